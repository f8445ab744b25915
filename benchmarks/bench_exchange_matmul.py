"""Exchanges of sequence parallelism with the projection behind them: one op, an exchange and a matmul, and NCCL's with permutes.

    torchrun --nproc-per-node 4 -m benchmarks.bench_exchange_matmul [--rounds N] [--tokens N ...] [--out DIR or FILE.json]

Run it from the root of the repository; `--device cpu` tries it on gloo ranks. 32 heads of 128 in bfloat16, one sequence of `tokens`.
`ours` is all_to_all_matmul, `apart` all_to_all_permute and the library's matmul, `nccl` what programs run without the backend. `saved`
means that the program reads what was received, too, as training does. Results are compared with those of `nccl` before anything is
timed. Method and traps: benchmarks/gpu_harness.py.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import direct, gpu_results
from benchmarks import gpu_harness as gpu
from benchmarks.bench_exchange import DIM, HEADS, OURS, SEED, received, summary
from tscompile.problem import Delivery

TOKENS = [2048, 8192, 16384, 32768, 65536]
APART, NCCL = "apart", "nccl"
CASES = {
    "output": (1, False),
    "output, saved": (1, True),
    "gradients, saved": (3, True),
}  # exchanges, and whether they are read


def sides(what: str, tokens: int, heads: int, make: Callable[..., Tensor]) -> dict[str, gpu.Side]:
    """Of one sequence. They return the projection `[tokens of a rank, heads * DIM]`, then what was received if that is saved."""
    count, saved = CASES[what]
    ranks = dist.get_world_size()
    rows, panel, width = tokens // ranks, heads // ranks * DIM, heads * DIM
    xs = [make(ranks, rows, panel) for _ in range(count)]
    # The output projection of a Linear, or its input gradient.
    weight = make(width, width).t() if count == 1 else make(count * width, width)
    weight.mul_(weight.shape[0] ** -0.5)
    ours = direct.exchange_matmul([x.unsqueeze(2) for x in xs], [weight], returned=saved)
    moved = direct.exchange(xs, [Delivery(i, (1, 0, 2), (), 1) for i in range(count)], [count])

    def with_matmul(whole: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            left = whole()
            return [left @ weight, left] if saved else [left @ weight]

        return run

    def nccl() -> Tensor:
        return torch.cat([received(x).transpose(0, 1).reshape(rows, width) for x in xs], 1)

    def once() -> Tensor:  # of one exchange the transpose is the only copy
        return nccl() if count > 1 else received(xs[0]).transpose(0, 1).reshape(rows, width)

    return {
        OURS: gpu.Side(ours),
        APART: gpu.Side(with_matmul(lambda: moved()[0].view(rows, -1))),
        NCCL: gpu.Side(with_matmul(once)),
    }


def right(all_sides: Mapping[str, gpu.Side]) -> bool:
    """What was received has the same bits on all sides, and projections differ by their rounding."""
    product, *rest = [y.clone() for y in all_sides[NCCL].run()]
    same = True
    for side in all_sides.values():
        first, *others = side.run()
        error = (first.float() - product.float()).norm() / product.float().norm()
        same &= bool(error <= gpu.order_eps(product.dtype))
        same &= all(torch.equal(a.view(b.shape), b) for a, b in zip(others, rest, strict=True))
    return not gpu.on_any_rank(not same)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR or FILE.json")
    args = parser.parse_args(argv)
    device = gpu.start(args.device)
    ranks, dtype = dist.get_world_size(), getattr(torch, args.dtype)
    path = gpu_results.result_path(args.out, "exchange-matmul", device)
    results = gpu_results.Results(path, "gpu-exchange-matmul", gpu_results.environment(device, args.dtype), False)
    timer = gpu.Timer(device)
    for tokens, what in itertools.product(args.tokens, CASES):
        with gpu.limit(120.0):
            all_sides = sides(what, tokens, args.heads, lambda *shape: torch.randn(shape, device=device).to(dtype))
            if not right(all_sides):
                raise RuntimeError(f"{what}, {tokens} tokens: not what NCCL and the library's matmul make of it")
            race = gpu.race(all_sides, timer, args.rounds, SEED)
            if race.failures:
                raise RuntimeError(f"{what}, {tokens} tokens: {race.failures}")
            whole = CASES[what][0] * tokens // ranks * args.heads * DIM * dtype.itemsize
            case = summary(what, tokens, whole * (ranks - 1) // ranks, race)
            results.put(case)
            for mode in ("eager", "graph"):
                if mode in case:
                    times = ", ".join(f"{name} {us:.1f}" for name, us in case[mode]["us"].items())
                    gpu.say(f"{case['name']:30} {mode:6} us: {times}")
    gpu.say(f"wrote {results.path}")
    gpu.finish()
    return 0


if __name__ == "__main__":
    sys.exit(gpu.guarded(main))
