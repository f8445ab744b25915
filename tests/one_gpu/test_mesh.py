"""mesh_matmul of all ranks of a mesh on one GPU: a link to its row and one to its column for each, and a stream."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.direct_ops import Shape
from tests.fused_programs import GATHER
from tests.mesh_cases import LHS, RHS, MeshCase, mesh_case
from tscompile.templates import find_template
from tscompile.templates.nvlink import mesh_tiles
from tscompile.templates.nvlink.channel import Site

from .group import SLOT_BYTES, Group, Op

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
if not torch.cuda.is_available():
    pytestmark.append(pytest.mark.skip(reason="needs an NVIDIA GPU (H100 or H200)"))

Place = tuple[int, int]
# What kernels are compiled for, each layout of either operand at least once: what is contracted is gathered, or not.
LAYOUTS = [
    ("panels", "panels"),
    ("panels, transposed", "panels, transposed"),
    ("rows", "columns, transposed"),
    ("rows, transposed", "columns"),
    ("panels", "columns"),
    ("rows, pieces", "pieces"),
]


class Mesh:
    """Ranks (i, j). Row i is a group, and column j is one."""

    def __init__(self, patch: pytest.MonkeyPatch, rows: int, columns: int, timeout_s: float = 20.0) -> None:
        self.shape = rows, columns
        self.places: list[Place] = list(product(range(rows), range(columns)))
        world = rows * columns
        self.rows = [Group(patch, columns, timeout_s, world) for _ in range(rows)]
        self.columns = [Group(patch, rows, timeout_s, world) for _ in range(columns)]
        self.streams = {place: torch.cuda.Stream() for place in self.places}
        self.dice = random.Random(world)
        torch.cuda.synchronize()

    def each(self, action: Callable[[Place], Any], places: Sequence[Place] | None = None) -> dict[Place, Any]:
        """`action(place)` on the stream of each rank, in any order."""
        order = list(self.places if places is None else places)
        self.dice.shuffle(order)
        results = {}
        for place in order:
            with torch.cuda.stream(self.streams[place]):
                results[place] = action(place)
        return results


class MeshOp:
    """One site of a mesh: inputs of all ranks, and what they should return."""

    def __init__(self, mesh: Mesh, layouts: tuple[str, str], seed: int, **more: Any) -> None:
        rows, columns = mesh.shape
        self.mesh, self.layouts = mesh, layouts
        scale, wide = (32, 17) if rows == columns == 2 else (64, 22)
        more = {"dtype": "bfloat16", "scale": scale, "wide": wide, **more}
        self.case: MeshCase = mesh_case(rows, columns, LHS[layouts[0]], RHS[layouts[1]], seed=seed, **more)
        self.args = {place: (*self.case.args_on("cuda", place), "a group") for place in mesh.places}
        self.sites = {place: Site(7) for place in mesh.places}
        found = find_template("mesh_matmul", "nvlink")
        assert found is not None
        self.template = found
        for place in mesh.places:
            assert 0 < found.scratch_bytes(self.case.plan, columns, *self.args[place]) <= SLOT_BYTES, layouts
        torch.cuda.synchronize()

    def call(self, place: Place) -> list[Tensor]:
        """On the current stream."""
        i, j = place
        site = self.sites[place]
        channels = self.mesh.rows[i].links[j].open(site), self.mesh.columns[j].links[i].open(site)
        outputs: list[Tensor] = self.template.run(channels, self.case.plan, *self.args[place])
        return outputs

    def check(self, outputs: dict[Place, list[Tensor]]) -> None:
        for place, found in outputs.items():
            self.case.check(place, found)


class RowOp:
    """A gather of every row, or of every column: an op of one of the two groups."""

    def __init__(self, mesh: Mesh, of_rows: bool) -> None:
        self.of_rows = of_rows
        self.ops = [
            Op(group, Shape(GATHER, 64, (256,), 128), form=False) for group in (mesh.rows if of_rows else mesh.columns)
        ]
        self.truth = [op.truth() for op in self.ops]

    def call(self, place: Place) -> list[Tensor]:
        which, rank = place if self.of_rows else place[::-1]
        return self.ops[which].call(rank)

    def check(self, outputs: dict[Place, list[Tensor]]) -> None:
        for which, (op, truth) in enumerate(zip(self.ops, self.truth, strict=True)):
            places = [(which, rank) if self.of_rows else (rank, which) for rank in range(op.group.size)]
            op.check([outputs[place] for place in places], truth)


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as made:
        yield made


def cut_finely(patch: pytest.MonkeyPatch) -> None:
    """Small shards travel in chunks, as large ones do."""
    patch.setattr(mesh_tiles, "_CHUNK_BYTES", 4 << 10)
    patch.setattr(mesh_tiles, "_ROW_BYTES", 64)


def same(one: dict[Place, list[Tensor]], other: dict[Place, list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for place, found in one.items() for a, b in zip(found, other[place], strict=True))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("shape", [(2, 2), (2, 3)], ids=["2x2", "2x3"])
def test_results_and_bits(patch: pytest.MonkeyPatch, shape: Place) -> None:
    """Every layout, with and without bias and gathered operands: the right results, and the same bits again."""
    mesh = Mesh(patch, *shape)
    for chunks in (False, True):
        if chunks:
            cut_finely(patch)
        for seed, layouts in enumerate(LAYOUTS):
            returned = (seed % 2 == 0, seed % 3 == 0)
            op = MeshOp(mesh, layouts, seed, bias=seed % 2 == 1, returned=returned)
            first = mesh.each(op.call)
            torch.cuda.synchronize()
            op.check(first)
            again = mesh.each(op.call)
            torch.cuda.synchronize()
            assert same(first, again), f"{layouts}: other bits"


def test_float16(patch: pytest.MonkeyPatch) -> None:
    mesh = Mesh(patch, 2, 2)
    op = MeshOp(mesh, LAYOUTS[0], 0, dtype="float16")
    outputs = mesh.each(op.call)
    torch.cuda.synchronize()
    op.check(outputs)


@pytest.mark.timeout(900)
def test_a_deep_queue_with_pauses(patch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    """Ops of the mesh, of rows and of columns follow each other on the same memory; ranks are held up at random."""
    mesh = Mesh(patch, 2, 2)
    cut_finely(patch)
    ops: list[MeshOp | RowOp] = [MeshOp(mesh, layouts, seed) for seed, layouts in enumerate(LAYOUTS[:4])]
    ops += [RowOp(mesh, True), RowOp(mesh, False)]
    for op in ops:
        mesh.each(op.call)  # loads the kernels and makes the tables
        torch.cuda.synchronize()
    dice = random.Random(1)
    for _ in range(0, pytestconfig.getoption("--iterations"), 12):
        order = [dice.randrange(len(ops)) for _ in range(12)]
        results = []
        for which in order:
            if dice.random() < 0.5:
                with torch.cuda.stream(mesh.streams[dice.choice(mesh.places)]):
                    torch.cuda._sleep(int(dice.random() * 300_000))
            results.append(mesh.each(ops[which].call))
        torch.cuda.synchronize()
        for which, outputs in zip(order, results, strict=True):
            ops[which].check(outputs)


def test_graphs_among_eager_calls(patch: pytest.MonkeyPatch) -> None:
    """Captured calls of the mesh and of its rows are replayed an odd number of times between eager ones."""
    mesh = Mesh(patch, 2, 2)
    ops: list[MeshOp | RowOp] = [MeshOp(mesh, LAYOUTS[0], 0), RowOp(mesh, True), MeshOp(mesh, LAYOUTS[3], 1)]
    for op in ops:
        mesh.each(op.call)
        torch.cuda.synchronize()
    graphs = {place: torch.cuda.CUDAGraph() for place in mesh.places}
    captured: list[dict[Place, list[Tensor]]] = [{} for _ in ops]
    for place, graph in graphs.items():
        with torch.cuda.graph(graph, stream=mesh.streams[place]):
            for number, op in enumerate(ops):
                captured[number][place] = op.call(place)
    dice = random.Random(2)
    for _ in range(6):
        for outputs in captured:
            for found in outputs.values():
                for output in found:
                    output.fill_(float("nan"))
        torch.cuda.synchronize()
        for _ in range(dice.choice((1, 2, 3))):
            mesh.each(lambda place: graphs[place].replay())
        torch.cuda.synchronize()
        for op, outputs in zip(ops, captured, strict=True):
            op.check(outputs)
        for _ in range(dice.choice((0, 1, 3))):
            which = dice.randrange(len(ops))
            outputs = mesh.each(ops[which].call)
            torch.cuda.synchronize()
            ops[which].check(outputs)


def test_a_rank_that_stays_away(patch: pytest.MonkeyPatch) -> None:
    """Its row and its column give up in time, fill outputs with NaN and leave a record; the rank across the mesh has all it needs."""
    mesh = Mesh(patch, 2, 2, timeout_s=1.5)
    op = MeshOp(mesh, LAYOUTS[0], 0)
    mesh.each(op.call)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(mesh.streams[0, 1])
    outputs = mesh.each(op.call, places=[(0, 0), (0, 1), (1, 0)])
    end.record(mesh.streams[0, 1])
    torch.cuda.synchronize()
    assert 1e3 <= start.elapsed_time(end) <= 6e3
    op.case.check((0, 0), outputs[0, 0])
    for place, link in (((0, 1), mesh.columns[1].links[0]), ((1, 0), mesh.rows[1].links[0])):
        assert outputs[place][0].isnan().all(), place
        record = link.read_record()
        assert record.site == 7 and record.peer == 1 and record.expected > record.seen
    assert not mesh.rows[0].links[0].has_record() and not mesh.columns[0].links[0].has_record()
