"""The page of an output: its record and masks as one HTML file."""
