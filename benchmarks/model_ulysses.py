"""A block with Ulysses sequence parallelism: projections, exchanges, attention, compiled by this backend and by Inductor, and the roof.

    torchrun --nproc-per-node 4 -m benchmarks.model_ulysses [--tokens N ...] [--only TEXT] [--rounds N] [--out DIR or FILE.json]

Run it from the root of the repository; `--tiny` runs on CPU ranks, to try the benchmark itself. One sequence, 32 heads of 128, causal,
one projection for q, k and v and one for the output, bfloat16. `deepspeed` permutes before and behind each exchange, `yunchang` once
(tests/programs/attention.py has their spellings). Both sides have the same attention: cuDNN's, unless `--attention` says otherwise.
Training takes `functional`, with functional collectives and one permute each way: torch 2.11 gets gradients of the others wrong.
`roof` computes what a rank computes, without exchanges and permutes: an overlap can be no faster. Before any timing results and
gradients are compared with Inductor's. Modes race in rounds of shuffled order; the slowest rank counts. `host` is what rank 0 takes to
enqueue a step: no step is faster.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import tscompile
from benchmarks import gpu_harness as gpu
from benchmarks import gpu_results, harness
from benchmarks.bench_cpu import find_backend
from benchmarks.model_llama import choose_attention
from tests.programs.attention import SPELLINGS
from tscompile.observe import ledger

TOKENS = [8192, 16384, 32768, 65536]
CASES = (("yunchang", False), ("deepspeed", False), ("functional", True))  # spelling, training
MODES = ("inductor", "tilescale", "roof")
SEED = 0
Exchange = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """x [1, tokens of a rank, heads * dim] -> the same. heads, sequence: exchanges to heads and back."""

    def __init__(
        self, heads: int, dim: int, exchanges: tuple[Exchange, Exchange], device: torch.device, dtype: Any
    ) -> None:
        super().__init__()
        self.heads, self.dim, self.to_heads, self.to_sequence = heads, dim, *exchanges
        width = heads * dim
        make = torch.Generator(device).manual_seed(SEED)  # the same weights on all ranks and in all modes
        sizes = {"wqkv": (3 * width, width), "wo": (width, width)}
        for name, size in sizes.items():
            value = torch.randn(size, generator=make, device=device) * width**-0.5
            self.register_parameter(name, nn.Parameter(value.to(dtype)))

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = F.linear(x, self.wqkv).view(b, s, 3, self.heads, self.dim).unbind(2)
        q, k, v = (self.to_heads(t).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(self.to_sequence(out.transpose(1, 2)).reshape(b, s, -1), self.wo)


def local(x: Tensor) -> Tensor:
    """The shape that an exchange to heads gives, without moving anything."""
    b, s, h, d = x.shape
    p = dist.get_world_size()
    return x.reshape(b, s * p, h // p, d)


def back(x: Tensor) -> Tensor:
    b, s, h, d = x.shape
    p = dist.get_world_size()
    return x.reshape(b, s // p, h * p, d)


def compiled(mode: str, spelling: str, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> nn.Module:
    found = SPELLINGS[spelling]
    exchanges = (local, back) if mode == "roof" else (found.heads, found.sequence)
    how: dict[str, Any] = {"backend": find_backend("tilescale")} if mode == "tilescale" else {}
    return torch.compile(Block(args.heads, args.dim, exchanges, device, dtype), fullgraph=True, dynamic=False, **how)  # type: ignore[no-any-return]


class Run:
    """One mode of a case. `step` is a forward, or a forward and backward, and returns what it computed."""

    def __init__(self, model: nn.Module, x: Tensor, training: bool, fuse: str) -> None:
        self.model, self.x, self.training, self.fuse = model, x.clone().requires_grad_(training), training, fuse
        self.grad: Tensor | None = None  # of the result, drawn in the first step

    def step(self) -> list[Tensor]:
        with tscompile.patch(fuse=self.fuse), torch.set_grad_enabled(self.training):
            y = self.model(self.x)
            if not self.training:
                return [y]
            leaves = (self.x, *self.model.parameters())
            for leaf in leaves:
                leaf.grad = None
            if self.grad is None:
                self.grad = torch.randn_like(y)
            y.backward(self.grad)
            return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def run_case(
    make: Callable[[str], nn.Module],
    x: Tensor,
    training: bool,
    args: argparse.Namespace,
    timer: gpu.Timer,
) -> dict[str, Any]:
    """Race the compiled model that `make` gives for each mode; tilescale's is compared with Inductor's before.

    args: `fuse`, `limit`, `rounds`.
    """
    torch._dynamo.reset()
    ledger.clear()
    failures = dict[str, str]()
    runs: dict[str, Run] = {}
    for mode in MODES:

        def start(mode: str = mode) -> Run:
            run = Run(make(mode), x, training, args.fuse)
            with gpu.limit(args.limit):
                run.step()
            return run

        found = gpu.attempt(mode, start, failures)
        if found is not None:
            runs[mode] = found
    errors = []
    if {"inductor", "tilescale"} <= runs.keys():
        runs["tilescale"].grad = runs["inductor"].grad
        for _ in range(2):  # the second step runs on memory that the first has left
            want = [t.float() for t in runs["inductor"].step()]
            got = runs["tilescale"].step()
            errors.append(harness.slowest([gpu.errors_of([a], [b])[0] for a, b in zip(got, want, strict=True)]))
        worst = max(map(max, errors))
        if not worst <= gpu.order_eps(x.dtype):
            failures["tilescale"] = f"wrong: off Inductor by {worst:.1e}"
            del runs["tilescale"]
    with gpu.limit(args.limit):
        race = gpu.race(
            {mode: gpu.Side(run.step) for mode, run in runs.items()}, timer, args.rounds, SEED, graphs=False
        )
    host = {}
    with gpu.limit(args.limit):
        for mode in race.eager[0] if timer.cuda and race.eager else ():
            host[mode] = timer.host_seconds(runs[mode].step)
    rows = tscompile.reports().to_json()["rows"]
    return {
        "training": training,
        "heads": args.heads,
        "dim": args.dim,
        "attention": args.attention,
        "rounds": {"eager": race.eager},
        "host": host,
        "errors": errors,
        "sites": [{key: row[key] for key in ("phase", "pattern", "decision", "code", "reason")} for row in rows],
        "failures": failures | race.failures,
    }


def lines(case: dict[str, Any]) -> list[str]:
    rounds = case["rounds"]["eager"]
    times = {mode: 1e3 * statistics.median(r[mode] for r in rounds) for mode in rounds[0]} if rounds else {}
    text = ", ".join(f"{mode} {ms:.3f} ms" for mode, ms in times.items())
    if {"inductor", "tilescale"} <= times.keys():
        text += f": {harness.paired_ratio(rounds, 'inductor', 'tilescale'):.2f}x"
    if {"roof", "tilescale"} <= times.keys():
        text += f", {harness.paired_ratio(rounds, 'roof', 'tilescale'):.2f} of the roof"
    if case["host"]:
        text += "; host " + ", ".join(f"{mode} {1e3 * seconds:.3f} ms" for mode, seconds in case["host"].items())
    fused = [f"{site['pattern']} {site['decision']} [{site['code']}]" for site in case["sites"]]
    failed = [f"{mode} FAILED: {why}" for mode, why in case["failures"].items()]
    return [text, "; ".join(fused), *failed]


def arguments(doc: str | None, tokens: Sequence[int], fuse: str) -> argparse.ArgumentParser:
    """What benchmarks of a program around an attention are asked."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens, help="of the sequence, all ranks together")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains one of TEXT,TEXT,...")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--attention", default="cudnn", choices=("any", "flash", "cudnn"))
    parser.add_argument("--fuse", default=fuse, choices=("auto", "always"), help="tilescale.fuse")
    parser.add_argument("--tiny", action="store_true", help="small sizes that CPU ranks can do")
    parser.add_argument("--limit", type=float, default=200.0, metavar="SECONDS", help="for each step of a case")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR or FILE.json")
    return parser


