"""The GPU tests' world: every rank runs the same tests in the same order, under torchrun.

    torchrun --nproc-per-node 4 --local-ranks-filter 0 -m pytest tests/gpu -x -q

A test that fails on one rank fails on all, so that no rank goes on alone; a rank that hangs ends with the stacks of all its
threads. `--device cpu` runs what needs no GPU on gloo ranks with tiny sizes, to try the tests themselves.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _pytest.faulthandler import fault_handler_stderr_fd_key
from torch.distributed import distributed_c10d

from tests.fused_programs import FULL, TINY, Sizes

_REPORT = pytest.StashKey[pytest.TestReport]()
_GRACE_S = 30.0  # pytest-timeout comes first: it can say more, unless the process hangs inside CUDA


def missing(config: pytest.Config) -> str:
    """Why these tests cannot run here; empty if they can."""
    if "RANK" not in os.environ:
        return "GPU tests run on all ranks at once: torchrun --nproc-per-node 4 -m pytest tests/gpu"
    if config.getoption("--device") == "cuda" and torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        return f"{os.environ['LOCAL_WORLD_SIZE']} ranks need as many GPUs, there are {torch.cuda.device_count()}"
    return "" if int(os.environ["WORLD_SIZE"]) > 1 else "one rank has nobody to talk to: --nproc-per-node 2 or 4"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if reason := missing(item.config):
        pytest.skip(reason)
    if item.get_closest_marker("gpu") and item.config.getoption("--device") != "cuda":
        pytest.skip("needs GPUs; this run is on CPU ranks, to try the tests themselves")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """A limit that holds even where Python cannot run."""
    marker = item.get_closest_marker("timeout")
    limit = float(marker.args[0]) if marker else item.config.getoption("--limit")
    stderr = item.config.stash.get(fault_handler_stderr_fd_key, 2)
    faulthandler.register(signal.SIGTERM, file=stderr, chain=True)  # torchrun ends the others once the first has ended
    faulthandler.dump_traceback_later(limit + _GRACE_S, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """torchrun ends all ranks once one has failed: the others let rank 0 say first what went wrong."""
    if session.testsfailed and os.environ.get("RANK", "0") != "0":
        time.sleep(5)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.when == "call":
        item.stash[_REPORT] = report
    return report


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    sizes: Sizes

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def store(self) -> dist.Store:
        return dist.PrefixStore("tests", distributed_c10d._get_default_store())

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def say(self, *text: object) -> None:
        if self.rank == 0:
            print(*text, flush=True)


@pytest.fixture(scope="session")
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=100)
    if request.config.getoption("--device") == "cuda":
        device, sizes = torch.device("cuda", int(os.environ["LOCAL_RANK"])), FULL
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=timeout)
    else:
        device, sizes = torch.device("cpu"), TINY
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timeout)
    yield World(rank, size, device, sizes)
    if request.session.testsfailed == 0:  # after a failure the peers may be gone, and leaving together would hang
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def together(request: pytest.FixtureRequest, world: World) -> Iterator[None]:
    """Seeds, and one verdict on all ranks."""
    torch.manual_seed(world.rank)
    torch._dynamo.reset()
    yield
    report = request.node.stash.get(_REPORT, None)
    passed = report is None or report.outcome != "failed"
    world.store.set(f"{request.node.nodeid}/{world.rank}", "" if passed else f" {str(report.longrepr)[-3000:]}")
    keys = [f"{request.node.nodeid}/{rank}" for rank in range(world.size)]
    world.store.wait(keys, timedelta(seconds=_GRACE_S))
    stories = {rank: world.store.get(key).decode() for rank, key in enumerate(keys)}
    failed = {rank: story for rank, story in stories.items() if story}
    if failed and passed:
        rank, story = next(iter(failed.items()))
        pytest.fail(f"failed on ranks {sorted(failed)}; rank {rank} said:\n{story}", pytrace=False)


@pytest.fixture(scope="module")
def language(world: World) -> Iterator[Any]:
    """A `language_group.Group` over all ranks."""
    from tests.gpu.language_group import Group

    group = Group(world)
    yield group
    group.release()


@pytest.fixture
def group(language: Any, request: pytest.FixtureRequest) -> Any:
    """The same, with nothing signalled and nothing aborted."""
    language.begin(request.node.nodeid)
    return language
