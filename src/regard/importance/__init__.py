"""What ranks keys, blocks or tokens, one idea per file."""
