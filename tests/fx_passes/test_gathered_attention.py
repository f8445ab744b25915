"""Attention on gathered keys and values in captured graphs: one op each way, the keys of each rank, and reasons to keep it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, fx

from tests.gathered_programs import CASES, gather, in_zigzag_order, sdpa, separate
from tests.graphs import Compiled, compile_graphs
from tests.programs import PROGRAMS, Setting
from tscompile.fx_passes.gathered_attention import arguments_of
from tscompile.lowering import planner
from tscompile.options import Options
from tscompile.problem import ChunkedAttention, Fuse, FusionProblem, Gemm, Keep, Plan
from tscompile.testing import fake_world

FORWARD, BACKWARD = "all_gather_attention", "attention_reduce_scatter"
R = 4
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with fake_world(R):
        yield


def rand(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, requires_grad=grad)


def compile_case(name: str, **options: Any) -> Compiled:
    built = CASES[name].build(Setting(R))
    return compile_graphs(built.call, *built.args, backward=True, **options)


def op_of(found: Compiled, kind: str) -> fx.Node:
    (node,) = (n for g in found.graphs for n in g.nodes if kind in str(n.target))
    return node


def chunks_of(found: Compiled, kind: str) -> ChunkedAttention:
    plan = Plan.loads(str(op_of(found, kind).args[-2]))
    assert plan.chunks is not None and Plan.loads(plan.dumps()) == plan
    return plan.chunks


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fused_backward])
def test_the_attention_and_its_collectives_are_one_op_each_way(name: str) -> None:
    found = compile_case(name)
    assert found.kinds() == [FORWARD, BACKWARD] and set(found.codes()) == {"fused"}
    targets = found.targets()
    assert not [t for t in targets if "scaled_dot_product" in t or "c10d" in t]
    assert chunks_of(found, FORWARD).order == chunks_of(found, BACKWARD).order


CONTIGUOUS = tuple((r,) for r in range(R))
ORDERS = {
    "separate": CONTIGUOUS,
    "stacked": CONTIGUOUS,
    "sequence first": CONTIGUOUS,
    "unlike layouts": CONTIGUOUS,
    "zigzag": tuple((r, 2 * R - 1 - r) for r in range(R)),
    "striped": tuple((r, R + r) for r in range(R)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_which_keys_each_rank_holds(name: str) -> None:
    assert chunks_of(compile_case(name), FORWARD).order == ORDERS[name]


def test_what_the_backward_needs_is_an_output() -> None:
    found = compile_case("separate")
    assert len(op_of(found, FORWARD).meta["val"]) == 2 + 2 + 1  # output, logsumexp; keys, values; token
    assert [t for t in found.targets() if t.startswith("aten")].count("aten.cat") == 0


def test_inference_gets_the_output_alone() -> None:
    found = compile_graphs(separate, *(rand(2, 4, 8, 16) for _ in range(3)))
    op = op_of(found, FORWARD)
    assert len(op.meta["val"]) == 2 and chunks_of(found, FORWARD).results == (0,)


def test_one_gather_for_both() -> None:
    found = compile_case("stacked")
    keys, values = chunks_of(found, FORWARD).keys
    assert keys.shard == values.shard == 0 and keys.dims == values.dims
    assert [keys.fixed, values.fixed] == [((1, 0),), ((1, 1),)]
    (scatter,) = chunks_of(found, BACKWARD).scatters
    assert sorted(scatter.parts) == [1, 2]


def test_repeated_heads_are_read_once() -> None:
    found = compile_case("repeated heads")
    assert found.kinds()[0] == FORWARD and found.codes()[0] == "fused"
    (shard, _), (query) = op_of(found, FORWARD).args[1], op_of(found, FORWARD).args[0]  # type: ignore[misc]
    assert (query.meta["val"].shape[1], shard.meta["val"].shape[1]) == (4, 2)  # type: ignore[union-attr]


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], R * k.shape[2], dtype=torch.bool).tril(3)
    return sdpa(q, gather(k, 2), gather(v, 2), attn_mask=mask)


def local_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, gather(k, 2), torch.cat([v] * R, 2))


def gathered_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = gather(k, 2)
    return sdpa(q + k.mean(), k, gather(v, 2))


def cast_afterwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q.double(), gather(k, 2).double(), gather(v, 2).double())


def gathered_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(torch.cat([q] * R, 1), gather(k, 1), gather(v, 1))


def part_of_the_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, gather(k, 2)[:, :, : 3 * k.shape[2]], gather(v, 2)[:, :, : 3 * v.shape[2]])


def unlike_orders(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, in_zigzag_order(gather(k, 2)), gather(v, 2))


def piece_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (gather(t, 2).split(4, 2) for t in (k, v))
    return sdpa(q, torch.cat([*k, k[0]], 2), torch.cat([*v, v[0]], 2))


def computed_afterwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, gather(k, 2).cos(), gather(v, 2))


KEPT: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "a mask": ("with a mask of its own", masked),
    "values that are no gather": ("not both gathered", local_values),
    "queries that wait": ("wait for gathered keys or values", gathered_queries),
    "casts": ("cast after they were gathered", cast_afterwards),
    "gathered heads": ("do not hold parts of the sequence", gathered_heads),
    "a part": ("read a part of what is gathered", part_of_the_keys),
    "unlike orders": ("in different orders", unlike_orders),
    "twice": ("there twice", piece_twice),
    "computed": ("not both gathered", computed_afterwards),
}


@pytest.mark.parametrize("name", KEPT)
def test_is_kept_for_a_reason(name: str) -> None:
    said, call = KEPT[name]
    found = compile_graphs(call, *(rand(2, 4, 8, 16) for _ in range(3)))
    assert FORWARD not in [kind for kind, code in zip(found.kinds(), found.codes(), strict=True) if code == "fused"]
    assert any(row.pattern == FORWARD and said in row.reason for row in found.rows), [r.reason for r in found.rows]


def test_zigzag_with_its_causal_mask_is_kept_both_ways() -> None:
    program = PROGRAMS["h3_cp_zigzag"]
    built = program.build(Setting(R))
    found = compile_graphs(built.call, *built.args, backward=True)
    assert found.kinds() == [FORWARD, FORWARD, BACKWARD, BACKWARD]
    assert all("mask of its own" in row.reason for row in found.rows)


def test_gathers_of_two_groups_are_kept() -> None:
    other = dist.new_group(list(range(R)))

    def of_two_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, gather(k, 2), torch.cat(funcol.all_gather_tensor(v, 0, other).chunk(R), 2))

    found = compile_graphs(of_two_groups, *(rand(2, 4, 8, 16) for _ in range(3)))
    assert set(found.kinds()) == {FORWARD} and set(found.codes()) == {"no-kernel"}


def test_gradients_that_something_else_reads_are_kept() -> None:
    found = compile_case("also read")
    assert found.kinds()[0] == FORWARD and BACKWARD not in [
        kind for kind, code in zip(found.kinds(), found.codes(), strict=True) if code == "fused"
    ]


def test_a_gather_that_only_the_backward_reads_is_kept() -> None:
    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        op = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return op(grad, q, gather(k, 2), gather(v, 2), out, lse, 0.0, False)  # type: ignore[no-any-return]

    q, k = rand(2, 4, 8, 16), rand(2, 4, 8, 16)
    found = compile_graphs(backward, q, q, k, k, q, rand(2, 4, 8))
    assert set(found.kinds()) == {FORWARD} and "backward of an attention" in found.rows[0].reason


def test_an_average_is_one() -> None:
    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
        op = aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = op(grad, q, k, v, out, lse, 0.0, False)
        return [funcol.reduce_scatter_tensor(t, "avg", 2, dist.group.WORLD) for t in found[1:]]

    q, k = rand(2, 4, 8, 16), rand(2, 4, 8 * R, 16)
    found = compile_graphs(backward, q, q, k, k, q, rand(2, 4, 8))
    assert found.kinds() == [BACKWARD] and found.codes() == ["fused"]
    assert Plan.loads(str(op_of(found, BACKWARD).args[-2])).reduce_op == "avg"


def test_disabled_they_say_so() -> None:
    found = compile_case("separate", disable=(FORWARD, BACKWARD))
    assert found.kinds() == [FORWARD, BACKWARD] and set(found.codes()) == {"disabled"}
    assert [len(row.collectives) for row in found.rows] == [2, 2]


def test_what_does_not_pay_gives_way() -> None:
    """The keys' projection can be fused with their gather where the attention is kept."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        q, k, v = (x @ w for _ in range(3))
        k, v = (gather(t, 0).view(R * 8, 4, 16).transpose(0, 1)[None] for t in (k.sin() @ w, v))
        return sdpa(q.view(8, 4, 16).transpose(0, 1)[None], k, v)

    found = compile_graphs(fn, rand(8, 64), rand(64, 64), disable=(FORWARD,))
    assert ("matmul_all_gather", "fused") in zip(found.kinds(), found.codes(), strict=True)


