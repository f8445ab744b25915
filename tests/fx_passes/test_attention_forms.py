"""Every form of attention that torch has, between exchanges: what the graphs of CPU ranks, and of GPUs without any, become."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, fx
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests import attention_ops
from tests.attention_ops import FORMS, GROUPED, NAMES
from tests.graphs import compile_graphs
from tests.programs.attention import SPELLINGS
from tscompile.fx_passes import attention, fusion_pass
from tscompile.fx_passes.attention import attention_form, is_attention
from tscompile.options import Options
from tscompile.problem import Argument, Attention, Fuse, Plan, Result, Row
from tscompile.testing import fake_world

KIND = "all_to_all_attention"
R, BATCH, LENGTH, HEADS, WIDTH = 4, 2, 10, 16, 16
aten = torch.ops.aten
Program = Callable[..., Any]


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    attention_ops.install()
    with fake_world(R):
        yield


def fused(graphs: Sequence[fx.Graph]) -> list[tuple[fx.Node, Attention]]:
    """The fused ops of the graphs, with what their plans say of the attention."""
    found = []
    for node in (n for graph in graphs for n in graph.nodes if KIND in str(n.target)):
        plan = Plan.loads(str(node.args[-2]))
        assert plan.attention is not None and Plan.loads(plan.dumps()) == plan
        found.append((node, plan.attention))
    return found


def constants(said: Attention) -> dict[str, Any]:
    return {a.name: a.value for a in said.arguments if a.source == "constant"}


def shares(said: Attention) -> dict[str, str]:
    return {a.name: said.operands[a.value].share for a in said.arguments if a.source == "operand"}


def block(attend: Program, spelling: str = "yunchang") -> Program:
    exchange = SPELLINGS[spelling]

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(*(exchange.heads(t).transpose(1, 2) for t in (q, k, v)))
        return exchange.sequence(out.transpose(1, 2)).flatten(2)

    return fn


def leaves(key_heads: int = HEADS, grad: bool = True) -> list[Tensor]:
    return [torch.randn(BATCH, LENGTH, heads, WIDTH, requires_grad=grad) for heads in (HEADS, key_heads, key_heads)]


@pytest.mark.parametrize("form", FORMS)
def test_training_is_one_op_each_way(form: str) -> None:
    found = compile_graphs(block(FORMS[form]), *leaves(), backward=True)
    assert set(found.kinds()) == {KIND} and set(found.codes()) == {"fused"}
    assert [len(row.collectives) for row in found.rows] == [4, 4]
    assert all(any(NAMES[form] in shape for shape in row.shapes) for row in found.rows)
    assert not [t for t in found.targets() if "scaled_dot_product" in t or t in ("aten.clone", "aten.cat")]
    (_, forward), (node, backward) = fused(found.graphs)
    assert backward.op == f"{forward.op}_backward"
    kept = [result.number for result in forward.results]
    assert kept == ([0, 1, 2, 3] if form == "efficient" else [0, 1, 6, 7])
    assert [len(result.layout) for result in forward.results] == [4, 4 if form == "cudnn" else 3, 0, 0]
    assert backward.results == ()  # gradients are sent, and nothing else reads them
    gradient = "grad_out_" if form == "efficient" else "grad_out"
    expected = dict.fromkeys((gradient, "query", "key", "value", "out", "logsumexp"), "heads")
    expected |= {"out": "rows"} if form == "efficient" else {"logsumexp": "packed"}
    assert shares(backward) == expected | {"philox_seed": "whole", "philox_offset": "whole"}
    assert [len(args) for args in node.args[:2]] == [1, 7]  # type: ignore[arg-type]


def test_what_the_op_is_called_with_is_what_the_program_called_it_with() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, is_causal=True, scale=0.3)[0]

    (_, forward), (_, backward) = fused(compile_graphs(block(attend), *leaves(), backward=True).graphs)
    given = {"attn_bias": None, "dropout_p": 0.0, "is_causal": True, "scale": 0.3}
    assert constants(forward) == {**given, "compute_log_sumexp": True}
    assert constants(backward) == {**given, "grad_input_mask": (True, True, True, False)}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_lengths_are_those_of_the_operands(form: str, dynamic: bool) -> None:
    args = leaves()
    for tensor in args if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 1)
    found = compile_graphs(block(FORMS[form]), *args, backward=True)
    assert found.kinds() == [KIND, KIND]
    _, (_, backward) = fused(found.graphs)
    lengths = (Argument("max_q", "size", (1, 2)), Argument("max_k", "size", (2, 2)))  # of query and key, dim 2
    assert tuple(a for a in backward.arguments if a.source == "size") == (() if form == "efficient" else lengths)


@pytest.mark.parametrize("form", FORMS)
def test_inference_returns_what_is_sent_and_nothing_else(form: str) -> None:
    found = compile_graphs(block(FORMS[form]), *leaves(grad=False))
    ((node, said),) = fused(found.graphs)
    assert said.results == () and len(node.meta["val"]) == 3 + 0 + 1 + 1  # q, k, v; none; what is sent; token
    if form != "flash":
        assert constants(said)["compute_log_sumexp"] is False


@pytest.mark.parametrize("form", GROUPED)
def test_groups_of_heads_divide_queries_and_keys(form: str) -> None:
    found = compile_graphs(block(FORMS[form]), *leaves(2 * R), backward=True)
    assert [row.reason.split("; ")[-1] for row in found.rows] == ["runs as 2 head groups"] * 2
    found = compile_graphs(block(FORMS[form]), *leaves(R), backward=True)
    assert set(found.kinds()) == {"all_to_all_permute"} and "one head" in found.rows[0].reason


# Graphs of GPUs


def swap(x: Tensor) -> Tensor:
    """Equal blocks of dim 0, block d to rank d."""
    sent = aten.clone(x, memory_format=torch.contiguous_format)  # x.contiguous() asks for a GPU
    return funcol.wait_tensor(funcol.all_to_all_single(sent, None, None, dist.group.WORLD))  # type: ignore[arg-type]


def to_heads(x: Tensor) -> Tensor:
    """`[b, s, H, d]` -> `[b, H/R, R*s, d]`."""
    b, s, h, d = x.shape
    got = swap(x.view(b, s, R, h // R, d).permute(2, 0, 1, 3, 4))
    return got.permute(1, 0, 2, 3, 4).reshape(b, R * s, h // R, d).transpose(1, 2)


def to_sequence(x: Tensor) -> Tensor:
    """`[b, H/R, R*s, d]` -> `[b, s, H, d]`."""
    b, h, s, d = x.shape
    got = swap(x.transpose(1, 2).reshape(b, R, s // R, h, d).permute(1, 0, 2, 3, 4))
    return got.permute(1, 2, 0, 3, 4).reshape(b, s // R, R * h, d)


OPERANDS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "flash": (aten._scaled_dot_product_flash_attention.default, (0.0, True)),
    "cudnn": (aten._scaled_dot_product_cudnn_attention.default, (None, True, 0.0, True)),
    "efficient": (aten._scaled_dot_product_efficient_attention.default, (None, True, 0.0, True)),
}


def forward_of(form: str, returned: int = 8) -> Program:
    """q, k and v as received and the attention's first results are outputs too: the mask of dropout, the ninth, is not."""
    op, rest = OPERANDS[form]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> list[Any]:
        q, k, v = (to_heads(t) for t in (q, k, v))
        results = op(q, k, v, *rest)
        return [to_sequence(results[0]), q, k, v, *results[:returned]]

    return forward


