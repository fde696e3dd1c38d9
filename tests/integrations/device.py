"""Where these tests run: on a GPU if there is one, and so through the Triton kernels."""

import torch
from transformers import TrainingArguments

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_arguments(folder, steps, **options) -> TrainingArguments:
    """Of a Trainer that reports to nobody and keeps its learning rate."""
    quiet = {"report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant"}
    return TrainingArguments(str(folder), max_steps=steps, use_cpu=DEVICE.type == "cpu", **quiet, **options)
