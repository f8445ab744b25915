"""Timing, printing and topology for programs around distributed kernels, and barriers on words of a tensor; on CPU ranks."""

from __future__ import annotations

import ctypes
import io
import itertools
import time
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tscompile.language as tl
from tests.worlds import run_world
from tscompile.errors import TscompileError
from tscompile.language import topology

ROUNDS = 40


def together(rank: int, size: int) -> list[Any]:
    from . import rank_kernels

    d = tl.dialect("cpu")
    meet = d.compile(rank_kernels.meeting_blocks(d, size))
    with tl.SymmetricGroup(nbytes=1 << 16) as group:
        words, cells = group.tensor((64,), torch.int32), group.tensor((size,), torch.int32)
        out, epochs = torch.zeros(2, dtype=torch.int32), itertools.count(1, 2)
        for _ in range(ROUNDS):
            if rank == 1:
                time.sleep(0.001)
            meet(group.context, words, cells, next(epochs), out)
        wrong = out.tolist()

        calls = itertools.count()
        slow = tl.perf_fn(lambda: (next(calls), time.sleep(0.02 if rank == 1 else 0.001)), group, warmup=2, iters=5)
        with pytest.raises(ValueError, match="one call or more"):
            tl.perf_fn(lambda: None, group, iters=0)

        said = io.StringIO()
        with redirect_stdout(said):
            tl.dist_print(group, "rows:", rank + 10)
            tl.dist_print(group, f"a\nb{rank}", ranks=[1])
    return [wrong, slow, next(calls), said.getvalue()]


@pytest.mark.slow
def test_on_ranks() -> None:
    (wrong, slow, calls, said), second = run_world(2, together)
    assert wrong == second[0] == [0, 2 * ROUNDS], "cells that were stale, and meetings"
    assert slow == second[1] and 20 <= slow < 200, "all ranks know the time of the slowest one"
    assert calls == second[2] == 7
    assert said == "[rank 0] rows: 10\n[rank 1] rows: 11\n[rank 1] a\n[rank 1] b1\n" and second[3] == ""


class Nvml:
    """Stands for libnvidia-ml: four GPUs, of which some pairs lack a capability."""

    def __init__(self, missing: set[tuple[int, int, int]]) -> None:
        self.missing = missing

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        if not uuid.startswith(b"GPU-"):
            return 2
        handle._obj.value = int(uuid.removeprefix(b"GPU-")) + 1
        return 0

    def nvmlDeviceGetP2PStatus(self, one: ctypes.c_void_p, other: ctypes.c_void_p, capability: int, status: Any) -> int:
        status._obj.value = 6 if (one.value - 1, other.value - 1, capability) in self.missing else 0
        return 0


def test_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=index))
    nvml = Nvml(set())
    monkeypatch.setattr(topology, "_nvml", lambda: nvml)
    assert tl.has_fullmesh_nvlink() and tl.supports_p2p_native_atomic()
    nvml.missing = {(2, 3, 2)}
    assert not tl.has_fullmesh_nvlink() and tl.has_fullmesh_nvlink([0, 1, 2]) and tl.has_fullmesh_nvlink([3])
    assert tl.supports_p2p_native_atomic()
    nvml.missing = {(3, 0, 3)}
    assert tl.has_fullmesh_nvlink() and not tl.supports_p2p_native_atomic() and tl.supports_p2p_native_atomic([0, 1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="x"))
    monkeypatch.setattr(Nvml, "nvmlDeviceGetHandleByUUID", lambda *_: 6)
    with pytest.raises(TscompileError, match="nvmlDeviceGetHandleByUUID fails with 6: does nvidia-smi run here"):
        tl.has_fullmesh_nvlink()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without an NVIDIA driver")
def test_topology_without_a_driver() -> None:
    with pytest.raises(TscompileError, match=r"there is no NVIDIA driver here .*: run this where the GPUs are"):
        tl.has_fullmesh_nvlink()
