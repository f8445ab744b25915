"""torch's own attention kernels by groups of heads: as near to the truth as for all heads at once, and laid out as the graph says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.attention_calls import SCALE, by_groups, calls, described, operands
from tests.attention_ops import FORMS, GROUPED, attention, gradients

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
if not torch.cuda.is_available():
    pytestmark.append(pytest.mark.skip(reason="needs an NVIDIA GPU (H100 or H200)"))

LENGTH, WIDTH = 200, 64  # no multiple of a tile, nor of 32
CASES = [*((form, (8, 8)) for form in FORMS), *((form, (8, 4)) for form in GROUPED)]


def called(form: str, heads: tuple[int, int], by_rows: bool) -> tuple[fx.Node, fx.Node]:
    args = operands(2, heads, LENGTH, WIDTH, by_rows, "cuda", torch.bfloat16)
    try:
        return calls(form, *args)
    except RuntimeError as error:
        pytest.skip(f"this torch does not run {form} attention of {heads} heads here: {error}")


def truth(node: fx.Node) -> list[Tensor]:
    """Of the results with heads, in float64."""
    _, values = described(node)
    if not node.target._opname.endswith("_backward"):  # type: ignore[union-attr]
        return list(attention(*values, True, SCALE))
    grad, q, k, v = values[:4]
    out, lse = attention(q, k, v, True, SCALE)
    return list(gradients(grad, q, k, v, out, lse, True, SCALE))


def error(got: Tensor, want: Tensor) -> float:
    """Of a result whose sequence may be padded, `[B, heads, S, D]` or `[B, heads, S or more(, 1)]`."""
    if want.dim() == 3:
        got = got.flatten(2)[..., : want.shape[2]]
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize(("form", "heads"), CASES)
def test_groups_of_heads_are_as_right_as_the_whole(form: str, heads: tuple[int, int], by_rows: bool) -> None:
    for node in called(form, heads, by_rows):
        described_as, values = described(node)
        wanted = truth(node)
        for groups in (2, 4):
            found = by_groups(described_as, values, groups)
            for result, got, want in zip(described_as.results, found, wanted, strict=True):
                whole = node.meta["val"][result.number]
                assert got.shape == whole.shape
                assert error(got, want) <= 1.5 * error(whole, want) + 1e-6, (node.target, result, groups)
                assert error(whole, want) < 0.02


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize(("form", "heads"), CASES)
def test_results_are_what_the_graph_takes_them_for(form: str, heads: tuple[int, int], by_rows: bool) -> None:
    """A plan holds the memory order that a fake tensor has; the op's outputs are laid out by it."""
    for node in called(form, heads, by_rows):
        with FakeTensorMode() as mode:
            args = fx.map_arg(node.args, lambda n, mode=mode: mode.from_tensor(n.meta["val"]))
            fakes = node.target(*args, **node.kwargs)  # type: ignore[operator]
        for real, fake in zip(node.meta["val"], fakes, strict=True):
            if isinstance(fake, Tensor) and fake.numel():  # else it is the mask of dropout, which nobody asked for
                assert isinstance(real, Tensor) and (real.shape, real.dtype) == (fake.shape, fake.dtype), node.target
