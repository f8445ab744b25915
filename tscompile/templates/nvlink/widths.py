"""How wide tiles are. Pure functions of sizes, so all ranks choose alike, and the cost model asks them, too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...problem import GatherUse
from .kernels.config import ITEM_BYTES, MAX_SLICES, SMS, TILE_K, TILE_M, loaded_rows

# TMA swizzles the columns of a right operand [K, N] by 64, and wgmma takes multiples of 8 of one [N, K]; epilogues want 16.
SWIZZLED_WIDTHS = (256, 192, 128)
DENSE_WIDTHS = tuple(range(256, 127, -16))
WIDEST = 256
# Also of gathers that are pushed, which may have so few rows that half the SMs would have no tile, by layout (plain, dense).
NARROW_WIDTHS = ((64,), (96, 64))
# A tile of 128 rows takes an SM as long as if it had that many columns more; a column takes so long per unit of k, and there is a pause
# before the next tile. [measured 2026-11-20, H200, bfloat16, all SMs busy: GEMMs of 512 to 8192 rows, tiles of 128 to 256 columns]
_EXTRA_COLUMNS = 18
_COLUMN_US_PER_K = 4.45e-5
_PAUSE_US = 1.0
# Of memory that is read: us per MiB. [measured 2026-11-28, H200: cuBLAS, 128 rows]
_READ_US_PER_MIB = 0.27
# Bytes per us that all SMs load together: narrower tiles than those of 128 columns wait for their loads. [measured 2026-11-28, H200:
# kernels of small sums and gathers alone, 16 to 512 rows, tiles of 64 columns; within 15 %]
_LOADED_BYTES_PER_US = 10.5e6
# One pass over NVLink by copy engine: us until the first byte, for each copy and its flag, and per MiB that one rank receives.
# [measured 2026-11-20, 4 GPUs]
_PASS_US = 10.0
_COPY_US = 8.0
_PUSH_US_PER_MIB = 3.1
# A row that a copy engine sends costs as much as so many bytes more. [measured 2026-11-28, 2x H200, 8K rows that lie 24 KiB apart: 256
# bytes at 112 GB/s, 1024 at 264, 2048 at 280, 4096 at 345]
_ROW_BYTES = 400
# A gather whose kernel pushes: us until the first byte is there and us per MiB that one rank receives, of two ranks and for each
# further one; us per MiB of the shard, which warps must at least read and store; how much longer a GEMM takes beside it.
# [measured 2026-11-28, 2x and 4x H200, 128 to 8192 rows: within 10 %, but for matmuls of 10 us]
_PUSHED_US, _PUSHED_RANK_US = 9.0, 1.5
_PUSHED_US_PER_MIB, _PUSHED_RANK_US_PER_MIB = 3.3, 0.5
_STORED_US_PER_MIB = 7.5
_PUSHED_FACTOR = 1.08
_SLICE_BYTES = 256 << 10  # of a shard, at least: 128 of the 264 warps that push 2 KiB each then share a slice
# Launch of a matmul of torch's. [measured 2026-11-20, 4x H200]
_CUBLAS_US = 4.0
# us of a fused gather in one kernel: its launch, and what neither transport nor tiles explain, by copy engine [measured 2026-11-20] and
# pushed [measured 2026-11-28].
LAUNCH_US = 6.0
COPIED_TAIL_US = 10.0
_PUSHED_TAIL_US = 6.0


def tile_us(width: int, k: int) -> float:
    """Time of a tile of 128 rows, `width` columns and `k` products on one SM, all SMs busy."""
    return (width + _EXTRA_COLUMNS) * k * _COLUMN_US_PER_K + _PAUSE_US


def waves_of(tiles: int) -> int:
    """Waves of that many tiles over the SMs; the last one takes as long as a full one."""
    return max(1, -(-tiles // SMS))


def read_us(k: int, n: int) -> float:
    """Reading a right operand [k, n] of 2-byte elements, without which no GEMM ends however few rows it has."""
    return k * n * ITEM_BYTES / (1 << 20) * _READ_US_PER_MIB


def cublas_us(m: int, n: int, k: int) -> float:
    """Time of torch's matmul `[m, k] @ [k, n]`. cuBLAS cuts one of less than a wave into smaller pieces, so that all SMs work."""
    tiles = -(-m // TILE_M) * -(-n // WIDEST)
    waves = tiles / SMS if tiles < SMS else -(-tiles // SMS)
    return _CUBLAS_US + max(waves * tile_us(WIDEST, k), read_us(k, n))


def gemm_us(tiles: int, width: int, k: int, n: int, rows: int = TILE_M) -> float:
    """Time of a GEMM by one of the kernels, launch included; a tile loads `rows` rows."""
    return LAUNCH_US + max(waves_of(tiles) * _wave_us(width, k, tiles, rows), read_us(k, n))


def tile_width(tile_rows: int, widths: Sequence[int], k: int, transposed: bool) -> int:
    """Columns of a tile for `tile_rows` rows of tiles over matrices of these widths: the least time, then the widest."""

    def us(tile: int) -> tuple[float, int]:
        tiles = tile_rows * sum(math.ceil(width / tile) for width in widths)
        return math.ceil(tiles / SMS) * tile_us(tile, k), -tile

    return min(_choices(transposed), key=us)


def _choices(transposed: bool, narrow: bool = False) -> tuple[int, ...]:
    return (DENSE_WIDTHS if transposed else SWIZZLED_WIDTHS) + (NARROW_WIDTHS[transposed] if narrow else ())


def _wave_us(tile: int, k: int, tiles: int, rows: int) -> float:
    """Time of a wave of `tiles` tiles, or of as many as there are SMs, which load `rows` rows each."""
    loaded = min(tiles, SMS) * (rows + tile) * k * ITEM_BYTES
    return max(tile_us(tile, k), loaded / _LOADED_BYTES_PER_US)


def pushed_slices(rows: int, k: int) -> tuple[int, int]:
    """In how many slices of k a kernel pushes a shard of `rows` rows, and the steps of k of a slice; the last one may be shorter.

    The ranks count each other's slices, so this depends on nothing but the shard.
    """
    steps = -(-k // TILE_K)
    slices = max(1, min(MAX_SLICES, steps, rows * k * ITEM_BYTES // _SLICE_BYTES))
    length = -(-steps // slices)
    return -(-steps // length), length


def gather_us(tile: int, rows: int, widths: Sequence[int], k: int, ranks: int, pushed: bool, mib: float) -> float:
    """Time of a gather whose matmuls all read gathered rows, in one kernel.

    Args:
        tile: columns of a tile. rows: all that are gathered, of `k` elements. widths: columns of the weights.
        pushed: the kernel pushes the shard; otherwise the copy engine does.
        mib: MiB that a rank receives.
    """
    tiles = -(-rows // TILE_M) * sum(-(-width // tile) for width in widths)
    wave, waves = _wave_us(tile, k, tiles, loaded_rows(rows)), waves_of(tiles)
    least = read_us(k, sum(widths))
    if not pushed:
        last = waves_of(-(-tiles // ranks)) * wave  # the tiles of the shard that comes last
        return max(LAUNCH_US + max(waves * wave, least), push_us(mib, ranks) + last) + COPIED_TAIL_US
    slices, _ = pushed_slices(rows // ranks, k)
    # Slices come from all ranks at the same time, so the first wave ends when it has multiplied the last one.
    further = min(max(ranks - 2, 0), 2)  # of more than four nothing was measured
    us_per_mib = _PUSHED_US_PER_MIB + _PUSHED_RANK_US_PER_MIB * further
    sent = max(us_per_mib * mib, _STORED_US_PER_MIB * mib / max(ranks - 1, 1))
    first, last = (_PUSHED_US + _PUSHED_RANK_US * further + sent / part for part in (slices, 1))
    longest = max(first + max(_PUSHED_FACTOR * waves * wave, least), last + wave / slices + (waves - 1) * wave)
    return LAUNCH_US + longest + _PUSHED_TAIL_US


def received_mib(rows: int, k: int, ranks: int) -> float:
    """MiB that a rank receives of gathered rows of `k` elements."""
    return rows * k * ITEM_BYTES * (ranks - 1) / ranks / (1 << 20)


def gather_width(rows: int, widths: Sequence[int], k: int, ranks: int, transposed: bool, pushed: bool = False) -> int:
    """Columns of a tile for all gathered rows, of `k` elements: the least time, then the widest."""
    mib = received_mib(rows, k, ranks)

    def us(tile: int) -> tuple[float, int]:
        return gather_us(tile, rows, widths, k, ranks, pushed, mib), -tile

    return min(_choices(transposed, narrow=pushed), key=us)


def pushes(rows: int, widths: Sequence[int], k: int, ranks: int) -> bool:
    """True if a gather of rows for these weights should have its kernel push the shard, False if the copy engine should.

    Asked of sizes alone: ranks must choose alike, and their weights may lie in memory in different ways. Template and cost model
    both ask here, so a benchmark that replaces this function gets the form that it wants.
    """

    def us(pushed: bool) -> float:
        width = gather_width(rows, widths, k, ranks, True, pushed)
        return gather_us(width, rows, widths, k, ranks, pushed, received_mib(rows, k, ranks))

    return us(True) < us(False)


def push_us(mib: float, ranks: int) -> float:
    """Until the shards of all peers are there, `mib` MiB in all."""
    return copied_us(mib, ranks - 1)


def copied_us(mib: float, copies: int) -> float:
    """Until `copies` copies by the copy engine of a peer are there, one after the other, while `mib` MiB arrive in all."""
    return _PASS_US + _COPY_US * copies + _PUSH_US_PER_MIB * mib


def row_factor(nbytes: int) -> float:
    """How much longer a copy of rows of so many bytes takes than one of one piece."""
    return 1.0 + _ROW_BYTES / max(nbytes, 1)


@dataclass(frozen=True)
class Tiling:
    """tiles: of the whole result. width: columns of a tile."""

    tiles: int
    width: int


def blocks_tiling(
    use: GatherUse, ranks: int, blocks: tuple[int, int, int], free: int, transposed: bool
) -> tuple[Tiling, int]:
    """The tiling of a use in the kernel of blocks, and its k with every block rounded up to whole steps.

    Args:
        blocks: (pieces, inner, width) as refusal.block_sizes has them. free: size of the local operand beside k.
        transposed: the right operand lies as [N, K].
    """
    pieces, inner, width = blocks
    count = pieces * ranks
    k = count * -(-inner // TILE_K) * TILE_K if use.contracts_ranks else width
    across = width if use.contracts_ranks else inner
    if use.side == "lhs":
        tile_rows, columns = -(-across // TILE_M), [free]
        tile_rows *= 1 if use.contracts_ranks else count
    else:
        tile_rows, columns = -(-free // TILE_M), [across] * (1 if use.contracts_ranks else count)
    chosen = tile_width(tile_rows, columns, k, transposed)
    return Tiling(tile_rows * sum(-(-column // chosen) for column in columns), chosen), k
