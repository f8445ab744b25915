"""The heap of a group of GPUs: host words in shared memory, data in GPU memory that all ranks of the group map.

Not for kernels, and not for agreement (lowering/vote.py). The control plane is a ShmHeap with its smallest arena. The data plane
is one region per rank, from the best provider that serves all ranks:

    [control, 1 MiB][slot 0][slot 1][slot 2][slot 3]       each slot `half_bytes`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import HeapError
from .arena import grains
from .heap import AbortRecord
from .p2p import SymmMemProvider
from .provider import NvshmemProvider
from .region import DeviceMemory, Provider
from .shm import ShmHeap
from .world import DEFAULT_HEAP_BYTES, current_world

CONTROL_BYTES = (
    1 << 20
)  # flags and counters of the kernels, at the start of each rank's region; zero when a region is new
SLOTS = 4

Post = dict[str, object]


def needed_bytes(half_bytes: int) -> int:
    """Size of each rank's region for slots of `half_bytes`."""
    return CONTROL_BYTES + SLOTS * grains(half_bytes)


def gpu_facts(device: torch.device) -> Post:
    """The UUID of `device`, and for each other visible GPU whether `device` can address its memory."""
    own = device.index
    uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    reach = {
        uuid: bool(torch.cuda.can_device_access_peer(own, index)) for index, uuid in enumerate(uuids) if index != own
    }
    return {"gpu": uuids[own], "reach": reach}


@dataclass(frozen=True)
class Choice:
    """The provider of a group; `reason` says why this one, and why not the better ones."""

    provider: str
    reason: str


def decide(posts: Sequence[Mapping[str, Any]], ranks: Sequence[int], order: Sequence[str]) -> Choice:
    """The first provider of `order` that no rank refuses. A pure function of what all ranks posted, so all ranks agree.

    Args:
        posts: of `NvlinkHeap.prepare`, in rank order.
        ranks: global rank of each index, for messages.
        order: names of the providers, the best one first.

    Raises:
        HeapError: two ranks share a GPU, a GPU cannot address another one, or a rank refuses each provider.
    """
    for index, post in enumerate(posts):
        for other, peer in enumerate(posts):
            if other == index:
                continue
            if post["gpu"] == peer["gpu"]:
                raise HeapError(
                    f"ranks {ranks[index]} and {ranks[other]} share one GPU: give each rank its own (LOCAL_RANK)"
                )
            if post["reach"].get(peer["gpu"]) is False:
                raise HeapError(
                    f"the GPU of rank {ranks[index]} cannot address the memory of that of rank {ranks[other]}: "
                    "nvidia-smi topo -p2p rw shows which pairs can; form groups of those"
                )
    refused: list[str] = []
    for name in order:
        refusals = [
            f"rank {rank}: {post['providers'][name]['refusal']}"
            for rank, post in zip(ranks, posts, strict=True)
            if post["providers"][name].get("refusal")
        ]
        if not refusals:
            return Choice(name, "; ".join([*refused, f"{name}: all ranks can use it"]))
        refused.append(f"not {name}: {refusals[0]}")
    raise HeapError(
        f"no GPU memory that all ranks of the group reach ({'; '.join(refused)}): python -m tscompile.doctor says more"
    )


