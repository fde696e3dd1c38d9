"""How much memory the kernels for many tokens may take for partial results."""

_limit = [1 << 30]


def set_workspace_limit(size: int) -> None:
    """Limit the partial results that the GPU's training kernels keep at a time to about `size` bytes (default: 1 GiB).

    So do selections of long sequences, which may take a third more. The kernels process the tokens in ranges whose
    partial results fit. In addition they keep the inverse index, some 40 bytes for each block that a token chose; the
    backward keeps sums of about a sixth of the limit, and a selection may keep its index keys in int8. A larger
    workspace means fewer and longer passes over the keys, which is faster beyond some 100K tokens; a smaller one leaves
    more memory to the model. A range has at least 16 tokens of one group, whatever the limit. The limit holds for the
    whole process, on every device.

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


def tokens_per_range(num_tokens: int, bytes_per_token: int) -> int:
    """Tokens of one group per token range: a multiple of 16, whose partial results fit into the workspace.

    All ranges of `num_tokens` tokens have this size, except the last, which may be shorter.
    """
    most = max(16, workspace_limit() // max(1, bytes_per_token))
    num_ranges = -(-num_tokens // most)
    return max(16, -(-num_tokens // max(1, num_ranges * 16)) * 16)


def ranges_per_pass(num_groups: int, num_tokens: int, range_tokens: int, bytes_per_token: int, numbers: int) -> int:
    """Token ranges that are worked on at once: as many groups as fit, if a group's tokens are one range.

    Two ranges of one group would add to the same sums. The passes over the groups have equal sizes, except the last,
    and may take a third more than the limit: so few bytes are not worth another pass. numbers: per token, what the
    kernels number in 32 bits.
    """
    if range_tokens < num_tokens:
        return 1
    tokens = max(1, num_tokens)
    fit = min(workspace_limit() * 4 // 3 // max(1, tokens * bytes_per_token), (2**31 - 1) // max(1, tokens * numbers))
    num_passes = -(-num_groups // max(1, fit))
    return -(-num_groups // num_passes)
