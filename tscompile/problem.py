"""What a pattern found and what a plan says: plain data, no torch graph, no kernels.

Everything here is the same on every rank of a group: no rank number, pointer or process-local id may enter it,
because a plan travels inside compiled artifacts that other ranks load.

The one shape under every kind (docs/dev/design.md draws it): a collective moves a tensor `[P, R, Q]`, row-major, where
R is the rank dimension, P what lies outside it and Q what lies inside. A gather along dim 0 has P = 1; a gather
along dim 1 of `[B, S/R, D]` has P = B and Q = S/R * D. Matmul operands and results are 2-D views of that tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal

Phase = Literal["forward", "backward", "inference"]
Axis = Literal["rows", "cols"]
Share = Literal["heads", "packed", "rows", "whole"]

PLAN_VERSION = 3


@dataclass(frozen=True)
class GatherUse:
    """How one matmul reads the gathered tensor G = `[P, R, Q]`.

    G is viewed as a row-major matrix G2. The rank dimension lies in G2's rows or in its columns (`rank_axis`). The matmul's
    operand is G2, or its transpose if `transposed`; it is the left or the right operand (`side`). G2's sizes follow
    from the other operand, so no shape is stored and symbolic sizes need no special case.
    """

    side: Literal["lhs", "rhs"]
    transposed: bool
    rank_axis: Axis
    dtype: str  # dtype of the matmul, e.g. "bfloat16"; G is cast to it where it differs

    @property
    def contracts_ranks(self) -> bool:
        """True if the rank dimension is summed over (a weight gradient), False if it is an output dimension."""
        operand_axis = self.rank_axis if not self.transposed else ("cols" if self.rank_axis == "rows" else "rows")
        return operand_axis == ("cols" if self.side == "lhs" else "rows")

    @property
    def reads_rows(self) -> bool:
        """True if the left operand is the gathered matrix as it lies, the rank dimension in its rows."""
        return self.side == "lhs" and not self.transposed and self.rank_axis == "rows"


@dataclass(frozen=True)
class Delivery:
    """A part of what an exchange received, in the order in which a reader wants it.

    exchange: number of the op's input, which is `[R, f1, ..., fk]`; what is received has the same dims, with the source rank as dim 0.
    order: its dims as they lie in the output, outermost first.
    fixed: (dim, index) of the dims that the reader wants one index of.
    outer: where outputs are joined, how many dims of `order` lie outside of the joined one.
    """

    exchange: int
    order: tuple[int, ...]
    fixed: tuple[tuple[int, int], ...] = ()
    outer: int = 0


@dataclass(frozen=True)
class Operand:
    """A tensor that an attention reads.

    index: number of the op's output that holds it as received, or of the `local` tensor that it is if it crosses no ranks.
    counts: of what is received: how many dims of that output make up each of the operand's dims, in the order of memory.
    order: those dims as the attention has them, `[B, heads, ...]`.
    share: what a group of heads reads of it. "heads": these heads, a view. "packed", "rows": these heads without gaps, contiguous or
        in the memory order of `[B, S, heads, D]`, since the kernel takes it to lie so. "whole": all of it, since it has no heads.
    """

    index: int
    received: bool
    counts: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    share: Share = "heads"


@dataclass(frozen=True)
class Panels:
    """What an exchange `[R, f1, ..., fk]` sends, as panels of a left operand: its dims that are rows, and those of the columns outside
    and inside of the rank. issued: number of the exchange in the program's order.
    """

    rows: tuple[int, ...]
    outer: tuple[int, ...]
    inner: tuple[int, ...]
    issued: int = 0

    @property
    def order(self) -> tuple[int, ...]:
        """As they lie in the left operand."""
        return (*self.rows, *self.outer, 0, *self.inner)

    @property
    def sent(self) -> tuple[int, ...]:
        """The dims of what goes to one rank."""
        return (*self.rows, *self.outer, *self.inner)


@dataclass(frozen=True)
class Argument:
    """An argument of an attention's op.

    name: what the op's schema calls it.
    source: "operand": `value` is the number of an operand. "size": (number of an operand, dim): that size. "constant": `value` itself.
    """

    name: str
    source: Literal["operand", "size", "constant"]
    value: Any


@dataclass(frozen=True)
class Result:
    """A result of an attention that the program reads beside what is sent.

    number: which one of the op's.
    layout: its dims as they lie in memory, outermost first; empty if it has no heads and no contents that matter (the state of
        random numbers that nothing draws): then it is what the first group's call returned.
    """

    number: int
    layout: tuple[int, ...] = ()


@dataclass(frozen=True)
class Departure:
    """An exchange that sends a result of an attention or a matmul.

    result: its number. sizes: how many of the op's `sizes` it takes: the result is reshaped to them.
    fixed: (dim, index) that are selected. order: what is left of the dims, as they are sent: `[R, f1, ..., fk]`.
    heads: of an attention: which of the `sizes` are the heads.
    columns: of a matmul: (first, number) of the columns of its result that are reshaped.
    """

    result: int
    sizes: int
    fixed: tuple[tuple[int, int], ...]
    order: tuple[int, ...]
    heads: int = -1
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class Attention:
    """An attention between exchanges, computed by groups of heads; what its exchanges deliver stands in the plan and in `deliveries`.

    op: name of the op in torch.ops.aten, of its default overload. Operands and results with heads have them in dim 1.
    arguments: all that the op is called with.
    results: what of it the op returns.
    heads: for each exchange before it, the dim of its input that is the heads.
    deliveries, joins: of the exchanges after it, as in the plan.
    """

    op: str
    arguments: tuple[Argument, ...]
    operands: tuple[Operand, ...]
    results: tuple[Result, ...]
    heads: tuple[int, ...]
    departures: tuple[Departure, ...]
    deliveries: tuple[Delivery, ...]
    joins: tuple[int, ...]


@dataclass(frozen=True)
class Keys:
    """The keys or the values of an attention, as each rank has its part of them in an input of the op.

    shard: number of the input, which is `[f1, ..., fk]`.
    dims: for each dim of `[B, heads, S / R, E]`, the dims of that input that it consists of, outermost first, counted from 1.
    fixed: (dim, index) of the dims that are selected.
    """

    shard: int
    dims: tuple[tuple[int, ...], ...]
    fixed: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Scatter:
    """A reduce_scatter of gradients.

    parts: numbers of the attention's results that it sums; several are stacked: `[parts, B, heads, S / R, E]` of a rank's keys.
    sizes: how many of the op's `sizes` that is reshaped to. order: those dims as they lie in the result, outermost first.
    """

    parts: tuple[int, ...]
    sizes: int
    order: tuple[int, ...]


@dataclass(frozen=True)
class ChunkedAttention:
    """An attention whose keys and values are cut along the sequence over the ranks, computed chunk by chunk.

    op: its name in torch.ops.aten, of the forward or of the backward.
    order: the whole sequence consists of equal pieces; piece j of rank r is number `order[r][j]` of them.
    results: numbers of the op's results that the program reads. layouts: the dims of each as they lie in memory, outermost first.
    keys: forward: the keys, then the values. operands: backward: names of its tensor operands, in the order of the op's input.
    scatters: backward: the reduce_scatters of the gradients of keys and values.
    """

    op: str
    causal: bool
    scale: float | None
    order: tuple[tuple[int, ...], ...]
    results: tuple[int, ...]
    layouts: tuple[tuple[int, ...], ...]
    keys: tuple[Keys, ...] = ()
    operands: tuple[str, ...] = ()
    scatters: tuple[Scatter, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The string argument of a fused op: everything its runtime needs beside tensors and the group's name.

    site: stable name of the site in its graph, equal on all ranks; it is what an error message names.
    executor: name of the template that runs it ("shm" on CPU ranks of one host).
    uses: all_gather_matmul, all_to_all_matmul: one entry per matmul. mesh_matmul: how its matmul reads the left operand, then the right
        one.
    rank_axis: matmul_reduce_scatter, matmul_all_gather: where the rank dimension lies in the matmul's result `[M, N]`.
    coefficients: matmul_reduce_scatter, matmul_all_reduce: factor of each term.
    collectives: number of original collectives that the op stands for (all_reduces merged by linearity); term i belongs to
        collective `term_group[i]`. The reference issues them one by one, as the program did.
    reduce_op: "sum" or "avg".
    dtype: dtype of the tensor that crosses ranks.
    return_gathered: all_gather_matmul: the gathered tensor `[P, R*Q]` is an output too; mesh_matmul: so is the left operand's;
        all_to_all_matmul: so is what was received, `[M, K]`.
    return_second: mesh_matmul: so is the right operand's.
    second_size: mesh_matmul: ranks of the right operand's group.
    schedule: mesh_matmul: the order in which it takes the shards, as templates/mesh_gemm.py names them; all_to_all_attention: the
        number of head groups.
    deliveries: all_to_all_permute, all_to_all_attention, matmul_all_to_all: what is delivered.
    joins: the same: for each output, how many of the deliveries it consists of.
    attention: all_to_all_attention: what is computed between the exchanges.
    panels: all_to_all_matmul: of each exchange, in the order of the columns.
    departures: matmul_all_to_all: what each exchange sends of which matmul's result.
    chunks: all_gather_attention, attention_reduce_scatter: what is computed. In the former `deliveries` and `joins` say what else of
        the gathered tensors is an output; an input of the op is a block of what they count as exchanges.
    """

    kind: str
    site: str
    executor: str
    dtype: str
    uses: tuple[GatherUse, ...] = ()
    rank_axis: Axis = "rows"
    coefficients: tuple[float, ...] = ()
    collectives: int = 1
    term_group: tuple[int, ...] = ()
    reduce_op: Literal["sum", "avg"] = "sum"
    return_gathered: bool = False
    return_second: bool = False
    second_size: int = 0
    schedule: str = ""
    deliveries: tuple[Delivery, ...] = ()
    joins: tuple[int, ...] = ()
    attention: Attention | None = None
    departures: tuple[Departure, ...] = ()
    panels: tuple[Panels, ...] = ()
    chunks: ChunkedAttention | None = None
    version: int = PLAN_VERSION

    @property
    def computes(self) -> bool:
        """False if the op only moves elements, so that its results are equal to the bit."""
        return self.kind != "all_to_all_permute"

    @property
    def unspecified(self) -> frozenset[int]:
        """Outputs whose contents do not matter: torch leaves the state of random numbers uninitialised where nothing is drawn."""
        if self.chunks is not None:
            return frozenset(place for place, number in enumerate(self.chunks.results) if number > 1)
        results = self.attention.results if self.attention is not None else ()
        return frozenset(len(self.joins) + place for place, result in enumerate(results) if not result.layout)

    def dumps(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=4096)
    def loads(text: str) -> Plan:
        """Parse a plan; the result is cached, since an op parses its plan at every call."""
        raw: dict[str, Any] = json.loads(text)
        if raw.get("version") != PLAN_VERSION:
            raise ValueError(
                f"compiled artifact carries plan version {raw.get('version')}, this tscompile reads {PLAN_VERSION}: "
                "clear the Inductor cache (TORCHINDUCTOR_CACHE_DIR) and run again"
            )
        raw["uses"] = tuple(GatherUse(**use) for use in raw["uses"])
        raw["coefficients"] = tuple(raw["coefficients"])
        raw["term_group"] = tuple(raw["term_group"])
        raw["deliveries"] = _all(Delivery, raw["deliveries"])
        raw["joins"] = tuple(raw["joins"])
        raw["departures"] = _all(Departure, raw["departures"])
        raw["panels"] = _all(Panels, raw["panels"])
        if raw["attention"] is not None:
            parts: dict[str, Callable[..., Any]] = {
                "arguments": Argument,
                "operands": Operand,
                "results": Result,
                "departures": Departure,
                "deliveries": Delivery,
            }
            found = {name: _tuples(value) for name, value in raw["attention"].items()}
            found |= {name: _all(part, raw["attention"][name]) for name, part in parts.items()}
            raw["attention"] = Attention(**found)
        if raw["chunks"] is not None:
            fields = {name: _tuples(value) for name, value in raw["chunks"].items()}
            fields |= {name: _all(part, raw["chunks"][name]) for name, part in (("keys", Keys), ("scatters", Scatter))}
            raw["chunks"] = ChunkedAttention(**fields)
        return Plan(**raw)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _all(part: Callable[..., Any], raw: list[dict[str, Any]]) -> tuple[Any, ...]:
    return tuple(part(**{name: _tuples(value) for name, value in fields.items()}) for fields in raw)


