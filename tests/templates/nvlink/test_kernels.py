"""The kernels compiled for sm_90a, in configurations that cover all branches: registers, shared memory, and who does what. No GPU."""

from __future__ import annotations

import itertools
import re
from functools import cache
from importlib.resources import files

import pytest
import tilelang
import tvm

import tscompile.language as tl
from tests.language.ptx import before, read_non_coherently
from tscompile.templates.nvlink.kernels.all_gather import all_gather_kernel
from tscompile.templates.nvlink.kernels.config import (
    DTYPE_CODES,
    ITEM_BYTES,
    MAX_OPERANDS,
    MAX_STAGES,
    SUM_FORMS,
    TILE_M,
    BlocksConfig,
    GemmConfig,
    MeshConfig,
    depth,
    piece_rows,
    pulled_rows,
)
from tscompile.templates.nvlink.kernels.gather_blocks import gather_blocks_kernel
from tscompile.templates.nvlink.kernels.gather_push import gather_push_kernel
from tscompile.templates.nvlink.kernels.gemm import PASS_CONFIGS, THREADS
from tscompile.templates.nvlink.kernels.mesh_gemm import mesh_gemm_kernel
from tscompile.templates.nvlink.kernels.reduce import reduce_kernel
from tscompile.templates.nvlink.kernels.service import service_kernel
from tscompile.templates.nvlink.kernels.spoil import spoil_kernel
from tscompile.templates.nvlink.kernels.sum_push import sum_push_kernel
from tscompile.templates.nvlink.sums import PULL_WIDTHS, PUSH_WIDTHS
from tscompile.templates.nvlink.widths import DENSE_WIDTHS, NARROW_WIDTHS, SWIZZLED_WIDTHS

REGISTERS = 65536 // THREADS // 8 * 8  # that a thread can have with one CTA per SM
SHARED_BYTES = 227 << 10
LOADER, MULTIPLIER = "if (((int)threadIdx.x) < 32) {\n", "if (128 <= ((int)threadIdx.x)) {\n"


def summing(dtype: str, transposed: bool, operands: int, bias: bool, tile_n: int, all_reduce: bool):
    stages = depth(tile_n, pulled_rows(tile_n) * tile_n)
    return GemmConfig(dtype, transposed, operands, bias, tile_n, stages), all_reduce


def gathering(dtype: str, transposed: bool, operands: int, bias: bool, tile_n: int, collects: bool, rows: int = TILE_M):
    return GemmConfig(dtype, transposed, operands, bias, tile_n, depth(tile_n), rows=rows), collects


