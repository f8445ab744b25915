"""The exchanges of sequence parallelism, permutes included, against NCCL's: one op for each of what programs write.

    torchrun --nproc-per-node 4 -m benchmarks.bench_exchange [--rounds N] [--tokens N ...] [--out DIR or FILE.json]

Run it from the root of the repository; `--device cpu` tries it on gloo ranks. 32 heads of 128 in bfloat16, one sequence of `tokens`.
The rival is what programs run without the backend: `nccl` permutes what it sends or what it receives, as yunchang does, `nccl, twice`
both, as DeepSpeed does. Results are compared with NCCL's, bit for bit, before anything is timed. Method and traps:
benchmarks/gpu_harness.py.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import direct, gpu_results, harness
from benchmarks import gpu_harness as gpu
from tscompile.problem import Delivery

HEADS, DIM, TOKENS = 32, 128, [2048, 8192, 16384, 32768, 65536]
OURS, ONCE, TWICE, SEED = "ours", "nccl", "nccl, twice", 0
QKV, FUSED, BACK = "q, k, v", "fused qkv", "back"


def received(x: Tensor) -> Tensor:
    """all_to_all_single of `[R, ...]`, contiguous."""
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    return out


def sides(what: str, tokens: int, heads: int, make: Callable[..., Tensor]) -> dict[str, gpu.Side]:
    """Of one sequence. Before the attention they return `[heads of a rank, tokens, DIM]`, after it `[tokens of a rank, heads, DIM]`."""
    ranks = dist.get_world_size()
    mine, each = tokens // ranks, heads // ranks
    if what == BACK:
        (x,) = [make(each, ranks, mine, DIM)]
        op = direct.exchange([x.permute(1, 0, 2, 3)], [Delivery(0, (2, 0, 1, 3))], [1])

        def once() -> list[Tensor]:
            return [received(x.permute(1, 2, 0, 3).contiguous()).permute(1, 0, 2, 3).contiguous()]

        return {OURS: gpu.Side(op), TWICE: gpu.Side(once)}
    count = 3 if what == QKV else 1
    wide = 1 if what == QKV else 3
    xs = [make(mine, wide, ranks, each, DIM) for _ in range(count)]
    inputs = [x.permute(2, 1, 0, 3, 4) for x in xs]  # [R, wide, tokens, heads, DIM]
    deliveries = [Delivery(i, (3, 0, 2, 4), ((1, j),)) for i in range(count) for j in range(wide)]
    op = direct.exchange(inputs, deliveries, [1] * len(deliveries))

    def once() -> list[Tensor]:  # attention reads [tokens, heads] through strides
        found = [received(x.contiguous()) for x in inputs]
        return [y[:, j].permute(2, 0, 1, 3).flatten(1, 2) for y in found for j in range(wide)]

    def twice() -> list[Tensor]:
        return [y.contiguous() for y in once()]

    return {OURS: gpu.Side(op), ONCE: gpu.Side(once), TWICE: gpu.Side(twice)}


def right(all_sides: Mapping[str, gpu.Side]) -> bool:
    """All results are the same, on all ranks."""
    want = [y.clone() for y in all_sides[TWICE].run()]
    same = all(
        torch.equal(a.flatten(), b.contiguous().flatten())
        for side in all_sides.values()
        for a, b in zip((y.reshape(w.shape) for y, w in zip(side.run(), want, strict=True)), want, strict=True)
    )
    return not gpu.on_any_rank(not same)


def summary(what: str, tokens: int, nbytes: int, race: gpu.Race) -> dict[str, Any]:
    """Times, what leaves a rank in a second, and speed-ups, paired within rounds."""
    found: dict[str, Any] = {"name": f"{what}, {tokens} tokens", "what": what, "tokens": tokens, "bytes_sent": nbytes}
    for mode, rounds in (("eager", race.eager), ("graph", race.graph)):
        if not rounds or OURS not in rounds[0]:
            continue
        seconds = {name: statistics.median(times[name] for times in rounds) for name in rounds[0]}
        found[mode] = {
            "us": {name: 1e6 * s for name, s in seconds.items()},
            "gbytes_per_s": nbytes / seconds[OURS] / 1e9,
            "speedup": {
                name: harness.bootstrap(
                    rounds, lambda sample, name=name: harness.paired_ratio(sample, name, OURS)
                ).to_dict()
                for name in seconds
                if name != OURS
            },
            "rounds": rounds,
        }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR or FILE.json")
    args = parser.parse_args(argv)
    device = gpu.start(args.device)
    ranks, dtype = dist.get_world_size(), torch.bfloat16
    path = gpu_results.result_path(args.out, "exchange", device)
    results = gpu_results.Results(path, "gpu-exchange", gpu_results.environment(device, "bfloat16"), False)
    timer = gpu.Timer(device)
    for tokens, what in itertools.product(args.tokens, (QKV, FUSED, BACK)):
        with gpu.limit(120.0):
            all_sides = sides(what, tokens, args.heads, lambda *shape: torch.randn(shape, device=device).to(dtype))
            if not right(all_sides):
                raise RuntimeError(f"{what}, {tokens} tokens: not what NCCL makes of it")
            race = gpu.race(all_sides, timer, args.rounds, SEED)
            if race.failures:
                raise RuntimeError(f"{what}, {tokens} tokens: {race.failures}")
            whole = (1 if what == BACK else 3) * tokens // ranks * args.heads * DIM * dtype.itemsize
            case = summary(what, tokens, whole * (ranks - 1) // ranks, race)
            results.put(case)
            for mode in ("eager", "graph"):
                if mode in case:
                    times = ", ".join(f"{name} {us:.1f}" for name, us in case[mode]["us"].items())
                    gpu.say(f"{case['name']:24} {mode:6} us: {times} ({case[mode]['gbytes_per_s']:.0f} GB/s)")
    gpu.say(f"wrote {results.path}")
    gpu.finish()
    return 0


if __name__ == "__main__":
    sys.exit(gpu.guarded(main))
