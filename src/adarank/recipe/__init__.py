"""Recipes: read, checked, opened as a job, and planned."""