GATHERS = [
    gathering("bfloat16", True, 1, False, 256, False),
    gathering("bfloat16", True, 3, True, 256, True),
    gathering("bfloat16", True, 1, False, 240, True),
    gathering("float16", True, 1, True, 224, False),
    gathering("bfloat16", True, 2, False, 208, False),
    gathering("bfloat16", True, 2, False, 192, True),
    gathering("float16", True, 3, True, 176, False),
    gathering("bfloat16", True, 1, False, 160, False),
    gathering("float16", True, 1, True, 144, True),
    gathering("bfloat16", True, 2, False, 128, True, rows=64),
    gathering("float16", False, 2, False, 256, True),
    gathering("bfloat16", False, 3, True, 192, False),
    gathering("float16", False, 1, False, 128, False),
]
PUSHES = [
    gathering("bfloat16", True, 3, True, 256, True),
    gathering("bfloat16", True, 1, False, 224, False),
    gathering("float16", True, 2, False, 144, True),
    gathering("bfloat16", True, 1, True, 128, False),
    gathering("bfloat16", True, 3, False, 96, True, rows=48),
    gathering("float16", True, 1, True, 64, False),
    gathering("float16", False, 2, False, 256, True),
    gathering("bfloat16", False, 3, True, 192, False),
    gathering("float16", False, 1, False, 128, True),
    gathering("bfloat16", False, 2, True, 64, True),
]
REDUCES = [
    summing("bfloat16", True, 1, False, 256, False),
    summing("float16", False, 2, True, 256, True),
    summing("bfloat16", False, 3, True, 256, False),
    summing("bfloat16", True, 3, False, 256, True),
    summing("bfloat16", True, 1, False, 192, True),
    summing("float16", False, 3, True, 192, False),
    summing("bfloat16", True, 1, False, 128, True),
    summing("float16", False, 3, True, 128, False),
]
SUM_PUSHES = [
    (
        GemmConfig(dtype, transposed, operands, bias, tile_n, depth(tile_n), rows=16 if form == "one_shot" else TILE_M),
        form,
    )
    for dtype, transposed, operands, bias, tile_n, form in [
        ("bfloat16", True, 1, False, 64, "one_shot"),
        ("float16", False, 3, True, 64, "two_shot"),
        ("bfloat16", False, 2, False, 64, "scatter"),
        ("bfloat16", True, 2, True, 128, "two_shot"),
        ("float16", True, 1, False, 128, "scatter"),
        ("bfloat16", False, 1, False, 192, "one_shot"),
        ("bfloat16", True, 3, True, 192, "two_shot"),
        ("bfloat16", True, 3, True, 256, "one_shot"),
        ("bfloat16", True, 3, True, 256, "scatter"),
        ("bfloat16", False, 2, True, 256, "two_shot"),
    ]
]
# Half of all forms, such that every pair of side, layouts and what becomes of the ranks occurs.
BLOCKS = [
    (
        BlocksConfig(dtype, transposed, 1, bias, tile_n, depth(tile_n), left_transposed, gathered_left, contracts),
        collects,
    )
    for dtype, transposed, left_transposed, gathered_left, contracts, tile_n, bias, collects in [
        ("bfloat16", False, True, True, True, 256, False, True),
        ("bfloat16", False, True, False, False, 256, True, True),
        ("float16", False, False, False, True, 256, True, True),
        ("bfloat16", False, False, True, False, 192, False, False),
        ("bfloat16", False, True, True, True, 128, False, False),
        ("bfloat16", True, False, True, True, 128, True, False),
        ("bfloat16", True, False, False, False, 240, True, False),
        ("float16", True, True, False, True, 224, False, False),
        ("float16", True, True, True, False, 256, True, True),
    ]
]
MESHES = [
    (MeshConfig(dtype, transposed, 1, bias, tile_n, depth(tile_n), left_transposed, contracts), collects)
    for dtype, transposed, left_transposed, contracts, tile_n, bias, collects in [
        ("bfloat16", False, False, (True, True), 256, False, (False, False)),
        ("float16", True, False, (False, False), 208, True, (True, True)),
        ("bfloat16", False, True, (False, True), 128, True, (True, False)),
        ("bfloat16", True, True, (True, False), 256, False, (False, True)),
    ]
]
ALL = [(all_gather_kernel, *form) for form in GATHERS] + [(reduce_kernel, *form) for form in REDUCES]
ALL += [(gather_blocks_kernel, *form) for form in BLOCKS] + [(gather_push_kernel, *form) for form in PUSHES]
ALL += [(sum_push_kernel, *form) for form in SUM_PUSHES] + [(mesh_gemm_kernel, *form) for form in MESHES]


def name_of(value: object) -> str:
    if isinstance(value, GemmConfig):
        layout = "nk" if value.transposed else "kn"
        if isinstance(value, BlocksConfig):
            layout += "-km" if value.left_transposed else "-mk"
            layout += ("-left" if value.gathered_left else "-right") + ("-sum" if value.contracts else "")
        if isinstance(value, MeshConfig):
            layout += "-km" if value.left_transposed else "-mk"
            layout += "".join("-sum" if along else "-out" for along in value.contracts)
        return f"{value.dtype}-{layout}-{value.operands}-{'bias' if value.bias else 'plain'}-{value.tile_n}"
    return value.__name__ if callable(value) else str(value)


every = pytest.mark.parametrize(("build", "config", "flag"), ALL, ids=name_of)
gathers = pytest.mark.parametrize(("config", "collects"), GATHERS, ids=name_of)
pushes = pytest.mark.parametrize(("config", "collects"), PUSHES, ids=name_of)
blocks = pytest.mark.parametrize(("config", "collects"), BLOCKS, ids=name_of)
meshes = pytest.mark.parametrize(("config", "collects"), MESHES, ids=name_of)
reduces = pytest.mark.parametrize(("config", "all_reduce"), REDUCES, ids=name_of)
sum_pushes = pytest.mark.parametrize(("config", "form"), SUM_PUSHES, ids=name_of)


@cache
def family(build) -> dict[tuple[GemmConfig, bool | str | tuple[bool, bool]], tl.CudaArtifact]:
    """All kernels of one program, in few runs of nvcc."""
    forms = [(config, flag) for program, config, flag in ALL if program is build]
    functions = [build(*form) for form in forms]
    return dict(zip(forms, tl.compile_cuda_all(functions, pass_configs=PASS_CONFIGS), strict=True))


