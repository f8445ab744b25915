"""Every kernel of examples/tilescale compiled for sm_90a, without a GPU."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest

import tscompile.language as tl
from tests.language.ptx import before, read_non_coherently

FOLDER = Path(__file__).parents[1] / "examples" / "tilescale"
sys.path.insert(0, str(FOLDER))  # the scripts import each other by these names
from run_all import NAMES  # noqa: E402

MAKERS = {__import__(name).EXAMPLE.kernels: name for name in NAMES}  # cannon and summa share theirs
# What kernels read through plain loads of a parameter: nobody writes it meanwhile.
PRIVATE = {"ctx", "x", "starts", "b", "topk_idx", "topk_weights", "position", "counts", "first", "go"}

pytestmark = pytest.mark.slow


@cache
def compiled(make) -> list[tuple[str, tl.CudaArtifact]]:
    return [
        (kernel.name, tl.compile_cuda(kernel.function, pass_configs=kernel.pass_configs))
        for kernel in make(tl.dialect("cuda"))
    ]


@pytest.mark.parametrize("make", MAKERS, ids=MAKERS.values())
def test_kernels_compile_for_gpus(make) -> None:
    for name, artifact in compiled(make):
        assert artifact.cubin[:4] == b"\x7fELF", name
        assert artifact.spill_bytes == 0 and artifact.stack_bytes == 0, name
        assert artifact.shared_bytes <= 227 << 10, name
        assert "call.uni" not in artifact.ptx, name  # all inlined
        assert read_non_coherently(artifact) <= PRIVATE, name


def test_rows_for_experts_move_in_words_of_16_bytes_with_many_loads_in_flight() -> None:
    artifacts = dict(compiled(__import__("deepep").EXAMPLE.kernels))
    sent, summed, wide = (artifacts[name] for name in ("dispatch", "combine bfloat16", "combine float32"))
    before(sent.ptx, *[r"ld\.global\.L1::no_allocate\.v4\.u32"] * 4, *[r"st\.global\.v4\.u32"] * 4)
    load = r"ld\.relaxed\.sys\.global\.L1::no_allocate\.v4\.u32"
    for artifact in (summed, wide):  # of 8 ranks
        before(artifact.ptx, *[load] * 8, r"add\.(rn\.)?f32", r"st\.weak\.global\.v4\.u32")
    for artifact in (sent, summed, wide):
        assert artifact.registers <= 128  # of 512 threads
        before(artifact.ptx, r"st\.release\.sys", r"ld\.acquire\.sys", r"bar\.sync|barrier\.sync", r"st\.release\.sys")
