"""matmul_all_to_all over shared memory: what a matmul makes is sent as soon as it is there, while the next one is computed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..nvshmem.heap import Channel
from ..problem import Departure, FusionProblem, Plan
from .all_to_all import Posts, arena_bytes
from .arithmetic import multiply
from .attention import departing, sent_shape
from .template import register_template, shm_refusal, torch_dtype


def cut_grids(departures: Sequence[Departure], sizes: Sequence[int]) -> list[list[int]]:
    """Of the op's `sizes`, those that each exchange gives to the columns that it sends."""
    found, start = [], 0
    for departure in departures:
        found.append(list(sizes[start : start + departure.sizes]))
        start += departure.sizes
    return found


def shapes_sent(departures: Sequence[Departure], sizes: Sequence[int]) -> list[list[int]]:
    """`[R, f1, ..., fk]` of each exchange."""
    grids = cut_grids(departures, sizes)
    return [sent_shape(departure, grid) for departure, grid in zip(departures, grids, strict=True)]


def views_sent(departures: Sequence[Departure], sizes: Sequence[int], results: Sequence[Tensor]) -> list[Tensor]:
    """What each exchange sends, as a view of the matmuls' contiguous `results`."""
    found = []
    for departure, grid in zip(departures, cut_grids(departures, sizes), strict=True):
        result = results[departure.result]
        if departure.columns is not None:
            result = result.narrow(1, *departure.columns)
        found.append(departing(departure, grid, result))
    return found


@register_template("matmul_all_to_all")
class ShmGemmAllToAll:
    """lhs `[M, K]`, rhs `[K, N]`, biases `[N]` or None of each matmul; `sizes` as the plan's departures take them."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        return shm_refusal(problem)

    def scratch_bytes(
        self,
        plan: Plan,
        size: int,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        sizes: Sequence[int],
    ) -> int:
        return arena_bytes(shapes_sent(plan.departures, sizes), torch_dtype(plan.dtype))

    def run(
        self,
        channel: Channel,
        plan: Plan,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        sizes: Sequence[int],
    ) -> list[Tensor]:
        posts = Posts(channel, shapes_sent(plan.departures, sizes), torch_dtype(plan.dtype))
        results = [a.new_empty((a.shape[0], b.shape[1])) for a, b in zip(lhs, rhs, strict=True)]
        sent = views_sent(plan.departures, sizes, results)
        for index, result in enumerate(results):
            multiply(result, lhs[index], rhs[index], biases[index])
            for number, departure in enumerate(plan.departures):
                if departure.result == index:
                    posts.post(number, sent[number])
        return posts.delivered(plan, sent)
