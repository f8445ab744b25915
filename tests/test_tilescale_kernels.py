"""Every kernel of examples/tilescale compiled for sm_90a, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import tscompile.language as tl
from tests.language.ptx import read_non_coherently
from tscompile.language.compile import compile_lowered, lower

FOLDER = Path(__file__).parents[1] / "examples" / "tilescale"
sys.path.insert(0, str(FOLDER))  # the scripts import each other by these names
from run_all import NAMES  # noqa: E402

MAKERS = {__import__(name).EXAMPLE.kernels: name for name in NAMES}  # cannon and summa share theirs
PRIVATE = {
    "ctx",
    "x",
    "starts",
    "b",
}  # what kernels read through plain loads of a parameter: nobody writes it meanwhile

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("make", MAKERS, ids=MAKERS.values())
def test_kernels_compile_for_gpus(make) -> None:
    kernels = make(tl.dialect("cuda"))
    lowered = [lower(kernel.function, pass_configs=kernel.pass_configs) for kernel in kernels]
    for kernel, artifact in zip(kernels, compile_lowered(lowered), strict=True):
        assert artifact.cubin[:4] == b"\x7fELF", kernel.name
        assert artifact.spill_bytes == 0 and artifact.stack_bytes == 0, kernel.name
        assert artifact.shared_bytes <= 227 << 10, kernel.name
        assert "call.uni" not in artifact.ptx, kernel.name  # all inlined
        assert read_non_coherently(artifact) <= PRIVATE, kernel.name
