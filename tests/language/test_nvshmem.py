"""Kernels with NVSHMEM calls, compiled and linked for sm_90a without a GPU, and what is refused where it is written."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import tilelang
import tilelang.language as T

import tscompile.language as tl
from tscompile.language import linking, modules, toolchain
from tscompile.language.compile import parse
from tscompile.language.nvshmem import Amo, CmpType, Team
from tscompile.nvshmem import headers

from . import elf
from . import nvshmem_kernels as k
from .kernels import CTX
from .ptx import read_non_coherently

D = tl.dialect("cuda", nvshmem="inline")
FORMS = [(name, scope) for name in ("moves", "collectives") for scope in k.SCOPES] + [("signals",)]
RDC = [("moves", "_warp"), ("moves", "_block"), ("collectives", "_block"), ("signals",)]
LOADER = {"vprintf", "__assertfail"}
"""What CUDA provides when it loads an image."""
LEVEL = {"": "0", "_warp": "1", "_block": "3"}
"""NVSHMEM's `threadgroup_t`, as it stands in mangled names."""


def name_of(form: tuple[str, ...]) -> str:
    return "".join(form)


@pytest.fixture(scope="module")
def compiled() -> Iterator[Callable[..., tl.CudaArtifact]]:
    """Artifacts by form and way, compiled side by side."""
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def start(form: tuple[str, ...], way: str) -> Future:
        function = parse(lambda: getattr(k, form[0])(D, *form[1:]))
        return pool.submit(tl.compile_cuda, function, nvshmem=way)

    futures = {(form, way): start(form, way) for way, forms in (("inline", FORMS), ("rdc", RDC)) for form in forms}
    yield lambda form, way="inline": futures[form, way].result()
    pool.shutdown(cancel_futures=True)


def called(artifact: tl.CudaArtifact) -> set[str]:
    """The entry points in the source that TileLang generated."""
    return set(re.findall(r"tsl_x_(?:nv|team|wait)_\w+", artifact.source))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_inlined(compiled, form: tuple[str, ...]) -> None:
    """One image with NVSHMEM in it: nothing to link, no calls, no spills, and the state that the loader looks for."""
    artifact = compiled(form)
    assert artifact.spill_bytes == artifact.stack_bytes == 0
    assert elf.undefined(artifact.cubin) <= LOADER
    state = [s for s in elf.symbols(artifact.cubin) if s.name == "nvshmemi_device_state_d"]
    version = [s for s in elf.symbols(artifact.cubin) if s.name == "nvshmemi_device_lib_version_d"]
    assert [s.defined and s.size > 500 for s in state] == [True]
    assert [s.defined and s.size for s in version] == [12]
    calls = called_functions(artifact) - LOADER
    assert not {name for name in calls if "nvshmemi_proxy" not in name}  # 3.8 keeps one, in the forms with nbi
    assert read_non_coherently(artifact) <= {
        "ctx",
        "a loaded pointer",
    }  # the table of peers' heaps, which nobody writes
    assert "ld.global.nc.u8" not in artifact.ptx and "ld.global.nc.v4" not in artifact.ptx  # but no payload


def entry(artifact: tl.CudaArtifact) -> str:
    """The PTX of the kernel itself, between its braces."""
    text, depth = artifact.ptx[artifact.ptx.index("{", artifact.ptx.index(".visible .entry")) :], 0
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return text[: brace.end()]
    raise AssertionError("a kernel without an end")


def called_functions(artifact: tl.CudaArtifact) -> set[str]:
    found = set(re.findall(r"call(?:\.uni)?\s*(?:\([^)]*\),\s*)?\n?\s*(\w+)", entry(artifact)))
    return {name for name in found if name != "seq"}


def transfers(artifact: tl.CudaArtifact) -> set[tuple[str, str, str]]:
    """NVSHMEM's functions that the kernel calls: name, level, and number of the operation."""
    found = set()
    for name in called_functions(artifact):
        match = re.match(
            r"_Z\d+nvshmemi_transfer_([a-z_]+?)(?:_dispatch)?(?:I|v|E)(?:L13threadgroup_t(\d)E)?(?:L13nvshmemi_op_t(\d)E)?",
            name,
        )
        if match:
            found.add((match[1], match[2] or "", match[3] or ""))
    return found


