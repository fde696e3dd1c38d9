"""FLOP formulas of the operators, for `torch.utils.flop_counter.FlopCounterMode`.

They count multiplications and additions of the matrix products, as PyTorch's formulas of attention do, from shapes
alone: reading lengths or ids would wait for a GPU. For rows without padding these are the products with the keys that
a causal query selects or sees. For packed documents, padding, caches (by their capacity) and given blocks that repeat
or are -1 they are bounds.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

MODULE = "torch.utils.flop_counter"


def register_formulas() -> None:
    """Register the formulas with PyTorch, at once or when its counter is imported, which imports Triton."""
    if MODULE in sys.modules:
        _register(sys.modules[MODULE])
    else:
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported:
    """An import hook that calls `_register` after the counter's module has run, and then removes itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = spec.loader if spec is not None else None
        if loader is not None:
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _register(module)

            loader.exec_module = exec_module
        return spec


def _register(module: Any) -> None:
    for name, formula in _FORMULAS.items():
        packet = getattr(torch.ops.flexmsa, name)
        module.register_flop_formula(packet)(_by_name(packet.default, formula))


def _by_name(op: torch._ops.OpOverload, formula: Callable[[Any], int]) -> Callable[..., int]:
    """The formula of a call's arguments by their names in the schema, shapes in place of tensors."""
    arguments = op._schema.arguments

    def count(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        values = {x.name: x.default_value for x in arguments}
        values |= dict(zip(values, args, strict=False)) | kwargs
        return formula(SimpleNamespace(**values))

    return count


def seen_keys(seqlen_q: int, seqlen_k: int) -> int:
    """The keys that `seqlen_q` causal queries see, added up; the last query sees `seqlen_k`.

    >>> seen_keys(3, 5)
    12
    """
    first = max(seqlen_k - seqlen_q, 0)
    return (seqlen_k * (seqlen_k + 1) - first * (first + 1)) // 2


def selected_keys(seqlen_q: int, seqlen_k: int, block_size: int, topk: int | None) -> int:
    """Of these the keys that the queries select, if each selects its own block and topk - 1 whole ones before it.

    >>> [selected_keys(1, n, block_size=4, topk=2) for n in (3, 8, 9, 12)]
    [3, 8, 5, 8]
    """
    if topk is None or topk * block_size >= seqlen_k:
        return seen_keys(seqlen_q, seqlen_k)

    def up_to(last: int) -> int:
        """Of the queries that see 1 .. last keys."""
        dense = min(last, topk * block_size)
        blocks, rest = divmod(last - dense, block_size)
        own = blocks * block_size * (block_size + 1) // 2 + rest * (rest + 1) // 2
        return dense * (dense + 1) // 2 + (last - dense) * (topk - 1) * block_size + own

    return up_to(seqlen_k) - up_to(max(seqlen_k - seqlen_q, 0))


def _products(call: Any, queries: str, number: int, topk: int | None = None) -> int:
    """`number` matrix products of the queries [B, H, Sq, D] of that name with the keys that they select or see."""
    q, k = getattr(call, queries), call.index_k if queries == "index_q" else call.k
    pages = getattr(call, "page_table", None)
    seqlen_k = k[2] if pages is None else pages[1] * k[2]
    return 2 * number * q[0] * q[1] * q[3] * selected_keys(q[2], seqlen_k, call.block_size, topk)


def _main(number: int) -> Callable[[Any], int]:
    """So many products of the main branch with the keys of the given blocks."""
    return lambda call: _products(call, "q", number, _given_topk(call))


def _given_topk(call: Any) -> int | None:
    return None if call.block_indices is None else call.block_indices[3]


def _select(call: Any) -> int:
    return _products(call, "index_q", 1)


def _index_loss(call: Any) -> int:
    """The scores of teacher and student, and the gradients of index_q and index_k, which come with them."""
    topk = _given_topk(call)
    return _products(call, "q", 1, topk) + _products(call, "index_q", 3 if call.with_grad else 1, topk)


def _attention_and_loss_backward(call: Any) -> int:
    return _main(5)(call) + _products(call, "index_q", 3, _given_topk(call))


# A backward computes the scores once more, and the gradients of probabilities, q, k and v. The backward of the index
# loss alone multiplies its gradient by a scalar, or is counted by the operators that it calls.
_FORMULAS: dict[str, Callable[[Any], int]] = {
    "select_blocks": _select,
    "scored_blocks": _select,
    "block_sparse_attention": _main(2),
    "block_sparse_attention_backward": _main(5),
    "attend_blocks": _main(2),
    "select_and_attend": lambda call: _select(call) + _products(call, "q", 2, call.ids[3]),
    "index_loss": _index_loss,
    "attention_and_index_loss": _main(2),
    "attention_and_index_loss_backward": _attention_and_loss_backward,
}