def test_on_gpus_they_have_to_be_asked_for() -> None:
    problem = FusionProblem(FORWARD, 4, True, "cuda", "bfloat16", 1 << 26, (Gemm(1 << 17, 1 << 14, 128),), exchanges=2)
    chunks = ChunkedAttention("_scaled_dot_product_cudnn_attention", False, None, CONTIGUOUS, (0,), ((0, 1, 2, 3),))
    plan = Plan(FORWARD, "", "", "bfloat16", chunks=chunks)
    decision = planner.plan(problem, plan, Options())
    assert isinstance(decision, Keep) and decision.code == "unproven" and "gather is fused" not in decision.reason
    asked = planner.plan(problem, plan, Options(fuse="always"))
    assert isinstance(asked, Fuse) and asked.executor == "nvlink"
    causal = planner.plan(problem, replace(plan, chunks=replace(chunks, causal=True)), Options(fuse="always"))
    assert isinstance(causal, Keep) and "causal" in causal.reason


def test_the_state_of_random_numbers_is_not_compared() -> None:
    """Of flash attention on GPUs a backward gets results 6 and 7 too, which torch leaves as they are where nothing is drawn."""
    layouts = ((0, 2, 1, 3), (0, 1, 2), (), ())
    chunks = ChunkedAttention("_scaled_dot_product_flash_attention", False, None, CONTIGUOUS, (0, 1, 6, 7), layouts)
    assert Plan(FORWARD, "", "", "bfloat16", chunks=chunks).unspecified == {2, 3}


