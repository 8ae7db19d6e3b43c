"""Averages, sums and interpolations of whole tensors."""
