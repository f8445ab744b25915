"""What the templates over NVLink hand to kernels and to the copy engine; on the CPU, with launches that are only noted down."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tscompile.templates.nvlink.registered  # noqa: F401  (registers the templates)
from tscompile.nvshmem import copies
from tscompile.nvshmem.device import CONTROL_BYTES
from tscompile.problem import GatherUse, Plan
from tscompile.templates import find_template
from tscompile.templates.nvlink import all_gather_gemm, gemm_reduce
from tscompile.templates.nvlink.channel import ACK, SIDE
from tscompile.templates.nvlink.kernels.all_gather import all_gather_kernel
from tscompile.templates.nvlink.kernels.gemm import GemmConfig
from tscompile.templates.nvlink.kernels.reduce import reduce_kernel

from .fake_gpu import SLOT_BYTES, Gpu

BF16 = "bfloat16"
ROWS, GRADIENT = GatherUse("lhs", False, "rows", BF16), GatherUse("lhs", True, "rows", BF16)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def parameters(build: Any, config: GemmConfig) -> list[Any]:
    """Parameters of a kernel, as TileLang declares them."""
    function = build(config, True)
    return [function.buffer_map.get(parameter, parameter) for parameter in function.params]


class Launches:
    """Stands for `jit.kernel`: keeps configurations and arguments, and checks the arguments against the kernel's parameters."""

    def __init__(self) -> None:
        self.calls: list[tuple[GemmConfig, bool, tuple[Any, ...]]] = []

    def __call__(self, build: Any, config: GemmConfig, flag: bool) -> Any:
        def launch(*args: Any) -> None:
            declared = parameters(build, config)
            assert len(args) == len(declared)
            for argument, parameter in zip(args, declared, strict=True):
                is_tensor = isinstance(argument, torch.Tensor)
                assert is_tensor == hasattr(parameter, "shape"), parameter
                if is_tensor:
                    assert argument.dim() == len(parameter.shape) and str(argument.dtype) == f"torch.{parameter.dtype}"
                    assert argument.is_contiguous() and argument.data_ptr() % 16 == 0
            self.calls.append((config, flag, args))

        return launch


