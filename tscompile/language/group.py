"""Symmetric memory for a program's own kernels: tensors that every rank of a process group has, and the context that kernels take.

    with tl.SymmetricGroup(nbytes=64 << 20) as group:
        inbox = group.tensor((1024,), torch.float32)
        kernel(group.context, x, inbox, to, epoch)   # in it: tl.put_block(tl.remote(ctx, inbox[0], to), x[0], 4096, ...)
        group.check()

Ranks are processes of one host: on CPU they share POSIX memory, on GPUs the memory that the fused ops use (NVSHMEM, or torch's own
symmetric memory). Nothing here waits for ever, and a rank that fails inside the `with` ends the waits of all others.
"""

from __future__ import annotations

import json
import time
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from .. import switches
from ..errors import HeapError, PeerError
from ..nvshmem.device import CONTROL_BYTES, SLOTS, NvlinkHeap
from ..nvshmem.shm import ShmHeap
from ..nvshmem.world import DEFAULT_HEAP_BYTES
from ..observe import once
from . import context
from .nodes import Nodes
from .stream import GroupStream

FLAGS = 1 << 16
"""int32 words of the "flags" region."""

_ABORT, _CELL, _TEAM = 0, 64, 256  # bytes from the control base
_FLAGS_AT = 4096
_ALIGNMENT = 256  # of tensors, in bytes
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.02