def backward_of(form: str) -> Program:
    op = getattr(aten, f"{OPERANDS[form][0]._opname}_backward").default

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *results: Any) -> Tensor:
        out, lse = results[:2]
        grad = to_heads(grad)
        if form == "efficient":
            found = op(grad, q, k, v, None, out, lse, *results[2:4], 0.0, [True, True, True, False], True)
        elif form == "flash":
            found = op(grad, q, k, v, out, lse, *results[2:6], 0.0, True, *results[6:8])
        else:
            found = op(grad, q, k, v, out, lse, *results[6:8], None, *results[2:6], 0.0, True)
        return torch.cat([to_sequence(t).flatten(2) for t in found[:3]], 2)

    return backward


def on_gpu(mode: FakeTensorMode, key_heads: int) -> list[Tensor]:
    with mode:
        return [
            torch.empty(BATCH, LENGTH, heads, WIDTH, device="cuda", dtype=torch.bfloat16)
            for heads in (HEADS, key_heads, key_heads)
        ]


def traced(form: str, key_heads: int, backward: bool) -> tuple[FakeTensorMode, fx.Graph]:
    """The graph of a rank on a GPU, with fake tensors; forward and backward apart, as they are compiled."""
    mode = FakeTensorMode()
    args: list[Any] = on_gpu(mode, key_heads)
    program = forward_of(form)
    if backward:
        with mode:
            args = [torch.empty_like(args[0]), *program(*args)[1:]]
        program = backward_of(form)
    with mode:
        graph = make_fx(program)(*args).graph
    graph.eliminate_dead_code()
    return mode, graph