def test_what_a_gather_launches(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    launches, acknowledged = Launches(), []
    monkeypatch.setattr(all_gather_gemm, "kernel", launches)
    monkeypatch.setattr(all_gather_gemm, "service_kernel", lambda name: lambda *args: acknowledged.append((name, args)))
    template = find_template("all_gather_matmul", "nvlink")
    assert template is not None
    shard = torch.randn(2, 16 * 64).to(torch.bfloat16)  # two pieces of 16 rows, k = 64: tiles span ranks
    weights = [torch.randn(64, 32).to(torch.bfloat16), torch.randn(40, 64).to(torch.bfloat16).t()]
    weights += [torch.randn(64, n).to(torch.bfloat16) for n in (8, 16, 24)]
    gradient = torch.randn(2 * 4 * 16, 8).to(torch.bfloat16)
    uses = (*[ROWS] * 5, GRADIENT)
    plan = Plan("all_gather_matmul", "g/site", "nvlink", BF16, uses=uses)
    biases = [None, None, None, None, torch.ones(24, dtype=torch.bfloat16), None]
    outputs = template.run(gpu.link.open(5), plan, shard, [*weights, gradient], biases)
    assert [tuple(output.shape) for output in outputs] == [(128, n) for n in (32, 40, 8, 16, 24)] + [(64, 8)]
    # One layout, one bias, at most three weights a kernel.
    assert [(config.transposed, config.bias, config.operands) for config, *_ in launches.calls] == [
        (False, False, 3),
        (True, False, 1),
        (False, True, 1),
    ]
    assert all(args[-1] == -1 for *_, args in launches.calls)  # the weight gradient reads the slot after them
    assert not acknowledged  # an eager call needs none
    slot = gpu.link.slot_view(1, (2, 4, 16 * 64), torch.bfloat16)
    assert torch.equal(slot[:, 1], shard)
    side = [
        step
        for step in gpu.engine.issued
        if step["stream"] == SIDE and step["kind"] in (copies.COPY_ROWS, copies.WRITE)
    ]
    assert [step["kind"] for step in side] == [copies.COPY_ROWS, copies.WRITE] * 3
    base = [owner + CONTROL_BYTES + SLOT_BYTES for owner in gpu.memory.bases]
    nbytes = 16 * 64 * 2
    assert [step["dst"] for step in side[::2]] == [base[peer] + nbytes for peer in (0, 3, 2)]
    assert all((step["rows"], step["bytes"], step["dst_pitch"]) == (2, nbytes, 4 * nbytes) for step in side[::2])
    assert [step["value"] for step in side[1::2]] == [1] * 3
    # The next call of the same shapes reuses steps in the other slot, with its own epoch and its own shard.
    gpu.engine.issued.clear()
    again = shard.clone()
    gpu.torch.capturing = True
    template.run(gpu.link.open(5), plan, again, [*weights, gradient], biases)
    assert [name for name, _ in acknowledged] == ["tsk_acknowledge"]


def test_an_eager_gather_again_brings_its_own_epoch_and_shard(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    monkeypatch.setattr(all_gather_gemm, "kernel", launches)
    template = find_template("all_gather_matmul", "nvlink")
    assert template is not None
    plan = Plan("all_gather_matmul", "g/site", "nvlink", BF16, uses=(ROWS,), return_gathered=True)
    weight = torch.randn(64, 32).to(torch.bfloat16)
    for epoch in range(1, 6):
        shard = torch.randn(1, 128 * 64).to(torch.bfloat16)
        gpu.engine.issued.clear()
        product, gathered = template.run(gpu.link.open(5), plan, shard, [weight], [None])
        assert product.shape == (512, 32) and gathered.shape == (1, 4 * 128 * 64)
        copied = [step for step in gpu.engine.issued if step["kind"] == copies.COPY]
        flags = [step for step in gpu.engine.issued if step["kind"] == copies.WRITE]
        slot = gpu.link.slot_offset(epoch & 1)
        assert [step["dst"] - gpu.memory.bases[peer] for step, peer in zip(copied, (0, 3, 2), strict=True)] == [
            slot + shard.nbytes
        ] * 3
        assert {step["src"] for step in copied} == {shard.data_ptr()}
        assert {step["value"] for step in flags} == {epoch}
        *_, arguments = launches.calls[-1]
        assert arguments[-3:] == (epoch, 5, ACK)
    assert len(gpu.link.tables) == 1


@pytest.mark.parametrize("kind", ["matmul_reduce_scatter", "matmul_all_reduce"])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_a_sum_launches(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, kind: str, transposed: bool) -> None:
    launches = Launches()
    monkeypatch.setattr(gemm_reduce, "kernel", launches)
    template = find_template(kind, "nvlink")
    assert template is not None
    plan = Plan(kind, "g/site", "nvlink", BF16, coefficients=(2.0, -1.0), reduce_op="avg")
    lhs = [torch.randn(512, k).to(torch.bfloat16) for k in (64, 128)]
    rhs = [torch.randn(k, 264).to(torch.bfloat16) for k in (64, 128)]
    if transposed:
        rhs = [b.t().contiguous().t() for b in rhs]
    biases = [torch.full((264,), 3.0, dtype=torch.bfloat16), torch.full((264,), 4.0, dtype=torch.bfloat16)]
    outer = [2] if kind == "matmul_reduce_scatter" else []
    (out,) = template.run(gpu.link.open(5), plan, lhs, rhs, biases, [], *outer)
    assert out.shape == ((512 if kind == "matmul_all_reduce" else 128), 264)
    ((config, all_reduce, args),) = launches.calls
    assert (config.transposed, config.operands, config.bias) == (transposed, 2, True)
    assert all_reduce == (kind == "matmul_all_reduce")
    # The sum is scaled once, in float32: by the first coefficient over the ranks. The other operands bring the rest of theirs.
    names = [getattr(parameter, "name", "") for parameter in parameters(reduce_kernel, config)]
    given = dict(zip(names, args, strict=True))
    assert given["scale"] == 2.0 / 4
    assert torch.equal(given["A0"], lhs[0]) and torch.equal(given["A1"], lhs[1] * -0.5)
    assert given["rows"] == len(out) and given["C"] == out.data_ptr()
    tiles = given["tiles"]
    assert tiles == (2 * 3 if kind == "matmul_reduce_scatter" else 3) and config.tile_n == 128
    assert (given["pull_entries"], given["result_entries"]) == (3 * tiles, 3 * tiles if all_reduce else 0)
    assert given["pulls"] != given["results"]
    assert given["result_offset"] == 3 * tiles * 128 * 128 * 2
    assert (given["epoch"], given["site"], given["ack"]) == (1, 5, ACK)
    assert given["slot"] == gpu.memory.bases[1] + CONTROL_BYTES + SLOT_BYTES
    need = template.scratch_bytes(plan, 4, lhs, rhs, biases, [], *outer)
    assert need == (3 + all_reduce) * tiles * 128 * 128 * 2


def test_the_kernels_parameters_are_those_that_launches_are_checked_against() -> None:
    config = GemmConfig(BF16, True)
    assert [p.name for p in parameters(all_gather_kernel, config)][:5] == ["X", "A", "B0", "B1", "B2"]
    assert [p.name for p in parameters(reduce_kernel, config)][:6] == ["A0", "A1", "A2", "B0", "B1", "B2"]


def test_the_same_sizes_in_other_pieces_get_other_tables(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """With symbolic shapes [B, S, D] one site meets B * S rows in different numbers of pieces."""
    launches = Launches()
    monkeypatch.setattr(gemm_reduce, "kernel", launches)
    template = find_template("matmul_reduce_scatter", "nvlink")
    assert template is not None
    plan = Plan("matmul_reduce_scatter", "g/site", "nvlink", BF16, coefficients=(1.0,))
    a, b = torch.randn(1024, 64).to(torch.bfloat16), torch.randn(64, 256).to(torch.bfloat16)
    tables = []
    for outer in (1, 2, 1):
        template.run(gpu.link.open(5), plan, [a], [b], [None], [], outer)
        names = [getattr(parameter, "name", "") for parameter in parameters(reduce_kernel, GemmConfig(BF16, False))]
        tables.append(dict(zip(names, launches.calls[-1][2], strict=True))["table"])
    assert tables[0] == tables[2] != tables[1]


@pytest.mark.parametrize("first", [False, True])
def test_a_bias_that_comes_or_goes_is_seen(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    """Two graphs that differ in nothing but a bias name their sites alike."""
    launches = Launches()
    monkeypatch.setattr(gemm_reduce, "kernel", launches)
    monkeypatch.setattr(all_gather_gemm, "kernel", launches)
    gather, reduction = (find_template(kind, "nvlink") for kind in ("all_gather_matmul", "matmul_all_reduce"))
    assert gather is not None and reduction is not None
    a, b = torch.randn(512, 64).to(torch.bfloat16), torch.randn(64, 256).to(torch.bfloat16)
    bias = torch.ones(256, dtype=torch.bfloat16)
    for with_bias in (first, not first):
        given = [bias if with_bias else None]
        gather.run(
            gpu.link.open(5), Plan("all_gather_matmul", "g/a", "nvlink", BF16, uses=(ROWS,)), a.view(1, -1), [b], given
        )
        reduction.run(gpu.link.open(5), Plan("matmul_all_reduce", "g/b", "nvlink", BF16), [a], [b], given, [])
        assert [config.bias for config, *_ in launches.calls[-2:]] == [with_bias, with_bias]