class SymmetricGroup:
    """Symmetric memory of the ranks of one process group. Making it is collective, and so is `barrier`.

    Args:
        group: the process group, of 1 to MAX_RANKS ranks; the default one if None.
        nbytes: room for tensors on each rank.
        device: of the memory: the CPU, or this rank's GPU. If None, the current GPU where the group's backend is NCCL, else the CPU.
        timeout_s: bound of every wait, in kernels and here, in seconds.
        ranks_per_node: see `nodes`; all ranks form one node if None.

    Raises:
        ValueError: nodes of `ranks_per_node` do not make up the group.
        HeapError: there is no such memory on some rank, or ranks have different `ranks_per_node`; every rank raises.
        PeerError: a rank did not come in time.

    Attributes:
        rank, size: of this rank in the group, and of the group.
        nodes: which ranks are of one node: for algorithms of two levels, whatever memory the ranks share.
        device: where the tensors are.
        context: what kernels take as `ctx`, int64 `[WORDS]` on the device.
        flags: the own "flags" region, int32 `[FLAGS]`: for `tl.barrier`, and flags that are addressed by offset.
        provider: what the memory is: "shm" (CPU), "nvshmem", or "symm_mem", torch's own.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        nbytes: int = 64 << 20,
        *,
        device: torch.device | None = None,
        timeout_s: float = 30.0,
        ranks_per_node: int | None = None,
    ) -> None:
        wanted = {name: switches.switch(name) for name in (switches.NVSHMEM, switches.DISTRIBUTED)}
        self._ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        self.rank, self.size = self._ranks.index(dist.get_rank()), len(self._ranks)
        if self.size > context.MAX_RANKS:
            raise HeapError(f"{self.size} ranks: kernels address {context.MAX_RANKS} at most, so form smaller groups")
        self.nodes = Nodes(self.rank, self.size, self.size if ranks_per_node is None else ranks_per_node)
        self.device = device or _device_of(group)
        self.timeout_s = timeout_s
        self._store, self._turn = _store_of(self._ranks), 0
        self._room, self._used = nbytes, 0
        self._heap = self._connect(nbytes)
        self._bases = [self._address(rank) for rank in range(self.size)]
        self._offsets: dict[int, int] = {}
        self._abort = [self._view(rank, _ABORT, (1,), torch.int32) for rank in range(self.size)]
        self._record = torch.zeros(context.RECORD_WORDS, dtype=torch.int64)
        if self.device.type == "cuda":
            self._record = self._record.pin_memory()
        self.flags = self._view(self.rank, _FLAGS_AT, (FLAGS,), torch.int32)
        self.provider = self._heap.provider if isinstance(self._heap, NvlinkHeap) else "shm"
        self._view(self.rank, _TEAM + 8, (1,), torch.int64).fill_(self._pes())
        self.context = self._fill_context()
        self.barrier()
        self._say_what_is_in_vain(wanted)

    def __enter__(self) -> SymmetricGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:  # peers may be inside kernels that write here, so the memory stays until the process ends
            self.abort(f"{type(error).__name__}: {error}")
        else:
            self.barrier()
            self.close()

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """This rank's part of a new symmetric tensor, all zero. Every rank makes the same tensors in the same order.

        It need not be freed and cannot be: the memory goes with the group.

        Raises:
            HeapError: the room that `nbytes` set is used up.
        """
        offset = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        tensor_bytes = dtype.itemsize * int(torch.Size(shape).numel())
        if offset + tensor_bytes > self._room:
            raise HeapError(
                f"{tensor_bytes} bytes more than {offset} of {self._room} do not fit: make the group with a larger nbytes"
            )
        self._used = offset + tensor_bytes
        made = self._view(self.rank, CONTROL_BYTES + offset, tuple(shape), dtype)
        self._offsets[made.data_ptr()] = offset
        return made

    def peers(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's part of a symmetric tensor as mapped here, in rank order; writing to them needs no kernel.

        Raises:
            HeapError: `tensor` was not made by `tensor`, or is only a part of what that made.
        """
        offset = self._offsets.get(tensor.data_ptr())
        if offset is None:
            raise HeapError("this tensor is not symmetric: pass what SymmetricGroup.tensor returned")
        return [
            self._view(rank, CONTROL_BYTES + offset, tuple(tensor.shape), tensor.dtype) for rank in range(self.size)
        ]

    def remote(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """Where another rank keeps a symmetric tensor, or a contiguous part of one, as mapped here.

        Raises:
            HeapError: `tensor` is not symmetric or not contiguous, or there is no such rank.
        """
        if not 0 <= rank < self.size:
            raise HeapError(f"rank {rank} of a group of {self.size}")
        offset = tensor.data_ptr() - self._bases[self.rank]
        end = offset + tensor.numel() * tensor.element_size()
        if not 0 <= offset <= end <= CONTROL_BYTES + self._used or not tensor.is_contiguous():
            raise HeapError(
                "this tensor is not symmetric: pass a contiguous part of what SymmetricGroup.tensor returned"
            )
        return self._view(rank, offset, tuple(tensor.shape), tensor.dtype)

    def nvshmem(self) -> torch.Tensor:
        """The context, for kernels that make calls of `tl.nvshmem`; on CPU ranks those need no NVSHMEM.

        Raises:
            HeapError: NVSHMEM cannot address the memory of this group; the message says why it is another.
        """
        if self.provider == "symm_mem":
            assert isinstance(self._heap, NvlinkHeap)
            raise HeapError(
                "NVSHMEM cannot address the memory of this group, which is torch's symmetric memory "
                f"({self._heap.provider_reason}): python -m tscompile.doctor says more; calls outside of tl.nvshmem work"
            )
        return self.context

    def on_stream(self, stream: torch.cuda.Stream | None = None) -> GroupStream:
        """Copies, signals, waits and barriers that the host issues on a stream; the current one of the time of each call if None."""
        return GroupStream(self, stream)

    def barrier(self) -> None:
        """Wait until all ranks are here and their devices have done what they had to do.

        Raises:
            PeerError: a rank failed, gave up a wait in a kernel, or does not come in time.
        """
        self.check()
        self._exchange(None)

    def check(self) -> None:
        """Wait for this rank's device; the results of its kernels can be trusted if this does not raise.

        Raises:
            PeerError: a kernel of this or of another rank gave up a wait, or a rank failed.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        writer = int(self._abort[self.rank].item()) - 1
        if writer < 0:
            return
        said = self._failure()
        if said is not None:
            raise said
        if int(self._record[0]):
            raise self._given_up(*self._record[1:5].tolist())
        text = f"rank {self._ranks[writer]} gave up a wait, and so ended those of all ranks"
        raise PeerError(self._ranks[writer], "", f"{text}: look at its error")

    def abort(self, reason: str) -> None:
        """Say that this rank has failed: ends the waits of all ranks, in kernels and here."""
        self._store.compare_set("failed", "", json.dumps([dist.get_rank(), reason[:500]]))  # the first one stands
        word = torch.tensor([1 + self.rank], dtype=torch.int32)
        if self.device.type == "cpu":
            for theirs in self._abort:
                theirs.copy_(word)
            return
        # By copy engine and on a stream of its own: the kernels that wait may hold every SM, and the current stream.
        word, stream = word.pin_memory(), torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            for theirs in self._abort:
                theirs.copy_(word, non_blocking=True)
        stream.synchronize()

    def close(self) -> None:
        """Give the memory back; the tensors must not be used any more. No rank's kernels may still use it (`barrier`)."""
        if isinstance(self._heap, NvlinkHeap):
            self._heap.release()

    def _connect(self, nbytes: int) -> ShmHeap | NvlinkHeap:
        """Map the memory of all ranks, and clear the own."""
        heap: ShmHeap | NvlinkHeap | None = None
        try:
            if self.device.type == "cuda":
                heap = NvlinkHeap(
                    self.rank,
                    self.size,
                    self.device,
                    ranks=self._ranks,
                    heap_bytes=max(DEFAULT_HEAP_BYTES, 2 * nbytes),
                )
                post = heap.prepare(-(-nbytes // SLOTS))
            else:
                heap = ShmHeap(self.rank, self.size)  # new files read as zeros
                post = heap.prepare(-(-(CONTROL_BYTES + nbytes) // 2))
        except HeapError as error:
            post = {"refused": str(error)}
        try:
            said = self._exchange([post, self.nodes.ranks_per_node])
            posts, widths = [post for post, _ in said], [width for _, width in said]
            if len(set(widths)) > 1:
                raise HeapError(f"ranks_per_node must be the same on all ranks; they passed {widths}")
            for rank, other in zip(self._ranks, posts, strict=True):
                if "refused" in other:
                    raise HeapError(f"rank {rank} has no symmetric memory: {other['refused']}")
            assert heap is not None
            heap.connect(posts)
            if isinstance(heap, NvlinkHeap):
                with torch.no_grad():
                    heap.memory.view(self.rank, CONTROL_BYTES, (SLOTS * heap.half_bytes,), torch.uint8).zero_()
                torch.cuda.synchronize(self.device)
            self._exchange(None)
        finally:
            if heap is not None:
                heap.release_names()
        return heap

    def _view(self, owner: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        memory = self._heap.memory if isinstance(self._heap, NvlinkHeap) else self._heap
        return memory.view(owner, offset, shape, dtype)

    def _address(self, owner: int) -> int:
        return self._view(owner, 0, (1,), torch.uint8).data_ptr()

    def _fill_context(self) -> torch.Tensor:
        own = self._bases[self.rank]
        return context.fill(
            torch.empty(context.WORDS, dtype=torch.int64),
            rank=self.rank,
            size=self.size,
            timeout_ns=int(self.timeout_s * 1e9),
            epoch_cell=own + _CELL,
            abort_word=own + _ABORT,
            abort_offset=_ABORT,
            record=self._record.data_ptr(),
            data=[base + CONTROL_BYTES for base in self._bases],
            flags=[base + _FLAGS_AT for base in self._bases],
            control=self._bases,
            team=own + _TEAM,
        ).to(self.device)

    def _say_what_is_in_vain(self, wanted: dict[str, bool | None]) -> None:
        """Warn of TileScale's switches that ask for what this group is not."""
        if wanted[switches.DISTRIBUTED] is False:
            once(switches.DISTRIBUTED, "%s=0 has no effect: this program makes symmetric memory", switches.DISTRIBUTED)
        if wanted[switches.NVSHMEM] and self.provider != "nvshmem":
            heap = self._heap
            reason = heap.provider_reason if isinstance(heap, NvlinkHeap) else "CPU ranks share POSIX memory instead"
            once(switches.NVSHMEM, "%s=1 has no effect on ranks %s: %s", switches.NVSHMEM, self._ranks, reason)
        if wanted[switches.NVSHMEM] is False and self.provider == "nvshmem":
            once(switches.NVSHMEM, "%s=0 came too late: this process uses NVSHMEM already", switches.NVSHMEM)

    def _given_up(self, peer: int, site: int, expected: int, seen: int) -> PeerError:
        """The error that stands for this rank's record."""
        if site == context.REFUSED:
            text = context.REFUSALS.get(expected, f"reason {expected}")
            return PeerError(
                dist.get_rank(), "", f"a kernel of rank {dist.get_rank()} made a call that cannot be: {text} ({seen})"
            )
        guilty = self._ranks[peer] if 0 <= peer < self.size else -1
        whom = f"for rank {guilty}" if guilty >= 0 else "for a signal"
        text = f"the kernel waited {whom} at site {site} until its flag is {expected}; it is {seen}"
        return PeerError(guilty, str(site), f"rank {dist.get_rank()} gave up: {text}: {_ADVICE}")

    def _pes(self) -> int:
        """The word of the team that says which PEs the ranks are; 0: NVSHMEM cannot address them."""
        if self.provider == "symm_mem":
            return 0
        return context.pack_pes(self._ranks if self.provider == "nvshmem" else range(self.size))

    def _failure(self) -> PeerError | None:
        """The error that stands for what another rank said when it failed."""
        if not self._store.check(["failed"]):
            return None
        rank, reason = json.loads(self._store.get("failed"))
        return PeerError(rank, "", f"rank {rank} failed: {reason}")

    def _exchange(self, value: Any) -> list[Any]:
        """What every rank passed, in rank order; collective."""
        self._turn += 1
        self._store.set(f"{self._turn}/{self.rank}", json.dumps(value))
        keys = [f"{self._turn}/{rank}" for rank in range(self.size)]
        deadline, pause = time.monotonic() + self.timeout_s, _FIRST_PAUSE_S
        while not self._store.check(keys):
            failure = self._failure()
            if failure is not None:
                raise failure
            if time.monotonic() > deadline:
                late = next(rank for rank, key in zip(self._ranks, keys, strict=True) if not self._store.check([key]))
                raise PeerError(late, "", f"rank {late} did not come within {self.timeout_s:g} s: {_ADVICE}")
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE_S)
        values = [json.loads(self._store.get(key)) for key in keys]
        if self._turn > 2:  # all ranks are in this turn, so nobody reads those before the last one any more
            self._store.delete_key(f"{self._turn - 2}/{self.rank}")
        return values


_ADVICE = "look for the first error in its log, or raise timeout_s if it is only slow"


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _store_of(ranks: tuple[int, ...]) -> dist.Store:
    """A store for one group of these ranks: they count how many of them they made, and count alike."""
    store = dist.PrefixStore(f"tscompile/language/{ranks}", distributed_c10d._get_default_store())
    made = store.add(f"made/{dist.get_rank()}", 1)
    return dist.PrefixStore(str(made), store)
