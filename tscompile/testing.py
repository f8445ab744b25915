"""Helpers for tests of distributed programs, for users of tscompile and for its own suite.

`fake_world` lets one process build and compile the graphs of a rank of any world. `run_ranks` runs a function on real
gloo ranks of this host and brings back what they returned, or says what they printed. `collective_counts` reads a graph.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .rank_server import Rank, RankServer, Start

_COLLECTIVE_NAMESPACES = frozenset(
    {"_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d", "_dtensor"}
)
_NOT_COLLECTIVES = ("wait_tensor", "mesh_get_process_group")
_FOREIGN = frozenset({"deepspeed::dim_zero_all_to_all"})  # collectives that another package registers as its own ops
_SUFFIXES = ("_into_tensor", "_tensor", "_single", "_coalesced", "_out", "_")
_OUTPUT_CHARS = 6000  # of each failed rank: a traceback and what led to it
_GRACE_S = 5.0  # after the first failure, the time in which peers may still say what they saw


@contextmanager
def fake_world(size: int, rank: int = 0) -> Iterator[dist.ProcessGroup]:
    """A process group of `size` ranks in which this process is `rank` and nobody else exists.

    Its collectives finish at once and leave arbitrary data, so programs can be traced and compiled but not checked for
    values. Dynamo and DTensor forget on both sides: compiled code and cached layouts hold group names of the world they were made in.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a process group exists already: leave it before entering a fake world")
    _forget()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield dist.group.WORLD  # type: ignore[misc]
    finally:
        _forget()
        dist.destroy_process_group()


def _forget() -> None:
    torch._dynamo.reset()
    if "torch.distributed.tensor" in sys.modules:
        debug = importlib.import_module("torch.distributed.tensor.debug")
        getattr(debug, "_clear_sharding_prop_cache", lambda: None)()  # torch has no public name for it


def collective_name(target: object) -> str | None:
    """Short name ("all_gather", "reduce_scatter", "all_reduce", ...) of a collective's overload or op name, else None.

    The short name does not tell the spellings of one collective apart (into_tensor, coalesced, out, in place).
    """
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if target.name() in _FOREIGN:
        return short_name(target._opname)
    if target.namespace not in _COLLECTIVE_NAMESPACES or target._opname.startswith(_NOT_COLLECTIVES):
        return None
    return short_name(target._opname)


def short_name(op: str) -> str:
    """`op` without namespace, overload and suffix of its spelling: "all_gather_into_tensor" -> "all_gather"."""
    parts = op.split("::")[-1].split(".")
    name = parts[1] if len(parts) > 1 and parts[0] in (*_COLLECTIVE_NAMESPACES, "deepspeed") else parts[0]
    while True:
        stripped = next((name.removesuffix(s) for s in _SUFFIXES if name.endswith(s)), name)
        if stripped == name:
            return name
        name = stripped


def collective_counts(graph: torch.fx.Graph) -> dict[str, int]:
    """Number of collectives of each kind in a graph, by short name; waits do not count."""
    names = (collective_name(node.target) for node in graph.nodes if node.op == "call_function")
    return dict(Counter(name for name in names if name is not None))


class RankFailure(AssertionError):
    """A rank of `run_ranks` raised, died or ran past the time limit; the message carries what the ranks printed."""


@dataclass
class _Worker:
    rank: int
    process: Rank
    log: Path
    result: Path


_server: RankServer | None = None  # of calls without an environment of their own


def _server_of(env: dict[str, str]) -> RankServer:
    """The server that is kept, a new one if it has ended or the environment has changed since."""
    global _server
    # pytest writes the name of the test that runs into the environment; no module reads it while it is imported.
    wanted = {name: value for name, value in env.items() if not name.startswith("PYTEST_")}
    if _server is not None and (_server.env != wanted or not _server.alive()):
        _server.close()
        _server = None
    if _server is None:
        _server = RankServer(wanted)
    return _server


def run_ranks(
    ranks: int,
    target: Callable[..., Any] | str,
    *args: Any,
    timeout_s: float = 120.0,
    backend: str | None = "gloo",
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Run `target(*args)` on `ranks` processes of this host and return what each returned, in rank order.

    `target` is a function that can be imported (or its "module:name"); arguments and results must be picklable. The
    environment is the one that torchrun sets; with a `backend` the default process group exists before `target` starts
    and is destroyed after it. If a rank fails, or not all are done after `timeout_s`, every rank and its children are
    killed and RankFailure shows their output, tracebacks included.

    Ranks are forked from a process that has imported torch, its compiler and tscompile, and is started by the first call.
    With `env`, variables that the ranks have besides, that process is a new one, so they count from the first import on.
    """
    name = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
    from torch._C._distributed_c10d import TCPStore

    # The parent serves the store, as torchrun's agent does: the port is bound before anyone is told about it.
    store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="tscompile-ranks-") as folder:
        root = Path(folder)
        (root / "call").write_bytes(pickle.dumps((name, args, backend, timeout_s)))
        server = RankServer(dict(os.environ) | env) if env else _server_of(dict(os.environ))
        workers: list[_Worker] = []
        try:
            # extend, not a list: if a later rank cannot start, the earlier ones are known and killed
            workers.extend(_start(server, rank, ranks, root, store.port, env or {}) for rank in range(ranks))
            done = _await(workers, timeout_s)
        finally:
            for worker in workers:
                worker.process.kill()
            if env:
                server.close()
        if not done or any(worker.process.returncode for worker in workers):
            why = "a rank failed" if done else f"not done after {timeout_s:.0f} s"
            raise RankFailure(f"{name} on {ranks} ranks: {why}\n" + "\n".join(_story(w) for w in workers))
        return [pickle.loads(worker.result.read_bytes()) for worker in workers]


def _start(server: RankServer, rank: int, ranks: int, root: Path, port: int, extra: dict[str, str]) -> _Worker:
    log, result = root / f"log.{rank}", root / f"result.{rank}"
    log.touch()
    env = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": root.name,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        # pytest puts test folders on sys.path; workers, and what they start, must be able to import what the parent can.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    call = (str(root / "call"), str(result))
    start = Start(f"{__name__}:_work", call, env | extra, list(sys.path), os.getcwd(), str(log))
    return _Worker(rank, server.start(start), log, result)


def _await(workers: list[_Worker], timeout_s: float) -> bool:
    """Wait for all workers; after the first failure its peers get a short grace. False if the time is up."""
    deadline = time.monotonic() + timeout_s
    failed = False
    while any(worker.process.poll() is None for worker in workers):
        if not failed and any(worker.process.returncode for worker in workers):
            failed, deadline = True, min(deadline, time.monotonic() + _GRACE_S)
        if time.monotonic() > deadline:
            return failed
        time.sleep(0.05)
    return True


def _story(worker: _Worker) -> str:
    text = worker.log.read_text(errors="replace")
    code = worker.process.returncode
    state = "finished" if code == 0 else "killed" if code == -signal.SIGKILL else f"exit status {code}"
    return f"--- rank {worker.rank}: {state} ---\n{text[-_OUTPUT_CHARS:]}"


def _work(call: str, result: str) -> None:
    """What a rank does: run the pickled call, leave its result, end."""
    name, args, backend, timeout_s = pickle.loads(Path(call).read_bytes())
    status = 0
    try:
        module, _, attribute = name.partition(":")
        function = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
        if backend is not None:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        value = function(*args)  # type: ignore[operator]
        Path(result).write_bytes(pickle.dumps(value))
        if backend is not None:
            dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        status = 1
    # Leave at once: a failed rank's process group may wait for its peers in a destructor.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
