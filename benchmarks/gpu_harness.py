"""Timing of GPU candidates on all ranks at once: CUDA events, eager calls and graph replays, heated and interleaved.

`benchmarks.harness` has the method and its traps: rounds, an order shuffled anew in each, the slowest rank, statistics
within rounds. What GPUs add:

* Clocks. A timing that follows a light one starts on cooler clocks and gains several per cent: about 20 ms of matmul run
  before each timing, so that every candidate starts from the same temperature, and with a deep queue in front of it.
* Hosts. Back-to-back calls (`eager`) show what a host that must issue them gets, replays of a CUDA graph (`graph`) what
  the GPU alone needs. Both are kept.
* Hangs. A kernel that waits for a peer can hang a machine that costs money: `limit` ends the process from a thread that
  needs no interpreter, with all stacks printed, and the results so far are in the file already.

On CPU ranks everything but graphs works too, so that the benchmarks themselves can be tested.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import harness

HEAT_MS = 20.0
GRAPH_CALLS = 4
WARM_CALLS = 2


def start(device: str) -> torch.device:
    """Join the world that torchrun describes. `device` is "cuda" or "cpu"."""
    if "RANK" not in os.environ:
        raise SystemExit("this runs on all GPUs at once: torchrun --nproc-per-node 4 -m benchmarks.<name>")
    rank = int(os.environ["RANK"])
    torch.manual_seed(1234 + rank)
    faulthandler.register(signal.SIGTERM, chain=True)  # what torchrun sends to the others once one has ended
    if device == "cpu":
        torch.set_num_threads(1)
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return torch.device("cpu")
    here = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(here)
    dist.init_process_group("nccl", device_id=here, timeout=timedelta(seconds=120))
    return here


def say(*text: object, sep: str = " ") -> None:
    if dist.get_rank() == 0:
        print(f"[{time.monotonic() - _STARTED:6.1f}]", *text, sep=sep, flush=True)


_STARTED = time.monotonic()


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """End the process if the block takes longer. The timer is a C thread: no lock of the interpreter can hold it up."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def on_any_rank(failed: bool) -> bool:
    """True on all ranks if `failed` on one of them."""
    return harness.slowest([float(failed)])[0] > 0


@dataclass
class Side:
    """One way of computing the case. `run` returns the tensors that are checked; `written` is memory that it fills."""

    run: Callable[[], Any]
    written: Sequence[Tensor] = ()
    graph: bool = True  # may be captured
    checked: bool = True


@dataclass
class Race:
    """Raw seconds per call, slowest rank: one dict per round, for eager calls and for graph replays."""

    eager: list[dict[str, float]] = field(default_factory=list)
    graph: list[dict[str, float]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


class Timer:
    """Times calls on this rank. `heat` keeps the GPU at the clocks of a busy one."""

    def __init__(self, device: torch.device, min_ms: float = 8.0) -> None:
        self.cuda = device.type == "cuda"
        self.min_ms = min_ms
        self.failure = "raised on another rank"  # what the last call that raised here said
        self._heats = 0
        if self.cuda:
            self._left, self._right = (torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) for _ in range(2))
            each = 1e3 * self.seconds(self._matmul, 20, heated=False)
            self._heats = math.ceil(HEAT_MS / each)

    def _matmul(self) -> None:
        torch.mm(self._left, self._right)

    def heat(self) -> None:
        """Queue about 20 ms of matmul; does not wait."""
        for _ in range(self._heats):
            self._matmul()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], object], calls: int, heated: bool = True) -> float:
        """Per call, of `calls` back-to-back calls that start together on all ranks."""
        if not self.cuda:
            return harness.time_calls(function, calls)
        if heated:
            self.heat()
        self._issue(function, WARM_CALLS)  # deep behind the queue of matmuls, where races of starting ranks show
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        done = self._issue(function, calls)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / calls / 1e3 if done else math.inf

    def host_seconds(self, function: Callable[[], object], rounds: int = 8) -> float:
        """What the host takes to enqueue a call behind other work: the least of the rounds on this rank. All ranks do this alike."""
        least = math.inf
        for _ in range(rounds):
            if self.cuda:
                torch.cuda.synchronize()
                dist.barrier()
                self.heat()
            begin = time.perf_counter()
            if not self._issue(function, 1):
                return math.inf
            least = min(least, time.perf_counter() - begin)
        self.synchronize()
        return least

    def _issue(self, function: Callable[[], object], calls: int) -> bool:
        """False if a call raised. This rank must not leave then: the others wait for it in the next barrier."""
        try:
            for _ in range(calls):
                function()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            return False
        return True

    def calls(self, function: Callable[[], object], least: int = 5, most: int = 60) -> int:
        """How many calls make a timing; the same on all ranks."""
        estimate = harness.slowest([self.seconds(function, 3, heated=False)])[0]
        if estimate == math.inf:
            raise RuntimeError(self.failure)
        return max(least, min(most, math.ceil(self.min_ms / 1e3 / max(estimate, 1e-7))))

    def host_us(self, function: Callable[[], object], calls: int = 20) -> float:
        """Microseconds of the host to issue one call, slowest rank."""
        function()
        self.synchronize()
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        spent = time.perf_counter() - begin
        self.synchronize()
        return 1e6 * harness.slowest([spent / calls])[0]


