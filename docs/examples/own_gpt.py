"""Put MSA into a GPT of your own, and train it: `python docs/examples/own_gpt.py [--steps N]`.

The model has what other people's models have: one fused projection, its own RoPE, its own training loop. Lines marked
MSA are all that the index branch adds. docs/training.md explains each of them.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flexmsa
from flexmsa import AuxRequest, metrics


@dataclass
class Config:
    layers: int = 2
    width: int = 96
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    context: int = 512
    block_size: int = 16
    topk: int | None = 4  # MSA: blocks that a query attends to; None is the dense warm-up
    index_head_dim: int = 16  # MSA


def rope(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary position embedding of x [B, H, S, D]."""
    frequency = theta ** -(torch.arange(0, x.shape[-1], 2, device=x.device) / x.shape[-1])
    angle = positions[:, None] * frequency
    left, right = x.chunk(2, dim=-1)
    rotated = torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], dim=-1)
    return rotated.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.sizes = [n * config.head_dim for n in (config.heads, config.kv_heads, config.kv_heads)]
        self.qkv = nn.Linear(config.width, sum(self.sizes), bias=False)
        self.out = nn.Linear(self.sizes[0], config.width, bias=False)
        # MSA: an index query per group of heads, and one index key for all of them.
        self.index_sizes = [config.kv_heads * config.index_head_dim, config.index_head_dim]
        self.index_qk = nn.Linear(config.width, sum(self.index_sizes), bias=False)
        self.index_q_norm = nn.RMSNorm(config.index_head_dim)
        self.index_k_norm = nn.RMSNorm(config.index_head_dim)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, index_q and index_k, each [B, heads, S, size]."""
        positions = torch.arange(x.shape[1], device=x.device)

        def split(y: Tensor, size: int) -> Tensor:
            return y.unflatten(-1, (-1, size)).transpose(1, 2)

        q, k, v = (split(y, self.config.head_dim) for y in self.qkv(x).split(self.sizes, dim=-1))
        # MSA: the input is detached, so the index loss trains the index branch and nothing else.
        index = self.index_qk(x.detach()).split(self.index_sizes, dim=-1)
        index_q, index_k = (split(y, self.config.index_head_dim) for y in index)
        index_q, index_k = self.index_q_norm(index_q), self.index_k_norm(index_k)
        # MSA: the index heads know positions as the main heads do.
        return rope(q, positions), rope(k, positions), v, rope(index_q, positions), rope(index_k, positions)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, aux = flexmsa.attention(
            *self.heads(x),
            block_size=self.config.block_size,
            topk=self.config.topk,
            return_aux=AuxRequest(index_loss=True),
        )
        assert aux.index_loss is not None
        return self.out(out.transpose(1, 2).flatten(2)), aux.index_loss


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(config.width), nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attended, index_loss = self.attention(self.attention_norm(x))
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), index_loss


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(256, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of the next bytes, and the sum of the layers' index losses."""
        x, index_loss = self.embedding(ids), torch.zeros((), device=ids.device)
        for block in self.blocks:
            x, loss = block(x)
            index_loss = index_loss + loss  # MSA: a sum, so that each layer's loss counts the same in deep models
        return self.norm(x) @ self.embedding.weight.T, index_loss


def text() -> Tensor:
    """The bytes of Python's standard library."""
    files = sorted(Path(argparse.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def batch(data: Tensor, size: int, length: int) -> Tensor:
    starts = torch.randint(len(data) - length - 1, (size, 1))
    return data[starts + torch.arange(length + 1)].long()


@torch.no_grad()
def index_branch_finds(model: GPT, ids: Tensor) -> dict[str, float]:
    """MSA: the share of the attention that the selection finds, beside selections that learn nothing."""
    config, found = model.config, {}
    x = model.embedding(ids)
    for number, block in enumerate(model.blocks):
        q, k, _, index_q, index_k = block.attention.heads(block.attention_norm(x))
        sizes = {"block_size": config.block_size, "topk": config.topk or 4}
        selections = {
            "index branch": flexmsa.select_blocks(index_q, index_k, **sizes),
            "window": metrics.window_blocks(q, k, **sizes),
            "random": metrics.random_blocks(q, k, **sizes),
        }
        recalls = metrics.recalls(q, k, selections, block_size=config.block_size, num_queries=128)
        found |= {f"layer {number}, {name}": round(recall.score.item(), 2) for name, recall in recalls.items()}
        x, _ = block(x)
    return found


def train(model: GPT, data: Tensor, steps: int, warm_up: int, index_weight: float = 1.0) -> list[tuple[float, float]]:
    """Train, the first steps densely; return both losses of each step."""
    # MSA: the index branch apart from the rest, because one norm for all would let one loss scale the other's step.
    index = [p for name, p in model.named_parameters() if ".index_" in name]
    base = [p for name, p in model.named_parameters() if ".index_" not in name]
    optimizer = torch.optim.AdamW([{"params": base}, {"params": index}], lr=3e-3, weight_decay=0.01)
    topk, losses = model.config.topk, []
    for step in range(steps):
        model.config.topk = None if step < warm_up else topk  # MSA: the phases
        ids = batch(data, 4, model.config.context)
        logits, index_loss = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        (loss + index_weight * index_loss).backward()
        nn.utils.clip_grad_norm_(base, 1.0)
        nn.utils.clip_grad_norm_(index, 1.0)
        optimizer.step()
        losses.append((loss.item(), index_loss.item()))
        if step % 10 == 0 or step == steps - 1:
            phase = "dense" if step < warm_up else "sparse"
            print(f"step {step:4d}, {phase}: loss {losses[-1][0]:.3f}, KL {losses[-1][1]:.3f}", flush=True)
    return losses


def main() -> list[tuple[float, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="training steps, half of them dense (default 60)")
    options = parser.parse_args()
    torch.manual_seed(0)
    model, data = GPT(Config()), text()
    losses = train(model, data, options.steps, warm_up=options.steps // 2)
    print(index_branch_finds(model, batch(data, 2, model.config.context)[:, :-1]))
    return losses


if __name__ == "__main__":
    main()
