"""Where these tests run: on a GPU if there is one, and so through the Triton kernels."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
