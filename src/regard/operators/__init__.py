"""Finished mechanisms on q, k, v, one file each."""
