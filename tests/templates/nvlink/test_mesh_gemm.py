"""mesh_matmul over NVLink without GPUs: operands, chunks, tables, and the protocol of two groups under a random scheduler."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tscompile.problem import GatherUse
from tscompile.templates.nvlink import mesh_tiles
from tscompile.templates.nvlink.mesh_tiles import Operand, chunk_copies, mesh_table, operands_refusal, panel_bounds

from .mesh_protocol import as_matrix, blocked, copy, make_mesh, own_blocks
from .protocol import run_all

BF16 = "bfloat16"
QUICK = settings(deadline=None, max_examples=100)
SLOW = settings(deadline=None, max_examples=40)
SEEDS = st.integers(0, 10**6)
TILE = (4, 3, 2)  # rows, columns, step of k


@pytest.fixture(scope="module", autouse=True)
def small() -> object:
    """Tiles and chunks of a few elements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_tiles, "TILE_M", TILE[0])
        patch.setattr(mesh_tiles, "TILE_K", TILE[2])
        patch.setattr(mesh_tiles, "BAND", 3)
        patch.setattr(mesh_tiles, "_CHUNK_BYTES", 16)
        patch.setattr(mesh_tiles, "_ROW_BYTES", 4)
        patch.setattr(mesh_tiles, "_ALIGNED", 1)
        yield