def compiled(build, config: GemmConfig, flag: bool | str | tuple[bool, bool]) -> tl.CudaArtifact:
    return family(build)[config, flag]


def branches(source: str) -> tuple[str, str, str]:
    """What the loading warp, the multiplying warps, and the other warps do."""
    head, _, rest = source.partition(LOADER)
    loader, _, others = rest.partition("\n  } else {\n    " + MULTIPLIER)
    multiplier, _, idle = others.partition("\n    } else {\n")
    assert loader and multiplier and "tma_load" not in head
    return loader, multiplier, idle


def test_the_configurations_cover_what_templates_ask_for() -> None:
    for forms in (GATHERS, PUSHES, REDUCES, SUM_PUSHES):
        assert {config.dtype for config, _ in forms} == set(DTYPE_CODES)
        assert {config.operands for config, _ in forms} == set(range(1, MAX_OPERANDS + 1))
        for flags in ("transposed", "bias"):
            assert {getattr(config, flags) for config, _ in forms} == {False, True}
    for forms in (GATHERS, PUSHES, REDUCES):
        assert {flag for _, flag in forms} == {False, True}
    for transposed, widths in ((True, DENSE_WIDTHS), (False, SWIZZLED_WIDTHS)):
        assert {config.tile_n for config, _ in GATHERS if config.transposed is transposed} == set(widths)
    assert {config.tile_n for config, _ in BLOCKS if not config.transposed} == set(SWIZZLED_WIDTHS)
    assert {config.tile_n for config, _ in PUSHES if not config.transposed} == {*SWIZZLED_WIDTHS, *NARROW_WIDTHS[0]}
    # The rest of these kernels is the same at every width.
    assert {256, 128} < {config.tile_n for config, _ in BLOCKS if config.transposed} < set(DENSE_WIDTHS)
    pushed = {config.tile_n for config, _ in PUSHES if config.transposed}
    assert {256, 128, *NARROW_WIDTHS[1]} < pushed < {*DENSE_WIDTHS, *NARROW_WIDTHS[1]}
    flags = ("transposed", "left_transposed", "gathered_left", "contracts")
    for one, other in itertools.combinations(flags, 2):
        assert len({(getattr(config, one), getattr(config, other)) for config, _ in BLOCKS}) == 4
    assert {config.tile_n for config, _ in REDUCES} == set(PULL_WIDTHS)
    assert {config.tile_n for config, _ in SUM_PUSHES} == set(PUSH_WIDTHS)
    assert {form for _, form in SUM_PUSHES} == set(SUM_FORMS)


def test_rings_are_longer_than_pipelines() -> None:
    """A tile's number is read after its first stage is full, while the loading warp may be as many tiles ahead as there are stages."""
    text = files("tscompile.templates.nvlink.kernels").joinpath("tile.h").read_text()
    (length,) = re.findall(r"__shared__ int ring\[(\d+)\]", text)
    assert max(config.stages for _, config, _ in ALL) == MAX_STAGES < int(length)
    assert f"[w & {int(length) - 1}]" in text


@every
def test_resources(build, config: GemmConfig, flag: bool | str) -> None:
    artifact = compiled(build, config, flag)
    assert artifact.cubin[:4] == b"\x7fELF"
    assert artifact.spill_bytes == 0 and artifact.stack_bytes == 0
    assert 0 < artifact.registers <= REGISTERS
    stages = config.stages * config.tile_k * (config.tile_m + config.tile_n) * 2
    assert stages <= artifact.shared_bytes <= SHARED_BYTES
    # C7510 and its like: wgmma is serialised, or register counts cannot be set. A call would serialise wgmma as well.
    assert "ptxas info" in artifact.log
    assert not re.search(r"C7\d\d\d|wgmma|setmaxnreg|warning", artifact.log), artifact.log
    assert "call.uni" not in artifact.ptx and ".func" not in artifact.ptx
    assert f"wgmma.mma_async.sync.aligned.m64n{config.tile_n}k16" in artifact.ptx


@every
def test_only_the_tile_table_is_read_by_the_read_only_path(build, config: GemmConfig, flag: bool | str) -> None:
    """Peers write everything else while the kernel runs, or it changes between launches of a graph."""
    assert read_non_coherently(compiled(build, config, flag), addresses=r"\*|int64_t") == {"table"}


