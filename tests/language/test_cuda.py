"""Every primitive compiled for sm_90a: what PTX it becomes, that nothing spills, and where TileLang puts the calls. No GPU needed."""

import re
from functools import cache
from pathlib import Path

import pytest

import tscompile.language as tl

from . import copy_kernels, kernels
from .ptx import before, read_non_coherently

D = tl.dialect("cuda")
NO_SHARED_SYNC = {"tl.disable_thread_storage_sync": True}


def compiled(function: object, **pass_configs: bool) -> tl.CudaArtifact:
    artifact = tl.compile_cuda(function, pass_configs=pass_configs or None)
    assert artifact.cubin[:4] == b"\x7fELF"
    assert artifact.spill_bytes == 0
    assert artifact.stack_bytes == 0
    assert "call.uni" not in artifact.ptx and ".func" not in artifact.ptx  # all inlined: a call would serialise wgmma
    assert read_non_coherently(artifact) <= {"ctx", "table"}  # which nobody writes while kernels run
    return artifact


def test_non_coherent_loads_are_seen() -> None:
    """What the check above is for: mainline marks a parameter that is only read as read-only data, even after an acquire."""

    @kernels.T.prim_func
    def kernel(
        ctx: kernels.T.Tensor((32,), "int64"),
        x: kernels.T.Tensor((8,), "float32"),
        y: kernels.T.Tensor((8,), "float32"),
    ):
        with kernels.T.Kernel(1, threads=32, prelude=D.prelude) as _:
            tl.fence()
            y[0] = x[1] + tl.peer(ctx, tl.rank(ctx), 0, (8,), "float32")[2]

    assert read_non_coherently(tl.compile_cuda(kernel)) == {"ctx", "x"}


def test_copies() -> None:
    ptx = compiled(copy_kernels.copies(D, 4)).ptx
    for load, store in (("v4.u32", "v4.u32"), ("u64", "u64"), ("u32", "u32"), ("u16", "u16"), ("u8", "u8")):
        assert f"ld.global.L1::no_allocate.{load} " in ptx and f"st.global.{store} " in ptx
    assert "bar.sync" not in ptx and "barrier.sync" not in ptx


@pytest.mark.parametrize(
    ("dtype", "word", "number"), [("int32", "u32", "u32"), ("float32", "u32", "f32"), ("int64", "u64", "u64")]
)
def test_loads_stores_and_atomics(dtype: str, word: str, number: str) -> None:
    ptx = compiled(kernels.words(D, dtype)).ptx
    for name, orders in kernels.ORDERS.items():
        for order in orders:
            for scope in kernels.SCOPES:
                instruction, suffix = name.split("_")[0].replace("atomic", "atom"), word
                if name.endswith("_add"):
                    suffix = f"add.{number}"
                assert len(re.findall(rf"\b{instruction}\.{order}\.{scope}\.global\.{suffix} ", ptx)) == 1
    assert f"ld.volatile.global.{word} " in ptx and f"st.volatile.global.{word} " in ptx


def instruction(name: str, form: dict) -> str:
    """What PTX calls a form of load or store, up to the type."""
    weak = "" if form.get("non_coherent") else ".weak"  # .nc implies it
    order = weak if form["semantics"] == "weak" else f".{form['semantics']}"
    scope = f".{form['scope']}" if "scope" in form else ""
    nc, na = ".nc" * form.get("non_coherent", False), ".L1::no_allocate" * form.get("no_allocate", False)
    return f"{name}{order}{scope}.global{nc}{na}"


