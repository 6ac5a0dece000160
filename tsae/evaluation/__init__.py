"""Measures of a trained dictionary on held-out contexts."""
