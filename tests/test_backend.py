"""The door: options, composition with the user's own pass, install(), and the messages that are said once."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
from torch import Tensor, fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

import tscompile
from tests.compat import TORCH
from tscompile import backend, observe
from tscompile.backend import tilescale
from tscompile.errors import OptionError
from tscompile.fx_passes.fusion_pass import FusionPass, collect_rows
from tscompile.options import Options
from tscompile.problem import Row
from tscompile.testing import fake_world

EAGER = {"tilescale.inner": "eager", "tilescale.fuse": "always"}


@pytest.fixture(autouse=True)
def fresh(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    torch._dynamo.reset()
    observe.forget_said()
    caplog.set_level(logging.WARNING, "tscompile")
    yield
    torch._dynamo.reset()


def gathered(x: Tensor, w: Tensor) -> Tensor:
    return fc.all_gather_tensor(x, 0, dist.group.WORLD) @ w


def compile_rows(fn: Any, *args: Any, **kwargs: Any) -> list[Row]:
    rows: list[Row] = []
    with collect_rows(rows.extend):
        torch.compile(fn, **kwargs)(*args)
    return rows


def test_the_backend_is_found_by_name_without_an_import() -> None:
    from importlib.metadata import entry_points

    found = [e.value for e in entry_points(group="torch_dynamo_backends") if e.name == "tilescale"]
    assert found == ["tscompile.backend:tilescale"]


def test_without_a_process_group_everything_is_inductors_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        torch._dynamo.reset()
        f = torch.compile(lambda x: x + 1, backend=tilescale, options={"tilescale.inner": "eager"})
        assert torch.equal(f(torch.ones(3)), torch.full((3,), 2.0))
    assert [r.message for r in caplog.records].count(caplog.records[0].message) == 1
    assert "init_process_group" in caplog.records[0].message


def test_on_one_rank_everything_is_inductors(caplog: pytest.LogCaptureFixture) -> None:
    with fake_world(1):
        torch.compile(lambda x: x + 1, backend=tilescale, options={"tilescale.inner": "eager"})(torch.ones(3))
    assert "one rank" in caplog.text


def test_an_unknown_option_names_the_nearest() -> None:
    with fake_world(2), pytest.raises(Exception, match=r"tilescale\.inner"):
        compile_rows(
            gathered, torch.ones(4, 4), torch.ones(4, 4), backend=tilescale, options={"tilescale.iner": "eager"}
        )
    with pytest.raises(OptionError):
        backend.install(iner="eager")


class Users(CustomGraphPass):
    """A user's own pass, which must still run, and before ours."""

    def __init__(self) -> None:
        self.saw: list[str] = []

    def uuid(self) -> str:
        return "users"

    def __call__(self, graph: fx.Graph) -> None:
        self.saw += [str(n.target) for n in graph.nodes if n.op == "call_function"]


def test_the_users_own_pass_runs_before_ours() -> None:
    for in_options in (True, False):
        torch._dynamo.reset()
        users = Users()
        with fake_world(2), config.patch({} if in_options else {"post_grad_custom_post_pass": users}):
            own = {"post_grad_custom_post_pass": users} if in_options else {}
            rows = compile_rows(
                gathered, torch.ones(4, 4), torch.ones(4, 4), backend=tilescale, options={**EAGER, **own}
            )
        assert "_c10d_functional.all_gather_into_tensor.default" in users.saw
        assert [row.decision for row in rows] == ["fused"]


def test_a_mode_reaches_inductor_together_with_our_pass() -> None:
    saw: list[bool] = []

    class Looks(Users):
        def __call__(self, graph: fx.Graph) -> None:
            saw.append(config.max_autotune)

    with fake_world(2), config.patch(post_grad_custom_post_pass=Looks(), fx_graph_cache=False), torch.no_grad():
        rows = compile_rows(
            gathered, torch.ones(4, 4), torch.ones(4, 4), backend=tilescale, mode="max-autotune-no-cudagraphs"
        )
    assert saw == [True]
    assert [row.pattern for row in rows] == ["all_gather_matmul"]