def capture(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_CALLS):
            function()
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(GRAPH_CALLS):
            function()
    torch.cuda.synchronize()
    return graph


def race(sides: Mapping[str, Side], timer: Timer, rounds: int, seed: int, graphs: bool = True) -> Race:
    """Race the sides; every rank calls this alike. A side that raises on any rank leaves the race, with its error."""
    result = Race()
    units: dict[str, tuple[Callable[[], object], int, int]] = {}  # what to call, calls per timing, ops per call
    for name, side in sides.items():
        calls = attempt(name, lambda side=side: timer.calls(side.run), result.failures)
        if calls is None:
            continue
        units[f"{name}/eager"] = (side.run, calls, 1)
        if graphs and timer.cuda and side.graph:
            graph = attempt(f"{name}/graph", lambda side=side: capture(side.run), result.failures)
            if graph is not None:
                units[f"{name}/graph"] = (graph.replay, max(3, calls // GRAPH_CALLS), GRAPH_CALLS)
    local: list[dict[str, float]] = []
    gc.collect()
    gc.disable()  # a collection inside one timing would be charged to one side
    try:
        local += [
            {unit: timer.seconds(*units[unit][:2]) / units[unit][2] for unit in order}
            for order in harness.orders(list(units), rounds, seed)
        ]
    finally:
        gc.enable()
    merged = iter(harness.slowest([times[unit] for times in local for unit in units]))
    whole = [{unit: next(merged) for unit in units} for _ in local]
    raised = {unit for times in whole for unit, t in times.items() if t == math.inf}
    result.failures.update({unit.removesuffix("/eager"): f"while it was timed: {timer.failure}" for unit in raised})
    for times in whole:
        times = {unit: t for unit, t in times.items() if unit not in raised}
        for kind, into in (("eager", result.eager), ("graph", result.graph)):
            into.append({unit.removesuffix(f"/{kind}"): t for unit, t in times.items() if unit.endswith(f"/{kind}")})
    return result


def attempt(name: str, action: Callable[[], Any], failures: dict[str, str]) -> Any:
    """The action's result, or None if it raised on this rank or another; every rank then leaves it out.

    A GPU that has faulted raises here again and again, which ends the program: nothing after it could be trusted.
    """
    result, text = None, ""
    try:
        result = action()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        print(f"rank {dist.get_rank()}: {name}: {text}", file=sys.stderr, flush=True)
    if on_any_rank(bool(text)):
        failures[name] = text or "raised on another rank"
        return None
    return result


def errors_of(got: Sequence[Tensor], truth: Sequence[Tensor]) -> tuple[float, float]:
    """Worst `||got - truth|| / ||truth||` and worst `max |got - truth| / max |truth|`; infinite where not finite."""
    norm = largest = 0.0
    for a, b in zip(got, truth, strict=True):
        difference = a.view(b.shape).to(b.dtype).sub(b)
        pair = float(difference.norm() / b.norm()), float(difference.abs().max() / b.abs().max())
        pair = tuple(value if math.isfinite(value) else math.inf for value in pair)
        norm, largest = max(norm, pair[0]), max(largest, pair[1])
    return norm, largest


def order_eps(dtype: torch.dtype) -> float:
    """What sums of the same in another order may differ by, norm by norm: in float32 it shows, in 16 bits rounding hides it."""
    info = torch.finfo(dtype)
    return (16 if info.bits > 16 else 1) * info.eps


def allowed(base: tuple[float, float], dtype: torch.dtype) -> tuple[float, float]:
    """What a fused op may be off where the original ops in the same dtype are `base` off: twice that, and one rounding."""
    eps = torch.finfo(dtype).eps
    return 2 * base[0] + eps / 2, 2 * base[1] + eps


def finish(code: int = 0) -> None:
    """Leave at once: tearing down communicators of a world in which something failed can hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.cuda.is_initialized():
        if code == 0:
            dist.barrier()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()


def guarded(main: Callable[[], int]) -> int:
    """Run `main`; on an error say it and leave at once, so that torchrun ends the other ranks."""
    try:
        return main()
    except Exception:
        traceback.print_exc()
        finish(1)
        return 1
