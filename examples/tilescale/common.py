"""What the examples of this folder share: starting the ranks, symmetric memory, checks, timing.

    python examples/tilescale/allgather.py                 # 2 CPU ranks
    python examples/tilescale/allgather.py --gpu --ranks 4
    torchrun --nproc-per-node 4 examples/tilescale/allgather.py --gpu

A rank that fails ends the others: their waits end at once, and the program with the first error.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any

import tilelang
import tilelang.language as T
import torch
import torch.distributed as dist

import tscompile.language as tl
from tscompile.language.dialects import Dialect

HEAP_BYTES = {False: 16 << 20, True: 1 << 30}  # of symmetric memory on each rank: on CPU, on GPUs
STAGGER_S, CYCLES_PER_S = 0.04, 1.5e9
CTX = T.Tensor((tl.WORDS,), "int64")  # the parameter through which a kernel knows its group
tilelang.set_log_level("WARNING")  # without a line for each kernel


@dataclass(frozen=True)
class Matmul:
    """How matmuls are done on a target: rows, columns and depth of a tile, and what is multiplied (sums are float32)."""

    rows: int
    cols: int
    depth: int
    dtype: str
    item_bytes: int


MATMUL = {"cuda": Matmul(128, 128, 64, "bfloat16", 2), "cpu": Matmul(32, 32, 32, "float32", 4)}


class ExampleError(RuntimeError):
    """A rank failed; the message holds what it said."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of an example: what is compiled, under a name for messages."""

    name: str
    function: Any
    pass_configs: dict[str, Any] | None = None


