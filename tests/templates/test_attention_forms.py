"""Every form of attention by groups of heads: equal to the whole, and to the program of its ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tscompile
from tests import attention_ops
from tests.attention_calls import by_groups, calls, described, operands
from tests.attention_ops import FORMS, GROUPED
from tests.programs import scalar_loss
from tests.programs.attention import SPELLINGS
from tests.worlds import run_world
from tscompile.backend import tilescale
from tscompile.templates.attention import heads_of

KIND = "all_to_all_attention"
WIDTH = 8


def given(heads: tuple[int, int], by_rows: bool) -> tuple[Tensor, Tensor, Tensor]:
    return operands(3, heads, 40, WIDTH, by_rows)


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (8, 4)])
@pytest.mark.parametrize("form", ["cpu", *FORMS])
def test_groups_of_heads_are_the_whole(form: str, heads: tuple[int, int], by_rows: bool) -> None:
    if form == "efficient" and heads[0] != heads[1]:
        heads = (8, 8)
    attention_ops.install()
    for node in calls(form, *given(heads, by_rows)):
        attention, values = described(node)
        for groups in (1, 2, 4):
            for result, got in zip(attention.results, by_groups(attention, values, groups), strict=True):
                want = node.meta["val"][result.number]
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
                assert got.stride() == want.stride() or want.shape[0] == 1


@pytest.mark.parametrize(("form", "name"), [("flash", "logsumexp"), ("cudnn", "logsumexp"), ("efficient", "out")])
def test_slices_that_are_not_packed_are_read_wrongly(form: str, name: str) -> None:
    """Else nothing here would notice that an operand is no tensor of its own."""
    attention_ops.install()
    _, node = calls(form, *given((4, 4), True))
    attention, values = described(node)
    (number,) = (a.value for a in attention.arguments if a.name == name)
    loose = tuple(replace(o, share="heads") if n == number else o for n, o in enumerate(attention.operands))
    (query, *_) = by_groups(replace(attention, operands=loose), values, 2)
    assert not torch.allclose(query, node.meta["val"][0], rtol=1e-3, atol=1e-3)


def test_rows_lie_as_the_kernel_takes_them_whatever_the_output_lies_like() -> None:
    attention_ops.install()
    _, node = calls("efficient", *given((4, 4), True))
    attention, values = described(node)
    (number,) = (a.value for a in attention.arguments if a.name == "out")
    values[number] = values[number].contiguous()
    for groups in (1, 2):
        assert heads_of(attention, values, groups - 1, groups)[number].transpose(1, 2).is_contiguous()
        torch.testing.assert_close(by_groups(attention, values, groups)[0], node.meta["val"][0])


# On ranks


def ulysses(form: str, causal: bool) -> Any:
    exchange = SPELLINGS["yunchang"]

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = FORMS[form](*(exchange.heads(t).transpose(1, 2) for t in (q, k, v)), causal)
        return exchange.sequence(out.transpose(1, 2))

    return fn


def trained(rank: int, size: int, form: str, key_heads: int, dtype: torch.dtype, options: dict[str, Any]) -> list[str]:
    attention_ops.install()
    for causal in (True, False):
        torch._dynamo.reset()
        fn = ulysses(form, causal)
        compiled = torch.compile(
            fn,
            backend=tilescale,
            fullgraph=True,
            options={"tilescale.inner": "eager", "tilescale.fuse": "always", **options},
        )
        draw = torch.Generator().manual_seed(rank)
        for _ in range(3):
            args = [
                torch.randn(2, 9, heads, WIDTH, generator=draw).to(dtype).requires_grad_()
                for heads in (8, key_heads, key_heads)
            ]
            found = []
            for call in (compiled, fn):
                out = call(*args)
                found.append([out.detach(), *torch.autograd.grad(scalar_loss(out), args)])
            for got, want in zip(*found, strict=True):
                torch.testing.assert_close(got, want)
                assert got.stride() == want.stride()
            with torch.no_grad():
                torch.testing.assert_close(compiled(*args), found[1][0])
    rows = tscompile.reports().rows
    return sorted({f"{row.pattern} {row.code} {len(row.collectives)}" for row in rows})


@pytest.mark.slow
@pytest.mark.parametrize(("form", "key_heads"), [*((form, 8) for form in FORMS), *((form, 4) for form in GROUPED)])
def test_forms_on_ranks(form: str, key_heads: int) -> None:
    found = run_world(2, trained, form, key_heads, torch.float32, {}, timeout_s=120)
    assert found == [[f"{KIND} fused 4"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_verify_does_not_compare_what_nothing_wrote(form: str) -> None:
    found = run_world(2, trained, form, 8, torch.bfloat16, {"tilescale.verify": True}, timeout_s=120)
    assert found == [[f"{KIND} fused 4"]] * 2
