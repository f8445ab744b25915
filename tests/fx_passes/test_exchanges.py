"""The proof through an exchange, and the op made of it, against really running random programs on index tensors of all ranks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.fx_passes.test_layout import factorizations
from tscompile.fx_passes.all_to_all_permute import find_site
from tscompile.fx_passes.collectives import find_collectives
from tscompile.fx_passes.cuts import Cuts
from tscompile.fx_passes.fusion_pass import FusionPass
from tscompile.fx_passes.layout import Digit, Prover, View
from tscompile.fx_passes.pattern import Context
from tscompile.fx_passes.rewrite import Builder
from tscompile.options import Options
from tscompile.problem import Plan
from tscompile.templates.all_to_all import Outputs
from tscompile.templates.all_to_all_gemm import Received, as_panels
from tscompile.testing import collective_counts, fake_world

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
SHARD_DIM = torch.ops._dtensor.shard_dim_alltoall.default


@pytest.fixture(params=[2, 3, 4], scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    with fake_world(request.param):
        yield request.param


def exchanged(blocks: list[Tensor]) -> list[Tensor]:
    """all_to_all of equal blocks along dim 0, for all ranks."""
    parts = [x.chunk(len(blocks)) for x in blocks]
    return [torch.cat([parts[s][r] for s in range(len(blocks))]) for r in range(len(blocks))]


def resharded(values: list[Tensor], gather_dim: int, shard_dim: int) -> list[Tensor]:
    whole = torch.cat(values, gather_dim)
    return [part.contiguous() for part in whole.chunk(len(values), shard_dim)]


def call_on_all(target: Any, args: list[tuple[Any, ...]]) -> list[Any]:
    """One op of the graph on every rank, each with its own arguments."""
    if target is c10d.all_to_all_single.default:
        return exchanged([a[0] for a in args])
    if target is SHARD_DIM:
        return resharded([a[0] for a in args], *args[0][1:3])
    if target is c10d.wait_tensor.default:
        return [a[0] for a in args]
    if "all_to_all_permute" in str(target):
        plan = Plan.loads(args[0][2])
        results = [Outputs(plan.deliveries, plan.joins, [x.shape for x in a[0]], a[0][0]) for a in args]
        for number in range(len(args[0][0])):
            for outputs, got in zip(results, exchanged([a[0][number].contiguous() for a in args]), strict=True):
                outputs.deliver(number, 0, got)
        return [[*outputs.tensors, None] for outputs in results]
    if "all_to_all_matmul" in str(target):
        plan = Plan.loads(args[0][4])
        found = []
        sent = [as_panels(plan, a[0]) for a in args]
        for rank, (_, others, biases, *_) in enumerate(args):
            received = Received(sent[rank])
            for number in range(len(sent[rank])):
                for source, inputs in enumerate(sent):
                    received.put(number, source, inputs[number][rank])
            products = [received.tensor @ b + (0 if c is None else c) for b, c in zip(others, biases, strict=True)]
            found.append([*products, *([received.tensor] if plan.return_gathered else []), None])
        return found
    if "tscompile.begin" in str(target):
        return [None for _ in args]
    return [target(*a) for a in args]


class Ranks:
    """A graph that is run on all ranks at once while it is built; every element has a number of its own."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.graph = fx.Graph()
        self.fake = FakeTensorMode()
        self.real: dict[fx.Node, list[Any]] = {}
        self.inputs: list[fx.Node] = []
        self.count = 0

    def input(self, shape: tuple[int, ...]) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        numel = int(torch.Size(shape).numel())
        self.real[node] = [
            (torch.arange(numel, dtype=torch.float32) + self.count + r * numel).view(shape) for r in range(self.ranks)
        ]
        self.count += numel * self.ranks
        with self.fake:
            node.meta["val"] = torch.empty(shape)
        self.inputs.append(node)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        with self.fake:
            node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]), **kwargs)
        own = [fx.map_arg(args, lambda n, r=r: self.real[n][r]) for r in range(self.ranks)]
        self.real[node] = call_on_all(target, own)
        return node

    def exchange(self, node: fx.Node) -> fx.Node:
        name = dist.group.WORLD.group_name  # type: ignore[union-attr]
        size = node.meta["val"].shape[0] // self.ranks
        splits = [size] * self.ranks
        sent = self.call(aten.clone.default, node)
        return self.call(
            c10d.wait_tensor.default, self.call(c10d.all_to_all_single.default, sent, splits, splits, name)
        )

    def reshard(self, node: fx.Node, gather_dim: int, shard_dim: int) -> fx.Node:
        return self.call(SHARD_DIM, node, gather_dim, shard_dim, dist.group.WORLD.group_name)  # type: ignore[union-attr]

    def fuse(self, outputs: list[fx.Node]) -> None:
        self.graph.output(tuple(outputs))
        gm = fx.GraphModule(torch.nn.Module(), self.graph)
        self.graph = gm.graph
        with V.set_fake_mode(self.fake):
            FusionPass(Options(fuse="always"), lambda: "test")(self.graph)

    def again(self) -> list[list[Any]]:
        """Outputs of the graph as it is now, per output and rank."""
        values: dict[fx.Node, list[Any]] = {}
        inputs = [self.real[node] for node in self.inputs]
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = inputs.pop(0)
            elif node.op == "output":
                return [values[out] for out in node.args[0]]
            else:
                own = [fx.map_arg(node.args, lambda n, r=r: values[n][r]) for r in range(self.ranks)]
                results = [node.target(*a, **node.kwargs) for a in own] if node.kwargs else None
                values[node] = results or call_on_all(node.target, own)
        raise AssertionError("a graph has an output")


