"""Tensors given as [B, S, H, D]: found where shapes fit no attention as they are, and fit one with axes swapped."""

from torch import Tensor

__all__ = ["reject_wrong_layouts"]

# Those that are likely to be wrong together, most of them first.
_TOGETHER = (
    ("q", "k", "v", "index_q", "index_k"),
    ("q", "k", "v"),
    ("index_q", "index_k"),
    ("k", "v"),
    *(("q",), ("k",), ("v",), ("index_q",), ("index_k",)),
)


def reject_wrong_layouts(**tensors: Tensor) -> None:
    """Raise ValueError if the tensors are those of an attention but for the order of heads and tokens in some.

    For tensors that another check refuses, whose message would name one shape of many.

    Args:
        tensors: q, k, v, index_q and index_k, as far as they are known. Block indices [B, Hkv, Sq, topk] can be given
            in place of index_q. What is no tensor of four dimensions is left to other checks.
    """
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in tensors.values()):
        return
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if _fit(**shapes):
        return
    for group in _TOGETHER:
        names = [name for name in group if name in shapes]
        # More tokens than heads: else the shape is a wrong number of heads rather than another order.
        if not names or not all(shapes[name][1] > shapes[name][2] for name in names):
            continue
        swapped = {name: (x[0], x[2], x[1], x[3]) if name in names else x for name, x in shapes.items()}
        if _fit(**swapped):
            given = ", ".join(f"{name} {list(shapes[name])}" for name in names)
            raise ValueError(
                f"{', '.join(names)}: expected [B, H, S, D], got {given}, which looks like [B, S, H, D]; pass "
                f"{', '.join(f'{name}.transpose(1, 2)' for name in names)}"
            )


Shape = tuple[int, ...]


def _fit(
    q: Shape | None = None,
    k: Shape | None = None,
    v: Shape | None = None,
    index_q: Shape | None = None,
    index_k: Shape | None = None,
) -> bool:
    """Whether the shapes are those of one attention."""
    if q is not None and k is not None:
        if k[1] < 1 or q[1] % k[1] or (q[0], q[3]) != (k[0], k[3]):
            return False
        if index_q is not None and index_q[:3] != (q[0], k[1], q[2]):
            return False
        if index_k is not None and index_k[:3] != (q[0], 1, k[2]):
            return False
    elif index_k is not None and index_k[1] != 1:
        return False
    return v is None or v == k
