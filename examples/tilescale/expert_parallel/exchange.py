"""Dispatch of tokens to the ranks of their experts, and combine of what the experts made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from common import World

from .kernels import KERNELS
from .layout import ExchangeRefused, Layout, aligned, check_sizes, refusal
from .sizes import CHUNK, Sizes

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
NUM_SMS = {"cuda": 64, "cpu": 2}


@dataclass(frozen=True, eq=False)
class Handle:
    """Where the rows of a dispatch went: what a cached dispatch and combine need. It owns its memory, and stays valid.

    Attributes:
        num_tokens: of this rank.
        num_recv_tokens: rows that this rank received.
        position, first, go: tensors of the kernels, see counting.py.
    """

    num_tokens: int
    num_recv_tokens: int
    position: torch.Tensor
    first: torch.Tensor
    go: torch.Tensor


@dataclass(frozen=True, eq=False)
class Received:
    """What a rank got, `[rows, ...]`: in the order of source ranks, and of tokens within them.

    The tensors are views of memory that the next dispatch of the exchange overwrites: clone what is needed longer.

    Attributes:
        x: `[rows, hidden]`.
        topk_idx: int64 `[rows, topk]`, experts as this rank numbers them; -1 for those of other ranks.
        topk_weights: float32 `[rows, topk]`, 0 where topk_idx is -1.
        src_idx: int32 `[rows]`, the token's number at its source.
        tokens_per_expert: entries of topk_idx that name each expert of this rank, rounded up to the alignment that was asked for.
        handle: for `combine` and `dispatch_cached`.
    """

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    src_idx: torch.Tensor
    tokens_per_expert: list[int]
    handle: Handle


@dataclass(frozen=True, eq=False)
class _Plan:
    """What the kernel `layout` made of a topk_idx."""

    position: torch.Tensor
    counts: torch.Tensor
    numbers: torch.Tensor


class ExpertExchange:
    """The exchange of one group. Making it is collective, and so is every call but `layout` and `combine_input`.

    Calls and what uses their results belong on one stream, and not into CUDA graphs: each call has an epoch of its own. A rank that
    does not come ends the waits of the others after the group's time-out: `group.check()` raises it.

    Args:
        world: the ranks; two tensors of max_recv_tokens rows are taken from its symmetric memory.
        experts: of all ranks together; each has as many.
        topk: experts of a token.
        hidden: elements of a token, of whole 16 bytes.
        dtype: bfloat16, float16 or float32.
        max_recv_tokens: rows that each rank has room for. Tokens of all ranks together are always enough.
        num_sms: blocks that move rows. More are faster up to some number, and leave less for what runs beside them.

    Raises:
        ValueError: numbers that do not fit together, or that differ between ranks.
        HeapError: the symmetric memory is too small.
    """

    def __init__(
        self,
        world: World,
        *,
        experts: int,
        topk: int,
        hidden: int,
        dtype: torch.dtype,
        max_recv_tokens: int,
        num_sms: int | None = None,
    ) -> None:
        group, cuda = world.group, world.device.type == "cuda"
        blocks = NUM_SMS[world.dialect.name] if num_sms is None else num_sms
        sizes = Sizes(group.size, experts, topk, hidden, NAMES.get(dtype, str(dtype)), max_recv_tokens, blocks)
        everybodys: list[Sizes] = [sizes] * group.size
        dist.all_gather_object(everybodys, sizes)
        if different := [rank for rank, other in enumerate(everybodys) if other != everybodys[0]]:
            raise ValueError(
                f"ranks differ: {everybodys[0]} on rank 0, {everybodys[different[0]]} on rank {different[0]}"
            )
        if dtype not in NAMES:
            raise ValueError(f"{dtype}: one of {', '.join(NAMES.values())}")
        sms = torch.cuda.get_device_properties(world.device).multi_processor_count if cuda else 1024
        check_sizes(group.size, experts, topk, sizes.row_bytes, max_recv_tokens, blocks, sms)
        self._sizes, self._group, self._dtype, self._epoch = sizes, group, dtype, 0
        compiled = [world.compile(make(world.dialect, sizes)) for make in KERNELS]
        self._layout, self._notify, self._dispatch, self._combine = compiled
        self._told = group.tensor((sizes.ranks, sizes.numbers), torch.int32)
        self._ready = group.tensor((sizes.ranks,), torch.int32)
        self._done = group.tensor((sizes.ranks, sizes.blocks), torch.int32)
        self._recv_x = group.tensor((max_recv_tokens, hidden), dtype)
        self._recv_topk_idx = group.tensor((max_recv_tokens, topk), torch.int64)
        self._recv_topk_weights = group.tensor((max_recv_tokens, topk), torch.float32)
        self._recv_src_idx = group.tensor((max_recv_tokens,), torch.int32)
        self._y = group.tensor((max_recv_tokens, hidden), dtype)
        self._y_weights = group.tensor((max_recv_tokens, topk), torch.float32)
        self._summary = torch.zeros(sizes.summary, dtype=torch.int32, device=group.device)
        self._on_host = torch.zeros(sizes.summary, dtype=torch.int32, pin_memory=cuda)
        self._copied = torch.cuda.Event() if cuda else None
        # A kernel takes no tensor without elements: a rank without tokens sends this one, which has no expert.
        self._no_experts = self._empty(1, topk, dtype=torch.int64).fill_(-1)

    def layout(self, topk_idx: torch.Tensor) -> Layout:
        """What `dispatch` would send for this topk_idx, on the device; the ranks exchange nothing.

        Raises:
            ValueError: topk_idx is no int64 `[tokens, topk]` on this device.
        """
        plan, size = self._plan(topk_idx), self._sizes
        per_expert = plan.numbers[size.ranks : size.ranks + size.experts]
        return Layout(plan.position[: len(topk_idx)] >= 0, plan.counts.sum(0, dtype=torch.int32), per_expert)

    def dispatch(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, *, expert_alignment: int = 1
    ) -> Received:
        """Send each token to every rank that has one of its experts, once. Waits until the ranks have told each other how much, and not
        for the rows: they are there for what follows on the stream.

        Args:
            x: `[tokens, hidden]`; ranks may have different numbers of tokens, or none.
            topk_idx: int64 `[tokens, topk]`, experts of each token, -1 for none.
            topk_weights: float32 `[tokens, topk]`.
            expert_alignment: what tokens_per_expert is rounded up to.

        Raises:
            ValueError: an argument of this rank is wrong; nothing was exchanged.
            ExchangeRefused: some rank would receive more than max_recv_tokens, or has a wrong expert. Every rank raises it, no row was
                sent, and the exchange can go on.
            PeerError: a rank did not come.
        """
        size, tokens = self._sizes, len(x)
        self._check("x", x, (tokens, size.hidden), self._dtype)
        self._check("topk_weights", topk_weights, (tokens, size.topk), torch.float32)
        if len(topk_idx) != tokens:
            raise ValueError(f"{tokens} tokens in x, {len(topk_idx)} in topk_idx")
        if expert_alignment < 1:
            raise ValueError(f"expert_alignment is {expert_alignment}: it is 1 or more")
        plan = self._plan(topk_idx)
        first, go = torch.empty_like(plan.counts), self._empty(1, dtype=torch.int32)
        self._epoch += 1
        self._notify(
            self._group.context,
            plan.counts,
            plan.numbers,
            self._told,
            self._ready,
            first,
            go,
            self._summary,
            self._epoch,
        )
        self._on_host.copy_(self._summary, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        handle = Handle(tokens, 0, plan.position, first, go)
        self._send(x, topk_idx, topk_weights, handle, whole=True)
        if self._copied is not None:
            self._copied.synchronize()
        heard, *numbers = self._on_host.tolist()
        if not heard:
            self._group.check()
            raise RuntimeError("not all ranks were heard, and none has said why")
        rows, wrong = numbers[: size.ranks], numbers[size.ranks : 2 * size.ranks]
        if reason := refusal(rows, wrong, size.rows, size.experts):
            raise ExchangeRefused(reason)
        count = rows[self._group.rank]
        return Received(
            self._recv_x[:count],
            self._recv_topk_idx[:count],
            self._recv_topk_weights[:count],
            self._recv_src_idx[:count],
            aligned(numbers[2 * size.ranks :], expert_alignment),
            replace(handle, num_recv_tokens=count),
        )

    def dispatch_cached(self, x: torch.Tensor, handle: Handle) -> torch.Tensor:
        """Send other tokens the way of an earlier dispatch: `[rows, hidden]`, a view like `Received.x`. Nothing is counted, and the
        host does not wait.

        Raises:
            ValueError: x is not `[tokens, hidden]` with as many tokens as then.
        """
        self._check("x", x, (handle.num_tokens, self._sizes.hidden), self._dtype)
        topk_idx, topk_weights = (  # not read
            self._empty(handle.num_tokens, self._sizes.topk, dtype=dtype) for dtype in (torch.int64, torch.float32)
        )
        self._epoch += 1
        self._send(x, topk_idx, topk_weights, handle, whole=False)
        return self._recv_x[: handle.num_recv_tokens]

    def combine_input(self, handle: Handle) -> torch.Tensor:
        """`[rows, hidden]` of symmetric memory: experts that write their result here spare `combine` a copy. Valid until the next call
        of `combine_input` or `combine`; what an earlier one left is not cleared."""
        return self._y[: handle.num_recv_tokens]

    def combine(
        self, y: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add up, for each token that this rank sent, what the ranks made of it: in float32 and in the order of ranks, so results are
        the same bits each time.

        Args:
            y: `[rows, hidden]`, of the rows of that dispatch; may be `combine_input(handle)`.
            handle: of the dispatch.
            topk_weights: float32 `[rows, topk]`, to be added up likewise, or None.

        Returns:
            `[tokens, hidden]`, 0 for tokens that went nowhere, and `[tokens, topk]` or None.

        Raises:
            ValueError: arguments of this rank that do not fit; nothing was exchanged.
        """
        size, rows, tokens = self._sizes, handle.num_recv_tokens, handle.num_tokens
        self._check("y", y, (rows, size.hidden), self._dtype)
        if topk_weights is not None:
            self._check("topk_weights", topk_weights, (rows, size.topk), torch.float32)
            self._y_weights[:rows].copy_(topk_weights)
        if y.data_ptr() != self._y.data_ptr():
            self._y[:rows].copy_(y)
        out = self._empty(max(tokens, 1), size.hidden, dtype=self._dtype)
        out_weights = self._empty(max(tokens, 1), size.topk, dtype=torch.float32)
        self._epoch += 1
        self._combine(
            self._group.context,
            self._carried(self._y),
            self._y_weights,
            handle.position,
            handle.first,
            self._carried(out),
            out_weights,
            self._ready,
            self._done,
            int(topk_weights is not None),
            self._epoch,
        )
        return out[:tokens], None if topk_weights is None else out_weights[:tokens]

    def _plan(self, topk_idx: torch.Tensor) -> _Plan:
        size = self._sizes
        self._check("topk_idx", topk_idx, (len(topk_idx), size.topk), torch.int64)
        if not len(topk_idx):
            topk_idx = self._no_experts
        plan = _Plan(
            self._empty(len(topk_idx), size.ranks, dtype=torch.int32),
            self._empty(-(-len(topk_idx) // CHUNK), size.ranks, dtype=torch.int32),
            torch.zeros(size.numbers, dtype=torch.int32, device=self._group.device),
        )
        self._layout(topk_idx, plan.position, plan.counts, plan.numbers)
        return plan

    def _send(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, handle: Handle, whole: bool
    ) -> None:
        if not handle.num_tokens:
            x = self._empty(1, self._sizes.hidden, dtype=self._dtype)
            topk_idx, topk_weights = self._no_experts, self._empty(1, self._sizes.topk, dtype=torch.float32)
        self._dispatch(
            self._group.context,
            x.view(torch.int32),
            topk_idx,
            topk_weights,
            handle.position,
            handle.first,
            handle.go,
            self._recv_x.view(torch.int32),
            self._recv_topk_idx,
            self._recv_topk_weights,
            self._recv_src_idx,
            self._ready,
            self._done,
            int(whole),
            self._epoch,
        )

    def _carried(self, tensor: torch.Tensor) -> torch.Tensor:
        """As kernels of this target declare it."""
        halves = tensor.dtype != torch.float32 and tensor.device.type == "cpu"
        return tensor.view(torch.int16) if halves else tensor

    def _empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._group.device)

    def _check(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raises ValueError if an argument is not what the kernels take."""
        device = self._group.device
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
            got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name} is {got}: it must be {dtype} {list(shape)} on {device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: pass {name}.contiguous()")