PUT, GET = "1", "4"


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["_warp", "_block"])
def test_each_copy_is_nvshmem_s_own(compiled, scope: str) -> None:
    """Linked kernels call NVSHMEM's functions by name: for what no peer mapping serves, one of each kind at this scope."""
    artifact, level = compiled(("moves", scope), "rdc"), LEVEL[scope]
    assert called(artifact) == {f"tsl_x_nv_{name}{scope}" for name in k.MOVES} | {"tsl_x_nv_quiet"}
    kinds = {
        ("rma", level, PUT),
        ("rma", level, GET),
        ("rma_nbi", level, PUT),
        ("rma_nbi", level, GET),
        ("put_signal", level, ""),
    }
    assert kinds <= transfers(artifact)
    assert {one for one in transfers(artifact) if one[0] in ("rma", "rma_nbi", "put_signal")} == kinds
    assert ("quiet", "0", "") in transfers(artifact)


@pytest.mark.slow
def test_signals_and_collectives_are_nvshmem_s_where_they_move(compiled) -> None:
    signals, collectives = compiled(("signals",), "rdc"), compiled(("collectives", "_block"), "rdc")
    assert {"rma_p", "amo_nonfetch", "fence", "quiet"} <= {name for name, _, _ in transfers(signals)}
    assert ("put_signal", "3", "") in transfers(collectives) and ("put_signal", "0", "") not in transfers(collectives)
    assert {"quiet", "rma_p"} <= {name for name, _, _ in transfers(collectives)}


@pytest.mark.slow
@pytest.mark.parametrize("form", RDC, ids=name_of)
def test_linked(compiled, form: tuple[str, ...]) -> None:
    cubin = compiled(form, "rdc").cubin
    assert elf.undefined(cubin) <= LOADER
    assert any(s.name == "nvshmemi_device_state_d" and s.defined for s in elf.symbols(cubin))
    assert any("nvshmemi_transfer" in s.name and s.defined for s in elf.symbols(cubin))


@pytest.mark.slow
def test_every_call_is_in_a_kernel(compiled) -> None:
    """What the tests compile, and those on ranks run, is all there is."""
    source = " ".join(compiled(form).source for form in FORMS)
    entries = {
        **{name: f"tsl_x_nv_{name}" for name in tl.nvshmem.__all__ if name.startswith(("put", "get"))},
        **{name: f"tsl_x_nv_{name}" for name in ("fence", "quiet", "int_p", "signal_op")},
        **{f"{name}{s}": f"tsl_x_nv_{name}{s}" for name in ("broadcast", "fcollect", "barrier") for s in k.SCOPES},
        **{f"{name}{s}": f"tsl_x_team_sync{s}" for name in ("sync", "sync_all") for s in k.SCOPES},
        **{f"barrier_all{s}": f"tsl_x_nv_barrier{s}" for s in k.SCOPES},
        "broadcastmem_block": "tsl_x_nv_broadcast_block",
        "signal_wait_until": "tsl_x_wait_u64",
        "get_pe": "ctx[0]",
        "get_pe_num": "ctx[1]",
    }
    assert set(entries) | {"Amo", "CmpType", "Team"} == set(tl.nvshmem.__all__)
    assert len(entries) == 44
    for name, text in entries.items():
        assert re.search(rf"{re.escape(text)}(?!\w)", source), name


@pytest.mark.slow
def test_all_waits_are_bounded(compiled) -> None:
    """NVSHMEM's have no clock; ours poll with acquire, look at the clock, and may give up."""
    for form, waits in ((("signals",), 7), (("collectives", "_warp"), 10), (("collectives", "_block"), 12)):
        ptx = compiled(form).ptx
        assert ptx.count("ld.acquire.sys.global.u64") == 2 * waits, form
        assert ptx.count("%globaltimer") == 2 * waits, form
    # No loop without one: what NVSHMEM would wait with is not in the kernel.
    assert not re.search(
        r"nvshmemi?_(wait_until|signal_wait|barrier|sync|broadcast|fcollect)", compiled(("signals",)).ptx
    )


@pytest.mark.slow
def test_a_matmul_keeps_its_registers_when_inlined() -> None:
    artifact = tl.compile_cuda(parse(lambda: k.gemm_and_put(D)))
    assert "wgmma.mma_async" in artifact.ptx and "setmaxnreg" in artifact.ptx
    assert artifact.spill_bytes == artifact.stack_bytes == 0 and "C75" not in artifact.log
    with pytest.raises(toolchain.ToolchainError, match=r"setmaxnreg and wgmma.*Use nvshmem='inline', or make the comm"):
        tl.compile_cuda(parse(lambda: k.gemm_and_put(D)), nvshmem="rdc")


