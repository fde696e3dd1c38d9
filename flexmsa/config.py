"""Settings of an MSA layer."""

from dataclasses import dataclass

from flexmsa import validation

__all__ = ["MSAConfig"]


@dataclass(frozen=True)
class MSAConfig:
    """Settings of `MSAttention`.

    Attributes:
        hidden_size: width of the layer's input and output.
        num_heads, num_kv_heads: query heads Hq and key/value heads Hkv; Hkv divides Hq.
        head_dim, index_head_dim: D and Di.
        block_size, topk, num_local_blocks, num_init_blocks: as for `flexmsa.attention`; topk None is the warm-up.
        qk_norm: apply RMSNorm to each head of q, k, index_q and index_k.
        norm_eps: the epsilon of these norms.
        rotary_dim: how many leading dimensions of each head RoPE rotates, in both branches; even; 0 for no RoPE, None
            for min(head_dim, index_head_dim).
        rope_theta: the base of RoPE's frequencies.
        bias: give the projections a bias.
        loss_in_backward: compute the index loss of a layer in training in the backward, see `MSAttention`. Not for a
            converted model of transformers, which has its own switch.

    >>> MSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, index_head_dim=16).group_size
    2
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    index_head_dim: int = 128
    block_size: int = 128
    topk: int | None = 16
    num_local_blocks: int = 1
    num_init_blocks: int = 0
    qk_norm: bool = True
    norm_eps: float = 1e-6
    rotary_dim: int | None = None
    rope_theta: float = 10000.0
    bias: bool = False
    loss_in_backward: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "index_head_dim"):
            validation.check_int(name, getattr(self, name), 1)
        validation.check_settings(self.block_size, self.topk, self.num_local_blocks, self.num_init_blocks)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads: expected a multiple of num_kv_heads={self.num_kv_heads}, got {self.num_heads}"
            )
        if self.rotary_size % 2 or not 0 <= self.rotary_size <= min(self.head_dim, self.index_head_dim):
            raise ValueError(
                f"rotary_dim: expected an even number from 0 to {min(self.head_dim, self.index_head_dim)}, "
                f"the smaller of head_dim and index_head_dim, got {self.rotary_size}"
            )

    @property
    def group_size(self) -> int:
        """G, the number of query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def rotary_size(self) -> int:
        """`rotary_dim`, or its default if that is None."""
        return min(self.head_dim, self.index_head_dim) if self.rotary_dim is None else self.rotary_dim