FORMS = ("flash_attention", "cudnn_attention", "efficient_attention", "flash_attention_for_cpu")


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("backward", [False, True])
def test_arguments_of_every_form(name: str, backward: bool) -> None:
    op = getattr(aten, f"_scaled_dot_product_{name}{'_backward' if backward else ''}").default
    graph = fx.Graph()
    given: list[Any] = []
    for argument in op._schema.arguments:
        if argument.kwarg_only:
            continue
        kind = str(argument.type)
        given.append(graph.placeholder(argument.name) if kind == "Tensor" and argument.name != "attn_bias" else None)
    names = [argument.name for argument in op._schema.arguments]
    given[names.index("dropout_p")], given[names.index("is_causal")] = 0.0, True
    found = arguments_of(graph.call_function(op, tuple(given), {"scale": 0.5}))
    assert not isinstance(found, Keep)
    assert (found["is_causal"], found["scale"], str(found["value"])) == (True, 0.5, "value")
    assert ("logsumexp" in found) == backward
    given[names.index("dropout_p")] = 0.1
    refused = arguments_of(graph.call_function(op, tuple(given)))
    assert isinstance(refused, Keep) and "dropout" in refused.reason


@pytest.mark.parametrize("kind", [FORWARD, BACKWARD])
def test_large_sizes_pay_on_cpu_ranks(kind: str) -> None:
    plan = Plan(kind, "", "", "float32")
    large = FusionProblem(kind, 2, True, "cpu", "float32", 8 << 20, (), exchanges=2, merged_bytes=1 << 18)
    assert not isinstance(planner.plan(large, plan, Options()), Keep)
    small = FusionProblem(kind, 2, True, "cpu", "float32", 1 << 10, (), exchanges=1, merged_bytes=64 << 20)
    decision = planner.plan(small, plan, Options())
    assert isinstance(decision, Keep) and decision.code == "no-gain"