def test_a_group_that_is_a_graph_value_is_kept_with_the_reason() -> None:
    if TORCH < (2, 13):
        pytest.skip("compile_on_one_rank came with torch 2.13")
    config_module: Any = importlib.import_module("torch.distributed.config")
    from torch.distributed.device_mesh import init_device_mesh

    with fake_world(2), config_module.patch(compile_on_one_rank=True):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        rows = compile_rows(
            lambda x, w: fc.all_gather_tensor(x, 0, (mesh, 0)) @ w,
            torch.ones(4, 4),
            torch.ones(4, 4),
            backend=tilescale,
            options=EAGER,
        )
    assert [row.code for row in rows] == ["group-not-constant"]


def test_torch_logs_shows_each_site(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "tscompile")
    with fake_world(2), torch.no_grad():
        compile_rows(gathered, torch.ones(4, 4), torch.ones(4, 4), backend=tilescale, options=EAGER)
    assert "1 of 1 collectives fused" in caplog.text
    assert "0:all_gather_matmul fused" in caplog.text


def test_install_puts_the_pass_into_inductors_own_configuration() -> None:
    saved = config.post_grad_custom_post_pass
    try:
        users = Users()
        config.post_grad_custom_post_pass = users
        tscompile.install(fuse="always")
        tscompile.install(fuse="always")  # a second call replaces the pass, it does not add another
        passes = backend._as_list(config.post_grad_custom_post_pass)
        assert [type(p) for p in passes] == [Users, FusionPass]
    finally:
        config.post_grad_custom_post_pass = saved


def test_async_tp_is_switched_off_beside_us() -> None:
    assert backend.pass_patches(Options(), {})["_micro_pipeline_tp"] is False


def test_cache_identity_follows_options_and_groups_but_not_the_rank() -> None:
    with fake_world(4, rank=0):
        first = backend.pass_identity(Options())
        assert first != backend.pass_identity(Options(fuse="always"))
    with fake_world(4, rank=3):
        assert backend.pass_identity(Options()) == first
    with fake_world(2):
        assert backend.pass_identity(Options()) != first


def test_chained_passes_for_torch_versions_whose_hook_takes_no_list() -> None:
    from tscompile.fx_passes.fusion_pass import chained

    users = Users()
    both = chained([users, users])
    assert both.uuid() and "users" in both.uuid()
    assert chained([lambda graph: None]).uuid() is None  # no identity: Inductor must not cache
    graph = fx.Graph()
    graph.call_function(torch.relu, (graph.placeholder("x"),))
    both(graph)
    assert len(users.saw) == 2


def test_a_graph_break_on_a_collective_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def fn(x: Tensor) -> Tensor:
        out = torch.empty(x.shape[0] * 2, *x.shape[1:])
        dist.all_gather_into_tensor(out, x, async_op=True).wait()
        return out + 1

    with fake_world(2), torch.no_grad():
        for _ in range(2):
            torch._dynamo.reset()
            torch.compile(fn, backend=tilescale, options={"tilescale.inner": "eager"})(torch.ones(4, 4))
    told = [r.message for r in caplog.records if "graph break" in r.message]
    assert len(told) == 1 and "async_op" in told[0]


def test_explain_runs_nothing_and_covers_the_backward() -> None:
    ran = []

    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = gathered(x, w)
        if not torch.compiler.is_compiling():
            ran.append(1)
        return y

    with fake_world(4):
        report = tscompile.explain(fn, torch.ones(4, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True))
    assert {row.phase for row in report.rows} == {"forward", "backward"}
    assert not ran


def test_explain_passes_a_graph_break_by_running_what_is_before_it() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = gathered(x, w)
        torch._dynamo.graph_break()
        return fc.reduce_scatter_tensor(y @ w, "sum", 0, dist.group.WORLD)

    with fake_world(4), torch.no_grad():
        report = tscompile.explain(fn, torch.ones(4, 4), torch.ones(4, 4), options={"tilescale.fuse": "always"})
    assert [row.pattern for row in report.rows] == ["all_gather_matmul", "matmul_reduce_scatter"]
