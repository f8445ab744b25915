"""Every kernel of examples/tilescale compiled for sm_90a, without a GPU."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import pytest

import tscompile.language as tl
from tests.language.ptx import before, read_non_coherently
from tscompile.language.compile import compile_lowered, lower

FOLDER = Path(__file__).parents[1] / "examples" / "tilescale"
sys.path.insert(0, str(FOLDER))  # the scripts import each other by these names
from run_all import NAMES  # noqa: E402

MAKERS = {__import__(name).EXAMPLE.kernels: name for name in NAMES}  # cannon and summa share theirs
# What kernels read through plain loads of a parameter: nobody writes it meanwhile.
PRIVATE = {"ctx", "x", "starts", "b", "tile_table", "step_table", "readers", "senders"}
PRIVATE |= {"topk_idx", "topk_weights", "position", "counts", "first", "go"}

pytestmark = pytest.mark.slow


@cache
def compiled(make) -> dict[str, tl.CudaArtifact]:
    """The kernels of an example, by name."""
    kernels = make(tl.dialect("cuda"))
    lowered = [lower(kernel.function, pass_configs=kernel.pass_configs) for kernel in kernels]
    return dict(zip((kernel.name for kernel in kernels), compile_lowered(lowered), strict=True))


@pytest.mark.parametrize("make", MAKERS, ids=MAKERS.values())
def test_kernels_compile_for_gpus(make) -> None:
    for name, artifact in compiled(make).items():
        assert artifact.cubin[:4] == b"\x7fELF", name
        assert artifact.spill_bytes == 0 and artifact.stack_bytes == 0, name
        assert artifact.shared_bytes <= 227 << 10, name
        assert "call.uni" not in artifact.ptx, name  # all inlined
        assert read_non_coherently(artifact) <= PRIVATE, name


def test_attention_waits_in_the_warp_that_loads_and_before_it_loads() -> None:
    found = {
        name: a for name, a in compiled(__import__("kv_attention").kernels).items() if name.startswith("attention")
    }
    assert len(found) == 2
    for name, artifact in found.items():
        head, _, rest = artifact.source.partition("if (((int)threadIdx.x) < 128) {")
        loading, _, multiplying = rest.partition("warpgroup_reg_alloc<232>")
        before(
            loading,
            r"threadIdx\.x\) < 32",
            r"for \(",
            "tsl_x_warp_wait_s32",
            r"k_empty\[.*\]\.wait\(",
            r"tl::tma_load\(kv_desc, k_full",
            r"v_empty\[.*\]\.wait\(",
            r"tl::tma_load\(kv_desc, v_full",
        )
        assert "tsl_x" not in head + multiplying and "tma_load" not in head + multiplying, name
        assert loading.count("tl::tma_load(kv_desc") == 2 and "kv[" not in artifact.source, (
            name
        )  # keys come by TMA alone
        # The scores of a step are under way while the values of the last one are added.
        loop = multiplying[multiplying.index("< count") :]
        before(loop, "wgmma_ss<", "wgmma_rs<", "wait_wgmma<1>", "AllReduce<tl::MaxOp", "wait_wgmma<0>")
        assert not re.search(r"wgmma.*serialized", artifact.log), name
        before(artifact.ptx, r"ld\.acquire\.sys\.global\.u32", r"fence\.proxy\.async;", r"cp\.async\.bulk\.tensor\.3d")


def test_rows_for_experts_move_in_words_of_16_bytes_with_many_loads_in_flight() -> None:
    artifacts = compiled(__import__("deepep").EXAMPLE.kernels)
    sent, summed, wide = (artifacts[name] for name in ("dispatch", "combine bfloat16", "combine float32"))
    before(sent.ptx, *[r"ld\.global\.L1::no_allocate\.v4\.u32"] * 4, *[r"st\.global\.v4\.u32"] * 4)
    load = r"ld\.relaxed\.sys\.global\.L1::no_allocate\.v4\.u32"
    for artifact in (summed, wide):  # of 8 ranks
        before(artifact.ptx, *[load] * 8, r"add\.(rn\.)?f32", r"st\.weak\.global\.v4\.u32")
    for artifact in (sent, summed, wide):
        assert artifact.registers <= 128  # of 512 threads
        before(artifact.ptx, r"st\.release\.sys", r"ld\.acquire\.sys", r"bar\.sync|barrier\.sync", r"st\.release\.sys")