def outputs(graph: fx.Graph) -> list[Any]:
    (node,) = (n for n in graph.nodes if n.op == "output")
    values = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
    return [value.meta["val"] if isinstance(value, fx.Node) else value for value in values]


def facts(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else value


def run_pass(mode: FakeTensorMode, graph: fx.Graph) -> list[Row]:
    rows: list[Row] = []
    with V.set_fake_mode(mode), fusion_pass.collect_rows(rows.extend):
        fusion_pass.FusionPass(Options(fuse="always"), lambda: "test")(graph)
    return rows


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("form", "key_heads"), [*((form, HEADS) for form in FORMS), *((form, HEADS // 2) for form in GROUPED)]
)
def test_graphs_of_gpus(monkeypatch: pytest.MonkeyPatch, form: str, key_heads: int, backward: bool) -> None:
    mode, graph = traced(form, key_heads, backward)
    (node,) = (n for n in graph.nodes if is_attention(n))
    sizes = []
    if not backward and form != "efficient":  # the lengths are constants here; let the program read them of the op
        (output,) = (n for n in graph.nodes if n.op == "output")
        with graph.inserting_before(output):
            sizes = [graph.call_function(operator.getitem, (node, number)) for number in (2, 3, 4, 5)]
        for size, number in zip(sizes, (2, 3, 4, 5), strict=True):
            size.meta["val"] = node.meta["val"][number]
        output.args = ([*output.args[0], *sizes],)  # type: ignore[misc]
    before = [facts(value) for value in outputs(graph)]
    monkeypatch.setattr(fusion_pass.planner, "plan", lambda *args: Fuse("shm", 1.0, 2.0, "2 head groups"))
    (row,) = run_pass(mode, graph)
    assert row.pattern == KIND and row.code == "fused" and len(row.collectives) == 4
    assert not [n for n in graph.nodes if is_attention(n) or "all_to_all_single" in str(n.target)]
    assert [facts(value) for value in outputs(graph)] == before
    ((node, found),) = fused([graph])
    assert [value.device.type for value in node.meta["val"]] == ["cuda"] * len(node.meta["val"])
    names = {a.name for a in found.arguments}
    assert names == {a.name for a in getattr(aten, found.op).default._schema.arguments}
    if sizes:
        assert before[-4:] == [None, None, R * LENGTH, R * LENGTH]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_graphs_of_gpus_take_the_exchanges_alone_for_want_of_a_kernel(form: str, backward: bool) -> None:
    mode, graph = traced(form, HEADS, backward)
    rows = run_pass(mode, graph)
    assert sum(len(row.collectives) for row in rows) == 4
    assert {(row.pattern, row.code) for row in rows} == {("all_to_all_permute", "fused")}
    assert "; all_to_all_attention: no kernel for all_to_all_attention on cuda tensors" in rows[0].reason
    assert [n for n in graph.nodes if is_attention(n)]


def test_a_result_of_which_nothing_is_known_is_not_put_together() -> None:
    mode = FakeTensorMode()
    args = on_gpu(mode, HEADS)
    with mode:
        graph = make_fx(forward_of("flash", 9))(*args).graph
    graph.eliminate_dead_code()
    rows = run_pass(mode, graph)
    assert "; all_to_all_attention: nothing says how result 8 of the attention" in rows[0].reason


# What is refused


RUN_TIME = object()  # an argument that is no constant of the graph


def node_of(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call of `target` in a graph; tensors, and what is known at run time, become inputs of it."""
    graph = fx.Graph()

    def put(value: Any) -> Any:
        if value is not RUN_TIME and not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"arg{len(graph.nodes)}")
        node.meta["val"] = value
        return node

    return graph.call_function(target, tuple(put(x) for x in args), {name: put(x) for name, x in kwargs.items()})


def tensors(count: int) -> list[Tensor]:
    return [torch.empty(2, 4, 12, 8, device="meta") for _ in range(count)]


LSE = torch.empty(2, 4, 12, device="meta")
SEED = torch.empty((), dtype=torch.int64, device="meta")
FLASH, CUDNN, EFFICIENT = (OPERANDS[form][0] for form in ("flash", "cudnn", "efficient"))
REFUSED: dict[str, tuple[str, Callable[[], fx.Node]]] = {
    "dropout": ("dropout draws", lambda: node_of(FLASH, *tensors(3), 0.1)),
    "dropout, cuDNN": ("dropout draws", lambda: node_of(CUDNN, *tensors(3), None, True, 0.1)),
    "dropout, backward": (
        "dropout draws",
        lambda: node_of(
            aten._scaled_dot_product_flash_attention_backward.default,
            *tensors(5), LSE, None, None, 12, 12, 0.5, False, SEED, SEED,
        ),
    ),
    "bias": ("with a mask", lambda: node_of(EFFICIENT, *tensors(3), torch.empty(2, 4, 12, 12, device="meta"), True)),
    "bias, by name": (
        "with a mask",
        lambda: node_of(aten._scaled_dot_product_flash_attention_for_cpu.default, *tensors(3), attn_mask=LSE),
    ),
    "debug mask": ("mask of dropout", lambda: node_of(FLASH, *tensors(3), 0.0, False, True)),
    "sequences of several lengths": (
        "behind one another",
        lambda: node_of(
            aten._scaled_dot_product_flash_attention_backward.default,
            *tensors(5), LSE, SEED, SEED, 12, 12, 0.0, False, SEED, SEED,
        ),
    ),
    "another length": (
        "max_k of the attention is the length of its key",
        lambda: node_of(
            aten._scaled_dot_product_flash_attention_backward.default,
            *tensors(5), LSE, None, None, 12, 11, 0.0, False, SEED, SEED,
        ),
    ),
    "a scale of run time": ("scale of the attention is known only", lambda: node_of(FLASH, *tensors(3), scale=RUN_TIME)),
    "a device's own": (
        "a device's own attention",
        lambda: node_of(aten._scaled_dot_product_fused_attention_overrideable.default, *tensors(3)),
    ),
    "a checkpoint": (
        "random numbers",
        lambda: node_of(torch._prims.rng_prims.run_and_save_rng_state, FLASH, *tensors(3)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_for_a_reason(name: str) -> None:
    said, make = REFUSED[name]
    node = make()
    form = attention_form(node)
    assert is_attention(node) and form is not None
    assert form.refusal is not None and form.refusal.code == "no-kernel" and said in form.refusal.reason


def test_an_argument_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later torch may add one."""
    monkeypatch.setattr(attention, "_CONSTANTS", ("is_causal",))
    form = attention_form(node_of(FLASH, *tensors(3)))
    assert form is not None and form.refusal is not None and "with scale, which" in form.refusal.reason


@pytest.mark.skipif(
    not hasattr(aten._scaled_dot_product_flash_attention, "quantized"),
    reason="this torch has no attention of 8-bit types",
)
def test_the_overload_for_quantised_operands_is_another_op() -> None:
    form = attention_form(node_of(aten._scaled_dot_product_flash_attention.quantized, *tensors(3)))
    assert form is not None and form.refusal is not None and "quantized" in form.refusal.reason


def test_outputs_that_hold_nothing_are_named() -> None:
    said = Attention("op", (), (), (Result(0, (0, 1, 2)), Result(6), Result(7)), (), (), (), ())
    assert Plan(KIND, "", "", "float32", joins=(1, 1, 1), attention=said).unspecified == {4, 5}
    assert Plan("all_to_all_permute", "", "", "float32", joins=(1,)).unspecified == frozenset()
