"""The index loss and its gradient."""
