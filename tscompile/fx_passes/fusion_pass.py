"""The pass: every collective of a post-grad graph becomes part of one report row, and those that pay become fused ops."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.fx_passes.post_grad import stable_topological_sort  # type: ignore[attr-defined, unused-ignore]
from torch._inductor.virtualized import V

from .. import observe
from ..errors import KeptError
from ..lowering import ops, planner
from ..options import Options
from ..problem import Fuse, Keep, Phase, Plan, Row
from . import patterns  # noqa: F401  (importing it registers the patterns)
from .collectives import Collective, find_collectives, group_ranks
from .describe import dtype_name, shape_text, source_line
from .lanes import chain_tokens
from .layout import Prover
from .matmuls import TAKEN
from .pattern import Context, Match, Pattern, patterns_for
from .rewrite import Builder, UnresolvedSizeError
from .sizes import hint, product

try:  # torch >= 2.13 tells a pass whether the graph is for inference
    from torch._inductor.custom_graph_pass import CustomInferenceAwareGraphPass as _Base

    PASS_IS_TOLD_PHASE = True
except ImportError:
    _Base = CustomGraphPass  # type: ignore[assignment, misc]
    PASS_IS_TOLD_PHASE = False

aten = torch.ops.aten
RowSink = Callable[[list[Row]], None]
_sink: ContextVar[RowSink | None] = ContextVar("tscompile_row_sink", default=None)
_told_inference: ContextVar[bool] = ContextVar("tscompile_told_inference", default=False)
_seconds = 0.0


def telling_phase(inner: Callable[..., Any]) -> Callable[..., Any]:
    """An inner compiler that lets the pass know what Inductor tells the inner compiler alone, on torch < 2.13."""

    def compile_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        token = _told_inference.set(bool(kwargs.get("is_inference", False)))
        try:
            return inner(gm, example_inputs, **kwargs)
        finally:
            _told_inference.reset(token)

    return compile_inner


@contextmanager
def collect_rows(sink: RowSink) -> Any:
    """Within this context every pass hands its rows to `sink` too (explain uses it; nothing has to run)."""
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)


def pass_seconds() -> float:
    """Wall time that this process has spent in the pass so far."""
    return _seconds


class FusionPass(_Base):
    """The pass object that Inductor runs after its own post-grad passes.

    It has no side effect beyond the graph: after a cache hit it does not run, so whatever the run needs stands in the graph itself.
    """

    def __init__(self, options: Options, identity: Callable[[], str]) -> None:
        """identity is asked at every compilation: process groups may come and go between them."""
        self._options = options
        self._identity = identity

    def uuid(self) -> str:
        return self._identity()

    def __call__(self, graph: fx.Graph, is_inference: bool | None = None) -> None:
        global _seconds
        start = time.perf_counter()
        collectives = find_collectives(graph)
        if collectives:
            _Fusion(graph, collectives, _phase(graph, is_inference), self._options).run()
        _seconds += time.perf_counter() - start


def chained(passes: Sequence[Callable[[fx.Graph], None]]) -> CustomGraphPass:
    """Several passes as one, for torch versions whose hook takes no list."""
    return _Chain(passes)


class _Chain(CustomGraphPass):
    def __init__(self, passes: Sequence[Callable[[fx.Graph], None]]) -> None:
        self.chained = tuple(passes)

    def uuid(self) -> Any:
        parts = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.chained]
        return None if None in parts else repr(parts)  # None: a pass without identity, so nothing may be cached

    def __call__(self, graph: fx.Graph) -> None:
        for each in self.chained:
            each(graph)


def _phase(graph: fx.Graph, is_inference: bool | None) -> Phase:
    if any(n.op == "placeholder" and "tangents" in n.name for n in graph.nodes):
        return "backward"
    if is_inference is None:
        is_inference = _told_inference.get()
    return "inference" if is_inference else "forward"


class _Fusion:
    """One run over one graph."""

    def __init__(self, graph: fx.Graph, collectives: list[Collective], phase: Phase, options: Options) -> None:
        self.graph = graph
        self.collectives = collectives
        self.phase = phase
        self.options = options
        self.rows: list[Row] = []
        self.fused: list[tuple[fx.Node, Plan]] = []
        first = collectives[0].node
        builder = Builder(graph, V.fake_mode)
        device = first.args[0].meta["val"].device if isinstance(first.args[0], fx.Node) else torch.device("cpu")
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            self.token = graph.call_function(
                aten.full.default, ([1], 0), {"dtype": torch.int64, "device": device, "pin_memory": False}
            )
        with V.fake_mode:
            self.token.meta["val"] = torch.zeros(1, dtype=torch.int64, device=device)
        self.context = Context(graph, builder, Prover(), self.token, {c.node: c for c in collectives})

    def run(self) -> None:
        for collective in self.collectives:
            if collective.node in self.context.collectives:
                self._site(collective)
        self._finish()

    def _site(self, collective: Collective) -> None:
        label = f"{len(self.rows)}:{collective.kind}"
        if collective.refusal is not None:
            self._row(label, None, (collective,), collective.refusal)
            return
        if collective.group_size < 2:
            self._row(label, None, (collective,), Keep("one-rank", "the group has one rank: there is nothing to hide"))
            return
        kept: list[tuple[Pattern, Keep]] = []
        given_way: tuple[Match, Keep] | None = None
        for pattern in patterns_for(collective.kind):
            found = pattern.find(self.context, collective)
            if isinstance(found, Match):
                refused = self._match(f"{len(self.rows)}:{found.kind}", found)
                if refused is None:
                    more = [(p.kind, keep.reason) for p, keep in kept if p.priority < 0]
                    self.rows[-1].reason += "".join(f"; {kind}: {why}" for kind, why in more)  # why not more of it
                    return
                given_way = given_way or (found, refused)
                found = refused
            if isinstance(found, Keep):
                kept.append((pattern, found))
        if given_way is not None:
            match, decision = given_way
            self._decided(f"{len(self.rows)}:{match.kind}", match, decision)
        elif kept:
            pattern, keep = kept[0]
            self._row(f"{len(self.rows)}:{pattern.kind}", pattern.kind, (collective,), keep)
        else:
            self._row(label, None, (collective,), _unmatched(collective))

    def _match(self, label: str, match: Match) -> Keep | None:
        """Decide on a match, and write its row; why it is kept, and no row, if another pattern may fuse what this one does not."""
        decision = planner.plan(match.problem, match.plan, self.options)
        if isinstance(decision, Fuse) and self.options.dry_run:
            decision = Keep("dry-run", "dry run: this site would be fused")
        source = source_line(match.collectives[0].node)
        if isinstance(decision, Fuse):
            plan = replace(match.plan, site=label, executor=decision.executor, schedule=decision.schedule)
            try:
                node = match.rewrite(self.context, plan)
            except UnresolvedSizeError as error:
                decision = Keep("symbolic-size", f"the graph has no value for a symbolic size: {error}")
            else:
                node.meta[TAKEN] = label
                self.fused.append((node, plan))
                self.context.edited()
        if match.gives_way and isinstance(decision, Keep) and decision.code != "dry-run":
            return decision
        self._decided(label, match, decision, source)
        return None

    def _decided(self, label: str, match: Match, decision: Fuse | Keep, source: str = "") -> None:
        self._row(label, match.kind, match.collectives, decision, match, source)
        for collective in match.collectives:  # each stands in one row
            del self.context.collectives[collective.node]

    def _row(
        self,
        label: str,
        kind: str | None,
        collectives: Sequence[Collective],
        decision: Fuse | Keep,
        match: Match | None = None,
        source: str = "",
    ) -> None:
        first = collectives[0]
        fused = isinstance(decision, Fuse)
        row = Row(
            site=label,
            graph="",
            phase=self.phase,
            pattern=kind,
            group=first.group,
            ranks=first.group_size,
            collectives=[c.op_name for c in collectives],
            decision="fused" if fused else "kept" if kind is not None else "unmatched",
            code="fused" if isinstance(decision, Fuse) else decision.code,
            reason=decision.reason if isinstance(decision, Keep) else "predicted to pay",
            source=source or source_line(first.node),
        )
        if match is not None:
            row.shapes, row.dtype = list(match.shapes), match.problem.dtype
            row.bytes = match.problem.comm_bytes + match.problem.second_comm_bytes
            if isinstance(decision, Fuse):
                row.predicted_us = {"fused": decision.predicted_fused_us, "original": decision.predicted_original_us}
                if self.options.fuse == "always":
                    row.reason = "every supported match is fused (tilescale.fuse = always)"
                if decision.schedule:
                    row.reason += f"; runs as {decision.schedule}"
        elif not first.node._erased and isinstance(first.node.args[0], fx.Node):
            value = first.input.meta["val"]
            full = first.group_size if first.kind == "all_gather" else 1
            row.shapes, row.dtype = [shape_text(first.input)], dtype_name(value.dtype)
            row.bytes = hint(product(value.shape)) * value.dtype.itemsize * full
        self.rows.append(row)

    def _finish(self) -> None:
        graph_id = self._name_graph()
        stable_topological_sort(self.graph)
        self.fused = chain_tokens(self.graph, self.token, self.fused, graph_id)
        with self.graph.inserting_after(self.token):
            begin = self.graph.call_function(torch.ops.tscompile.begin.default, (self.token, self._manifest(graph_id)))
            begin.meta["val"] = None
        stable_topological_sort(self.graph)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        fused = sum(len(row.collectives) for row in self.rows if row.decision == "fused")
        observe.log.info("%s: %d of %d collectives fused", graph_id, fused, len(self.collectives))
        for row in self.rows:
            observe.log.debug("%s %s [%s] %s %s", row.site, row.decision, row.code, row.reason, row.source)
        sink = _sink.get()
        if sink is not None:
            sink([replace(row) for row in self.rows])
        self._on_kept()

    def _name_graph(self) -> str:
        """Name graph, rows and plans by what was decided, so that every rank finds the same names."""
        facts = [(r.site, r.decision, r.code, r.shapes, r.dtype) for r in self.rows] + [
            p.dumps() for _, p in self.fused
        ]
        graph_id = f"{self.phase}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]}"
        for row in self.rows:
            row.graph, row.site = graph_id, f"{graph_id}/{row.site}"
        return graph_id

    def _manifest(self, graph_id: str) -> str:
        executor = planner.EXECUTORS.get(self.context.token.meta["val"].device.type, "shm")
        names = [row.group for row in self.rows if row.group and row.ranks > 1]
        names += [group for node, _ in self.fused for group in ops.groups_of(node.args)]
        groups: dict[str, dict[str, Any]] = {
            name: {"executor": executor, "sites": 0, "scratch_bytes": 0, "plans": []} for name in names
        }
        meshes: dict[tuple[str, ...], list[str]] = {}
        for node, plan in self.fused:
            args = fx.map_arg(node.args[:-3], lambda n: n.meta["val"])
            need = planner.prepare(plan, len(group_ranks(ops.groups_of(node.args)[0])), args)
            joined = ops.groups_of(node.args)
            if len(joined) > 1 and plan.executor == "nvlink":
                meshes.setdefault(joined, []).append(plan.site)
            for group in joined:
                entry = groups[group]
                entry["sites"] += 1
                entry["executor"] = plan.executor
                entry["scratch_bytes"] = max(entry["scratch_bytes"], need)
                entry["plans"].append(plan.dumps())
        for entry in groups.values():
            entry["digest"] = hashlib.sha256("\n".join(entry.pop("plans")).encode()).hexdigest()
        options = self.options
        manifest = {
            "version": 1,
            "graph": graph_id,
            "groups": groups,
            "meshes": [{"groups": joined, "sites": sites} for joined, sites in meshes.items()],
            "rows": [row.to_dict() for row in self.rows],
            "runtime": {"timeout_s": options.timeout_s, "heap_bytes": options.heap_bytes, "verify": options.verify},
        }
        return json.dumps(manifest, separators=(",", ":"))

    def _on_kept(self) -> None:
        kept = [row for row in self.rows if row.decision == "kept" and row.code != "dry-run"]
        if not kept or self.options.on_kept == "ignore":
            return
        lines = "\n".join(f"  {row.site} ({row.source}): {row.reason} [{row.code}]" for row in kept)
        message = f"{len(kept)} of {len(self.rows)} communication sites are not fused:\n{lines}"
        if self.options.on_kept == "error":
            raise KeptError(f'{message}\nSet "tilescale.on_kept" to "warn" or "ignore" to run them as they are.')
        observe.log.warning("%s", message)


def _unmatched(collective: Collective) -> Keep:
    readers = sorted({str(u.target) for u in collective.result.users if u.op == "call_function"})
    producer = collective.node.args[0]
    made_by = str(producer.target) if isinstance(producer, fx.Node) and producer.op == "call_function" else "an input"
    read_by = ", ".join(readers[:3]) if readers else "the graph's output"
    return Keep("no-matmul", f"no matmul next to it: it comes from {made_by} and is read by {read_by}")
