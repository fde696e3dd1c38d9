"""Serve requests that come and go, from pages that they share: `python docs/examples/server_loop.py`.

Each row of a `PagedMSACache` is a place for a request. Prompts are read in chunks, and in each step the rows that
generate get one token, while rows that are still reading get a part of their prompt.
"""

from collections import deque
from dataclasses import dataclass, field

import torch

from flexmsa.config import MSAConfig
from flexmsa.demo.model import GPT
from flexmsa.paged_cache import PagedMSACache

CONFIG = MSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, index_head_dim=16, block_size=16, topk=3)
LAYERS, ROWS, CHUNK = 2, 2, 32


@dataclass
class Request:
    prompt: list[int]
    max_new: int
    num_read: int = 0
    text: list[int] = field(default_factory=list)


class Server:
    def __init__(self, model: GPT, num_pages: int, max_pages: int) -> None:
        self.model = model
        sizes = ROWS, CONFIG.num_kv_heads, CONFIG.head_dim, CONFIG.index_head_dim
        pages = {"num_pages": num_pages, "max_pages": max_pages, "page_size": CONFIG.block_size}
        self.caches = [PagedMSACache(*sizes, **pages) for _ in range(LAYERS)]
        self.rows: list[Request | None] = [None] * ROWS
        self.waiting: deque[Request] = deque()

    def admit(self) -> None:
        """Give free rows to waiting requests."""
        for row, request in enumerate(self.rows):
            if request is None and self.waiting:
                self.rows[row] = self.waiting.popleft()

    @torch.no_grad()
    def step(self) -> None:
        """One call of the model for all rows: a chunk of a prompt, or one token."""
        self.admit()
        new = []
        for request in self.rows:
            if request is None:
                new.append([])
            elif request.num_read < len(request.prompt):
                new.append(request.prompt[request.num_read : request.num_read + CHUNK])
            else:
                new.append(request.text[-1:])
        width = max(map(len, new))
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in new])
        lens = torch.tensor([len(tokens) for tokens in new], dtype=torch.int32)
        logits = self.model.read(ids, self.caches, lens=lens)
        for row, (request, tokens) in enumerate(zip(self.rows, new, strict=True)):
            if request is None:
                continue
            request.num_read += len(tokens) if request.num_read < len(request.prompt) else 0
            if request.num_read == len(request.prompt):
                request.text.append(int(logits[row, len(tokens) - 1].argmax()))
            if len(request.text) == request.max_new:
                self.rows[row] = None
                for cache in self.caches:
                    cache.reset([row])

    def run(self, requests: list[Request]) -> None:
        self.waiting.extend(requests)
        steps = 0
        while self.waiting or any(self.rows):
            self.step()
            steps += 1
        print(f"{len(requests)} requests in {steps} steps; {self.caches[0].num_free_pages} pages are free again")


def main() -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG, LAYERS).eval()

    def requests() -> list[Request]:
        torch.manual_seed(1)
        return [Request(torch.randint(256, (length,)).tolist(), 5) for length in (70, 9, 150, 33)]

    together, alone = requests(), requests()
    Server(model, num_pages=24, max_pages=16).run(together)
    for request in alone:
        Server(model, num_pages=24, max_pages=16).run([request])
    assert [request.text for request in together] == [request.text for request in alone]
    print("each request got the text that it gets alone")


if __name__ == "__main__":
    main()
