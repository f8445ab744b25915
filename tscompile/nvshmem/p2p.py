"""Symmetric memory of a group through torch's own "CUDA" symmetric memory, for where NVSHMEM cannot be used.

Not a user of `torch.distributed._symmetric_memory.rendezvous`, which numbers its exchanges per process: the ranks of two groups
that overlap count differently and would wait for each other for ever (pytorch #196082). Here the group that the rendezvous
sees is one of our own, with the group's order of ranks and a store that numbers exchanges per rendezvous.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..errors import HeapError
from .region import Region

RENDEZVOUS_S = (
    60.0  # for each exchange over the store; all ranks have posted before, so only the mapping itself takes time
)
_PAGE = 4096
_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


class ExchangeStore(dist.Store):
    """The part of `store` under `prefix`, for one rendezvous. Keys end in "<number of the exchange>/<rank>".

    For each beginning of a key the number counts from the first one that is seen, so the ranks agree on it, however many
    exchanges each took part in before.
    """

    def __init__(self, store: dist.Store, prefix: str, timeout_s: float) -> None:
        super().__init__()
        self._store = store
        self._prefix = prefix
        self._timeout = timedelta(seconds=timeout_s)
        self._first: dict[str, int] = {}

    def _key(self, key: str) -> str:
        head, number, rank = key.rsplit("/", 2)
        return f"{self._prefix}/{head}/{int(number) - self._first.setdefault(head, int(number))}/{rank}"

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._key(key), value)

    def get(self, key: str) -> bytes:
        return self._store.get(self._key(key))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._store.wait([self._key(key) for key in keys], self._timeout if timeout is None else timeout)


@contextmanager
def _without_multicast() -> Iterator[None]:
    """Nothing here uses multicast, and its set-up fails on some virtual machines; a user's own allocations may want it."""
    before = os.environ.get(_NO_MULTICAST)
    os.environ[_NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_MULTICAST]
        else:
            os.environ[_NO_MULTICAST] = before


def backend_refusal() -> str:
    """Why torch's symmetric memory cannot be used, "" if it can. Allocates nothing and changes no setting."""
    try:
        from torch.distributed import _symmetric_memory as symm_mem

        backend = symm_mem.get_backend(torch.device("cuda"))
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"this torch has no symmetric memory ({error})"
    if backend is None:
        return "this torch has no symmetric memory for CUDA"
    if backend != "CUDA":  # it is one setting of the process, and the user's
        return f'torch\'s symmetric memory is set to "{backend}": unset TORCH_SYMMMEM, or call set_backend("CUDA") at the start'
    return ""


def _rendezvous(buffer: torch.Tensor, name: str, rank: int, size: int, store: ExchangeStore) -> tuple[Any, Any]:
    """Map the buffers of all ranks; returns torch's handle and the group that it was made with. Collective over the ranks."""
    from torch._C import _distributed_c10d as bindings

    library: Any = bindings  # its hints differ between versions of torch
    symmetric = library._SymmetricMemory
    group = dist.ProcessGroup(store, rank, size)
    library._register_process_group(name, group)
    try:
        try:
            return symmetric.rendezvous(buffer, name), group
        except RuntimeError as error:
            if "no group info" not in str(error):
                raise
        symmetric.set_group_info(name, rank, size, store)  # a torch that does not look for the process group itself
        return symmetric.rendezvous(buffer, name), group
    finally:
        library._unregister_process_group(name)


class SymmMemProvider:
    """Provider over torch's symmetric memory.

    Args:
        ranks: global ranks of the group, in its order.
        rank: index of this rank in the group.
        device: the local GPU, with its index.
        store: gives a store that all ranks of the group share; the default process group's if None.
        timeout_s: bound of each exchange over the store, in seconds. torch then passes file descriptors from rank to rank without
            a bound, for some milliseconds: a rank that is killed just then leaves its peers waiting.
    """

    name = "symm_mem"

    def __init__(
        self,
        ranks: tuple[int, ...],
        rank: int,
        device: torch.device,
        store: Callable[[], dist.Store] | None = None,
        timeout_s: float = RENDEZVOUS_S,
    ) -> None:
        self._ranks = ranks
        self._rank = rank
        self._device = device
        self._store = store or distributed_c10d._get_default_store
        self._timeout_s = timeout_s
        self._next: torch.Tensor | None = None
        self._kept: list[
            Any
        ] = []  # stores whose Python half torch must find alive, for as long as it holds the C++ half

    def _allocate(self, nbytes: int) -> torch.Tensor:
        # Not `symm_mem.empty`: it takes from a pool, whose blocks may differ between ranks that are in different groups.
        # One page more than asked for, since torch may put its own words in front of the buffer.
        from torch._C._distributed_c10d import _SymmetricMemory

        try:
            with torch.inference_mode(False):
                return _SymmetricMemory.empty_strided_p2p((nbytes + _PAGE,), (1,), torch.uint8, self._device)
        except RuntimeError as error:
            text = str(error).splitlines()[0] if str(error) else repr(error)
            raise HeapError(
                f"no {nbytes >> 20} MiB of GPU memory ({text}): free memory, or use smaller batches"
            ) from error

    def prepare(self, nbytes: int, claim: bool) -> dict[str, object]:
        self.discard()
        refusal = backend_refusal()
        if refusal:
            return {"refusal": refusal}
        if claim:
            try:
                self._next = self._allocate(nbytes)
            except HeapError as error:
                return {"refusal": str(error)}
        return {"token": secrets.token_hex(8)} if self._rank == 0 else {}

    def connect(self, posts: list[dict[str, object]], nbytes: int) -> Region:
        buffer, self._next = self._next, None
        if buffer is None or buffer.numel() != nbytes + _PAGE:
            buffer = None  # first, so that the two are never there together
            buffer = self._allocate(nbytes)
        name = f"tscompile/symm_mem/{posts[0]['token']}"
        store = ExchangeStore(self._store(), name, self._timeout_s)
        self._kept.append(store)
        try:
            with torch.cuda.device(self._device), _without_multicast():
                handle, group = _rendezvous(buffer, name, self._rank, len(self._ranks), store)
        except RuntimeError as error:
            raise HeapError(
                f"torch's symmetric memory cannot map the peers' GPUs ({error}): look at the logs of ranks "
                f"{list(self._ranks)}, and give them one container and one TMPDIR"
            ) from error
        pad = -buffer.data_ptr() % _PAGE
        if handle is None or handle.buffer_ptrs[self._rank] != buffer.data_ptr():
            raise HeapError(
                "torch's symmetric memory does not know this rank's buffer: report this with the output of "
                "python -m tscompile.doctor"
            )
        held: list[Any] = [buffer, handle, group]
        addresses = tuple(int(address) + pad for address in handle.buffer_ptrs)
        return Region(self.name, self._rank, self._device, addresses, nbytes, held.clear)

    def discard(self) -> None:
        self._next = None

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)
