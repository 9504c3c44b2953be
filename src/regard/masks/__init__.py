"""Masks of the algebra, one idea per file."""
