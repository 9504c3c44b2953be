"""The attention call, the families with their executors, and the card. It knows no paper."""
