"""Feature maps and position codes, one per file."""
