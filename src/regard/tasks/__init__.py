"""Data as classes: recall, copying, images."""
