"""A rank that dies, stops or stays away: in worlds of their own, which rank 0 starts while the others wait."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.direct_ops import EXCHANGE, Shape
from tests.failing_ranks import WAYS, survivors_of
from tests.fused_programs import GATHER, REDUCE, SCATTER
from tests.gpu.conftest import World


def shape_of(kind: str, world: World) -> Shape:
    m, n, k = (256, 1024, 1024) if world.cuda else (8, 24, 16)
    if kind == EXCHANGE:
        return Shape(kind, m, (), k * world.size)
    return Shape(kind, m if kind == GATHER else m * world.size, (n,), k)


def survive(world: World, way: str, kind: str, captured: bool) -> None:
    key = f"failure/{way}/{kind}/{captured}"
    if world.rank != 0:  # in the store, not in a collective: the GPUs belong to the other world meanwhile
        world.store.wait([key], timedelta(seconds=230))
        return
    try:
        for outcome in survivors_of(way, shape_of(kind, world), world.size, world.device.type, captured=captured):
            world.say(f"{way}: {outcome['seconds']:.1f} s, {outcome['message']}")
    finally:
        world.store.set(key, "done")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", [GATHER, SCATTER, REDUCE, EXCHANGE])
@pytest.mark.parametrize("way", WAYS)
def test_survivors_raise_in_time(world: World, way: str, kind: str) -> None:
    survive(world, way, kind, captured=False)


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", [GATHER, REDUCE, EXCHANGE])
@pytest.mark.parametrize("way", ["killed", "silent"])
def test_survivors_that_only_replay_graphs(world: World, way: str, kind: str) -> None:
    survive(world, way, kind, captured=True)