WORDS = {
    **{f"{sign}int{bits}": f"u{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "float16": "u16",
    "bfloat16": "u16",
    "float32": "u32",
    "float64": "u64",
    "float8_e4m3fn": "u8",
    "float8_e5m2": "u8",
}


@cache
def every_word() -> dict[str, tl.CudaArtifact]:
    return dict(zip(WORDS, tl.compile_cuda_all(kernels.every_word(D, dtype) for dtype in WORDS), strict=True))


@pytest.mark.parametrize("dtype", WORDS)
def test_every_form_of_load_and_store(dtype: str) -> None:
    artifact = every_word()[dtype]
    assert artifact.stack_bytes == artifact.spill_bytes == 0
    for name in ("ld", "st"):
        for _, form in kernels.word_forms(name):
            assert artifact.ptx.count(f"\t{instruction(name, form)}.{WORDS[dtype]} ") == 1, form
    assert [len(kernels.word_forms(name)) for name in ("ld", "st")] == [17, 15]


@pytest.mark.parametrize(("dtype", "lanes"), [("float32", 4), ("float16", 8)])
def test_every_form_of_128_bits(dtype: str, lanes: int) -> None:
    artifact = tl.compile_cuda(kernels.every_wide_word(D, dtype, lanes))
    assert artifact.stack_bytes == artifact.spill_bytes == 0  # the local array has become registers
    assert "local" not in artifact.ptx
    for name in ("ld", "st"):
        for _, form in kernels.word_forms(name, wide=True):
            assert artifact.ptx.count(f"\t{instruction(name, form)}.v4.u32 ") == 1, form
    assert [len(kernels.word_forms(name, wide=True)) for name in ("ld", "st")] == [11, 9]


def test_blocks_of_a_grid_meet() -> None:
    artifact = compiled(kernels.grid(D))
    before(
        artifact.ptx,
        r"bar\.sync",
        r"atom\.release\.gpu\.global\.add\.u64",
        r"ld\.acquire\.gpu\.global\.u64",
        r"bar\.sync",
    )
    assert artifact.ptx.count("ld.acquire.gpu.global.u64") == 3
    assert artifact.ptx.count("%globaltimer") == 6  # all three are bounded
    assert "div." not in artifact.ptx  # of 64 bits it would be a call


@pytest.mark.parametrize(("dtype", "word"), [("int32", "u32"), ("uint64", "u64")])
def test_waits_are_bounded_and_acquire(dtype: str, word: str) -> None:
    artifact = compiled(kernels.waits(D, dtype))
    assert (
        len(re.findall(rf"ld\.acquire\.sys\.global\.{word} ", artifact.ptx)) == 16
    )  # two polls for each of eight waits
    assert artifact.ptx.count("%globaltimer") == 16
    assert len(re.findall(r"atom(\.\w+)*\.exch\.b32 ", artifact.ptx)) == 8  # each may give up
    assert "ld.relaxed.sys.global.u32 " in artifact.ptx and "st.relaxed.sys.global.u32 " in artifact.ptx
    for number, compare in enumerate(kernels.COMPARES):
        prefix = {"int32": "s32", "uint64": "u64"}[dtype]
        assert re.search(rf"tsl_x_wait_{prefix}\(.*, {number}, .*\) != 0", artifact.source), compare


def test_short_forms_and_the_epoch() -> None:
    artifact = compiled(kernels.named_waits(D))
    assert "ld.relaxed.gpu.global.u32 " in artifact.ptx
    assert [int(n) for n in re.findall(r"tsl_x_wait_u32\(.*?\)\)\), (\d), ", artifact.source)] == [0, 1, 2, 3, 4, 5]


def test_the_address_of_another_rank() -> None:
    source = compiled(kernels.put_remote(D, 100)).source
    assert re.search(
        r"copy_block\(\(\(uint64_t\)\(\(ctx\[\(to \+ 8\)\] \+ .* - ctx\[\(ctx\[0\] \+ \(int64_t\)8\)\]", source
    )


def test_an_exchange_signals_after_its_data() -> None:
    before(
        compiled(kernels.exchange(D)).ptx,
        r"st\.global\.v4\.u32",
        r"bar\.sync",
        r"st\.release\.sys\.global\.u32",
        r"ld\.acquire\.sys\.global\.u32",
        r"bar\.sync",
        r"ld\.global\.L1::no_allocate\.v4\.u32",
    )


def test_threads() -> None:
    ptx = compiled(kernels.threads(D)).ptx
    for text in ("fence.acq_rel.cta;", "fence.acq_rel.gpu;", "fence.acq_rel.sys;", "fence.proxy.async;"):
        assert text in ptx
    for text in (
        "barrier.sync ",
        "barrier.arrive ",
        "elect.sync ",
        "vote.sync.any",
        "vote.sync.all",
        "vote.sync.ballot",
    ):
        assert text in ptx
    for text in ("shfl.sync.idx", "shfl.sync.bfly", "shfl.sync.up", "shfl.sync.down"):
        assert text in ptx
    before(ptx, "bar.warp.sync", r"st\.release\.sys\.global\.u32", r"ld\.acquire\.sys\.global\.u32")


def test_bulk_copies_are_complete_before_they_are_signalled() -> None:
    ptx = compiled(kernels.bulk(D), **NO_SHARED_SYNC).ptx
    before(
        ptx,
        r"mbarrier\.init\.shared::cta\.b64",
        r"fence\.proxy\.async\.shared::cta;",
        r"barrier\.sync ",
        r"fence\.proxy\.async\.shared::cta;",
        r"cp\.async\.bulk\.global\.shared::cta\.bulk_group",
        r"cp\.async\.bulk\.commit_group;",
        r"cp\.async\.bulk\.wait_group\.read 0;",
        r"cp\.async\.bulk\.wait_group 0;",
        r"st\.release\.sys\.global\.u32",
        r"red\.release\.sys\.global\.add\.u32",
        r"mbarrier\.arrive\.expect_tx",
        r"cp\.async\.bulk\.shared::cluster\.global\.mbarrier::complete_tx::bytes",
        r"mbarrier\.try_wait\.parity",
    )


@pytest.mark.parametrize("one_warp", [False, True])
def test_a_wait_stays_with_the_loads_of_a_warp_specialised_gemm(one_warp: bool) -> None:
    artifact = compiled(kernels.waiting_gemm(D, one_warp=one_warp))
    head, _, rest = artifact.source.partition("if (((int)threadIdx.x) < 128) {")
    producer, _, consumer = rest.partition("  } else {\n")
    assert "tsl_x" not in head + consumer
    before(producer, r"mbarrier\[.*\]\.wait\(", "tsl_x_warp_wait_s32", r"tl::tma_load\(a_desc", r"tl::tma_load\(b_desc")
    assert "wgmma_ss" in consumer and "wgmma" not in producer
    assert ("threadIdx.x) < 32" in producer) == one_warp
    assert artifact.source.count("tl::tma_load(") == 2
    before(artifact.ptx, r"ld\.acquire\.sys\.global\.u32", r"fence\.proxy\.async;", r"cp\.async\.bulk\.tensor\.2d")
    assert len(re.findall(r"ld\.acquire\.sys", artifact.ptx)) == 2


def test_a_kernel_that_does_not_compile() -> None:
    @kernels.T.prim_func
    def broken(x: kernels.T.Tensor((1,), "int32")):
        with kernels.T.Kernel(1, threads=32, prelude="#error this is no kernel\n") as _:
            x[0] = 1

    with pytest.raises(tl.ToolchainError, match="this is no kernel"):
        tl.compile_cuda(broken)


def test_the_header_is_part_of_the_kernel() -> None:
    """TileLang's cache key is made of the kernel's text: an `#include` would leave old binaries in the cache."""
    assert "tsl_x_copy_block" in copy_kernels.copies(D, 4).script()


def test_the_header_asks_nothing_about_the_block() -> None:
    """But for the block forms of meetings, which say so; test_stream.py has that those of warps do not."""
    code = re.sub(r"//.*", "", tl.prelude("cuda") or "")
    block = [
        line for line in code.splitlines() if re.search(r"__syncthreads|blockDim|threadIdx|blockIdx|\bbar\.sync", line)
    ]
    team = (Path(tl.__file__).parent / "cuda_team.h").read_text()
    assert all(line in team for line in block) and len(block) == 3
    assert "__forceinline__" in code


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("ld", {"semantics": "release"}, "semantics 'release': one of weak, volatile, relaxed, acquire"),
        ("st", {"semantics": "acquire"}, "semantics 'acquire': one of weak, volatile, relaxed, release"),
        ("ld", {"semantics": "acq_rel"}, "one of weak, volatile, relaxed, acquire"),
        ("st", {"scope": "system"}, "scope 'system': one of cta, gpu, sys"),
        *(
            (
                name,
                {"semantics": semantics, "scope": scope},
                f"scope '{scope}': {semantics} accesses have none, relaxed",
            )
            for name in ("ld", "st", "ld128", "st128")
            for semantics in ("weak", "volatile")
            for scope in kernels.SCOPES
        ),
        *(
            (name, {"semantics": "volatile", "no_allocate": True}, "no_allocate: weak, relaxed")
            for name in ("ld", "st", "ld128", "st128")
        ),
        *(
            (name, {"semantics": semantics, "non_coherent": True}, f"non_coherent: weak loads only, not {semantics}")
            for name, orders in (("ld", ("volatile", "relaxed", "acquire")), ("ld128", ("volatile", "relaxed")))
            for semantics in orders
        ),
        ("ld128", {"semantics": "acquire"}, "none of them can publish the others: weak, volatile, relaxed, beside"),
        ("st128", {"semantics": "release"}, "none of them can publish the others: weak, volatile, relaxed, beside"),
        ("st128", {"semantics": "acq_rel"}, "semantics 'acq_rel': one of weak, volatile, relaxed"),
        *(
            (name, {"dtype": dtype}, f"{dtype}: loads and stores are of integers and floats of 8, 16, 32 or 64 bits")
            for name in ("ld", "st")
            for dtype in ("bool", "int4", "float32x4", "float4_e2m1fn", "handle")
        ),
    ],
)
def test_loads_and_stores_that_do_not_exist(name: str, form: dict, message: str) -> None:
    address = tl.pointer(kernels.T.int64(8))
    arguments = {"ld": (address,), "st": (address, 1), "ld128": (address, address), "st128": (address, address)}[name]
    with pytest.raises(ValueError, match=message):
        getattr(tl, name)(*arguments, **({} if name.endswith("128") else {"dtype": "int32"}) | form)


