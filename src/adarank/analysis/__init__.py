"""The papers' figures, and why a merge comes out as it does: computed from a recipe's models and data, written as data and drawn."""
