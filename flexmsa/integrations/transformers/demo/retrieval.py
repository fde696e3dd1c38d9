"""The retrieval test: a key early in the context, which its end asks for. Full attention finds it, a window cannot."""

import torch
from torch import Tensor

# A statement of the key is the mark and the letters of the key; each letter has its own alphabet. Source code contains
# hardly any of these bytes.
MARK = 1
KEY_LENGTH = 2
ALPHABET = 64
FIRST_LETTER = 128
STATEMENT = KEY_LENGTH + 1


def plant_keys(ids: Tensor, most_statements: int, generator: torch.Generator) -> Tensor:
    """Write statements of a key over the text of each row: one or more at random places, and the question at the end.

    Every statement after the first is predictable, so several statements teach faster than one.

    Args:
        ids: [B, S] bytes.
        most_statements: a row has 1 to this many statements before the last.

    Returns:
        A changed copy of ids. All but the last KEY_LENGTH bytes of a row are the question.
    """
    statements = _draw_statements(len(ids), generator)
    num_places = (ids.shape[1] - STATEMENT) // STATEMENT
    planted = ids.clone()
    for row, statement in zip(planted, statements, strict=True):
        count = int(torch.randint(1, most_statements + 1, (), generator=generator))
        for place in torch.randperm(num_places, generator=generator)[:count].tolist():
            row[place * STATEMENT : (place + 1) * STATEMENT] = statement
    planted[:, -STATEMENT:] = statements
    return planted


def plant_early_keys(ids: Tensor, sink: int, generator: torch.Generator) -> Tensor:
    """The test: one statement of the key, in the first half of the context but behind its first `sink` bytes."""
    statements = _draw_statements(len(ids), generator)
    planted = ids.clone()
    starts = torch.randint(sink, ids.shape[1] // 2 - STATEMENT, (len(ids), 1), generator=generator)
    planted.scatter_(1, starts + torch.arange(STATEMENT), statements)
    planted[:, -STATEMENT:] = statements
    return planted


def _draw_statements(batch: int, generator: torch.Generator) -> Tensor:
    letters = torch.randint(ALPHABET, (batch, KEY_LENGTH), generator=generator)
    key = FIRST_LETTER + ALPHABET * torch.arange(KEY_LENGTH) + letters
    return torch.cat([torch.full((batch, 1), MARK), key], dim=1)


def answered(logits: Tensor, ids: Tensor) -> Tensor:
    """Whether a model answers each row of ids [B, S + 1], from its logits [B, S, vocabulary] for all but the last."""
    return (logits[:, -KEY_LENGTH:].argmax(-1) == ids[:, -KEY_LENGTH:]).all(1)
