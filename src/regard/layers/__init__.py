"""Mechanisms with parameters on tokens (B, N, C), one file each."""
