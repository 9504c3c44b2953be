"""Training and distillation that need attention's insides, and how the pocket models were made."""