Built = tuple[Callable[[str], nn.Module], Tensor]  # the compiled model of each mode, its input


def race_all(
    args: argparse.Namespace,
    kind: str,
    cases: Sequence[tuple[str, bool]],
    build: Callable[[str, int, torch.device, torch.dtype], Built],
) -> None:
    """Race each case, (name, training), at each number of tokens, and write the results."""
    if args.tiny:
        args.tokens, args.heads, args.dim, args.rounds, args.dtype = [64], 8, 16, 2, "float32"
    logging.getLogger("torch").setLevel(logging.WARNING)
    device = gpu.start("cpu" if args.tiny else "cuda")
    choose_attention("any" if args.tiny else args.attention)
    torch._dynamo.config.recompile_limit = 64
    path = gpu_results.result_path(args.out, kind, device)
    results = gpu_results.Results(path, f"gpu-{kind}", gpu_results.environment(device, args.dtype), False)
    timer = gpu.Timer(device, min_ms=5.0 if args.tiny else 100.0)
    for tokens in args.tokens:
        for which, training in cases:
            name = f"{which}, {tokens} tokens, {'forward and backward' if training else 'forward'}"
            if not any(text in name for text in args.only.split(",")):
                continue
            torch.manual_seed(SEED + dist.get_rank())
            make, x = build(which, tokens, device, getattr(torch, args.dtype))
            case = {"name": name, "spelling": which, "tokens": tokens, **run_case(make, x, training, args, timer)}
            results.put(case)
            gpu.say(name, *lines(case), sep="\n    ")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    gpu.say(f"wrote {results.path}")
    gpu.finish()


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(__doc__, TOKENS, "auto").parse_args(argv)

    def build(spelling: str, tokens: int, device: torch.device, dtype: torch.dtype) -> Built:
        x = torch.randn(1, tokens // dist.get_world_size(), args.heads * args.dim, device=device).to(dtype)
        return lambda mode: compiled(mode, spelling, args, device, dtype), x

    race_all(args, "ulysses", CASES, build)
    return 0


if __name__ == "__main__":
    sys.exit(gpu.guarded(main))
