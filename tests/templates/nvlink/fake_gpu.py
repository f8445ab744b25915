"""A DeviceLink on the CPU: the module's `torch` and the CUDA driver are replaced, everything else is the product's."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tscompile.language.launch_spec import LaunchSpec, launch_spec
from tscompile.nvshmem import stream
from tscompile.nvshmem.device import CONTROL_BYTES, SLOTS
from tscompile.problem import Gemm
from tscompile.templates.nvlink import channel, gemm_reduce, projected, widths
from tscompile.templates.nvlink.channel import DeviceLink
from tscompile.templates.nvlink.launch import Kernel
from tscompile.templates.nvlink.sums import SumPlan, pull_plan

SLOT_BYTES = 1 << 22
SERVICE = LaunchSpec("service_kernel", 1, 32, 0, {}, ("context", "ack", "epoch", "site"), ())


def large_forms(patch: pytest.MonkeyPatch) -> None:
    """What large ops do, of any size: the copy engine sends shards, and sums are pulled."""

    def pulled(gemms: Sequence[Gemm], ranks: int, outer: int, all_reduce: bool) -> SumPlan:
        k = sum(gemm.k for gemm in gemms)
        return pull_plan(gemms[0].m, gemms[0].n, k, ranks, 1 if all_reduce else ranks * outer, all_reduce)

    patch.setattr(gemm_reduce, "terms_plan", pulled)
    patch.setattr(widths, "pushes", lambda *_: False)


def most_chunks(patch: pytest.MonkeyPatch, count: int = 99) -> None:
    """What large matmuls do whose results are exchanged, of any size: they are cut, into `count` chunks or as many as can be."""

    def best(ways: Sequence[projected._Way]) -> projected._Way:
        fewest = min(len(way.chunks) for way in ways)
        return max((way for way in ways if len(way.chunks) <= max(count, fewest)), key=lambda way: len(way.chunks))

    patch.setattr(projected, "_best", best)


class FakeMemory:
    """Regions that nobody dereferences, but for this rank's own slots."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.bytes = torch.zeros(CONTROL_BYTES + SLOTS * SLOT_BYTES, dtype=torch.uint8)
        self.bases = [(1 << 40) + owner * (1 << 32) for owner in range(size)]

    @property
    def addresses(self) -> Sequence[int]:
        return self.bases

    def view(self, owner: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        assert owner == self.rank
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return self.bytes[offset : offset + nbytes].view(dtype).view(shape)


@lru_cache
def spec_of(name: str, *args: Any) -> LaunchSpec:
    """What TileLang makes of a kernel, without nvcc."""
    import tilelang
    import tvm

    from tscompile.templates.nvlink.kernels.gemm import PASS_CONFIGS

    module = importlib.import_module(f"tscompile.templates.nvlink.kernels.{name}")
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    with tvm.transform.PassContext(opt_level=3, config=PASS_CONFIGS), target:
        return launch_spec(tilelang.lower(getattr(module, f"{name}_kernel")(*args), target=target))


@dataclass(frozen=True)
class Launched:
    """One kernel that was launched: its name and configuration, and its values by name, as signed numbers."""

    name: str
    args: tuple[Any, ...]
    values: dict[str, int]


class FakeDriver:
    """Keeps what was issued: steps as dicts, and kernels with their values. Copies of the main stream are done."""

    def __init__(self, memory: FakeMemory) -> None:
        self._memory = memory
        self.issued: list[dict[str, int]] = []
        self.launched: list[Launched] = []
        self.done = True
        self.on_launch: Callable[[Launched], None] = lambda launched: None
        self._events = 0
        self._kernels: dict[int, tuple[str, tuple[Any, ...], Kernel]] = {}

    def kernel(self, name: str, *args: Any) -> Kernel:
        """Stands for `jit.kernel`."""
        for known, configuration, made in self._kernels.values():
            if (known, configuration) == (name, args):
                return made
        made = Kernel(SERVICE if name == "service" else spec_of(name, *args), 1)
        self._kernels[ctypes.addressof(made._native)] = name, args, made
        return made

    def event(self) -> int:
        self._events += 1
        return 100 + self._events

    def is_done(self, event: int | None) -> bool:
        assert event is not None and (event - 101) % 3 == channel.DONE  # three events a link
        return self.done

    def issue(self, steps: stream.Steps, queues: Any) -> None:
        names = [name for name, _ in stream.Step._fields_]
        found = [stream.Step.from_buffer_copy(step) for step in steps.items]
        for step in found:
            if step.word:
                word = ctypes.c_uint64.from_address(step.word).value
                if step.kind == stream.WRITE:
                    step.value = word
                else:
                    step.src += word
        self.issued += [{name: int(getattr(step, name)) for name in names} for step in found]
        for step in found:
            if step.kind in (stream.COPY, stream.COPY_ROWS) and step.stream == channel.MAIN:
                self._copy(step)
            if step.kind == stream.LAUNCH:
                assert step.stream == channel.MAIN
                name, args, kernel = self._kernels[step.src]
                places = kernel._places
                values = (ctypes.c_int64 * len(places)).from_address(step.dst)
                self.launched.append(Launched(name, args, {key: values[place] for key, place in places.items()}))
                self.on_launch(self.launched[-1])

    def _copy(self, step: stream.Step) -> None:
        """Into the own slot."""
        offset = step.dst - self._memory.bases[self._memory.rank]
        for row in range(max(step.rows, 1)):
            target = self._memory.bytes.data_ptr() + offset + row * step.dst_pitch
            ctypes.memmove(target, step.src + row * step.src_pitch, step.bytes)


class FakeTorch:
    """torch with GPU 0, which is the CPU. `stream` is the current one, `capturing` says whether a graph is recorded."""

    def __init__(self) -> None:
        self.stream, self.capturing = 7, False
        self._C = SimpleNamespace(
            _cuda_getCurrentRawStream=lambda index: self.stream,
            _cuda_isCurrentStreamCapturing=lambda: self.capturing,
        )
        self.cuda = SimpleNamespace(
            current_device=lambda: 0,
            Stream=lambda priority: SimpleNamespace(cuda_stream=1000),
            is_current_stream_capturing=lambda: self.capturing,
            synchronize=lambda: None,
            device=lambda device: torch.inference_mode(False),
        )

    def device(self, *_: object) -> torch.device:
        return torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class Gpu:
    """The fakes of one link."""

    def __init__(self, patch: pytest.MonkeyPatch, rank: int = 1, size: int = 4, timeout_s: float = 5.0) -> None:
        self.torch, self.memory = FakeTorch(), FakeMemory(rank, size)
        self.driver = FakeDriver(self.memory)
        patch.setattr(channel, "torch", self.torch)
        patch.setattr(channel.stream, "load", lambda: self.driver)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        services = (self.driver.kernel("service", name) for name in ("tsk_open", "tsk_acknowledge"))
        self.link = DeviceLink(self.memory, SLOT_BYTES, timeout_s, *services)
