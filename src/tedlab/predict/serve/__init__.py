"""Plans inference on clusters that one does not have: where prompts and new tokens are computed, and by whom."""
