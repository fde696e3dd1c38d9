import importlib.util
import os

import torch

# A test module imports what it needs of transformers at its top.
collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["*"]

# On a GPU: float32 products are compared, so no TF32 whatever the environment says, and some are compared bit for bit.
torch.set_float32_matmul_precision("highest")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
torch.use_deterministic_algorithms(torch.cuda.is_available(), warn_only=True)
