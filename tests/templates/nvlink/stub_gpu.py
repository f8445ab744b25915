"""One rank of a GPU group on the CPU, from the runtime down to stream.c: only the calls of the CUDA driver are stubs (stub_cuda.c)."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nvshmem.test_device import fake_heaps, grow
from tscompile.lowering import nvlink, runtime
from tscompile.lowering.group import GroupState
from tscompile.lowering.nvlink import NvlinkExecutor
from tscompile.nvshmem import native, stream
from tscompile.problem import Plan
from tscompile.templates.nvlink import channel, exchange, gather_blocks, gather_rows, gemm_reduce, mesh_gemm

from .fake_gpu import FakeDriver, FakeTorch

CALLS = ("copy", "rows", "flag", "record", "await", "encode", "launch", "flags")  # as stub_cuda.c numbers them
GROUP = "a group"


def fused_only() -> list[torch.Tensor]:
    """Stands for an op's reference."""
    raise AssertionError("the original ops ran")


class StubDriver(stream.Driver):
    """The product's native calls on stub_cuda.c."""

    def __init__(self) -> None:
        source = Path(stream.__file__).with_name("stream.c")
        flags = (f"-I{source.parent}", "-ldl")
        super().__init__(native.build(Path(__file__).with_name("stub_cuda.c"), flags, (source,)))
        self._count = ctypes.c_int.in_dll(self._library, "stub_count")
        self._calls = (ctypes.c_int * 4096).in_dll(self._library, "stub_calls")
        self.refused = ctypes.c_int.in_dll(self._library, "stub_refused")  # number of a call that fails, -1 for none
        self._shown = ctypes.c_int.in_dll(self._library, "stub_shown")
        self._parameters = (ctypes.c_uint64 * 64).in_dll(self._library, "stub_parameters")
        self._flags = (ctypes.c_uint64 * 128).in_dll(self._library, "stub_flags")
        self.refused.value, self._shown.value = -1, 0
        self.calls()

    def calls(self) -> list[str]:
        """The driver's calls since the last look."""
        found = [CALLS[kind] for kind in self._calls[: self._count.value]]
        self._count.value = 0
        return found

    def flags(self, count: int) -> list[tuple[int, int]]:
        """Addresses and values of the first flags of the last call that set several."""
        return [(self._flags[2 * i], self._flags[2 * i + 1]) for i in range(count)]

    def show(self, parameters: int) -> None:
        """How many parameters of a launch to keep."""
        self._shown.value = parameters

    def parameters(self) -> list[int]:
        """The first eight bytes of each parameter of the last launch; of a tensor map, its address."""
        return list(self._parameters[: self._shown.value])


class StubRank:
    """One rank of `size`, whose ops the runtime launches. Of several, the last one's `torch` and `driver` count."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        rank: int = 1,
        size: int = 4,
        group: str = GROUP,
        slot_bytes: int = 4 << 20,
    ) -> None:
        self.name = group
        heaps, _ = fake_heaps(size)
        grow(heaps, [slot_bytes] * size)
        self.driver, self.torch = StubDriver(), FakeTorch()
        self.kernels = FakeDriver(heaps[rank].memory)  # type: ignore[arg-type]
        for module in (exchange, gather_blocks, gather_rows, gemm_reduce, mesh_gemm, nvlink):
            patch.setattr(module, "kernel", self.kernels.kernel)
        patch.setattr(channel, "torch", self.torch)
        patch.setattr(channel.stream, "load", lambda: self.driver)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(nvlink, "_TIMED", (-1,))  # by events of torch
        patch.setattr(nvlink, "_watchdog", type("Watch", (), {"watch": staticmethod(lambda executor: None)}))
        ranks = tuple(range(size))
        self.executor = NvlinkExecutor()
        self.executor.adopt(heaps[rank], ranks, 60.0)
        self.group = GroupState(ranks, rank, 60.0, self.executor)
        self.group.heap = heaps[rank]
        patch.setitem(runtime.current_world().by_name, (group, "nvlink"), self.group)

    @property
    def link(self) -> channel.DeviceLink:
        assert self.executor.link is not None
        return self.executor.link

    def launch(self, plan: Plan, args: tuple[Any, ...]) -> list[torch.Tensor]:
        return runtime.launch(plan, self.name, args, fused_only)
