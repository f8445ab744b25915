"""What the kernels of the exchange are made for."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 128  # tokens whose rows are numbered together: a count of them fits into 8 bits


@dataclass(frozen=True)
class Sizes:
    """What kernels are made for.

    Attributes:
        ranks: of the group.
        experts: of all ranks together, a multiple of `ranks`.
        topk: experts of a token.
        hidden: elements of a row, of whole 16 bytes.
        dtype: of the elements: "float32", "bfloat16" or "float16".
        rows: how many a rank has room for.
        blocks: how many move rows on each rank.
    """

    ranks: int
    experts: int
    topk: int
    hidden: int
    dtype: str
    rows: int
    blocks: int

    @property
    def local_experts(self) -> int:
        return self.experts // self.ranks

    @property
    def row_bytes(self) -> int:
        return self.hidden * (4 if self.dtype == "float32" else 2)

    @property
    def numbers(self) -> int:
        """What a rank tells the others: rows per rank, entries per expert, entries that are no expert."""
        return self.ranks + self.experts + 1

    @property
    def summary(self) -> int:
        """What notify tells the host: 1 if all ranks were heard, rows per rank, entries that are no expert per rank, entries per expert
        of this rank."""
        return 1 + 2 * self.ranks + self.local_experts
