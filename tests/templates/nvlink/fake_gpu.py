"""A DeviceLink on the CPU: the module's `torch` and copy engine are replaced, everything else is the product's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tscompile.nvshmem import copies
from tscompile.nvshmem.device import CONTROL_BYTES, SLOTS
from tscompile.templates.nvlink import channel
from tscompile.templates.nvlink.channel import DeviceLink

SLOT_BYTES = 1 << 22


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


class FakeEngine:
    """Keeps what was issued: (kind, stream, fields that are not 0)."""

    def __init__(self) -> None:
        self.issued: list[dict[str, int]] = []
        self.done = True
        self._events = 0

    def event(self) -> int:
        self._events += 1
        return 100 + self._events

    def is_done(self, event: int | None) -> bool:
        assert event is not None and (event - 101) % 3 == channel.DONE  # three events a link
        return self.done

    def issue(self, steps: Any, streams: Any, events: Any) -> None:
        names = [name for name, _ in copies.Step._fields_]
        self.issued += [{name: int(getattr(step, name)) for name in names} for step in steps]


class FakeTorch:
    """torch with GPU 0, which is the CPU. `stream` is the current one, `capturing` says whether a graph is recorded."""

    def __init__(self) -> None:
        self.stream, self.capturing = 7, False
        self.waits: list[tuple[int, int]] = []
        self._C = SimpleNamespace(
            _cuda_getCurrentRawStream=lambda index: self.stream,
            _cuda_isCurrentStreamCapturing=lambda: self.capturing,
        )
        self.cuda = SimpleNamespace(
            current_device=lambda: 0,
            Stream=lambda priority: SimpleNamespace(cuda_stream=1000),
            ExternalStream=lambda stream: stream,
            current_stream=lambda: SimpleNamespace(wait_stream=lambda stream: self.waits.append((self.stream, stream))),
            device=lambda device: torch.inference_mode(False),
        )

    def device(self, *_: object) -> torch.device:
        return torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class Gpu:
    """The fakes of one link."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        rank: int = 1,
        size: int = 4,
        timeout_s: float = 5.0,
        opener: Callable[..., None] = lambda *_: None,
    ) -> None:
        self.torch, self.engine, self.memory = FakeTorch(), FakeEngine(), FakeMemory(rank, size)
        patch.setattr(channel, "torch", self.torch)
        patch.setattr(channel.copies, "load", lambda: self.engine)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        self.link = DeviceLink(self.memory, SLOT_BYTES, timeout_s, opener)
