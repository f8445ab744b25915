"""Train a small Llama with tensor and sequence parallelism, compiled with `backend="tilescale"`.

    torchrun --nproc-per-node 2 examples/train_llama_tp.py

The model and its parallelisation are plain PyTorch: `parallelize_module` with DTensor styles, AdamW, cross-entropy.
The only trace of tscompile is the backend's name and, at the end, the report. The text is the source code of the
Python standard library, one token per byte, so nothing is downloaded. Ranks on CPU talk through gloo, on GPUs
through NCCL.

With `--compare` (the default) three copies of the model, with the same weights and the same batches, are trained
side by side: this backend, `eager` and `inductor`. Losses must agree with `eager` to 1e-4 (relative), otherwise the
script exits with 1. Throughput is measured in blocks of steps; every round runs one block of each backend, in
changing order, so that a slow spell of the machine hits all of them. The first steps, which compile, are not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

VOCAB = 256  # one token per byte
HEADS, KV_HEADS = 8, 4
BLOCK = 5  # steps per timed block
WARMUP_STEPS = 2  # the first compiles, the second settles caches; both train, neither is timed
LOSS_TOLERANCE = 1e-4  # relative, against backend="eager"; fp32


def rotate(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding of `x [batch, heads, seq, head_dim]`."""
    half = x.shape[-1] // 2
    positions = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention. Under tensor parallelism a rank sees its own heads and the whole sequence."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.head_dim = dim // HEADS
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, KV_HEADS * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, KV_HEADS * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        q, k, v = (w(x).view(batch, seq, -1, self.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (rotate(k), v))
        out = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).reshape(batch, seq, -1))


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = (8 * dim // 3 + 127) // 128 * 128
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.attention = Attention(dim)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-5)
        self.feed_forward = FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    def __init__(self, layers: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, dim)
        self.layers = nn.ModuleList(Block(dim) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, VOCAB, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def parallelize(model: Llama, mesh: DeviceMesh) -> Llama:
    """Tensor parallelism inside attention and feed-forward, activations `Shard(1)` (along the sequence) between them."""
    parallelize_module(
        model,
        mesh,
        {
            "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        },
    )
    gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    for layer in model.layers:
        parallelize_module(
            layer,
            mesh,
            {
                "attention_norm": SequenceParallel(),
                "attention": gather,
                "attention.wq": ColwiseParallel(),
                "attention.wk": ColwiseParallel(),
                "attention.wv": ColwiseParallel(),
                "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
                "ffn_norm": SequenceParallel(),
                "feed_forward": gather,
                "feed_forward.w1": ColwiseParallel(),
                "feed_forward.w3": ColwiseParallel(),
                "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
            },
        )
    return model


def standard_library_text() -> Tensor:
    """Every top-level module of the standard library, concatenated by name: uint8 `[bytes]`."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


@dataclass
class Trainer:
    """One model, compiled with one backend. Trainers with the same arguments see the same weights and batches."""

    backend: str
    args: argparse.Namespace
    mesh: DeviceMesh
    text: Tensor
    losses: list[float] = field(default_factory=list)
    block_seconds: list[float] = field(default_factory=list)  # per timed block, slowest rank

    def __post_init__(self) -> None:
        torch.manual_seed(self.args.seed)
        model = parallelize(Llama(self.args.layers, self.args.dim).to(self.mesh.device_type), self.mesh)
        self.model = torch.compile(model, backend=self.backend, fullgraph=True, dynamic=False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=self.args.lr)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets `[batch, seq]`; they depend on seed and step only, so all ranks hold the same."""
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
        starts = torch.randint(len(self.text) - self.args.seq - 1, (self.args.batch, 1), generator=generator)
        windows = self.text[starts + torch.arange(self.args.seq + 1)].long().to(self.mesh.device_type)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def run(self, steps: int) -> float:
        """Train `steps` steps. Returns their time in seconds on the slowest rank."""
        dist.barrier()
        start = time.perf_counter()
        losses: list[Tensor] = []
        for _ in range(steps):
            tokens, targets = self.batch(len(self.losses) + len(losses))
            loss = F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        self.losses += torch.stack(losses).tolist()  # waits for the device, once per call and not once per step
        seconds = torch.tensor(time.perf_counter() - start, device=self.mesh.device_type)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.args.batch * self.args.seq * BLOCK / statistics.median(self.block_seconds)


def say(*text: object) -> None:
    if dist.get_rank() == 0:
        print(*text, flush=True)


def train(trainers: list[Trainer], args: argparse.Namespace) -> None:
    """Compile one trainer after the other, then alternate timed blocks of all of them."""
    for trainer in trainers:
        say(f"{trainer.backend:>9}: compiling (first step; a minute or two if Inductor's cache is cold) ...")
        seconds = trainer.run(1)
        say(f"{trainer.backend:>9}: first step took {seconds:.1f} s, loss {trainer.losses[0]:.4f}")
        trainer.run(WARMUP_STEPS - 1)
    order, first = random.Random(args.seed), trainers[0]  # the same order on every rank
    for _ in range(-(-args.steps // BLOCK)):
        for trainer in order.sample(trainers, len(trainers)):
            trainer.block_seconds.append(trainer.run(BLOCK))
        say(f"step {len(first.losses):>4}: loss {first.losses[-1]:.4f}, {first.tokens_per_second:,.0f} tokens/s")


def summarize(trainers: list[Trainer]) -> tuple[dict[str, Any], list[str]]:
    """Print losses and throughput side by side. Returns the numbers, and what is wrong with them."""
    first, steps = trainers[0], len(trainers[0].losses)
    say("\n     step" + "".join(f"{'loss ' + trainer.backend:>16}" for trainer in trainers))
    for step in sorted({*range(0, steps, max(1, steps // 8)), steps - 1}):
        say(f"{step:>9}" + "".join(f"{trainer.losses[step]:>16.6f}" for trainer in trainers))
    say(" tokens/s" + "".join(f"{trainer.tokens_per_second:>16,.0f}" for trainer in trainers))
    tail = statistics.mean(first.losses[-5:])
    problems = [] if tail < first.losses[0] else [f"the loss did not fall: {first.losses[0]:.4f} to {tail:.4f}"]
    result: dict[str, Any] = {t.backend: {"losses": t.losses, "block_seconds": t.block_seconds} for t in trainers}
    for other in trainers[1:]:
        if other.backend == "eager":
            ours, eager = torch.tensor(first.losses), torch.tensor(other.losses)
            difference = float(
                ((ours - eager) / eager).abs().max()
            )  # nan if one of them is: Python's max would not say
            say(f"losses agree with eager to {difference:.1e} (relative, worst step; limit {LOSS_TOLERANCE:.0e})")
            result["max_relative_loss_difference"] = difference
            if not difference <= LOSS_TOLERANCE:  # also if it is nan
                problems.append(f"losses differ from eager by {difference:.1e}, more than {LOSS_TOLERANCE:.0e}")
        else:
            ratios = [b / a for a, b in zip(first.block_seconds, other.block_seconds, strict=True)]
            result[f"speedup_over_{other.backend}"] = statistics.median(ratios)
            say(f"{statistics.median(ratios):.3f}x the tokens/s of {other.backend} (median of {len(ratios)} rounds)")
    return result, problems


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="tilescale")
    parser.add_argument("--steps", type=int, default=50, help=f"timed steps, rounded up to blocks of {BLOCK}")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, default=512, help="model width")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256, help="sequence length, a multiple of the number of ranks")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action=argparse.BooleanOptionalAction, default=True, help="against other backends")
    parser.add_argument("--save-json", type=Path, metavar="PATH", help="write losses and timings there")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        text = standard_library_text()
        say(f"{len(text) / 1e6:.1f} MB of text, {mesh.size()} {device} ranks, batch {args.batch} x {args.seq} tokens")
        backends = [args.backend, "eager", "inductor"] if args.compare else [args.backend]
        trainers = [Trainer(backend, args, mesh, text) for backend in dict.fromkeys(backends)]
        train(trainers, args)
        if args.backend == "tilescale":
            from tscompile import reports

            say(f"\n{reports()}")
        result, problems = summarize(trainers)
        for problem in problems:
            say(f"FAILED: {problem}")
        if args.save_json and dist.get_rank() == 0:
            result = {"settings": vars(args), "ranks": mesh.size(), **result}
            args.save_json.write_text(json.dumps(result, indent=1, default=str) + "\n")
        return int(bool(problems))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
