"""Findings of papers that search, made again on the pocket model."""
