"""Normalisers and score modifications, one idea per file."""