@dataclass(eq=False)
class World:
    """The ranks as an example sees them."""

    args: argparse.Namespace
    group: tl.SymmetricGroup
    dialect: Dialect
    dice: random.Random
    generator: torch.Generator
    compiled: dict[str, Callable[..., None]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def size(self) -> int:
        return self.group.size

    @property
    def device(self) -> torch.device:
        return self.group.device

    @property
    def matmul(self) -> Matmul:
        return MATMUL[self.dialect.name]

    @property
    def dtype(self) -> torch.dtype:
        """What matmuls multiply: the C target has no floats of 16 bits."""
        return getattr(torch, self.matmul.dtype)

    def compile(self, function: Any, pass_configs: dict[str, Any] | None = None) -> Callable[..., None]:
        """Compile a kernel, once: rank 0 puts it into TileLang's cache, and the others find it there. Collective."""
        key = function.script()
        if key not in self.compiled:
            if self.rank == 0:
                self.compiled[key] = self.dialect.compile(function, pass_configs)
            self.group.barrier()
            if self.rank != 0:
                self.compiled[key] = self.dialect.compile(function, pass_configs)
        return self.compiled[key]

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Random numbers, other ones on every rank and in every call."""
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype)

    def gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """What every rank passed, by torch's own all_gather: for references."""
        everybodys = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everybodys, mine.contiguous())
        return everybodys

    def gather_into(self, out: torch.Tensor, mine: torch.Tensor) -> None:
        """The same in one tensor. torch 2.13 gave the call another name."""
        call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        call(out, mine)

    def reduce_scatter(self, out: torch.Tensor, mine: torch.Tensor) -> None:
        """Of sums, into `out`; its name changed with the other's."""
        call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        call(out, mine)

    @property
    def rival(self) -> str:
        """What times are compared with."""
        return "NCCL" if self.device.type == "cuda" else "gloo"

    def rounds(self) -> Iterator[int]:
        """Numbers of the rounds to check, from 1. Ranks start each of them some random time apart.

        Nothing else in a round may make ranks wait for each other, or it would hide what a kernel fails to wait for: `keep` the
        results, and compare when all rounds are over.
        """
        for epoch in range(1, self.args.rounds + 1):
            self._dawdle()
            yield epoch

    def keep(self, result: torch.Tensor) -> torch.Tensor:
        """A copy of a result, made some random time after its kernel: what comes too early for that would show."""
        self._dawdle()
        return result.clone()

    def _dawdle(self) -> None:
        """Be late, every second time: in the program on CPU, on the current stream on a GPU."""
        seconds = self.dice.choice((0.0, self.dice.uniform(0, STAGGER_S)))
        if self.device.type == "cuda":
            torch.cuda._sleep(int(seconds * CYCLES_PER_S))
        else:
            time.sleep(seconds)

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Median time of `call` on the slowest rank."""
        return tl.perf_fn(call, self.group, warmup=1, iters=self.args.repeat)


def assert_equal(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """For data that was moved only: every bit must be right."""
    if got.shape != want.shape or not torch.equal(got, want):
        wrong = int((got != want).sum()) if got.shape == want.shape else f"shape {list(got.shape)}, so all"
        raise AssertionError(f"{what}: {wrong} of {want.numel()} elements differ from the reference")


def assert_close(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """For sums of products, against a reference in float32: an error of rounding, relative to the largest number."""
    tolerance = 1e-5 if got.dtype == torch.float32 and got.device.type == "cpu" else 1e-2
    error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
    if not error <= tolerance:  # nan too
        raise AssertionError(f"{what}: differs from the reference by {error:.1e} of its largest number")


def assert_as_good(what: str, got: torch.Tensor, baseline: torch.Tensor, truth: torch.Tensor) -> None:
    """For results of many roundings: at most twice as far from the truth as torch's own in the same dtype, and one rounding.

    In float32 some more: the C target adds up one by one, torch with several partial sums.
    """
    eps = torch.finfo(got.dtype).eps * (8 if got.dtype == torch.float32 else 1)

    def errors(x: torch.Tensor) -> torch.Tensor:
        off = x.to(truth.dtype) - truth
        return torch.stack((off.norm() / truth.norm(), off.abs().max() / truth.abs().max()))

    ours, allowed = errors(got), 2 * errors(baseline) + eps
    if not bool((ours <= allowed).all()):  # nan too
        raise AssertionError(f"{what}: relative errors (norm, largest) {ours.tolist()}, allowed {allowed.tolist()}")


@dataclass(frozen=True)
class Example:
    """One script.

    Attributes:
        run: what each rank does; returns what was checked, in words.
        kernels: all kernels of the script for a dialect, for tests that compile them without a GPU.
        sizes: numbers that can be given as options: (default on CPU, default on GPUs).
        switches: options without a value, and what they do.
        ranks_per_node: for an example of two levels, how many ranks form a node if `--ranks-per-node` does not say it.
        ranks: how many there are unless `--ranks` says so.
        allowed: says why the example does not work with so many ranks, "" if it does.
    """

    run: Callable[[World], str]
    kernels: Callable[[Dialect], list[Kernel]]
    sizes: Mapping[str, tuple[int, int]]
    ranks: int = 2
    allowed: Callable[[int], str] = lambda _: ""
    switches: Mapping[str, str] = field(default_factory=dict)
    ranks_per_node: Callable[[int], int] | None = None

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options of a run."""
        module = sys.modules[self.run.__module__]
        parser = argparse.ArgumentParser(
            description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--gpu", action="store_true", help="one GPU per rank; without it ranks are CPU processes")
        parser.add_argument("--ranks", type=int, default=self.ranks, help=f"how many to start ({self.ranks})")
        parser.add_argument("--rounds", type=int, default=5, help="how often to run and compare (5)")
        parser.add_argument("--repeat", type=int, default=5, help="how often to run for the time that is printed (5)")
        parser.add_argument("--timeout", type=float, default=60.0, help="bound of every wait, in seconds (60)")
        parser.add_argument("--seed", type=int, default=0, help="of the random data (0)")
        for name, (cpu, gpu) in self.sizes.items():
            parser.add_argument(f"--{name}", type=int, help=f"({cpu}; {gpu} on GPUs)")
        for name, does in self.switches.items():
            parser.add_argument(f"--{name}", action="store_true", help=does)
        if self.ranks_per_node:
            text = "ranks of each node, which may be virtual (two nodes if their number is even)"
            parser.add_argument("--ranks-per-node", type=int, help=text)
        args = parser.parse_args(arguments)
        args.ranks = int(os.environ.get("WORLD_SIZE", args.ranks))
        if self.ranks_per_node is None:
            args.ranks_per_node = None
        elif args.ranks_per_node is None:
            args.ranks_per_node = self.ranks_per_node(args.ranks)
        elif args.ranks_per_node < 1 or args.ranks % args.ranks_per_node:
            parser.error(f"{args.ranks} ranks are no nodes of {args.ranks_per_node}")
        for name, defaults in self.sizes.items():
            if getattr(args, name) is None:
                setattr(args, name, defaults[args.gpu])
        if reason := self.allowed(args.ranks):
            parser.error(reason)
        if args.gpu and torch.cuda.device_count() < args.ranks:
            parser.error(f"{args.ranks} ranks need as many GPUs, there are {torch.cuda.device_count()}")
        return args

    def main(self) -> None:
        """What the script does when it is run: as one rank under torchrun, else it starts the ranks itself."""
        arguments = sys.argv[1:]
        args = self.parse(arguments)
        if "RANK" in os.environ:
            said = self.run_rank(args, int(os.environ["RANK"]), args.ranks, None)
            if os.environ["RANK"] == "0":
                print(said)
            return
        try:
            print(launch(Path(str(sys.modules[self.run.__module__].__file__)), arguments, args.ranks))
        except ExampleError as error:
            sys.exit(str(error))

    def run_rank(self, args: argparse.Namespace, rank: int, size: int, store: dist.Store | None) -> str:
        """One rank: its process group, its symmetric memory, and the example."""
        device = None
        if args.gpu:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)
        dist.init_process_group(
            "nccl" if args.gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            device_id=device,
            timeout=timedelta(seconds=args.timeout),
        )
        with tl.SymmetricGroup(
            nbytes=HEAP_BYTES[args.gpu], timeout_s=args.timeout, ranks_per_node=args.ranks_per_node
        ) as group:
            generator = torch.Generator(device=group.device).manual_seed(1000 * args.seed + rank)
            dialect = tl.dialect("cuda" if args.gpu else "cpu")
            said = self.run(World(args, group, dialect, random.Random(1000 * args.seed + rank), generator))
        dist.destroy_process_group()
        return said


