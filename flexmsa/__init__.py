"""MiniMax Sparse Attention for PyTorch."""
