"""The exchanges of sequence parallelism, permutes included, against NCCL's: one op for each of what programs write.

    torchrun --nproc-per-node 4 -m benchmarks.bench_exchange [--rounds N] [--tokens N ...] [--out DIR or FILE.json]

Run it from the root of the repository; `--device cpu` tries it on gloo ranks. 32 heads of 128 in bfloat16, one sequence of `tokens`.
The rival is what programs run without the backend: `nccl` permutes what it sends or what it receives, as yunchang does, `nccl, twice`
both, as DeepSpeed does. Results are compared with NCCL's, bit for bit, before anything is timed. `projected` is q, k and v with the
projection that makes them: `permute` is cuBLAS and our exchange behind it, `roof` cuBLAS alone; results are compared within a rounding.
Method and traps: benchmarks/gpu_harness.py.
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
from tscompile.problem import Delivery, Departure

HEADS, DIM, TOKENS = 32, 128, [2048, 8192, 16384, 32768, 65536]
OURS, ONCE, TWICE, SEED = "ours", "nccl", "nccl, twice", 0
BEHIND, ROOF = "permute", "roof"
QKV, FUSED, BACK, PROJECTED = "q, k, v", "fused qkv", "back", "projected"


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


def projection(tokens: int, heads: int, make: Callable[..., Tensor]) -> dict[str, gpu.Side]:
    """x times the weight of q, k and v, and their exchanges; results as those of `sides` before the attention."""
    ranks = dist.get_world_size()
    mine, each, k = tokens // ranks, heads // ranks, heads * DIM
    x, weight = make(mine, k), make(3 * k, k) * k**-0.5
    departures = [Departure(0, 4, (), (1, 0, 2, 3), columns=(part * k, k)) for part in range(3)]
    grids = [(mine, ranks, each, DIM)] * 3
    deliveries, joins = [Delivery(part, (2, 0, 1, 3)) for part in range(3)], [1] * 3
    op = direct.matmul_exchange([x], [weight.t()], departures, grids, deliveries, joins)

    def made() -> list[Tensor]:
        return [y.unflatten(1, (ranks, each, DIM)).transpose(0, 1) for y in (x @ weight.t()).chunk(3, 1)]

    alone = direct.exchange(made(), deliveries, joins)

    def once() -> list[Tensor]:
        return [received(y.contiguous()).permute(2, 0, 1, 3).flatten(1, 2) for y in made()]

    behind = gpu.Side(lambda: alone.op.call(made()))
    return {OURS: gpu.Side(op), BEHIND: behind, ONCE: gpu.Side(once), ROOF: gpu.Side(lambda: [x @ weight.t()])}


def right(all_sides: Mapping[str, gpu.Side]) -> bool:
    """All results are the same, on all ranks: to the bit, or where something is computed, within two roundings."""
    reference = ONCE if ROOF in all_sides else TWICE
    want = [y.clone() for y in all_sides[reference].run()]
    same = True
    for name, side in all_sides.items():
        for a, b in zip(side.run(), want, strict=True) if name != ROOF else ():
            found, wanted = a.reshape(b.shape), b.contiguous()
            if reference == TWICE:
                same &= torch.equal(found, wanted)
            else:
                error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
                same &= bool(error <= 2 * torch.finfo(a.dtype).eps)
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
    kinds = (QKV, FUSED, BACK, PROJECTED)
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, metavar="WHAT")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR or FILE.json")
    args = parser.parse_args(argv)
    device = gpu.start(args.device)
    ranks, dtype = dist.get_world_size(), torch.bfloat16
    path = gpu_results.result_path(args.out, "exchange", device)
    results = gpu_results.Results(path, "gpu-exchange", gpu_results.environment(device, "bfloat16"), False)
    timer = gpu.Timer(device)
    for tokens, what in itertools.product(args.tokens, args.only):
        with gpu.limit(120.0):

            def make(*shape: int) -> Tensor:
                return torch.randn(shape, device=device).to(dtype)

            if what == PROJECTED:
                all_sides = projection(tokens, args.heads, make)
            else:
                all_sides = sides(what, tokens, args.heads, make)
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
