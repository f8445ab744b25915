"""A group in memory of this process or of several, or of one GPU: contexts over tensors."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch

import tscompile.language as tl

DATA_BYTES = 1 << 16
FLAG_BYTES = 1 << 12
CONTROL_BYTES = 1 << 12
RANK_BYTES = DATA_BYTES + FLAG_BYTES + CONTROL_BYTES
EPOCH_CELL, ABORT, RECORD = 0, 64, 128  # bytes from the control base


class World:
    """The memory of all ranks: in one file that processes map, or in this process, on any device."""

    def __init__(self, size: int, path: Path | None = None, device: str = "cpu") -> None:
        self.size, self.device = size, device
        if path is None:
            self.bytes = torch.zeros(size, RANK_BYTES, dtype=torch.uint8, device=device)
        else:
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), size * RANK_BYTES)
            self.bytes = torch.frombuffer(self._map, dtype=torch.uint8).view(size, RANK_BYTES)

    @staticmethod
    def create(path: Path, size: int) -> None:
        with path.open("wb") as file:
            os.ftruncate(file.fileno(), size * RANK_BYTES)

    def data(self, rank: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return self.bytes[rank, :DATA_BYTES].view(dtype)

    def flags(self, rank: int, dtype: torch.dtype = torch.uint32) -> torch.Tensor:
        return self.bytes[rank, DATA_BYTES : DATA_BYTES + FLAG_BYTES].view(dtype)

    def control(self, rank: int) -> torch.Tensor:
        return self.bytes[rank, DATA_BYTES + FLAG_BYTES :]

    def record(self, rank: int) -> list[int]:
        return self.control(rank)[RECORD : RECORD + 40].view(torch.int64).tolist()

    def abort(self, rank: int) -> int:
        return int(self.control(rank)[ABORT : ABORT + 4].view(torch.int32)[0])

    def context(self, rank: int, timeout_s: float = 20.0) -> torch.Tensor:
        control = [self.control(peer).data_ptr() for peer in range(self.size)]
        return tl.fill_context(
            torch.empty(tl.WORDS, dtype=torch.int64),
            rank=rank,
            size=self.size,
            timeout_ns=int(timeout_s * 1e9),
            epoch_cell=control[rank] + EPOCH_CELL,
            abort_word=control[rank] + ABORT,
            abort_offset=ABORT,
            record=control[rank] + RECORD,
            data=[self.data(peer).data_ptr() for peer in range(self.size)],
            flags=[self.flags(peer).data_ptr() for peer in range(self.size)],
            control=control,
        ).to(self.device)
