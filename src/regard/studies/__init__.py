"""Studies: findings of papers, made again at pocket size, one per file."""
