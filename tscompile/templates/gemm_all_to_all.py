"""matmul_all_to_all over shared memory: what a matmul makes is sent as soon as it is there, while the next one is computed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..nvshmem.heap import Channel
from ..problem import Departure, FusionProblem, Plan
from .all_to_all import Posts, arena_bytes
from .arithmetic import multiply
from .attention import departing, grids, sent_shapes
from .template import register_template, shm_refusal, torch_dtype


def views_sent(departures: Sequence[Departure], sizes: Sequence[int], results: Sequence[Tensor]) -> list[Tensor]:
    """What each exchange sends, as a view of the matmuls' contiguous `results`."""
    found = []
    for departure, grid in zip(departures, grids(departures, sizes), strict=True):
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
        return arena_bytes(sent_shapes(plan.departures, sizes), torch_dtype(plan.dtype))

    def run(
        self,
        channel: Channel,
        plan: Plan,
        lhs: Sequence[Tensor],
        rhs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        sizes: Sequence[int],
    ) -> list[Tensor]:
        posts = Posts(channel, sent_shapes(plan.departures, sizes), torch_dtype(plan.dtype))
        results = [a.new_empty((a.shape[0], b.shape[1])) for a, b in zip(lhs, rhs, strict=True)]
        sent = views_sent(plan.departures, sizes, results)
        for index, result in enumerate(results):
            multiply(result, lhs[index], rhs[index], biases[index])
            for number, departure in enumerate(plan.departures):
                if departure.result == index:
                    posts.post(number, sent[number])
        return posts.delivered(plan, sent)
