"""A group in memory of this process or of several, or of one GPU: contexts over tensors."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch

import tscompile.language as tl

DATA_BYTES = 1 << 16
FLAG_BYTES = 1 << 12
CONTROL_BYTES = 1 << 12
RANK_BYTES = DATA_BYTES + FLAG_BYTES + CONTROL_BYTES
EPOCH_CELL, ABORT, RECORD = 0, 64, 128  # bytes from the control base


class World:
    """The memory of all ranks, a row of bytes each: [data][flags][control]. On any device: in this process, in one file that
    processes map, or rows that are given.

    Args:
        size: ranks.
        path: of the file, see `create`.
        device: of the contexts, and of the memory where it is in this process.
        rows: of all ranks; own rank's record is then in `record`, on the host, and others' are not seen.
        record: int64 `[RECORD_WORDS]`.
    """

    def __init__(
        self,
        size: int,
        path: Path | None = None,
        device: str | torch.device = "cpu",
        rows: Sequence[torch.Tensor] = (),
        record: torch.Tensor | None = None,
    ) -> None:
        self.size, self.device, self._record = size, device, record
        if path is not None:
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), 0)
            rows = list(torch.frombuffer(self._map, dtype=torch.uint8).view(size, -1))
        self.rows = rows or list(torch.zeros(size, RANK_BYTES, dtype=torch.uint8, device=device))
        self.data_bytes = self.rows[0].numel() - FLAG_BYTES - CONTROL_BYTES

    @staticmethod
    def create(path: Path, size: int, data_bytes: int = DATA_BYTES) -> None:
        with path.open("wb") as file:
            os.ftruncate(file.fileno(), size * (data_bytes + FLAG_BYTES + CONTROL_BYTES))

    def data(self, rank: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return self.rows[rank][: self.data_bytes].view(dtype)

    def flags(self, rank: int, dtype: torch.dtype = torch.uint32) -> torch.Tensor:
        return self.rows[rank][self.data_bytes :][:FLAG_BYTES].view(dtype)

    def control(self, rank: int) -> torch.Tensor:
        return self.rows[rank][self.data_bytes + FLAG_BYTES :]

    def record(self, rank: int) -> list[int]:
        if self._record is not None:
            return self._record[:5].tolist()
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
            record=control[rank] + RECORD if self._record is None else self._record.data_ptr(),
            data=[self.data(peer).data_ptr() for peer in range(self.size)],
            flags=[self.flags(peer).data_ptr() for peer in range(self.size)],
            control=control,
        ).to(self.device)
