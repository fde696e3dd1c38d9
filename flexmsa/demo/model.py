"""A small byte-level GPT: the same blocks around MSAttention or around ordinary dense attention."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexmsa._rope import rotate, rotation
from flexmsa.cache import Cache
from flexmsa.config import MSAConfig
from flexmsa.modules import MSAttention

VOCABULARY = 256


class DenseAttention(nn.Module):
    """MSAttention without its index branch: the same projections, norms and RoPE around PyTorch's own attention."""

    def __init__(self, config: MSAConfig) -> None:
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=config.bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=config.bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=config.bias)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [B, S, hidden_size] to (out, None), the interface of MSAttention."""
        config = self.config
        positions = torch.arange(x.shape[1], device=x.device)[None]

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

        rope = rotation(positions, config.rotary_size, config.rope_theta)
        q = rotate(self.q_norm(heads(self.q_proj(x))), *rope)
        k = rotate(self.k_norm(heads(self.k_proj(x))), *rope)
        v = heads(self.v_proj(x))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class Block(nn.Module):
    """Attention and an MLP, each behind a norm, with a residual connection."""

    def __init__(self, attention: Any, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = attention
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the new x, and the attention's index loss or None."""
        attended, index_loss = self.attention(self.attention_norm(x))
        return self._finish(x, attended), index_loss

    def generate(self, x: Tensor, cache: Cache, **options: Any) -> tuple[Tensor, Tensor | None]:
        """As `MSAttention.generate`: return the new x, and the chosen blocks."""
        attended, block_indices = self.attention.generate(self.attention_norm(x), cache, **options)
        return self._finish(x, attended), block_indices

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """Bytes in, scores of the next byte out.

    >>> config = MSAConfig(32, num_heads=4, num_kv_heads=2, head_dim=8, index_head_dim=8, block_size=4, topk=2)
    >>> logits, index_loss = GPT(config, num_layers=2)(torch.zeros(1, 20, dtype=torch.int64))
    >>> logits.shape, index_loss.shape
    (torch.Size([1, 20, 256]), torch.Size([]))
    """

    def __init__(self, config: MSAConfig, num_layers: int, dense: bool = False) -> None:
        super().__init__()
        attention = DenseAttention if dense else MSAttention
        self.embedding = nn.Embedding(VOCABULARY, config.hidden_size)
        # Any, because to a type checker a ModuleList contains bare modules.
        self.blocks: Any = nn.ModuleList(Block(attention(config), config.hidden_size) for _ in range(num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # Two such weights per layer add to the residual stream.
                writes = name.endswith(("o_proj.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 * (2 * num_layers) ** -0.5 if writes else 0.02)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Score the byte that follows each byte.

        Args:
            ids: [B, S] int64.

        Returns:
            logits [B, S, 256], and the sum of the layers' index losses, 0 if they compute none.
        """
        x = self.embedding(ids)
        total = x.new_zeros(())
        for block in self.blocks:
            x, index_loss = block(x)
            total = total if index_loss is None else total + index_loss
        return self._score(x), total

    def read(self, ids: Tensor, caches: list[Cache], lens: Tensor | None = None, select_every: int = 1) -> Tensor:
        """Append bytes to the caches, and score the byte that follows each of them.

        Args:
            ids: [B, S] int64.
            caches: one per layer, as from `new_caches`.
            lens: [B] int; row b appends only its first lens[b] bytes.
            select_every: with n, only every n-th layer selects; the layers after it attend to the same blocks.

        Returns:
            logits [B, S, 256].
        """
        x = self.embedding(ids)
        block_indices = None
        for layer, (block, cache) in enumerate(zip(self.blocks, caches, strict=True)):
            reused = None if layer % select_every == 0 else block_indices
            x, block_indices = block.generate(x, cache, lens=lens, block_indices=reused)
        return self._score(x)

    def _score(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embedding.weight)

    def set_topk(self, topk: int | None) -> None:
        """Switch the selection of every MSA layer: None for the dense warm-up, an int for sparse."""
        for block in self.blocks:
            block.attention.topk = topk

    def new_caches(self, batch_size: int, capacity: int) -> list[Cache]:
        """Return an empty cache for each layer of an MSA model."""
        return [block.attention.new_cache(batch_size, capacity) for block in self.blocks]


def dense_twin(model: GPT) -> GPT:
    """Return the same model with dense attention, on the same device, with a copy of all common weights."""
    twin = GPT(model.blocks[0].attention.config, len(model.blocks), dense=True).to(model.embedding.weight.device)
    weights = model.state_dict()
    twin.load_state_dict({name: weights[name] for name in twin.state_dict()})
    return twin


def language_loss(logits: Tensor, ids: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of logits [B, S, 256] for the bytes ids [B, S], in nats per byte."""
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction=reduction)
