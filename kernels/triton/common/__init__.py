"""What the kernels of all folders share."""
