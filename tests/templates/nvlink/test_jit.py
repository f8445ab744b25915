"""Compiled kernels and how they are kept; without a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import GATHER_USES
from tscompile.errors import HeapError
from tscompile.language.launch_spec import LaunchSpec, TensorMap
from tscompile.nvshmem import native, stream
from tscompile.problem import GatherUse, Plan
from tscompile.templates import find_template
from tscompile.templates.nvlink import gather_blocks, gather_rows, gemm_reduce, jit
from tscompile.templates.nvlink.channel import Site
from tscompile.templates.nvlink.launch import Kernel
from tscompile.templates.template import CompiledTemplate

from .fake_gpu import Gpu, spec_of

BF16 = "bfloat16"
SPEC = LaunchSpec("k", 1, 32, 0, {}, (), ())


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(jit, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(jit, "_futures", {})
    return tmp_path / "kernels"


def test_a_kernel_is_compiled_once_and_read_back(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cubin, spec = jit.artifact("service", "tsk_open")
    assert cubin[:4] == b"\x7fELF" and spec == spec_of("service", "tsk_open")
    assert spec.kernel.encode() in cubin
    monkeypatch.setattr(jit, "_build", lambda *_: pytest.fail("it was there"))
    assert jit.artifact("service", "tsk_open") == (cubin, spec)
    (cache / next(path.name for path in cache.glob("*.json"))).unlink()  # as after a write that was cut off
    built = [(b"another", spec)]
    monkeypatch.setattr(jit, "_build", lambda *_: built.pop())
    assert jit.artifact("service", "tsk_open") == (b"another", spec)


def test_what_a_kernel_is_made_of_names_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "_build", lambda name, args: (repr((name, args)).encode(), SPEC))
    made = {jit.artifact(*wanted)[0] for wanted in (("a", 1), ("a", 2), ("b", 1))}
    monkeypatch.setattr(jit, "_sources", lambda: "changed")
    jit.artifact("a", 1)
    assert len(made) == 3 and len(list(cache.glob("*.cubin"))) == 4


def test_a_failed_compilation_is_told_where_the_kernel_is_needed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("nvcc says no")

    monkeypatch.setattr(jit, "_build", fail)
    jit.compile_ahead("service", "tsk_open").exception()
    with pytest.raises(RuntimeError, match="nvcc says no"):
        jit._loaded.__wrapped__(0, "service", ("tsk_open",))
    # In the vote it is a reason for all ranks, once; then it is tried again, since its cause may be gone.
    with pytest.raises(HeapError, match="cannot be compiled: nvcc says no"):
        jit.compiled()
    jit.compiled()
    monkeypatch.setattr(jit, "_build", lambda *_: (b"", SPEC))
    assert jit.compile_ahead("service", "tsk_open").result() == (b"", SPEC)
    assert jit.compile_ahead("service", "tsk_open") is jit.compile_ahead("service", "tsk_open")
    jit.compiled()


def test_a_cache_without_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jit, "_build", full)
    with pytest.raises(HeapError, match=r"No space left.*XDG_CACHE_HOME"):
        jit.artifact("service", "tsk_open")


def test_a_launch_spec_survives_json(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = TensorMap(
        "A", ("inner", "width", "blocks"), (("inner", "blocks"), ("inner",)), 2, (64, 128, 1), 9, 0, 3, 2, 0
    )
    spec = LaunchSpec("k", 132, 384, 1024, {"A_desc": tensor}, ("A_desc", "n", "scale"), ("scale",))
    monkeypatch.setattr(jit, "_build", lambda *_: (b"", spec))
    assert jit.artifact("any") == jit.artifact("any") == (b"", spec)


def test_values_and_their_places() -> None:
    tensor = TensorMap(
        "A", ("inner", "width", "blocks"), (("inner", "blocks"), ("inner",)), 2, (64, 128, 1), 9, 0, 3, 2, 0
    )
    kernel = Kernel(LaunchSpec("k", 132, 384, 1024, {"A_desc": tensor}, ("n", "A_desc", "scale"), ("scale",)), 77)
    values = kernel.values({"n": -5, "scale": 0.5, "A": 1 << 50, "inner": 3, "blocks": 4, "unknown": 9}, {"width"})
    values[kernel.place("width")] = 5
    with pytest.raises(ValueError, match="k needs scale, inner"):
        kernel.values({"n": 1, "A": 2, "blocks": 3}, {"width"})
    at = {name: values[kernel.place(name)] for name in ("n", "scale", "A", "inner", "blocks", "width")}
    assert at == {"n": 2**64 - 5, "scale": 0x3F000000, "A": 1 << 50, "inner": 3, "blocks": 4, "width": 5}
    spare = len(values) - stream.ALIGN_WORDS - stream.MADE_WORDS  # behind them there is room for the map
    assert kernel.place("unknown") == spare - 1 and values[spare - 1] == 9 and not any(values[spare:])
    step = kernel.step(values, 1)
    native = stream.NativeKernel.from_address(step.src)
    assert (step.kind, step.stream, step.dst) == (stream.LAUNCH, 1, ctypes.addressof(values))
    assert (native.function, native.grid, native.threads, native.shared) == (77, 132, 384, 1024)
    assert (native.values, native.maps) == (spare, 1)
    assert list(native.parameter[: native.parameters]) == [kernel.place("n"), -1, kernel.place("scale")]
    described = native.map[0]
    assert [described.dims[i] for i in range(3)] == [kernel.place(name) for name in tensor.dims]
    assert list(described.strides[0]) == [kernel.place("inner"), kernel.place("blocks"), -1, -1, -1]
    assert list(described.strides[1])[:2] == [kernel.place("inner"), -1] and described.strides[2][0] == -1
    assert list(described.box) == [64, 128, 1, 1, 1] and described.rank == 3
    too_many = tuple(str(n) for n in range(stream.MAX_PARAMETERS + 1))
    with pytest.raises(ValueError, match="65 parameters"):
        Kernel(LaunchSpec("k", 1, 32, 0, {}, too_many, ()), 1)


def test_the_native_structs_are_those_of_c() -> None:
    """A mismatch would pass wrong addresses to the GPU."""
    source = Path(stream.__file__).with_name("stream.c")
    sizes = (ctypes.c_uint64 * 6)()
    ctypes.CDLL(str(native.build(source, ("-ldl",)))).tsc_stream_sizes(sizes)
    step, tensor_map, kernel, made, queues, operation = sizes
    mirrored = (stream.Step, stream.NativeMap, stream.NativeKernel, stream.Queues)
    assert [step, tensor_map, kernel, queues] == [ctypes.sizeof(kind) for kind in mirrored]
    assert made == 8 * stream.MADE_WORDS
    assert operation == 48, "CUstreamBatchMemOpParams of cuda.h"
    limits = f"MAX_RANK = {stream.MAX_RANK}, MAX_MAPS = {stream.MAX_MAPS}, MAX_PARAMETERS = {stream.MAX_PARAMETERS},"
    assert limits in source.read_text()


@pytest.mark.parametrize("kind", ["gather", "scatter", "reduce", *map(str, range(len(GATHER_USES)))])
def test_what_is_compiled_ahead_is_what_is_launched(gpu: Gpu, kind: str) -> None:
    weights = [torch.randn(64, n).to(torch.bfloat16) for n in (32, 40, 8, 16)]
    biases = [None, torch.ones(40, dtype=torch.bfloat16), None, None]
    lhs = [torch.randn(512, k).to(torch.bfloat16) for k in (64, 128)]
    rhs = [torch.randn(264, k).to(torch.bfloat16).t() for k in (64, 128)]
    if kind == "gather":
        plan = Plan(
            "all_gather_matmul",
            "g/a",
            "nvlink",
            BF16,
            uses=(GatherUse("lhs", False, "rows", BF16),) * 4,
            return_gathered=True,
        )
        args: tuple[Any, ...] = (torch.randn(2, 16 * 64).to(torch.bfloat16), weights, biases)
    elif kind.isdigit():
        use = GatherUse(*GATHER_USES[int(kind)], BF16)
        plan = Plan("all_gather_matmul", "g/a", "nvlink", BF16, uses=(use,))
        whole = torch.randn(4 * 64, 64).to(torch.bfloat16)  # as rows; as columns it is the transpose
        k = 256 if use.contracts_ranks else 64
        other = torch.randn((k, 72) if use.side == "lhs" else (72, k)).to(torch.bfloat16)
        shard = whole[:64].reshape(1, -1) if use.rank_axis == "rows" else whole[:64].t().contiguous()
        args = (shard, [other], [None])
    else:
        plan = Plan(
            "matmul_reduce_scatter" if kind == "scatter" else "matmul_all_reduce",
            "g/a",
            "nvlink",
            BF16,
            coefficients=(1.0, 1.0),
        )
        args = (lhs, rhs, [None, None], [], *([2] if kind == "scatter" else []))
    template = find_template(plan.kind, "nvlink")
    assert isinstance(template, CompiledTemplate)
    ahead = template.kernels(plan, 4, *args)
    template.run(gpu.link.open(Site(5)), plan, *args)
    assert ahead and ahead == [(launched.name, *launched.args) for launched in gpu.driver.launched]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu(monkeypatch)
    for module in (gather_rows, gather_blocks, gemm_reduce):
        monkeypatch.setattr(module, "kernel", made.driver.kernel)
    return made
