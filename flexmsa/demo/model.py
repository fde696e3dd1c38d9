"""A byte-level GPT to read in one sitting: the same blocks around MSAttention or around ordinary dense attention."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexmsa.cache import MSACache
from flexmsa.config import MSAConfig
from flexmsa.modules import MSAttention, rotate

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
        """x [B, S, hidden_size] to (out, None), so that a block need not know which attention it holds."""
        config = self.config
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

        q = rotate(self.q_norm(heads(self.q_proj(x))), positions, config.rotary_size, config.rope_theta)
        k = rotate(self.k_norm(heads(self.k_proj(x))), positions, config.rotary_size, config.rope_theta)
        v = heads(self.v_proj(x))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a residual."""

    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = attention
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, **options: MSACache) -> tuple[Tensor, Tensor | None]:
        """Options go to the attention; returns the new x and the attention's index loss, if it has one."""
        attended, index_loss = self.attention(self.attention_norm(x), **options)
        x = x + attended
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)))), index_loss


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
        # Any, for a type checker sees bare modules in a ModuleList.
        self.blocks: Any = nn.ModuleList(Block(attention(config), config.hidden_size) for _ in range(num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # Two of these a layer add up on the residual stream.
                writes = name.endswith(("o_proj.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 * (2 * num_layers) ** -0.5 if writes else 0.02)

    def forward(self, ids: Tensor, caches: list[MSACache] | None = None) -> tuple[Tensor, Tensor]:
        """Score the byte that follows each byte.

        Args:
            ids: [B, S] int64; with caches, the bytes that follow those in them.
            caches: one for each layer, from `new_caches`.

        Returns:
            logits [B, S, 256], and the sum of the layers' index losses, 0 where they compute none.
        """
        x = self.embedding(ids)
        total = x.new_zeros(())
        for layer, block in enumerate(self.blocks):
            x, index_loss = block(x) if caches is None else block(x, cache=caches[layer])
            total = total if index_loss is None else total + index_loss
        return F.linear(self.norm(x), self.embedding.weight), total

    def set_topk(self, topk: int | None) -> None:
        """Switch the selection of every MSA layer: None for the dense warm-up, an int for sparse."""
        for block in self.blocks:
            block.attention.topk = topk

    def new_caches(self, batch_size: int, capacity: int) -> list[MSACache]:
        """Return an empty cache for each layer of an MSA model."""
        return [block.attention.new_cache(batch_size, capacity) for block in self.blocks]


def dense_twin(model: GPT) -> GPT:
    """Return the same model with dense attention, on the same device, with a copy of the weights that both have."""
    twin = GPT(model.blocks[0].attention.config, len(model.blocks), dense=True).to(model.embedding.weight.device)
    weights = model.state_dict()
    twin.load_state_dict({name: weights[name] for name in twin.state_dict()})
    return twin


def language_loss(logits: Tensor, ids: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy, in nats a byte, of logits [B, S, 256] for the bytes ids [B, S] that they should have foretold."""
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction=reduction)


@torch.no_grad()
def generate(
    model: GPT, prompt: bytes, length: int, temperature: float, generator: torch.Generator
) -> tuple[bytes, Tensor, Tensor]:
    """Continue `prompt` by `length` bytes: the prompt in one go, then byte by byte through the caches.

    Args:
        temperature: divides the logits; 0 takes the best byte each time.
        generator: of random numbers, on the CPU.

    Returns:
        The prompt with its continuation; the bytes read, ids [1, n] int64 (all but the last); and the logits
        [1, n, 256] that the cached model gave for them.
    """
    device = model.embedding.weight.device
    ids = torch.tensor([list(prompt)], device=device)
    caches = model.new_caches(1, len(prompt) + length)
    new, logits = ids, []
    for _ in range(length):
        logits.append(model(new, caches)[0])
        last = logits[-1][0, -1].float().cpu()
        if temperature == 0:
            choice = last.argmax(keepdim=True)
        else:
            choice = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)
        new = choice[None].to(device)
        ids = torch.cat([ids, new], dim=1)
    return bytes(ids[0].tolist()), ids[:, :-1], torch.cat(logits, dim=1)