@st.composite
def moved(draw: st.DrawFn, program: Ranks, node: fx.Node, most: int) -> fx.Node:
    for _ in range(draw(st.integers(0, most))):
        shape = tuple(node.meta["val"].shape)
        kind = draw(
            st.sampled_from(["reshape", "permute", "permute", "clone", "slice", "select", "expand", "split_cat"])
        )
        dim = draw(st.integers(0, len(shape) - 1))
        if kind == "reshape":
            size = draw(st.sampled_from(factorizations(shape[dim])))
            node = program.call(aten.reshape.default, node, [*shape[:dim], *size, *shape[dim + 1 :]])
        elif kind == "permute":
            node = program.call(aten.permute.default, node, draw(st.permutations(range(len(shape)))))
        elif kind == "clone":
            node = program.call(aten.clone.default, node)
        elif kind == "slice" and shape[dim] % 2 == 0:
            half = shape[dim] // 2
            start = draw(st.sampled_from([0, half]))
            node = program.call(aten.slice.Tensor, node, dim, start, start + half)
        elif kind == "select" and len(shape) > 2:
            node = program.call(aten.select.int, node, dim, draw(st.integers(0, shape[dim] - 1)))
        elif kind == "expand" and draw(st.booleans()):
            node = program.call(aten.unsqueeze.default, node, dim)
            node = program.call(aten.expand.default, node, [*shape[:dim], 2, *shape[dim:]])
        elif kind == "split_cat" and shape[dim] % program.ranks == 0:
            pieces = program.call(aten.split.Tensor, node, shape[dim] // program.ranks, dim)
            parts = [program.call(operator.getitem, pieces, i) for i in range(program.ranks)]
            node = program.call(aten.cat.default, parts, draw(st.integers(0, len(shape) - 1)))
    return node


def divided(program: Ranks, node: fx.Node) -> fx.Node:
    """`node` with a dim 0 that has a block for every rank."""
    shape = node.meta["val"].shape
    if shape[0] % program.ranks == 0:
        return node
    total = shape.numel()
    return program.call(aten.reshape.default, node, [program.ranks, total // program.ranks])


@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(st.data())
def test_random_programs_compute_the_same_on_every_rank(ranks: int, data: st.DataObject) -> None:
    program = Ranks(ranks)
    root = program.input(
        data.draw(st.sampled_from([(2, 4, 2 * ranks, 3), (4, 6 * ranks), (ranks, 2, 3, 4), (8 * ranks,)]))
    )
    outputs: list[fx.Node] = []
    results: list[fx.Node] = []
    for _ in range(data.draw(st.integers(1, 3))):
        node = data.draw(moved(program, root, 4))
        if node.meta["val"].numel() % ranks or node.meta["val"].numel() > 4096:
            continue
        dims = [d for d, size in enumerate(node.meta["val"].shape) if size % ranks == 0]
        if dims and node.meta["val"].dim() > 1 and data.draw(st.booleans()):
            shard = data.draw(st.sampled_from(dims))
            gather = data.draw(st.sampled_from([d for d in range(node.meta["val"].dim()) if d != shard]))
            result = program.reshard(program.call(aten.clone.default, node), gather, shard)
        else:
            result = program.exchange(divided(program, node))
        results.append(result)
        for _ in range(data.draw(st.integers(1, 2))):
            read = data.draw(moved(program, result, 4))
            outputs.append(program.call(aten.neg.default, read) if data.draw(st.booleans()) else read)
    same = {tuple(r.meta["val"].shape) for r in results}
    if len(results) > 1 and len(same) == 1:
        joined = program.call(aten.cat.default, results, data.draw(st.integers(0, results[0].meta["val"].dim() - 1)))
        outputs.append(program.call(aten.reshape.default, joined, [-1]))
    if not outputs:
        return
    expected = [program.real[out] for out in outputs]
    program.fuse(outputs)
    assert not collective_counts(program.graph), "every exchange is fused"
    for got, want in zip(program.again(), expected, strict=True):
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def site_of(program: Ranks, out: fx.Node) -> Any:
    program.graph.output((out,))
    collectives = find_collectives(program.graph)
    context = Context(
        program.graph,
        Builder(program.graph, program.fake),
        Prover(),
        program.inputs[0],
        {c.node: c for c in collectives},
    )
    return find_site(context, collectives[0])


def offsets(dims: tuple[tuple[Digit, ...], ...]) -> Tensor:
    found = torch.zeros((), dtype=torch.int64)
    for dim in dims:
        index = torch.zeros(1, dtype=torch.int64)
        for digit in dim:
            index = (index[:, None] + torch.arange(int(digit.size)) * int(digit.stride)).flatten()
        found = found[..., None] + index
    return found


def ulysses(program: Ranks, spelling: str) -> fx.Node:
    """Heads of k from a fused projection [b, s, (q k v) h d] to [b, h/P, S, d], as three libraries spell it."""
    p, (b, s, h, d) = program.ranks, (2, 3, 2 * program.ranks, 5)
    call = program.call
    projected = program.input((b * s, 3 * h * d))
    parts = call(aten.unbind.int, call(aten.reshape.default, projected, [b, s, 3, h, d]), 2)
    k = call(operator.getitem, parts, 1)
    if spelling == "resharded":
        return call(aten.permute.default, program.reshard(call(aten.clone.default, k), 1, 2), [0, 2, 1, 3])
    blocks = call(aten.reshape.default, k, [b, s, p, h // p, d])
    if spelling == "deepspeed":
        got = program.exchange(call(aten.permute.default, blocks, [2, 0, 1, 3, 4]))
        moved = call(aten.clone.default, call(aten.permute.default, got, [1, 0, 2, 3, 4]))
        whole = call(aten.reshape.default, moved, [b, p * s, h // p, d])
    else:
        got = program.exchange(call(aten.permute.default, blocks, [2, 1, 0, 3, 4]))
        whole = call(aten.permute.default, call(aten.reshape.default, got, [p * s, b, h // p, d]), [1, 0, 2, 3])
    return call(aten.permute.default, whole, [0, 2, 1, 3])


@pytest.mark.parametrize("spelling", ["deepspeed", "yunchang", "resharded"])
def test_the_offset_steps_with_the_destination(ranks: int, spelling: str) -> None:
    """On rank r, element (b, h, s, d) is one of rank s // (S/P), at strides that every spelling has, r head groups further on."""
    program = Ranks(ranks)
    out = ulysses(program, spelling)
    site = site_of(program, out)
    source: View = site.sources[0].view
    assert source.root is program.inputs[0]
    assert int(source.offset) == 2 * ranks * 5  # k stands behind q
    assert source.dims[0] == (Digit(ranks, 2 * 5),)
    (reading,) = site.homes
    assert reading.node is out
    rank = 1  # whose graph it is does not matter
    whole = torch.stack(program.real[program.inputs[0]]).flatten(1)
    blocks = whole[:, int(source.offset) + offsets(source.dims)][:, rank]  # [source rank, factors of a block]
    value = blocks.permute(reading.placement.factors).reshape(out.meta["val"].shape)
    assert torch.equal(value, program.real[out][rank])


def refusals() -> dict[str, Callable[[Cuts], bool]]:
    root = fx.Graph().placeholder("x")

    def view(*digits: tuple[int, int], offset: int = 0) -> View:
        return View(root, tuple((Digit(*digit),) for digit in digits), offset)

    return {
        "a digit that cuts another": lambda cuts: cuts.cut_for(view((4, 9))),
        "an element twice": lambda cuts: cuts.cut_for(view((6, 6), (2, 6))),
        "backwards": lambda cuts: cuts.cut_for(view((6, -6), offset=30)),
        "an offset inside of a digit": lambda cuts: cuts.cut_for(view((3, 6), offset=6)),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_does_not_fit_a_grid_leaves_it_as_it_was(name: str) -> None:
    cuts = Cuts.of_shape((6, 6))
    assert not refusals()[name](cuts)
    assert cuts.sizes == [6, 6]


def test_nothing_is_cut_in_the_ranks() -> None:
    cuts = Cuts([1, 6, 24])
    assert not cuts.insert([12], below=6)
    assert cuts.insert([2], below=6)
    assert cuts.sizes == [4, 3, 2]
