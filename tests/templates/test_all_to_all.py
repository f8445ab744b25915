"""all_to_all_permute on real ranks: falls back, verifies and fails as every op does, with the bits of the original exchanges."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from tests.cases import Case, exchange, manifest, row
from tests.worlds import run_world
from tscompile.errors import PeerError, TscompileError
from tscompile.fx_passes.all_to_all_permute import reference
from tscompile.lowering import runtime
from tscompile.observe import ledger
from tscompile.templates import find_template
from tscompile.templates.all_to_all import output_shapes

pytestmark = pytest.mark.slow


class Life:
    case = staticmethod(exchange)
    reference = staticmethod(reference)
    site = "exchange"

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.name = dist.group.WORLD.group_name  # type: ignore[union-attr]
        self.references = 0

    def begin(self, digest: str = "d", scratch_bytes: int = 1 << 16, **options: Any) -> None:
        rows = [row(self.name, f"{self.site}{seed}") for seed in range(20)]
        runtime.begin(manifest({self.name: 1}, digest=digest, scratch_bytes=scratch_bytes, rows=rows, **options))

    def call(self, seed: int = 0, **more: Any) -> None:
        self.launch(self.case(self.size, seed, "bfloat16", **more))

    def launch(self, case: Case, spoil: float = 0.0) -> None:
        def original() -> list[Tensor]:
            self.references += 1
            return [out + spoil for out in self.reference(case.plan, self.name, *case.args[self.rank])]

        outputs = runtime.launch(case.plan, self.name, case.args[self.rank], original)
        case.check(self.rank, outputs)
        for output in outputs:  # it is nobody else's memory
            output.fill_(float("nan"))


def the_reference_computes_the_same(life: Life) -> None:
    for seed in range(8):
        life.call(seed, count=1 + seed % 4)  # no graph has started: the original ops
    assert life.references == 8


def one_rank_has_other_plans(life: Life) -> None:
    life.begin(f"plan{life.rank == 0}")
    life.call()
    assert life.references == 1
    assert {r.code for r in ledger.rows()} == {"other-sites"}


def one_rank_compiles_alone(life: Life) -> None:
    """In the middle of a run: the ranks agree on the op from which they run the original ones."""
    life.begin("first")
    for seed in range(5):
        life.call(seed)
    assert life.references == 0
    if life.rank == 0:
        time.sleep(0.2)
        life.begin("second")
    for seed in range(3):
        life.call(seed)
    assert life.references == 3


def growth(life: Life) -> None:
    life.begin(scratch_bytes=64)
    for seed in range(4):
        life.call(seed, sizes=(8, 16 << seed))
    assert life.references == 0


def no_room(life: Life) -> None:
    life.begin(scratch_bytes=64, heap_bytes=8192)
    life.call(sizes=(64, 64))
    assert life.references == 1
    assert next(r.code for r in ledger.rows() if r.site == "exchange0") == "no-room"


def verified_to_the_bit(life: Life) -> None:
    life.begin(verify=True)
    life.call()
    assert life.references == 1
    # One part in a thousand would pass for a matmul in bfloat16.
    with pytest.raises(TscompileError, match="verify: output 0 of site exchange1"):
        life.launch(exchange(life.size, 1, "bfloat16"), spoil=2.0**-7)


def other_sizes(life: Life) -> str:
    life.begin(timeout_s=10.0)
    life.call()
    with pytest.raises(PeerError) as caught:
        life.call(sizes=(2, 3, 4 if life.rank else 6))
    return str(caught.value)


def one_rank_stays_away(life: Life) -> str:
    """It lives and never starts the op."""
    life.begin(timeout_s=1.5)
    life.call()
    dist.barrier()
    if life.rank == life.size - 1:
        time.sleep(4.0)
        return "stayed away"
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        life.call(1)
    assert time.monotonic() - start < 4.0
    with pytest.raises(PeerError):  # and it stays so
        life.call(2)
    return str(caught.value)


SCENARIOS: dict[str, Callable[[Life], Any]] = {
    function.__name__: function
    for function in (
        the_reference_computes_the_same,
        one_rank_has_other_plans,
        one_rank_compiles_alone,
        growth,
        no_room,
        verified_to_the_bit,
        other_sizes,
        one_rank_stays_away,
    )
}


def live(
    rank: int,
    size: int,
    kind: type[Life] = Life,
    scenarios: Mapping[str, Callable[[Any], Any]] = SCENARIOS,
) -> dict[str, Any]:
    store = dist.distributed_c10d._get_default_store()
    said = {}
    for name, scenario in scenarios.items():
        dist.barrier()
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=size)
        ledger.clear()
        print("scenario", name, flush=True)
        said[name] = scenario(kind(rank, size))
    return said


@pytest.mark.parametrize("size", [2, 3])
def test_scenarios(size: int) -> None:
    results = run_world(size, live, timeout_s=120)
    for said in results[:-1]:
        assert f"rank {size - 1} did not answer within 1.5 s" in said["one_rank_stays_away"]
    assert any("number of bytes" in said["other_sizes"] for said in results)


def one_rank_dies(rank: int, size: int) -> str:
    life = Life(rank, size)
    life.begin(timeout_s=20.0)
    life.call()
    if rank == size - 1:
        time.sleep(0.2)
        os._exit(1)
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        while True:
            life.call()
    assert time.monotonic() - start < 15, "nobody waits for the time-out: the process is gone"
    return str(caught.value)


def test_a_rank_that_dies() -> None:
    said = run_world(3, one_rank_dies, dying=(2,))
    assert all("rank 2" in text for text in said[:2]), said


def test_scratch_is_what_is_sent() -> None:
    template = find_template("all_to_all_permute", "shm")
    assert template is not None
    case = exchange(2, 0, "bfloat16", sizes=(3, 5), count=2)
    assert template.scratch_bytes(case.plan, 2, case.args[0][0]) == 2 * 64
    shapes = output_shapes(case.plan.deliveries, case.plan.joins, [x.shape for x in case.args[0][0]])
    assert shapes[-1] == [2, 30]


def test_a_plan_survives_its_text() -> None:
    plan = exchange(2, 0, "float32").plan
    assert type(plan).loads(plan.dumps()) == plan
    assert not plan.computes
    assert replace(plan, kind="all_gather_matmul").computes
