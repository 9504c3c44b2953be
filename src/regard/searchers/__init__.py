"""Search: from a budget and what heads do to a plan."""
