"""Files: read lazily and safely, written whole or not at all."""