@every
def test_only_the_loading_warp_loads_and_claims(build, config: GemmConfig, flag: bool | str) -> None:
    artifact = compiled(build, config, flag)
    loader, multiplier, idle = branches(artifact.source)
    sums = build in (reduce_kernel, sum_push_kernel)
    lefts = config.operands if sums else {gather_push_kernel: 1, mesh_gemm_kernel: 3}.get(build, 2)
    assert len(set(re.findall(r"tl::tma_load\((\w+)_desc", loader))) == lefts + config.operands
    if build not in (gather_blocks_kernel, mesh_gemm_kernel):
        assert set(re.findall(r"expect_transaction\((\d+)\)", loader)) == {str(config.rows * config.tile_k * 2)}
    for others in (multiplier, idle):
        assert "tma_load" not in others and "tsk_claim" not in others
    assert "wgmma" in multiplier and "wgmma" not in loader + idle
    dims = 3 if build in (gather_blocks_kernel, mesh_gemm_kernel) else 2
    assert artifact.ptx.count(f"cp.async.bulk.tensor.{dims}d.") >= loader.count("tl::tma_load(")  # nvcc unrolls loops
    # 256 threads of two warpgroups free a stage; a tile is passed on before its first stage is loaded.
    assert f"empty[{config.stages - 1}].init(256)" in artifact.source
    before(loader, "tsk_claim", r"empty\[.*\]\.wait", "tsk_pass", "tma_load", r"full\[.*\]\.arrive", "tsk_claim")
    # A bar.sync that not all threads reach would hang: the common ones stand before the branches.
    assert "__syncthreads" not in loader + multiplier + idle


@gathers
def test_a_gather_waits_before_it_loads(config: GemmConfig, collects: bool) -> None:
    artifact = compiled(all_gather_kernel, config, collects)
    loader, multiplier, idle = branches(artifact.source)
    assert artifact.source.count("tsk_wait_ranks") == loader.count("tsk_wait_ranks") == 1
    before(loader, "tsk_pass", "tsk_wait_ranks", r"if \(own != 0\)", "for .*k = 0", r"tma_load\(X_desc")
    before(loader, "tsk_wait_ranks", "else", r"tma_load\(A_desc", r"tma_load\(B0_desc", r"full\[.*\]\.arrive")
    assert loader.index("tma_load") > loader.index("tsk_wait_ranks")
    # The compiler keeps their order, and may put the wait, which is seldom long, behind the loops in the text.
    before(artifact.ptx, r"ld\.acquire\.sys\.global\.u32", r"fence\.proxy\.async;")
    assert multiplier.count("TSK_STORE") == config.operands
    assert multiplier.count("TSK_BIAS") == (config.operands if config.bias else 0)
    assert ("tsk_collect_shards" in idle) == collects
    assert (multiplier.count("tsk_join"), idle.count("tsk_join")) == (int(collects), int(collects))
    before(multiplier, "tsk_last", "tsk_aborted", "tsk_fill_nan", "tsk_finish")
    assert multiplier.count("tsk_fill_nan") == config.operands + collects


@pushes
def test_a_gather_that_pushes_waits_slice_by_slice(config: GemmConfig, collects: bool) -> None:
    artifact = compiled(gather_push_kernel, config, collects)
    loader, multiplier, idle = branches(artifact.source)
    assert artifact.source.count("tsk_wait_slice") == loader.count("tsk_wait_slice") == 1
    loop = "for .*i = 0", r"empty\[.*\]\.wait", r"tma_load\(A_desc", r"full\[.*\]\.arrive", r"tma_load\(B0_desc"
    before(loader, "tsk_pass", "for .*s = 0; s < slices", "tsk_wait_slice", r"if \(group == 0\)", *loop, "tsk_claim")
    assert loader.index("tma_load") > loader.index("tsk_wait_slice")
    # As above; the other proxy fence is that of the warps that push.
    before(artifact.ptx, r"ld\.acquire\.sys\.global\.u32", r"fence\.proxy\.async;")
    assert artifact.ptx.count("fence.proxy.async;") == 2
    # Whatever happens to the multiplying warps, all is sent; and nothing is claimed any more when the counters are reset.
    assert "tsk_wait" not in multiplier + idle
    before(idle, r"64 <= .*threadIdx", "tsk_push", *(["tsk_collect_slices"] if collects else []), "tsk_join")
    before(multiplier, "tsk_join", "tsk_last", "tsk_aborted", "tsk_report", "tsk_fill_nan", "tsk_finish_push")
    assert multiplier.count("tsk_fill_nan") == config.operands + collects
    assert (multiplier.count("TSK_STORE"), multiplier.count("TSK_BIAS")) == (
        config.operands,
        config.operands if config.bias else 0,
    )


