"""The proof: quality and cost of mechanisms, side by side."""
