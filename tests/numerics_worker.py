"""One rank of the numerics tests: each program in float64, eagerly and compiled, and how far the last two are off."""

from __future__ import annotations

import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import tscompile
from tests.programs import PROGRAMS, Built, Program, Setting, scalar_loss
from tscompile.backend import tilescale
from tscompile.fx_passes.fusion_pass import collect_rows
from tscompile.problem import Row
from tscompile.testing import short_name

Tensors = dict[str, torch.Tensor]
FACTOR = 2.0
# Eager can be exact by luck (a sum of two products that needs no rounding, say). Nothing can be asked to be better than
# one correct rounding to its dtype, whose relative error is up to half of eps.
FLOOR_EPS = 0.5


@dataclass
class Outcome:
    """One program on one rank. Errors are per tensor, `||x - truth|| / ||truth||`, of (compiled, eager)."""

    program: str
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    decisions: list[str] = field(default_factory=list)
    fused: int = 0
    collectives: Counter[tuple[str, str]] = field(default_factory=Counter)  # (decision, collective) -> number
    equal: bool = True  # every tensor, to the bit, to what eager computes
    seconds: float = 0.0
    failure: str = ""

    @property
    def adds_panels(self) -> bool:
        """A sum in float32 was taken in another order than eager's: all_to_all_matmul adds panels as they arrive."""
        return any(line.startswith("fused") and "all_to_all_matmul" in line for line in self.decisions)

    def wrong(self, dtype: torch.dtype) -> dict[str, str]:
        """Tensors whose error is more than twice that of eager."""
        return {
            name: f"error {compiled:.3g}, eager {eager:.3g}"
            for name, (compiled, eager) in self.errors.items()
            if not _is_close(compiled, eager, dtype)
        }


def _is_close(compiled: float, eager: float, dtype: torch.dtype) -> bool:
    """Written so that NaN is not."""
    return compiled <= max(FACTOR * eager, FLOOR_EPS * torch.finfo(dtype).eps)


def run_programs(
    names: list[str],
    dtype: torch.dtype,
    options: dict[str, Any],
    device: str = "cpu",
    programs: Mapping[str, Program] = PROGRAMS,
) -> list[Outcome]:
    """Run programs one after the other; a program that raises is reported and does not stop the others."""
    outcomes = []
    for name in names:
        start = time.monotonic()
        print(f"program {name}", flush=True)  # the last line before a hang names the program
        outcome = Outcome(name)
        try:
            _run(programs[name], Setting(dist.get_world_size(), dist.get_rank(), dtype, device), options, outcome)
        except Exception:
            outcome.failure = traceback.format_exc()
        outcome.seconds = time.monotonic() - start
        outcomes.append(outcome)
    return outcomes


def run_cases(cases: list[tuple[torch.dtype, str]], options: dict[str, Any]) -> list[Outcome]:
    """Run (dtype, program) one after the other."""
    return [outcome for dtype, name in cases for outcome in run_programs([name], dtype, options)]


def run_cached(folder: str, names: list[str], dtype: torch.dtype, options: dict[str, Any]) -> list[Outcome]:
    """`run_programs` with the compiler's caches in a folder."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    return run_programs(names, dtype, options)


def _run(program: Program, setting: Setting, options: dict[str, Any], outcome: Outcome) -> None:
    torch._dynamo.reset()
    built = program.build(setting)
    built.mark_dynamic()
    planned: list[Row] = []
    before = {row.site for row in tscompile.reports().rows}
    compiled = torch.compile(built.call, backend=tilescale, fullgraph=True, options=options)
    # A dynamic program is called again with other sizes, which the graph of the first call must serve.
    for stretch in (1, 2) if built.dynamic else (1,):
        sized = replace(setting, stretch=stretch)
        truth_setting = replace(sized, truth=True)
        truth = _results(program, truth_setting, program.build(truth_setting))
        eager = _results(program, sized, program.build(sized))
        args = program.build(sized).args if stretch > 1 else built.args
        with torch._dynamo.config.patch(error_on_recompile=stretch > 1), collect_rows(planned.extend):
            actual = _results(program, sized, Built(built.call, args), compiled)
        assert actual.keys() == eager.keys() == truth.keys(), "the same outputs and gradients exist in all three"
        for name, expected in truth.items():
            label = name if stretch == 1 else f"{name} (x{stretch})"
            outcome.equal &= torch.equal(actual[name], eager[name])
            outcome.errors[label] = (_error(actual[name], expected), _error(eager[name], expected))
    # This program's rows as they stand after its runs: a vote may have turned fused sites into kept ones. They are those
    # that the pass planned (an equal graph of an earlier program may have registered them already) and, where a cache
    # spared the pass, those that are new. A site counts as fused only if it was launched.
    sites = {row.site for row in planned}
    rows = [row for row in tscompile.reports().rows if row.site in sites or row.site not in before]
    outcome.decisions = [f"{row.decision} {row.phase} {row.pattern} {row.code}" for row in rows]
    outcome.collectives = Counter((row.decision, short_name(op)) for row in rows for op in row.collectives)
    outcome.fused = sum(row.decision == "fused" and row.measured_us is not None for row in rows)


def _results(program: Program, setting: Setting, built: Built, call: Callable[..., Any] | None = None) -> Tensors:
    """Outputs, then gradients of inputs and parameters, as whole tensors where they are DTensors."""
    for parameter in built.parameters.values():
        parameter.grad = None
    function = built.call if call is None else call
    with program.enter(setting):
        output = function(*built.args)
    outputs = output if isinstance(output, tuple | list) else (output,)
    results = {f"output {index}": _whole(tensor) for index, tensor in enumerate(outputs)}
    if program.backward:
        torch.autograd.backward(scalar_loss(output))
        leaves: dict[str, torch.Tensor] = {f"input {index}": arg for index, arg in enumerate(built.args)}
        for name, leaf in (leaves | built.parameters).items():
            if leaf.grad is not None:
                results[f"gradient of {name}"] = _whole(leaf.grad)
    return results


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    if hasattr(tensor, "wait"):  # the asynchronous result of an eager functional collective
        tensor = tensor.wait()
    return tensor.clone()


def _error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    assert actual.shape == truth.shape
    return float((actual.double() - truth).norm() / truth.norm())