@pushes
def test_a_pushed_slice_is_fenced_before_it_is_counted_and_before_its_flag(config: GemmConfig, collects: bool) -> None:
    ptx = compiled(gather_push_kernel, config, collects).ptx
    kinds = r"fence\.proxy\.async;|fence\.acq_rel\.sys;|atom\.global\.add|st\.relaxed\.sys|st\.global\.v4|ld\.global\.L1\S*v4"
    found = [re.sub(r"\.L1\S*", "", event) for event in re.findall(kinds, ptx)]
    at = found.index("fence.acq_rel.sys;")
    assert found[at - 1 : at + 4] == [
        "fence.proxy.async;",
        "fence.acq_rel.sys;",
        "atom.global.add",
        "fence.acq_rel.sys;",
        "st.relaxed.sys",
    ]
    assert found.count("fence.acq_rel.sys;") == 2
    # Before it the stores of a unit, whose loads were on their way together, and then the loads of the next one.
    assert found[at - 9 : at - 1] == ["st.global.v4"] * 4 + ["ld.global"] * 4


@blocks
def test_a_gather_in_blocks_waits_before_it_loads(config: BlocksConfig, collects: bool) -> None:
    artifact = compiled(gather_blocks_kernel, config, collects)
    loader, multiplier, idle = branches(artifact.source)
    assert artifact.source.count("tsk_wait_ranks") == loader.count("tsk_wait_ranks") == 1
    first = r"if \(j == 0\)", "tsk_pass"
    before(loader, "for .*j = 0", *first, "tsk_wait_ranks", r"if \(own\w* != 0\)", "for .*k = 0", r"tma_load\(X_desc")
    before(loader, "tsk_wait_ranks", r"if \(own\w* != 0\)", "else", r"tma_load\(A_desc", r"tma_load\(B_desc", "arrive")
    assert loader.index("tma_load") > loader.index("tsk_wait_ranks")
    # The compiler keeps their order, and may put the wait, which is seldom long, behind the loops in the text.
    before(artifact.ptx, r"ld\.acquire\.sys\.global\.u32", r"fence\.proxy\.async;")
    # Operands that lie along m or n are read as such: no copy, no transposition.
    layouts = f"{str(config.left_transposed).lower()}, {str(not config.transposed).lower()}, 1, 1>"
    assert f"64, {config.tile_n}, 16, {layouts}" in multiplier
    assert multiplier.count("TSK_STORE_BLOCK") == 1 and multiplier.count("TSK_BIAS") == config.bias
    assert ("tsk_collect_shards" in idle) == collects
    assert (multiplier.count("tsk_join"), idle.count("tsk_join")) == (int(collects), int(collects))
    before(multiplier, "tsk_last", "tsk_aborted", "tsk_fill_nan", "tsk_finish")
    assert multiplier.count("tsk_fill_nan") == 1 + collects
    # Only a sum takes its blocks from rows behind those of the tiles.
    assert bool(re.search(r"at = \(tsk_word\(table, tile, 4\) \+ j\)", loader)) == config.contracts


@meshes
def test_a_mesh_waits_for_both_operands_before_it_loads(config: MeshConfig, collects: tuple[bool, bool]) -> None:
    artifact = compiled(mesh_gemm_kernel, config, collects)
    loader, multiplier, idle = branches(artifact.source)
    assert artifact.source.count("tsk_wait_slice") == loader.count("tsk_wait_slice") == 2
    waits = r"ready = tsk_wait_slice\(context,.*epoch, site\)", r"r_ready = tsk_wait_slice\(r_context,.*r_epoch, site\)"
    before(loader, r"if \(j == 0\)", "tsk_pass", *waits, r"if \(own == 0\)", "for .*i = 0", r"tma_load\(A_desc")
    assert loader.index("tma_load") > loader.index("r_ready = tsk_wait_slice")
    # Whichever of the operands lies here: a loop for each pair.
    pairs = re.findall(r"tma_load\((\w)_desc", loader)
    assert list(zip(pairs[::2], pairs[1::2], strict=True)) == [("A", "B"), ("X", "B"), ("A", "Y"), ("X", "Y")]
    # The compiler keeps their order, and may put the wait, which is seldom long, behind the loops in the text.
    before(artifact.ptx, r"ld\.acquire\.sys\.global\.u32", r"fence\.proxy\.async;")
    layouts = f"{str(config.left_transposed).lower()}, {str(not config.transposed).lower()}, 1, 1>"
    assert f"64, {config.tile_n}, 16, {layouts}" in multiplier
    assert multiplier.count("TSK_STORE_BLOCK") == 1 and multiplier.count("TSK_BIAS") == config.bias
    collected = re.findall(r"tsk_collect_slices\((\w*context), (\w+)", idle)
    wanted = [("context", "gathered"), ("r_context", "r_gathered")]
    assert collected == [pair for pair, is_wanted in zip(wanted, collects, strict=True) if is_wanted]
    assert (multiplier.count("tsk_join"), idle.count("tsk_join")) == (any(collects), any(collects))
    # Either group's failure spoils the outputs and is reported in its own record; both slots are acknowledged.
    before(
        multiplier,
        "tsk_last",
        r"tsk_aborted\(context",
        r"tsk_report\(context",
        r"tsk_aborted\(r_context",
        r"tsk_report\(r_context",
    )
    before(
        multiplier,
        r"tsk_report\(r_context",
        "broken != 0",
        "tsk_fill_nan",
        r"tsk_finish\(context",
        r"tsk_finish\(r_context",
    )
    assert multiplier.count("tsk_fill_nan") == 1 + sum(collects)
    # Which rows of the table say whose block it is.
    for name, along in zip(("at", "r_at"), config.contracts, strict=True):
        assert bool(re.search(rf"\b{name} = \(?panel", loader)) == along