@dataclass(frozen=True)
class Gemm:
    """Sizes of one matmul of a problem as the ranks compute it: local `[m, k] @ [k, n]`; a symbolic size is its hint."""

    m: int
    n: int
    k: int


@dataclass(frozen=True)
class FusionProblem:
    """What the planner decides on. Sizes are hints where the graph is symbolic.

    second_group_size, second_comm_bytes, second_pieces: mesh_matmul: of the right operand's gather; those of the left one stand in the
        fields that every kind has. panels: mesh_matmul: each rank of either group holds one block of the contracted dim. static:
        mesh_matmul: no size is symbolic.
    exchanges: number of collectives that it replaces, where they need not be one.
    grids: matmul_all_to_all: for each departure the sizes that the columns are reshaped to.
    panels_of: all_to_all_matmul: of each exchange, how many panels of the left operand a rank sends another, and columns of one.
    copied_bytes: all_to_all_matmul: of what is sent, what must be copied first, since a rank's part does not lie in one piece.
    heads: all_to_all_attention: heads of this rank that all of its exchanges have, 0 if that is no constant.
    merged_bytes: all_gather_attention, attention_reduce_scatter: float32 partial results of one chunk of keys, which are added up.
    """

    kind: str
    group_size: int
    intra_host: bool
    device: str  # "cpu" | "cuda"
    dtype: str
    comm_bytes: int  # bytes of the full tensor [P, R, Q] that the original collective moves
    gemms: tuple[Gemm, ...]
    gemm_dtypes: tuple[str, ...] = ()  # of each matmul's result, before any cast
    reduce_op: str = "sum"
    return_gathered: bool = False
    return_second: bool = False
    pieces: int = 1  # P
    second_group_size: int = 0
    second_comm_bytes: int = 0
    second_pieces: int = 1
    static: bool = True
    panels: bool = False
    exchanges: int = 1
    grids: tuple[tuple[int, ...], ...] = ()
    panels_of: tuple[tuple[int, int], ...] = ()
    copied_bytes: int = 0
    heads: int = 0
    merged_bytes: int = 0
    capability: tuple[int, int] | None = None  # of the GPU, None where there is none


@dataclass(frozen=True)
class Keep:
    """A refusal: `code` is stable and machine-readable, `reason` is a sentence for the user."""

    code: str
    reason: str


@dataclass(frozen=True)
class Fuse:
    executor: str
    predicted_fused_us: float
    predicted_original_us: float
    schedule: str = ""


Decision = Fuse | Keep


@dataclass
class Row:
    """One line of the report: a site that was fused, kept, or a collective that no pattern matched.

    `group` is the process group's name; `collectives` has one op name per original collective, so that every collective of a
    graph stands in exactly one row. `measured_us` is filled at run time on this rank.
    """

    site: str
    graph: str
    phase: Phase
    pattern: str | None
    group: str
    ranks: int
    collectives: list[str]
    decision: Literal["fused", "kept", "unmatched"]
    code: str
    reason: str
    shapes: list[str] = field(default_factory=list)
    dtype: str = ""
    bytes: int = 0
    predicted_us: dict[str, float | None] = field(default_factory=lambda: {"fused": None, "original": None})
    measured_us: float | None = None
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class GroupMemory:
    """Buffers of one group: where they come from, why, and their size on each rank."""

    ranks: tuple[int, ...]
    provider: str
    bytes: int
    reason: str = ""
