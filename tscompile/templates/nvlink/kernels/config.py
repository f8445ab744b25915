"""What a fused GEMM kernel is compiled for, and numbers that its host side shares. Imports no TileLang."""

from __future__ import annotations

from dataclasses import dataclass, field

SMS = 132  # CTAs of a kernel: one per SM of an H100 or H200. Kernels themselves work with any number of them
DATA_FLAGS = 24 << 10  # of a slot; those of a sum are two for each tile that a rank sums, for each rank
MAX_SLICES = 8  # of k, in which a kernel pushes a shard: TSK_SLICES of push.h
MAX_OPERANDS = 3  # weights of one gather, or terms of one sum, that a kernel takes
ITEM_BYTES = 2  # of an element
TILE_M, TILE_K = 128, 64  # rows of a tile, and its step of k
SHARED_BYTES = 226 << 10  # of a CTA for stages and pieces; what is left of 227 KiB holds barriers and rings
MAX_STAGES = 7  # below the length of the rings in tile.h
STRIPE_ROWS = 16  # of a tile that one multiplying warp holds
STRIPES = TILE_M // STRIPE_ROWS
MAX_LEGS, MAX_TARGETS, GRID_DIMS = (
    8,
    8,
    5,
)  # of an exchange: what a launch sends, places that it goes to, dims of either: exchange.h
WORD_BYTES = 16  # of what an exchange moves at a time
UNIT_WORDS = 256  # that a warp has on their way: TSX_UNIT
SUM_FORMS = ("scatter", "two_shot", "one_shot")  # in the order of sum_push.h, which says what each does
DTYPE_CODES = {"bfloat16": 0, "float16": 1}  # TSK_BF16, TSK_FP16 of tile.h


def pulled_rows(tile_n: int) -> int:
    """Rows of tiles that are on their way to the pulling warps of a CTA: 32 KiB at most."""
    return 64 if tile_n > 128 else 128


def piece_rows(tile_n: int) -> int:
    """Rows that a pulling warp moves at a time.

    Four such pieces are on their way: all to the one pulling warp of a reduce_scatter, or two to each of the two of an all_reduce.
    """
    return pulled_rows(tile_n) // 4


def depth(tile_n: int, beside: int = 0) -> int:
    """Stages of the load pipeline that fit into shared memory beside that many elements."""
    return min(MAX_STAGES, (SHARED_BYTES // ITEM_BYTES - beside) // ((TILE_M + tile_n) * TILE_K))


def loaded_rows(rows: int) -> int:
    """Rows of the left operand that a tile loads where a matmul has `rows` rows, or runs of so many.

    TMA takes longer to fill a row that lies outside of a tensor than to load one that lies inside: with boxes of 128 rows a GEMM of 16
    rows takes twice as long as with boxes of 16 [measured 2026-11-28, H200, bfloat16: 68 and 33 us at 16 x 8192 x 7168].
    """
    return min(TILE_M, -(-rows // STRIPE_ROWS) * STRIPE_ROWS)


@dataclass(frozen=True)
class GemmConfig:
    """What a kernel is compiled for.

    dtype: of operands and result; sums are float32.
    transposed: the right operand lies as [N, K] (a Linear's weight used as `x @ W.T`), not as [K, N].
    operands: weights of one gather, or terms of one sum (1 to MAX_OPERANDS).
    bias: a bias row per result is added before rounding.
    tile_n: columns of a tile.
    stages: depth of the load pipeline.
    rows: of a tile that are loaded; what the others hold is not stored.
    """

    dtype: str
    transposed: bool
    operands: int = 1
    bias: bool = False
    tile_n: int = 256
    stages: int = 4
    rows: int = field(default=TILE_M, kw_only=True)

    tile_m = TILE_M
    tile_k = TILE_K
    left_transposed = False  # the left operand lies as [M, K]

    @property
    def registers(self) -> int:
        """Accumulator registers of a thread."""
        return self.tile_m * self.tile_n // 256


@dataclass(frozen=True)
class MeshConfig(GemmConfig):
    """What the kernel of two gathered operands is compiled for, beside a GEMM's own.

    left_transposed: the left operand lies as [K, M], not as [M, K].
    contracts: whether the blocks of the left operand lie along k, and whether those of the right one do.
    """

    left_transposed: bool = False
    contracts: tuple[bool, bool] = (True, True)

    @property
    def k_first(self) -> tuple[bool, bool]:
        """Whether k is the slower of the two axes of the left and of the right operand."""
        return self.left_transposed, not self.transposed


@dataclass(frozen=True)
class BlocksConfig(GemmConfig):
    """What the kernel is compiled for, beside a GEMM's own.

    left_transposed: the left operand lies as [K, M], not as [M, K].
    gathered_left: the left operand is the gathered one.
    contracts: the blocks lie along k, and their products are added up; otherwise they lie along the gathered operand's other axis.
    """

    left_transposed: bool = False
    gathered_left: bool = True
    contracts: bool = True

    @property
    def k_first(self) -> tuple[bool, bool]:
        """Whether k is the slower of the two axes of the gathered and of the local operand."""
        left, right = self.left_transposed, not self.transposed
        return (left, right) if self.gathered_left else (right, left)

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows or columns that a tile takes from the gathered and from the local operand."""
        return (self.tile_m, self.tile_n) if self.gathered_left else (self.tile_n, self.tile_m)