@blocks
def test_a_box_of_a_gather_in_blocks_is_of_one_block(config: BlocksConfig, collects: bool) -> None:
    """What the tensor maps are made of: sizes from the fastest axis on, the block last and alone in its box, so it bounds the rest."""
    host = host_of(gather_blocks_kernel(config, collects))
    names = "own_blocks|blocks|inner|width|k_blocks|k_inner|free"
    read = dict(re.findall(rf'\b({names})(?:: T\.int32)? = T\.Cast\("int32", gather_blocks_gemm_(\w)_shape', host))
    assert read == dict(zip(names.split("|"), "XAXXBBB", strict=True))
    gathered, local = config.k_first
    for name, along_k, k_first, count, inner, width in (
        ("X", config.contracts, gathered, "own_blocks", "inner", "width"),
        ("A", config.contracts, gathered, "blocks", "inner", "width"),
        ("B", True, local, "k_blocks", "k_inner", "free"),
    ):
        sizes, boxes = tensor_map(host, name)
        assert sizes == ([width, inner, count] if k_first == along_k else [inner, width, count])
        assert boxes[2] == "1"


def tensor_map(host: str, name: str) -> tuple[list[str], list[str]]:
    """Sizes of a map of three dimensions and of its box, the fastest first."""
    found = re.search(rf'call_packed\("__tvm_tensormap_create_tiled", {name}_desc, \d+, 3, {name}, (.*)\)', host)
    assert found
    fields = re.split(r", (?![^(]*\))", found[1])
    return fields[:3], fields[6:9]


@reduces
def test_a_sum_signals_after_its_tiles(config: GemmConfig, all_reduce: bool) -> None:
    artifact = compiled(reduce_kernel, config, all_reduce)
    loader, multiplier, idle = branches(artifact.source)
    assert "tsk_wait" not in loader  # nothing that is loaded comes from peers
    travels, _, own = multiplier[: multiplier.index("tsk_join")].partition("} else {")
    before(
        travels,
        r"tsk_word\(table, tile, 3\) == 0",
        "TSK_STAGE",
        r"taken\[0\]\.wait",
        "tsk_leave_note\\(1",
        "noted.*arrive",
    )
    before(own, "tsk_wait_landed", "TSK_ADD_PARTS", "TSK_SCALE", "TSK_STORE")
    assert ("TSK_STORE_TWICE" in own) == ("tsk_leave_note(2" in own) == all_reduce
    if all_reduce:
        before(own, "TSK_STORE_TWICE", r"taken\[0\]\.wait", r"tsk_leave_note\(2", "noted.*arrive")
    assert multiplier.count("TSK_BIAS") == int(config.bias)
    # The bias stands before the branch: every rank adds its own, as it does before a plain reduction.
    assert not config.bias or multiplier.index("TSK_BIAS") < multiplier.index("tsk_word(table, tile, 3)")
    before(idle, r"noted\[0\]\.wait", "tsk_note_kind", r"taken\[0\]\.arrive", "tsk_signal_peer")
    assert "tsk_signal" not in loader + multiplier
    assert idle.count("TSK_PULL") == 1 and idle.count("tsk_join") == 1
    before(multiplier, "tsk_leave_note\\(0", "tsk_join", "tsk_last", "tsk_aborted", "tsk_fill_nan", "tsk_finish")


