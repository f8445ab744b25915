"""What a fused GEMM kernel is compiled for, and numbers that its host side shares. Imports no TileLang."""

from __future__ import annotations

from dataclasses import dataclass

SMS = 132  # CTAs of a kernel: one per SM of an H100 or H200
MAX_OPERANDS = 3  # weights of one gather, or terms of one sum, that a kernel takes
DTYPE_CODES = {"bfloat16": 0, "float16": 1}  # TSK_BF16, TSK_FP16 of tile.h


@dataclass(frozen=True)
class GemmConfig:
    """What a kernel is compiled for.

    dtype: of operands and result; sums are float32.
    transposed: the right operand lies as [N, K] (a Linear's weight used as `x @ W.T`), not as [K, N].
    operands: weights of one gather, or terms of one sum (1 to MAX_OPERANDS).
    bias: a bias row per result is added before rounding.
    tile_n: columns of a tile; rows are 128 and the k step is 64.
    stages: depth of the load pipeline.
    """

    dtype: str
    transposed: bool
    operands: int = 1
    bias: bool = False
    tile_n: int = 256
    stages: int = 4

    tile_m = 128
    tile_k = 64

    @property
    def registers(self) -> int:
        """Accumulator registers of a thread."""
        return self.tile_m * self.tile_n // 256
