"""What a group's memory is and how its ops run on it, by executor: "shm" for CPU ranks of one host, "nvlink" for its GPUs.

Not for votes: group.py asks an executor for its heap and its channels, and knows nothing else about the hardware.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch

from ..nvshmem.heap import Channel, GroupHeap, HostChannel
from ..nvshmem.shm import ShmHeap
from ..problem import GroupMemory, Plan
from ..templates import Template

NAMES = ("shm", "nvlink", "reference")  # "reference": the original ops


class Memo:
    """What the launches of one site with the same layout of arguments share.

    need: bytes of a half or slot, negative if the original ops must run. kept: what the executor keeps for them.
    """

    __slots__ = ("kept", "need")

    def __init__(self, need: int) -> None:
        self.need = need
        self.kept: Any = None


class Executor(Protocol):
    """One per group.

    Attributes:
        name: as plans say.
        shares: parts that a call's memory is multiplied into: halves or slots.
        runs_ahead: ops are enqueued, not finished, when a launch returns; so a rank cannot take back what peers have enqueued.
        raised: a launch has told the program of the group's failure.
    """

    name: str
    shares: int
    runs_ahead: bool
    raised: bool

    def make_heap(self, ranks: tuple[int, ...], index: int, heap_bytes: int | None) -> GroupHeap: ...

    def adopt(self, heap: GroupHeap, ranks: tuple[int, ...], timeout_s: float) -> None:
        """The ranks have agreed on this heap, or on its new size, or on another time-out."""
        ...

    def enter(self, heap: GroupHeap, epoch: int, site: str) -> bool:
        """Say to the peers that this rank has entered an epoch. True if the group may have failed, or may run the original ops."""
        ...

    def channel(
        self, heap: GroupHeap, ranks: tuple[int, ...], epoch: int, site: str, timeout_s: float
    ) -> HostChannel: ...

    def run(
        self, template: Template, channel: HostChannel | None, plan: Plan, args: tuple[Any, ...], memo: Memo
    ) -> list[torch.Tensor]:
        """Run an op that was entered. There is no channel where ops run ahead: making one takes time, and they have no use for it."""
        ...

    def run_joined(
        self, other: Any, template: Template, plan: Plan, args: tuple[Any, ...], memo: Memo
    ) -> list[torch.Tensor]:
        """Run an op of this group and of `other`'s that was entered in both; only where ops run ahead."""
        ...

    def join(self, other: Any) -> None:
        """From now on ops join this group and `other`'s: what ends the ops of one ends those of the other."""
        ...

    def settle(self) -> bool:
        """Wait until nothing enqueued uses what memos keep; False if that cannot be waited for now."""
        ...

    def ready(self) -> None:
        """Wait for what has to be compiled.

        Raises:
            HeapError: it failed; the message says what to do.
        """
        ...

    def failed(self) -> tuple[int, str] | None:
        """(index of the rank at fault, text) if an enqueued op has failed since."""
        ...

    def stop(self) -> None:
        """End the waits of what all ranks have enqueued."""
        ...

    def describe(self, heap: GroupHeap, ranks: tuple[int, ...]) -> GroupMemory:
        """For the report."""
        ...


class ShmExecutor:
    """Templates run on the host, over POSIX shared memory."""

    name = "shm"
    shares = 2
    runs_ahead = False
    raised = False

    def make_heap(self, ranks: tuple[int, ...], index: int, heap_bytes: int | None) -> ShmHeap:
        return ShmHeap(index, len(ranks))

    def adopt(self, heap: GroupHeap, ranks: tuple[int, ...], timeout_s: float) -> None:
        pass

    def enter(self, heap: GroupHeap, epoch: int, site: str) -> bool:
        return heap.enter(epoch, site)

    def channel(self, heap: GroupHeap, ranks: tuple[int, ...], epoch: int, site: str, timeout_s: float) -> Channel:
        assert isinstance(heap, ShmHeap)
        return Channel(heap, ranks, epoch, site, timeout_s)

    def run(
        self, template: Template, channel: HostChannel | None, plan: Plan, args: tuple[Any, ...], memo: Memo
    ) -> list[torch.Tensor]:
        return template.run(channel, plan, *args)

    def run_joined(
        self, other: Any, template: Template, plan: Plan, args: tuple[Any, ...], memo: Memo
    ) -> list[torch.Tensor]:
        raise NotImplementedError("ops of two groups can be taken back here: mesh.py runs them")

    def join(self, other: Any) -> None:
        raise NotImplementedError("the groups of an op decide by themselves here")

    def settle(self) -> bool:
        return True

    def ready(self) -> None:
        pass

    def failed(self) -> tuple[int, str] | None:
        return None

    def stop(self) -> None:
        pass

    def describe(self, heap: GroupHeap, ranks: tuple[int, ...]) -> GroupMemory:
        return GroupMemory(ranks, "shared memory", self.shares * heap.half_bytes)


def make_executor(name: str) -> Executor:
    """A new executor of that name; the GPU one is imported on first use: it imports this module.

    Raises:
        KeyError: there is none of that name.
    """
    if name == "shm":
        return ShmExecutor()
    if name == "nvlink":
        executor: Executor = importlib.import_module("tscompile.lowering.nvlink").NvlinkExecutor()
        return executor
    raise KeyError(name)