def events(ptx: str) -> list[str]:
    """Stores to words of peers and what orders them, as they follow in the text."""
    kinds = r"fence\.proxy\.async;|fence\.acq_rel\.sys;|membar\.sys;|st\.relaxed\.sys|st\.release\.sys|ld\.acquire\.sys|atom\.sys\.exch"
    return re.findall(kinds, ptx)


@reduces
def test_no_flag_is_set_without_its_fences(config: GemmConfig, all_reduce: bool) -> None:
    found = events(compiled(reduce_kernel, config, all_reduce).ptx)
    signals = [i for i, event in enumerate(found) if event == "fence.acq_rel.sys;"]
    assert len(signals) == 2  # of one peer, and of all
    for i in signals:
        # Bulk copies of a peer read what generic stores wrote: proxy fence, then system fence, then the flag.
        assert found[i - 1 : i + 2] == ["fence.proxy.async;", "fence.acq_rel.sys;", "st.relaxed.sys"]
    # The only other relaxed stores end the waits of a group that has failed: one loop behind each exchange of the abort word.
    stores = [i for i, event in enumerate(found) if event == "st.relaxed.sys" and i - 1 not in signals]
    assert len(stores) == found.count("atom.sys.exch") > 0
    for i in stores:
        assert "atom.sys.exch" in found[i - 2 : i]
    assert found.count("st.release.sys") == 1  # the acknowledgement


PULL_EVENTS = {
    "claim": r"atom\.global\.add\.u32",
    "look": r"ld\.acquire\.sys\.global\.u32",
    "proxy": r"fence\.proxy\.async;",
    "load": r"cp\.async\.bulk\.shared::cluster\.global\.mbarrier",
    "loaded": r"mbarrier\.try_wait\.parity",
    "store": r"cp\.async\.bulk\.global\.shared::cta\.bulk_group",
    "commit": r"cp\.async\.bulk\.commit_group;",
    "read but one": r"cp\.async\.bulk\.wait_group\.read 1;",
    "read": r"cp\.async\.bulk\.wait_group\.read 0;",
    "written but one": r"cp\.async\.bulk\.wait_group 1;",
    "written": r"cp\.async\.bulk\.wait_group 0;",
    "fence": r"membar\.gl;",
    "tell": r"st\.volatile\.global\.u32",
}


def pull_events(ptx: str) -> list[str]:
    """What a pulling warp does, as it follows in the text."""
    pull = ptx[ptx.rindex("mbarrier.init.shared::cta.b64 [%r") :]
    found = re.finditer("|".join(f"({pattern})" for pattern in PULL_EVENTS.values()), pull)
    return [list(PULL_EVENTS)[match.lastindex - 1] for match in found if match.lastindex]


@reduces
def test_a_pull_reads_after_its_flag_and_tells_after_its_writes(config: GemmConfig, all_reduce: bool) -> None:
    found = pull_events(compiled(reduce_kernel, config, all_reduce).ptx)
    wait = ["look", "look", "proxy"]  # lane 0 looks once, then in a loop
    # A load takes the place of the piece that has just been stored, or, with four pieces, of the one before.
    read = "read" if all_reduce else "read but one"
    first = ["proxy", "claim", *wait, "load", "loaded", "store", "commit", read, "load"]
    ahead = ["claim", "look", "proxy", "load"]
    # One group of copies is committed between a tile's last one and the wait for all but one.
    told = {"late": ["written but one", "proxy", "fence", "tell"], "at once": ["written", "proxy", "fence", "tell"]}
    partial_tiles = [*first, *told["late"], *ahead, *told["at once"]]
    sums = [*first[1:], *ahead, "written"] if all_reduce else []
    assert found == partial_tiles + sums


@pytest.mark.parametrize("tile_n", PULL_WIDTHS)
def test_pieces_of_a_pull(tile_n: int) -> None:
    rows = piece_rows(tile_n)
    assert 4 * rows == pulled_rows(tile_n) and 4 * rows * tile_n * ITEM_BYTES <= 32 << 10
    assert TILE_M // rows % 4 == 0  # every tile begins in the first piece
    assert rows <= 32  # of a sum a lane stores a row
    assert rows * tile_n * ITEM_BYTES >= 4 << 10  # smaller copies cost more


