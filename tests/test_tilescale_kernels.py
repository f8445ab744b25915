"""Every kernel of examples/tilescale compiled for sm_90a, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import tscompile.language as tl
from tests.language.ptx import read_non_coherently

FOLDER = Path(__file__).parents[1] / "examples" / "tilescale"
sys.path.insert(0, str(FOLDER))  # the scripts import each other by these names
from run_all import NAMES  # noqa: E402

MAKERS = {__import__(name).EXAMPLE.kernels: name for name in NAMES}  # cannon and summa share theirs
# What kernels read through plain loads of a parameter: nobody writes it meanwhile.
PRIVATE = {"ctx", "x", "starts", "b", "topk_idx", "topk_weights", "position", "counts", "first", "go"}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("make", MAKERS, ids=MAKERS.values())
def test_kernels_compile_for_gpus(make) -> None:
    for kernel in make(tl.dialect("cuda")):
        artifact = tl.compile_cuda(kernel.function, pass_configs=kernel.pass_configs)
        assert artifact.cubin[:4] == b"\x7fELF", kernel.name
        assert artifact.spill_bytes == 0 and artifact.stack_bytes == 0, kernel.name
        assert artifact.shared_bytes <= 227 << 10, kernel.name
        assert "call.uni" not in artifact.ptx, kernel.name  # all inlined
        assert read_non_coherently(artifact) <= PRIVATE, kernel.name
