"""Which program does what in the key-major kernels."""
