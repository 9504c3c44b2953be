"""Probes: what heads do, one idea per file."""