@st.composite
def meshes(draw: st.DrawFn) -> tuple[Operand, Operand]:
    """Operands of any layout that the kernel takes, with one k."""
    sizes = [draw(st.integers(2, 4)) for _ in range(2)]
    pieces = [draw(st.integers(1, 3)) for _ in range(2)]
    contracts = [draw(st.booleans()) for _ in range(2)]
    needs = [size * piece if along else 1 for size, piece, along in zip(sizes, pieces, contracts, strict=True)]
    unit = draw(st.integers(1, 3)) if sizes == [2, 2] else 2
    k = math.lcm(*needs) * unit
    made = []
    for size, piece, along in zip(sizes, pieces, contracts, strict=True):
        free = draw(st.integers(1, 11))
        inner, width = (k // (size * piece), free) if along else (free, k)
        made.append(Operand(size, piece, inner, width, along, draw(st.booleans())))
    left, right = made
    return left, right


@SLOW
@given(operands=meshes(), workers=st.integers(1, 4), seed=SEEDS)
def test_whatever_arrives_when_in_either_group(operands: tuple[Operand, Operand], workers: int, seed: int) -> None:
    """Three ops in a row on every rank: each element is stored once, of data of that op; and no order of events holds them up."""
    assume(operands_refusal(*operands) is None)
    ranks, truth = make_mesh(*operands, TILE, workers, 3, seed)
    run_all(ranks, seed)  # type: ignore[arg-type]
    for rank, expected in zip(ranks, truth, strict=True):
        assert (
            all(torch.equal(out, want) for out, want in zip(rank.outs, expected, strict=False)) and len(expected) == 3
        )


@QUICK
@given(operands=meshes())
def test_chunks_put_a_shard_together(operands: tuple[Operand, Operand]) -> None:
    for operand in operands:
        whole = torch.arange(math.prod(blocked(operand, operand.blocks)), dtype=torch.int16).view(
            blocked(operand, operand.blocks)
        )
        slot = torch.full_like(whole, -1)
        for rank in range(operand.ranks):
            shard = own_blocks(operand, whole, rank)
            bounds = operand.chunks
            assert bounds[0][0] == 0 and bounds[-1][1] == operand.cut and len(bounds) <= mesh_tiles.MAX_CHUNKS
            for (first, last), rectangle in zip(bounds, chunk_copies(operand, rank), strict=True):
                before = slot.clone()
                copy(rectangle, shard, slot)
                changed = own_blocks(operand, slot != before, rank)
                assert (
                    int((slot != before).sum()) == int(changed.sum()) == (last - first) * shard.numel() // operand.cut
                )
        assert torch.equal(slot, whole)


@QUICK
@given(operands=meshes(), seed=SEEDS)
def test_what_a_table_waits_for(operands: tuple[Operand, Operand], seed: int) -> None:
    """Tiles come in the order of arrival; all chunks of all peers are waited for, so two slots suffice; and panels cover k."""
    left, right = operands
    ranks = seed % left.ranks, seed // 7 % right.ranks
    made = mesh_table(left, right, ranks, TILE[1])
    assert len(made.rows) == 2 * (made.tiles + made.panels)
    tiles = list(zip(made.rows[0 : 2 * made.tiles : 2], made.rows[1 : 2 * made.tiles : 2], strict=True))
    panels = list(zip(made.rows[2 * made.tiles :: 2], made.rows[2 * made.tiles + 1 :: 2], strict=True))
    assert made.steps == sum(row[2] for row, _ in panels)
    for which, (operand, rank) in enumerate(zip(operands, ranks, strict=True)):
        rows = [pair[which] for pair in (panels if operand.contracts else tiles)]
        masks = {row[6] for row in rows}
        assert masks == {0, *(1 << peer for peer in range(operand.ranks) if peer != rank)}
        assert max(pair[which][7] for pair in tiles) == len(operand.chunks) - 1
        for row in (pair[which] for pair in tiles):
            first, last = operand.chunks[row[7]]
            assert first < row[0] + row[2] <= last
    # Nothing that has come waits behind what has not.
    if not (left.contracts or right.contracts):
        needs = [pair[0][6] == 0 and pair[1][6] == 0 for pair in tiles]
        assert needs == sorted(needs, reverse=True) and needs[0]
    assert sorted(start for start, _ in panel_bounds(left, right)) == sorted(
        (row[4] if not row[3] else row[4] * left.ranks + ranks[0]) * left.inner + row[0] if left.contracts else row[0]
        for row, _ in panels
    )


def test_ranks_of_a_square_mesh_take_panels_as_cannon_does() -> None:
    """Rank (i, j) begins with its own panels where it has both operands; no two ranks of a group want the same shard first."""
    ranks = 4
    left = Operand(ranks, 1, 6, 8, True, False)
    right = Operand(ranks, 1, 6, 8, True, True)
    for i in range(ranks):
        firsts = []
        for j in range(ranks):
            made = mesh_table(left, right, (j, i), TILE[1])
            walk = made.rows[2 * made.tiles :]
            distances = [
                max((panel - j) % ranks, (panel - i) % ranks)
                for panel in (row[4] if not row[3] else j for row in walk[::2])
            ]
            assert distances == sorted(distances)
            if i == j:
                assert walk[0][3] and walk[1][3]
            firsts.append(walk[0][4] if not walk[0][3] else j)
        assert len(set(firsts)) > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"inner": 0}, "empty"),
        ({"inner": 12}, "multiple of 16 bytes"),
        ({"ranks": 3, "inner": 128}, None),
        ({"ranks": 3, "inner": 40, "pieces": 1}, "no multiple of 64"),
    ],
)
def test_operands_that_are_refused(change: dict[str, int], words: str | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_tiles, "TILE_K", 64)
        patch.setattr(mesh_tiles, "_ALIGNED", 8)
        sizes = {"ranks": 2, "pieces": 1, "inner": 192, "width": 128} | change
        left = Operand(**sizes, contracts=True, k_first=False)
        k = sizes["ranks"] * sizes["pieces"] * sizes["inner"]
        right = Operand(2, 1, k // 2, 128, True, True)
        refusal = operands_refusal(left, right)
    assert refusal is None if words is None else words in (refusal or "")


@pytest.mark.parametrize("side", ["lhs", "rhs"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("axis", ["rows", "cols"])
def test_operands_of_uses(side: str, transposed: bool, axis: str) -> None:
    """What the kernel multiplies is what the use says."""
    use = GatherUse(side, transposed, axis, BF16)  # type: ignore[arg-type]
    ranks, pieces, inner, width = 3, 2, 4, 5
    p, q = (pieces, inner * width) if axis == "rows" else (width * pieces, inner)
    whole = torch.arange(p * ranks * q).view(p, ranks, q)
    matrix = whole.reshape(-1, width) if axis == "rows" else whole.reshape(width, -1)
    operand = matrix.t() if transposed else matrix
    from_k = operand.t() if side == "lhs" else operand
    found = Operand.of(use, ranks, (p, q), from_k.shape[0])
    assert (found.pieces, found.inner, found.width) == (pieces, inner, width)
    assert torch.equal(as_matrix(found, whole.reshape(blocked(found, found.blocks))), from_k)
    assert (found.k, found.free) == tuple(from_k.shape)