def test_what_cannot_be_said() -> None:
    address = tl.pointer(kernels.T.int64(8))
    with pytest.raises(ValueError, match="pass dtype="):
        tl.ld(address)
    with pytest.raises(ValueError, match="float16: flags, atomics and shuffles are 32 or 64 bits wide"):
        tl.atomic_add(address, 1, dtype="float16")
    with pytest.raises(ValueError, match="int16: flags, atomics and shuffles"):
        tl.signal(address, 1, dtype="int16")
    with pytest.raises(ValueError, match="float64: atomic addition"):
        tl.atomic_add(address, 1, dtype="float64")
    with pytest.raises(ValueError, match="semantics 'acquire': one of relaxed, release"):
        tl.red_add(address, 1, "acquire", dtype="int32")
    with pytest.raises(ValueError, match="op 'max'"):
        tl.signal(address, 1, "max", dtype="int32")
    with pytest.raises(ValueError, match="float32: a flag is one of"):
        tl.wait_eq(address, address, 1, peer=0, dtype="float32")
    with pytest.raises(ValueError, match="compare '>='"):
        tl.wait(address, address, ">=", 1, peer=0, dtype="int32")
    with pytest.raises(ValueError, match="100 bytes: a bulk copy moves a positive multiple of 16"):
        tl.bulk_put(address, address, 100)
    with pytest.raises(ValueError, match="mode 'left'"):
        tl.shuffle(kernels.T.int32(1), 1, "left")
    with pytest.raises(ValueError, match="region 'heap'"):
        tl.peer_address(address, 0, region="heap")
    with pytest.raises(TypeError, match="not float32"):
        tl.put_warp(kernels.T.float32(1), address, 16)
    with pytest.raises(ValueError, match="target 'tpu'"):
        tl.dialect("tpu")
    with pytest.raises(ValueError, match="scope 'all'"):
        tl.fence("all")
