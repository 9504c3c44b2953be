"""Treatments: what a plan can do to chosen heads, one idea per file."""