@pytest.mark.slow
def test_calls_of_a_whole_block_switch_warp_specialisation_off() -> None:
    function = parse(lambda: k.joint_gemm(D))
    artifact = tl.compile_cuda(function)
    assert "setmaxnreg" not in artifact.ptx and "wgmma.mma_async" in artifact.ptx
    with pytest.raises(ValueError, match=r"nv_barrier_block is called by all threads .*use the forms of a warp"):
        tl.compile_cuda(function, pass_configs={linking.NO_WARP_SPECIALIZATION: False})
    with pytest.raises(ValueError, match="nv_barrier_block"):
        D.compile(function, {linking.NO_WARP_SPECIALIZATION: False})


@pytest.mark.slow
def test_the_numbers_are_those_of_the_headers(tmp_path: Path) -> None:
    prefix = {"SHARED": "NVSHMEM_TEAM_", "WORLD": "NVSHMEM_TEAM_", "INVALID": "NVSHMEM_TEAM_"}
    prefix |= {"NODE": "NVSHMEMX_TEAM_", "SAME_MYPE_NODE": "NVSHMEMX_TEAM_"}
    names = {f"NVSHMEMI_AMO_{one.name}".replace("AMO_END", "AMO_END"): one for one in Amo}
    names |= {f"NVSHMEM_CMP_{one.name}": one for one in CmpType}
    names |= {f"{prefix.get(one.name, 'NVSHMEMI_TEAM_')}{one.name}": one for one in Team}
    names |= {"NVSHMEM_SIGNAL_SET": Amo.SIGNAL_SET, "NVSHMEM_SIGNAL_ADD": Amo.SIGNAL_ADD}
    lines = [f'static_assert({name} == {int(value)}, "{name}");' for name, value in names.items()]
    assert len(lines) == 19 + 6 + 7 + 2

    def build(text: str) -> None:
        source = tmp_path / "numbers.cu"
        source.write_text(f"#include <nvshmem.h>\n#include <nvshmemx.h>\n{text}\n")
        command = [str(toolchain.nvcc()), "-ptx", "-std=c++17", "-arch=sm_90a", *linking.options("inline")]
        toolchain.run([*command, "-o", str(tmp_path / "numbers.ptx"), str(source)])

    build("\n".join(lines))
    with pytest.raises(toolchain.ToolchainError, match="NVSHMEM_CMP_EQ"):
        build('static_assert(NVSHMEM_CMP_EQ == 1, "NVSHMEM_CMP_EQ");')


