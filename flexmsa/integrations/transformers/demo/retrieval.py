"""A retrieval task: the context gives a key early and asks for it at its end, beyond the reach of a window."""

import torch
from torch import Tensor

# A telling is the mark and the letters of the key; each letter has its own alphabet. Source code has almost none of
# these bytes.
MARK = 1
KEY_LENGTH = 2
ALPHABET = 64
FIRST_LETTER = 128
TELLING = KEY_LENGTH + 1


def plant_keys(ids: Tensor, most_tellings: int, generator: torch.Generator) -> Tensor:
    """Write a key over the text of each row: at one or more random places, and at the end, where it is asked for.

    Each telling after the first can be predicted, so several tellings teach faster than one.

    Args:
        ids: [B, S] bytes.
        most_tellings: the most tellings before the last; their number is random from 1.

    Returns:
        A changed copy of ids. The question ends before the last KEY_LENGTH bytes.
    """
    telling = _tellings(len(ids), generator)
    slots = (ids.shape[1] - TELLING) // TELLING
    planted = ids.clone()
    for row, said in zip(planted, telling, strict=True):
        count = int(torch.randint(1, most_tellings + 1, (), generator=generator))
        for slot in torch.randperm(slots, generator=generator)[:count].tolist():
            row[slot * TELLING : (slot + 1) * TELLING] = said
    planted[:, -TELLING:] = telling
    return planted


def plant_early_keys(ids: Tensor, sink: int, generator: torch.Generator) -> Tensor:
    """Write the test: the key is told once, in the first half of the context but after its first `sink` bytes."""
    telling = _tellings(len(ids), generator)
    planted = ids.clone()
    starts = torch.randint(sink, ids.shape[1] // 2 - TELLING, (len(ids), 1), generator=generator)
    planted.scatter_(1, starts + torch.arange(TELLING), telling)
    planted[:, -TELLING:] = telling
    return planted


def _tellings(batch: int, generator: torch.Generator) -> Tensor:
    letters = torch.randint(ALPHABET, (batch, KEY_LENGTH), generator=generator)
    key = FIRST_LETTER + ALPHABET * torch.arange(KEY_LENGTH) + letters
    return torch.cat([torch.full((batch, 1), MARK), key], dim=1)


def answered(logits: Tensor, ids: Tensor) -> Tensor:
    """Return which rows of ids [B, S + 1] a model answers completely, from its logits [B, S, vocabulary]."""
    return (logits[:, -KEY_LENGTH:].argmax(-1) == ids[:, -KEY_LENGTH:]).all(1)
