"""Long queues of changing ops with ranks held up at random: what a protocol without barriers must survive."""

from __future__ import annotations

import pytest
import torch

from tests.direct_ops import EXCHANGE, Shape, stress
from tests.fused_programs import GATHER, REDUCE, SCATTER
from tests.gpu.conftest import World


def mixture(world: World) -> list[Shape]:
    """Each kind with sizes of each regime, so that different kernels follow each other on the same memory."""
    if not world.cuda:
        return [
            Shape(GATHER, 8, (24,), 16),
            Shape(SCATTER, 12 * world.size, (24,), 16),
            Shape(REDUCE, 13, (24,), 16),
            Shape(EXCHANGE, 9, (), 8 * world.size),
        ]
    r = world.size
    return [
        Shape(GATHER, 32, (1024,), 2048),
        Shape(GATHER, 256, (1792,), 2048),
        Shape(GATHER, 1024, (1024, 256, 256), 1024),
        Shape(GATHER, 131, (1024,), 1024),
        Shape(GATHER, 128, (1792,), 8192),  # pushed in eight slices
        Shape(GATHER, 1024, (7168,), 2048),  # by copy engine
        Shape(SCATTER, 32 * r, (2048,), 1792),
        Shape(SCATTER, 256 * r, (2048,), 1792),
        Shape(SCATTER, 1024 * r, (2048,), 640),
        Shape(REDUCE, 128, (2048,), 1792),
        Shape(REDUCE, 1024 * r, (2048,), 640),
        Shape(EXCHANGE, 64, (), 512 * r),
        Shape(EXCHANGE, 2048, (), 2048 * r),
    ]


@pytest.mark.timeout(1200)
def test_random_pauses(world: World, pytestconfig: pytest.Config) -> None:
    stress(mixture(world), torch.bfloat16, world.device, pytestconfig.getoption("--iterations"), world.say)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [GATHER, SCATTER, REDUCE, EXCHANGE])
def test_one_kind_in_a_deep_queue(world: World, pytestconfig: pytest.Config, kind: str) -> None:
    """The same op back to back: call e + 1 starts the moment that e ends, which a mixture seldom shows."""
    shapes = [shape for shape in mixture(world) if shape.kind == kind]
    for shape in shapes:
        stress(
            [shape],
            torch.bfloat16,
            world.device,
            max(20, pytestconfig.getoption("--iterations") // 4),
            world.say,
            2000.0,
        )
