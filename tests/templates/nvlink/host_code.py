"""Device code of the kernels as a library of the host: host_world.h runs its threads, the rest is the headers' own text."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from tscompile.language import context

KERNELS = files("tscompile.templates.nvlink.kernels")
HERE = Path(__file__).parent
_OPTIONS = ("-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-Wno-volatile")
_OF_CUDA = (
    "struct TslContext",
    "TSL const TslContext *tsl_context",
    "TSL bool tsl_aborted",
    "TSL void tsl_give_up",
    "enum TslCompare",
    "template <typename T> TSL bool tsl_holds",
    "template <typename T>\nTSL bool tsl_wait_until",
    "TSL bool tsl_wait_epoch",
)
_OF_TILE = (
    "#define TSK_CONSUMERS",
    "#define TSK_THREAD",
    "struct TskAddress",
    "TSL int tsk_aborted",
    "TSL void tsk_sync",
    "TSL uint32_t tsk_epoch",
    "TSL int tsk_last",
    "TSL void tsk_report",
    "TSL void tsk_finish",
)


def kernel_text(name: str) -> str:
    return KERNELS.joinpath(name).read_text()


def part(text: str, start: str) -> str:
    """A function, struct, enum or macro of a header, by how it begins."""
    line = re.search(rf"^{re.escape(start)}\b.*$", text, re.MULTILINE)
    assert line, start
    if line[0].startswith("#") or "}" in line[0]:
        return line[0]
    found = re.compile(r".*?^};?$", re.MULTILINE | re.DOTALL).match(text, line.start())
    assert found, start
    return found[0]


def build(folder: Path, *parts: str, runner: str) -> ctypes.CDLL:
    """Compile the parts behind what all device code uses, and `runner`, which defines functions for Python, behind them."""
    cuda, tile = files("tscompile.language").joinpath("cuda.h").read_text(), kernel_text("tile.h")
    text = [
        *((HERE / name).read_text() for name in ("host_world.h", "host_warps.h")),
        f"constexpr int TSL_MAX_RANKS = {context.MAX_RANKS};",
        *(part(cuda, start) for start in _OF_CUDA),
        *(part(tile, start) for start in _OF_TILE),
        *parts,
        "}",  # of the namespace that host_world.h has opened
        runner,
    ]
    (folder / "device.cpp").write_text("\n".join(text))
    subprocess.run(["g++", *_OPTIONS, "device.cpp", "-o", "device.so"], cwd=folder, check=True, timeout=120)
    return ctypes.CDLL(str(folder / "device.so"))


@dataclass(frozen=True)
class Group:
    """What the ranks of a group keep beside slots and flags.

    aborted: int32 [ranks, 1], the abort words. records: int64 [ranks, 8], of waits that were given up.
    cells: int32 [ranks], what a call's epoch is added to.
    """

    aborted: Tensor
    records: Tensor
    cells: Tensor

    @staticmethod
    def of(ranks: int, cell: int = 2) -> Group:
        return Group(
            torch.zeros(ranks, 1, dtype=torch.int32),
            torch.zeros(ranks, 8, dtype=torch.int64),
            torch.full((ranks,), cell, dtype=torch.int32),
        )

    def contexts(self, slots: Sequence[Tensor], flags: Sequence[Tensor]) -> list[Tensor]:
        """Of all ranks, for one slot. A wait ends as soon as nothing happens without it."""
        return [
            context.fill(
                torch.zeros(context.WORDS, dtype=torch.int64),
                rank=rank,
                size=len(slots),
                timeout_ns=1,
                epoch_cell=self.cells[rank:].data_ptr(),
                abort_word=self.aborted[rank].data_ptr(),
                abort_offset=0,
                record=self.records[rank].data_ptr(),
                data=[slot.data_ptr() for slot in slots],
                flags=[flag.data_ptr() for flag in flags],
                control=[word.data_ptr() for word in self.aborted],
            )
            for rank in range(len(slots))
        ]


class Hung(AssertionError):
    """A run that does not end, or whose waits were in vain."""


def call(function: ctypes._NamedFuncPointer, group: Group, *args: object) -> None:
    """Run.

    Raises:
        Hung: it does not end, or a thread gave up waiting.
    """
    function.restype = ctypes.c_char_p
    why = function(*args)
    if why is not None:
        raise Hung(why.decode())
    for rank, record in enumerate(group.records.tolist()):
        if record[0]:
            raise Hung(f"rank {rank} waited in vain: peer {record[1]}, site {record[2]}, {record[4]} of {record[3]}")


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