@pytest.mark.slow
@pytest.mark.parametrize("way", ["inline", "rdc"])
def test_the_kernels_of_tilelang(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Dialect.compile` goes through TileLang's own callback, its flags and its cache."""
    made = []
    real = linking.link
    monkeypatch.setattr(linking, "link", lambda *a: made.append(1) or real(*a))
    tilelang.disable_cache()
    try:
        d = tl.dialect("cuda", nvshmem=way)
        kernel = d.compile(parse(lambda: k.refused(d)))
    finally:
        tilelang.enable_cache()
    assert isinstance(kernel, modules.NvshmemKernel)
    assert "tsl_x_nv_putmem_block" in kernel.get_kernel_source()
    assert made == ([1] if way == "rdc" else [])
    assert d.compile_flags()[1] == f"-DTSL_NVSHMEM={'.'.join(map(str, headers.find().version))}"


def test_a_kernel_without_the_flags_says_what_to_do(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text(tl.prelude("cuda", nvshmem=True) or "")
    command = [str(toolchain.nvcc()), "-ptx", "-std=c++20", "-arch=sm_90a", "-o", str(tmp_path / "x"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode and "is compiled by tl.dialect('cuda', nvshmem='inline').compile" in done.stderr


# ---- what is refused where it is written ----

NV = tl.nvshmem
SET = Amo.SIGNAL_SET

REFUSED = [
    ("negative size", lambda c, x, y, s: NV.putmem(c, x[0], x[1], -4, 0), ValueError, "nbytes is -4: it cannot be neg"),
    ("size no integer", lambda c, x, y, s: NV.putmem(c, x[0], x[1], 4.0, 0), TypeError, "nbytes is 4.0: an integer is"),
    ("size of floats", lambda c, x, y, s: NV.getmem(c, x[0], x[1], x[2], 0), TypeError, "nbytes is of float32: an int"),
    ("impossible PE", lambda c, x, y, s: NV.getmem_warp(c, x[0], x[1], 4, 8), ValueError, "pe is 8: a group has at mo"),
    (
        "negative PE",
        lambda c, x, y, s: NV.getmem_nbi(c, x[0], x[1], 4, -1),
        ValueError,
        "pe is -1: it cannot be negati",
    ),
    ("no memory", lambda c, x, y, s: NV.putmem(c, "x", x[1], 4, 0), TypeError, "an address is x.i., a tensor, or"),
    (
        "int_p of floats",
        lambda c, x, y, s: NV.int_p(c, x[0], 1, 0),
        ValueError,
        "int_p stores an int32, and dest is of f",
    ),
    (
        "narrow signal",
        lambda c, x, y, s: NV.signal_op(c, y[0], 1, SET, 0),
        ValueError,
        "a signal of int32: NVSHMEM's sig",
    ),
    (
        "other Amo",
        lambda c, x, y, s: NV.signal_op(c, s[0], 1, Amo.ADD, 0),
        ValueError,
        "one of Amo.SIGNAL_SET, Amo.SIGNAL",
    ),
    (
        "operation by name",
        lambda c, x, y, s: NV.putmem_signal(c, x[0], x[1], 4, s[0], 1, "set", 0),
        ValueError,
        "sig_op 'set': one of Amo.SIGNAL_SET",
    ),
    ("comparison", lambda c, x, y, s: NV.signal_wait_until(c, s[0], 6, 1), ValueError, "cmp 6: one of CmpType.EQ, Cmp"),
    ("narrow wait", lambda c, x, y, s: NV.signal_wait_until(c, y[0], CmpType.EQ, 1), ValueError, "a signal of int32"),
    (
        "no team",
        lambda c, x, y, s: NV.barrier(c, 17),
        ValueError,
        "team 17: one of Team.WORLD, .* make a SymmetricGroup",
    ),
    (
        "team of one",
        lambda c, x, y, s: NV.sync(c, Team.SAME_GPU),
        ValueError,
        "Team.SAME_GPU: .* this team is the PE al",
    ),
    (
        "two dtypes",
        lambda c, x, y, s: NV.broadcast(c, Team.WORLD, x[0], y[0], 4, 0),
        ValueError,
        "dest is of float32 and src of int32",
    ),
    (
        "root",
        lambda c, x, y, s: NV.broadcastmem_block(c, Team.WORLD, x[0], x[1], 4, 9),
        ValueError,
        "root is 9: a group has at most 8 PEs",
    ),
    (
        "elements of an address",
        lambda c, x, y, s: NV.fcollect(c, Team.WORLD, tl.pointer(s[0]), x[1], 4),
        ValueError,
        "an address has no dtype: pass dtype=",
    ),
]


def written(make: Callable, prelude: str | None):
    @T.prim_func
    def kernel(ctx: CTX, x: T.Tensor((64,), "float32"), y: T.Tensor((64,), "int32"), signals: T.Tensor((4,), "int64")):
        with T.Kernel(1, threads=32, prelude=prelude) as _:
            make(ctx, x, y, signals)

    return kernel


@pytest.mark.parametrize(("make", "kind", "says"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_what_cannot_be(target: str, make: Callable, kind: type, says: str) -> None:
    prelude = D.prelude if target == "cuda" else None
    with pytest.raises(kind, match=says):
        parse(lambda: written(make, prelude))


def test_a_prelude_without_nvshmem() -> None:
    def put(ctx, x, y, signals):
        return NV.putmem(ctx, x[0], x[1], 4, 0)

    with pytest.raises(ValueError, match=r"nvshmem\.putmem needs .*dialect\('cuda', nvshmem='inline'\)\.prelude"):
        parse(lambda: written(put, tl.prelude("cuda")))
    parse(lambda: written(put, D.prelude))
    parse(lambda: written(lambda ctx, x, y, s: NV.sync_all(ctx), tl.prelude("cuda")))  # this needs none


@pytest.mark.parametrize("way", ["rcd", True, ""])
def test_a_way_to_link_that_there_is_not(way: object) -> None:
    with pytest.raises(ValueError, match=f"nvshmem {way!r}: inline or rdc"):
        tl.dialect("cuda", nvshmem=way)  # type: ignore[arg-type]