class NvlinkHeap:
    """Symmetric heap of the GPU ranks of one host.

    It lives like a ShmHeap: `prepare`, exchange of the posts, `connect`, `release_names`; the same steps replace the region
    by a larger one. Then the old region goes by `retire`, which only the caller can time: see there.

    Args:
        rank: index of this rank in the group.
        size: number of ranks.
        device: the local GPU, with its index.
        ranks: global ranks of the group, in its order.
        heap_bytes: budget of each rank's arena, for all groups together.
        providers: where regions come from, the best first; NVSHMEM, then torch's symmetric memory, if None.
        facts: gives what ranks must know of each other's GPU.

    Raises:
        HeapError: no C compiler, or no room for the control words.

    Attributes:
        half_bytes: size of one slot, 0 before the first `connect`.
        memory: the regions; set by `connect`.
        provider: name of the provider of `memory`, "" before.
        provider_reason: why this one, and why not a better one.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        *,
        ranks: tuple[int, ...],
        heap_bytes: int = DEFAULT_HEAP_BYTES,
        providers: Sequence[Provider] | None = None,
        facts: Callable[[torch.device], Post] = gpu_facts,
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.ranks = ranks
        self.half_bytes = 0
        self.provider = ""
        self.provider_reason = ""
        self._facts = facts
        self._control = ShmHeap(rank, size)
        self.entry = self._control.entry
        self._memory: DeviceMemory | None = None
        self._old: list[DeviceMemory] = []
        if providers is None:
            providers = (
                NvshmemProvider(ranks, rank, device, lambda: current_world(device, heap_bytes)),
                SymmMemProvider(ranks, rank, device),
            )
        self._providers = {provider.name: provider for provider in providers}

    @property
    def connected(self) -> bool:
        return self._control.connected and self._memory is not None

    @property
    def memory(self) -> DeviceMemory:
        """The regions of all ranks.

        Raises:
            HeapError: `connect` has not succeeded yet.
        """
        if self._memory is None:
            raise HeapError("this group has no GPU memory yet: its ranks must connect first")
        return self._memory

    def slot(self, owner: int, slot: int) -> int:
        """Address of a slot (0 to SLOTS - 1) of `owner`, as mapped in this process."""
        return self.memory.addresses[owner] + CONTROL_BYTES + slot * self.half_bytes

    def prepare(self, half_bytes: int) -> Post:
        """Take what this rank can take for slots of `half_bytes`; returns what peers need to know.

        The first call in a process may wait until all ranks of the world have entered NVSHMEM or the bound has passed.

        Raises:
            HeapError: no room for the control words, NVSHMEM hangs, or CUDA does not answer.
        """
        self.discard()
        half = grains(half_bytes)
        post = self._control.prepare(1)
        try:
            facts = self._facts(self.device)
        except RuntimeError as error:
            raise HeapError(
                f"CUDA does not describe its GPUs ({error}): python -m tscompile.doctor says more"
            ) from error
        answers: dict[str, Post] = {}
        claim = True
        for name, provider in self._providers.items():
            answers[name] = provider.prepare(needed_bytes(half), claim)
            claim = claim and bool(answers[name].get("refusal"))
        return {**post, **facts, "half_bytes": half, "providers": answers}

    def connect(self, peers: list[Post]) -> None:
        """Choose the provider, map the regions that every rank's `prepare` described, and use them from now on.

        If the posts differ in size, the smallest counts. On return this rank's control block is zero, and its device has no work
        left; a peer may use the block after the next stage of the caller's ballot, in which all ranks say that they are here.

        Raises:
            HeapError: no provider serves all ranks, or a region cannot be mapped; the old regions stay in use.
        """
        rows: list[dict[str, Any]] = list(peers)
        choice = decide(rows, self.ranks, tuple(self._providers))
        self._control.connect(peers)
        half = min(int(row["half_bytes"]) for row in rows)
        provider = self._providers[choice.provider]
        memory = provider.connect([row["providers"][choice.provider] for row in rows], needed_bytes(half))
        try:
            with torch.no_grad():
                memory.view(self.rank, 0, (CONTROL_BYTES,), torch.uint8).zero_()
            provider.synchronize()
        except RuntimeError as error:
            memory.release()
            raise HeapError(f"the new GPU memory of rank {self.ranks[self.rank]} cannot be written: {error}") from error
        if self._memory is not None:
            self._old.append(self._memory)
        self._memory = memory
        self.half_bytes = half
        self.provider, self.provider_reason = choice.provider, choice.reason
        self._discard_regions()  # of the other providers; the control segments keep their names until all peers mapped them

    def retire(self, keep: Sequence[object] = ()) -> None:
        """Release the regions that `connect` has replaced, but for those to keep.

        The caller has seen that all ranks connected: each waited for its device in `connect`, so no eager kernel uses the old
        regions any more. A captured graph does, whenever it is replayed: its region must be kept.
        """
        old, self._old = self._old, []
        for memory in old:
            if any(memory is kept for kept in keep):
                self._old.append(memory)
            else:
                memory.release()

    def release(self) -> None:
        """Release all regions; the heap can be prepared again. The caller has made sure that no rank's kernels use them."""
        self.discard()
        self.retire()
        memory, self._memory = self._memory, None
        self.half_bytes = 0
        if memory is not None:
            memory.release()

    def release_names(self) -> None:
        """Remove the names of this rank's control segments: every peer has mapped them, or will not."""
        self._control.release_names()
        self.discard()

    def discard(self) -> None:
        """Forget what `prepare` took last, unless `connect` has used it."""
        self._control.discard()
        self._discard_regions()

    def _discard_regions(self) -> None:
        for provider in self._providers.values():
            provider.discard()

    def enter(self, epoch: int, name: str) -> bool:
        return self._control.enter(epoch, name)

    def entered(self, peer: int) -> int:
        return self._control.entered(peer)

    def start(self, graph: int) -> None:
        self._control.start(graph)

    def started(self, peer: int) -> int:
        return self._control.started(peer)

    def site_of(self, peer: int, epoch: int) -> str:
        return self._control.site_of(peer, epoch)

    def alive(self, peer: int) -> bool:
        return self._control.alive(peer)

    def downgrade(self, epoch: int, reason: str) -> None:
        self._control.downgrade(epoch, reason)

    def downgraded(self) -> tuple[int, str] | None:
        return self._control.downgraded()

    def abort(self, guilty: int, text: str) -> None:
        self._control.abort(guilty, text)

    def aborted(self) -> AbortRecord | None:
        return self._control.aborted()
