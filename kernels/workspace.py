"""How much memory the training kernels may take for partial results."""

_limit = [1 << 30]


def set_workspace_limit(size: int) -> None:
    """Let the GPU's training kernels keep about `size` bytes of partial results at a time; 1 GiB by default.

    They work through the tokens in chunks that fit. Beside it they keep the reverse index, some 40 bytes for each block
    that a token chose, and the backward about a sixth of its workspace more for sums. A larger workspace means fewer
    and longer passes over the keys, which pays beyond some 100K tokens; a smaller one leaves memory to the model. At
    least 16 tokens of a group are taken at a time, whatever the limit. It holds for the whole process, on every device.

    Args:
        size: bytes, at least 1.

    Raises:
        ValueError: `size` is less than 1.
        TypeError: `size` is not an int.

    >>> set_workspace_limit(1 << 31)
    >>> set_workspace_limit(1 << 30)
    """
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"size: expected an int, a number of bytes, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"size: expected a number of bytes of at least 1, got {size}")
    _limit[0] = size


def workspace_limit() -> int:
    """The bytes that `set_workspace_limit` allows."""
    return _limit[0]


def chunk_tokens(num_tokens: int, bytes_per_token: int) -> int:
    """Tokens whose partial results, of one group, fit into the workspace: a multiple of 16, in chunks of equal size."""
    most = max(16, workspace_limit() // max(1, bytes_per_token))
    chunks = -(-num_tokens // most)
    return max(16, -(-num_tokens // max(1, chunks * 16)) * 16)
