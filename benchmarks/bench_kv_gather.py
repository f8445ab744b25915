"""Attention of a part of the queries on gathered keys and values, compiled by this backend and by Inductor, and the roof.

    torchrun --nproc-per-node 4 -m benchmarks.bench_kv_gather [--tokens N ...] [--rounds N] [--out DIR or FILE.json]

Run it from the root of the repository; `--tiny` runs on CPU ranks, to try the benchmark itself. One sequence, 32 heads of 128 of
queries, keys and values alike, no mask, bfloat16: every rank has a part of the sequence, gathers keys and values, and in training
scatters their gradients. `tilescale` fuses whatever it can (`tilescale.fuse` is "always"), since the question is whether it should.
`roof` is the attention on keys that are there already. Checks, races and traps: benchmarks/model_ulysses.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import gpu_harness as gpu
from benchmarks.bench_cpu import find_backend
from benchmarks.model_ulysses import Built, arguments, race_all
from tests.gathered_programs import gather

TOKENS = [16384, 32768, 65536]
CASES = (("gathered", False), ("gathered", True))


class Attention(nn.Module):
    """x [3, 1, heads, L, dim]: queries, keys and values of this rank -> [1, heads, L, dim]."""

    def __init__(self, whole: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.unbind(0)
        return F.scaled_dot_product_attention(q, self.whole(k), self.whole(v))


def local(x: Tensor) -> Tensor:
    """The shape of what is gathered, from this rank's part alone."""
    b, h, s, d = x.shape
    r = dist.get_world_size()
    return x.unsqueeze(2).expand(b, h, r, s, d).reshape(b, h, r * s, d)


def compiled(mode: str) -> nn.Module:
    how: dict[str, Any] = {"backend": find_backend("tilescale")} if mode == "tilescale" else {}
    whole = local if mode == "roof" else lambda x: gather(x, 2)
    return torch.compile(Attention(whole), fullgraph=True, dynamic=False, **how)  # type: ignore[no-any-return]


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(__doc__, TOKENS, "always").parse_args(argv)

    def build(_: str, tokens: int, device: torch.device, dtype: torch.dtype) -> Built:
        size = (3, 1, args.heads, tokens // dist.get_world_size(), args.dim)
        return compiled, torch.randn(size, device=device).to(dtype)

    race_all(args, "kv-gather", CASES, build)
    return 0


if __name__ == "__main__":
    sys.exit(gpu.guarded(main))
