"""A world of ranks that are threads of this process, with an NVSHMEM library that is none and memory of the CPU."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tscompile.nvshmem import host
from tscompile.nvshmem.provider import NvshmemProvider
from tscompile.nvshmem.world import World

CPU = torch.device("cpu")


def together(actions: Sequence[Callable[[], Any]], timeout_s: float = 30.0) -> list[Any]:
    """Run one action per rank at the same time; returns their results, or what they raised."""
    results: list[Any] = [None] * len(actions)

    def run(index: int) -> None:
        try:
            results[index] = actions[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    assert not any(thread.is_alive() for thread in threads)
    return results


class Function:
    """Stands for a ctypes function: has `argtypes` and `restype`, and calls `body`."""

    def __init__(self, body: Callable[..., Any]) -> None:
        self.body = body
        self.calls = 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.body(*args)


class Network:
    """What the fake libraries of all ranks share: calls that are collective wait for everybody here."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.size = size
        self.bases = [0] * size
        self.maps: list[mmap.mmap] = []


class FakeLibrary:
    """The functions of libnvshmem_host of one rank; attributes say what goes wrong."""

    def __init__(self, network: Network, rank: int) -> None:
        self.network = network
        self.rank = rank
        self.status = 0
        self.place = (rank, network.size)
        self.init_code = 0
        self.room = 1 << 40
        self.modules: list[int] = []
        self.module_code = 0
        self.hangs = threading.Event()
        self.hangs.set()  # cleared: the initialisation waits
        for name in dir(self):
            if name.startswith("_do_"):
                setattr(self, name.removeprefix("_do_"), Function(getattr(self, name)))

    def _do_nvshmemx_init_status(self) -> int:
        return self.status

    def _do_nvshmemx_get_uniqueid(self, uid: Any) -> int:
        uid._obj.internal = b"meet me"
        return 0

    def _do_nvshmemx_set_attr_uniqueid_args(self, rank: int, size: int, uid: Any, attributes: Any) -> int:
        assert uid._obj.internal == b"meet me"
        assert uid._obj.version == (1 << 16) + 128
        assert attributes._obj.version == (1 << 16) + 144
        assert (attributes._obj.args.version, attributes._obj.args.uid_args.version) == (
            (1 << 16) + 128,
            (1 << 16) + 24,
        )
        return 0

    def _do_nvshmemx_hostlib_init_attr(self, flags: int, attributes: Any) -> int:
        assert flags == 8
        self.hangs.wait()
        if self.init_code:
            return self.init_code
        self.network.barrier.wait(10)
        self.status = 2
        return 0

    def _do_nvshmem_my_pe(self) -> int:
        return self.place[0]

    def _do_nvshmem_n_pes(self) -> int:
        return self.place[1]

    def _do_nvshmem_align(self, alignment: int, nbytes: int) -> int | None:
        ok = nbytes <= self.room
        if ok:
            memory = mmap.mmap(-1, nbytes)
            self.network.maps.append(memory)
            self.network.bases[self.rank] = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.network.barrier.wait(10)
        return self.network.bases[self.rank] if ok else None

    def _do_nvshmem_ptr(self, address: int, pe: int) -> int | None:
        return self.network.bases[pe] + address - self.network.bases[self.rank]

    def _do_nvshmemx_cumodule_init(self, module: int) -> int:
        self.modules.append(module)
        return self.module_code

    def _do_nvshmemx_vendor_get_version_info(self, major: Any, minor: Any, patch: Any) -> None:
        major._obj.value, minor._obj.value, patch._obj.value = 3, 4, 5


class CpuProvider(NvshmemProvider):
    """The real provider; only the device that it waits for is the CPU."""

    synchronized = 0

    def synchronize(self) -> None:
        self.synchronized += 1


def make_worlds(
    size: int, store: dist.Store | None = None, heap_bytes: Sequence[int] | None = None, **options: Any
) -> tuple[list[World], list[FakeLibrary]]:
    """One world per rank, over one store, and the fake libraries below; nobody has entered."""
    network = Network(size)
    libraries = [FakeLibrary(network, rank) for rank in range(size)]
    wrapped = [host.Nvshmem(library, "a fake") for library in libraries]
    shared = store or dist.HashStore()
    options = {"muster_s": 5.0, "init_s": 5.0, **options}
    worlds = [
        World(
            shared,
            rank,
            size,
            CPU,
            (heap_bytes or [64 << 20] * size)[rank],
            load=lambda rank=rank: wrapped[rank],
            facts=lambda device, rank=rank: {"host": "here", "gpu": f"GPU-{rank}"},
            touch=lambda device: None,
            **options,
        )
        for rank in range(size)
    ]
    return worlds, libraries