@sum_pushes
def test_a_small_sum_is_exchanged_by_the_multiplying_warps(config: GemmConfig, form: str) -> None:
    artifact = compiled(sum_push_kernel, config, form)
    loader, multiplier, idle = branches(artifact.source + "\n    } else {\n")  # the other warps have nothing to do
    assert "tsk_" not in idle and "TSK_EXCHANGE" not in loader
    assert multiplier.count("TSK_BIAS") == config.bias
    before(
        multiplier, *["TSK_BIAS"] * config.bias, "TSK_EXCHANGE", "tsk_last", "tsk_aborted", "tsk_fill_nan", "tsk_finish"
    )
    found = events(artifact.ptx)
    signals = [i for i, event in enumerate(found) if event == "fence.acq_rel.sys;"]
    assert len(signals) == {"scatter": 1, "one_shot": 1, "two_shot": 2}[form]
    for i in signals:  # generic stores, read by generic loads: the system fence, then the flag
        assert found[i : i + 2] == ["fence.acq_rel.sys;", "st.relaxed.sys"]
    # What peers have sent is read behind its flag, 16 bytes at a time and not by the read-only path.
    parts = [match.start() for match in re.finditer(r"ld\.global\.L1::no_allocate\.v4", artifact.ptx)]
    assert parts and artifact.ptx.index("ld.acquire.sys.global.u32") < parts[0]


@pytest.mark.parametrize("build", [all_gather_kernel, reduce_kernel], ids=name_of)
def test_kernels_of_one_file_are_what_they_are_alone(build) -> None:
    """Their code, that is: shared memory that a device function declares belongs to the file instead of to its only kernel."""
    (config, flag), together = next(reversed(family(build).items()))
    alone = tl.compile_cuda(build(config, flag), pass_configs=PASS_CONFIGS)
    codes = [re.findall(r"^\t+(?:@!?%p\d+ )?([a-z].*?)[;\s]", each.ptx, re.MULTILINE) for each in (alone, together)]
    assert codes[0] == codes[1] and len(codes[0]) > 500
    assert together.source == alone.source and together.shared_bytes == alone.shared_bytes
    assert abs(together.registers - alone.registers) <= 8 and together.log.count("Compiling entry function") == 1


@pytest.mark.parametrize("name", ["tsk_open", "tsk_acknowledge", "tsk_wait_rank"])
def test_service_kernels(name: str) -> None:
    artifact = tl.compile_cuda(service_kernel(name), pass_configs=PASS_CONFIGS)
    assert artifact.spill_bytes == 0 and artifact.stack_bytes == 0
    assert ("ld.acquire.sys.global.u32" in artifact.ptx) == (name != "tsk_acknowledge")
    assert ("st.release.sys.global.u32" in artifact.ptx) == (name == "tsk_acknowledge")
    # The epoch of a captured call changes while its address does not.
    assert re.search(r"ld\.volatile(\.global)?\.u32", artifact.ptx)
    assert bool(re.search(r"st\.volatile(\.global)?\.u32", artifact.ptx)) == (name == "tsk_open")


def test_spoil_kernel() -> None:
    artifact = tl.compile_cuda(spoil_kernel(), pass_configs=PASS_CONFIGS)
    assert artifact.spill_bytes == 0 and artifact.stack_bytes == 0
    assert "st.global.v4.u32" in artifact.ptx and re.search(r"st\.volatile(\.global)?\.u8", artifact.ptx)


def host_of(function) -> str:
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    with tvm.transform.PassContext(opt_level=3, config=PASS_CONFIGS), target:
        return str(tilelang.lower(function, target=target).host_mod.script())


@pytest.mark.parametrize("build", [all_gather_kernel, gather_push_kernel, reduce_kernel, sum_push_kernel])
def test_the_host_reads_each_size_from_its_own_parameter(build) -> None:
    """TileLang reads one shape for all parameters that a loop has bound to one name (tests/language/test_upstream.py)."""
    host = host_of(build(GemmConfig("bfloat16", True, 3, True), "scatter" if build is sum_push_kernel else True))
    read = dict(re.findall(r"\b(M|MR|K\d?|N\d?)(?:: T\.int32)? = T\.Cast\(\"int32\", (\w+)\[\d\]\)", host))
    names = {
        all_gather_kernel: ("M", "MR", "K", "N0", "N1", "N2"),
        gather_push_kernel: ("M", "K", "N0", "N1", "N2"),
        reduce_kernel: ("M", "N", "K0", "K1", "K2"),
        sum_push_kernel: ("M", "N", "K0", "K1", "K2"),
    }[build]
    assert set(read) == set(names)
    owners = (
        {f"K{i}": f"_A{i}_" for i in range(3)}
        if build in (reduce_kernel, sum_push_kernel)
        else {f"N{i}": f"_B{i}_" for i in range(3)}
    )
    for size, owner in owners.items():
        assert owner in read[size]