_forked = multiprocessing.get_context("forkserver")
# What every rank needs is imported once, in the server that ranks are forked from.
_forked.set_forkserver_preload(["torch", "torch.distributed", "tilelang", "tscompile.language.group"])
_spawned = multiprocessing.get_context(
    "spawn"
)  # on GPUs: importing tilelang touches CUDA, which does not survive a fork


def launch(script: Path, arguments: Sequence[str], ranks: int, bound_s: float = 600.0) -> str:
    """Run a script of this folder in processes of its own; returns what rank 0 said.

    Raises:
        ExampleError: a rank failed, or they are not done after `bound_s` seconds.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = _spawned if "--gpu" in arguments else _forked
    running, processes, said = {}, [], ""
    try:
        for rank in range(ranks):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, args=(script, arguments, rank, ranks, store.port, there))
            process.start()
            there.close()
            processes.append(process)
            running[here] = rank
        deadline = time.monotonic() + bound_s
        while running:
            ready = wait_for_any(list(running), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ExampleError(f"ranks {sorted(running.values())} were not done after {bound_s:g} s")
            for connection in ready:
                rank = running.pop(connection)
                try:
                    failed, text = connection.recv()
                except EOFError:
                    failed, text = True, "its process ended without a word"
                if failed:
                    raise ExampleError(f"rank {rank} failed: {text}")
                said = text if rank == 0 else said
        return said
    finally:
        for process in processes:
            process.join(2.0 if not running else 0.0)
            process.kill()
            process.join()


def _rank_main(script: Path, arguments: Sequence[str], rank: int, size: int, port: int, connection: Any) -> None:
    try:
        sys.path.insert(0, str(script.parent))
        example = importlib.import_module(script.stem).EXAMPLE
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        connection.send((False, example.run_rank(example.parse(arguments), rank, size, store)))
    except BaseException:
        connection.send((True, traceback.format_exc()))
        connection.close()
        os._exit(1)  # without waiting for threads that talk to ranks that are gone
