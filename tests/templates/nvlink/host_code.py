"""Device code of the kernels as a library of the host: warps are threads (host_warps.h), the rest is the headers' own text."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch

from tscompile.language import context

KERNELS = files("tscompile.templates.nvlink.kernels")
HERE = Path(__file__).parent
_OPTIONS = ("-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-Wno-unknown-pragmas")


def kernel_text(name: str) -> str:
    return KERNELS.joinpath(name).read_text()


def function(text: str, start: str) -> str:
    """A function or a struct of a header, by how it begins."""
    found = re.search(rf"^{re.escape(start)}.*?^}};?$", text, re.MULTILINE | re.DOTALL)
    assert found, start
    return found[0]


def build(folder: Path, *parts: str) -> ctypes.CDLL:
    """Compile the parts behind what all device code uses."""
    cuda, tile = files("tscompile.language").joinpath("cuda.h").read_text(), kernel_text("tile.h")
    common = [
        (HERE / "host_warps.h").read_text(),
        "constexpr int TSL_MAX_RANKS = 8;",
        function(cuda, "struct TslContext"),
        "TSL const TslContext *tsl_context(const void *p) { return (const TslContext *)p; }",
        *re.findall(r"^enum TslCompare .*$", cuda, re.MULTILINE),
        function(cuda, "template <typename T> TSL bool tsl_holds"),
        function(tile, "struct TskAddress"),
        function(tile, "TSL uint32_t tsk_epoch"),
    ]
    (folder / "device.cpp").write_text("\n".join([*common, *parts]))
    subprocess.run(["g++", *_OPTIONS, "device.cpp", "-o", "device.so"], cwd=folder, check=True, timeout=120)
    return ctypes.CDLL(str(folder / "device.so"))


def contexts(slots: Sequence[torch.Tensor], flags: Sequence[torch.Tensor], cells: torch.Tensor) -> list[torch.Tensor]:
    """Of all ranks; `cells` are what a call's epoch is added to."""
    return [
        context.fill(
            torch.zeros(context.WORDS, dtype=torch.int64),
            rank=rank,
            size=len(slots),
            timeout_ns=1,
            epoch_cell=cells[rank:].data_ptr(),
            abort_word=0,
            abort_offset=0,
            record=0,
            data=[slot.data_ptr() for slot in slots],
            flags=[flag.data_ptr() for flag in flags],
            control=[0] * len(slots),
        )
        for rank in range(len(slots))
    ]


def pointers(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
