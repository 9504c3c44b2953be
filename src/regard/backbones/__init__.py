"""Whole networks into which any mechanism plugs."""
