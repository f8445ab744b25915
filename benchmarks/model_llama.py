"""Training steps of Llama 3 blocks under tensor parallelism: this backend, Inductor, Inductor with async TP, and the roof.

    torchrun --nproc-per-node 4 -m benchmarks.model_llama [--only "8B S8192"] [--modes inductor,tilescale] [--rounds N]

Run it from the root of the repository. Modes of one model race in one process, in rounds of shuffled order; a timing is a few
forward+backward steps, the slowest rank counts. `roof` computes what a rank computes, with local copies of the right
sizes in place of collectives: no overlap can be faster. Before any timing the loss and every gradient are compared with
the same model in float32, and a mode whose error is not of Inductor's size is reported and not timed.

`collectives_left` is what the report says the compiled steps still run as collectives; `nccl_kernels` is what the profiler
saw in one step, which checks it. `profiles` has the busiest kernels of that step, `sites` the predicted and the last measured time of
each fused op. `--tiny` runs on two CPU ranks, to try the benchmark itself.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import tscompile
from benchmarks import gpu_harness as gpu
from benchmarks import gpu_results, harness, model_report
from benchmarks.bench_cpu import find_backend
from benchmarks.llama import Config, build, build_local, configs, local_input, loss_of, tiny_configs
from benchmarks.step_profile import profile_step
from tscompile.observe import ledger

MODES = ("inductor", "async_tp", "tilescale", "roof")
GRAPHED = ("inductor_graphs", "tilescale_graphs")  # mode="reduce-overhead"; only if asked for
SEED = 0
SITE_KEYS = ("site", "phase", "pattern", "shapes", "predicted_us", "measured_us")


def compiled(mode: str, config: Config, mesh: DeviceMesh, dtype: torch.dtype, fuse: str) -> nn.Module:
    """The model of that mode. Backend and options differ between modes, which is what keeps Dynamo's code of them apart."""
    how: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if mode == "roof":
        return torch.compile(build_local(config, mesh.size(), torch.device(mesh.device_type), dtype), **how)
    model = build(config, mesh, dtype)
    if mode.startswith("tilescale"):
        how["backend"] = find_backend("tilescale")
    if mode == "tilescale":
        how["options"] = {"tilescale.fuse": fuse}
    elif mode == "async_tp":
        how["options"] = {"_micro_pipeline_tp": True}
    elif mode.endswith("_graphs"):
        how["mode"] = "reduce-overhead"
    return torch.compile(model, **how)


class Trainer:
    """One mode: its model, its input, and a step."""

    def __init__(self, model: Callable[..., Any], x: Tensor, fuse: str = "auto", graphed: bool = False) -> None:
        self.model, self.x, self.fuse, self.graphed = model, x, fuse, graphed
        self.parameters = dict(model.named_parameters()) if isinstance(model, nn.Module) else {}

    def step(self) -> Tensor:
        for leaf in (self.x, *self.parameters.values()):
            leaf.grad = None
        if self.graphed:
            torch.compiler.cudagraph_mark_step_begin()
        with tscompile.patch(fuse=self.fuse):
            loss = loss_of(self.model(self.x))
            loss.backward()
        return loss

    def results(self) -> dict[str, Tensor]:
        """Loss and gradients of one step, each rank's own part, in float32."""
        found = {"loss": self.step().detach().float().view(1).clone()}
        for name, leaf in {"input": self.x, **self.parameters}.items():
            grad = leaf.grad
            assert grad is not None, name
            if isinstance(grad, DTensor):
                partial = any(placement.is_partial() for placement in grad.placements)
                grad = grad.full_tensor() if partial else grad.to_local()
            found[name.removeprefix("_orig_mod.")] = grad.float().clone()
        return found


def off_by(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """`||x - truth|| / ||truth||` of each tensor, on the rank where it is largest."""
    names = list(truth)
    assert names == list(results), "the same gradients exist"
    own = [gpu.errors_of([results[name]], [truth[name]])[0] for name in names]
    return dict(zip(names, harness.slowest(own), strict=True))


def compare(
    trainers: dict[str, Trainer], config: Config, mesh: DeviceMesh, dtype: torch.dtype, failures: dict[str, str]
) -> dict[str, dict[str, float]]:
    """Errors of every mode, and wrong modes out of `trainers`. The truth is the same program in float32, not compiled."""
    model = build(config, mesh, dtype, held=torch.float32)
    x = trainers["inductor"].x.detach().float().requires_grad_()
    truth = Trainer(model, x).results()
    del model
    base = off_by(trainers["inductor"].results(), truth)
    errors = {"inductor": base}
    for mode in [mode for mode in trainers if mode not in ("inductor", "roof")]:
        for _ in range(2):  # the second step runs on memory that the first has left
            found = off_by(trainers[mode].results(), truth)
            errors[mode] = {name: max(value, errors.get(mode, {}).get(name, 0.0)) for name, value in found.items()}
        floor = torch.finfo(dtype).eps / 2
        wrong = {n: (e, base[n]) for n, e in errors[mode].items() if not e <= max(2 * base[n], floor)}
        if wrong:
            shown = ", ".join(f"{name} {e:.1e} (Inductor {b:.1e})" for name, (e, b) in list(wrong.items())[:4])
            failures[mode] = f"wrong: {len(wrong)} of {len(base)} tensors: {shown}"
            del trainers[mode]
    return errors


def make_trainers(
    config: Config, args: argparse.Namespace, mesh: DeviceMesh, dtype: torch.dtype, failures: dict[str, str]
) -> dict[str, Trainer]:
    """Compile every mode with a first step. Returns the modes that work."""
    device = torch.device(mesh.device_type)
    x = local_input(config, mesh.size(), mesh.get_local_rank(), device, dtype)
    trainers: dict[str, Trainer] = {}
    for mode in args.modes:
        gpu.say(f"  {mode}: compiling ...")

        def make(mode: str = mode) -> Trainer:
            fuse = args.fuse if mode.startswith("tilescale") else "auto"
            model = compiled(mode, config, mesh, dtype, args.fuse)
            trainer = Trainer(model, x.detach().clone().requires_grad_(), fuse, mode in GRAPHED)
            with gpu.limit(args.limit):
                trainer.step()
            return trainer

        trainer = gpu.attempt(mode, make, failures)
        if trainer is not None:
            trainers[mode] = trainer
    return trainers


def run_config(
    config: Config, args: argparse.Namespace, mesh: DeviceMesh, timer: gpu.Timer, dtype: torch.dtype
) -> dict[str, Any]:
    torch._dynamo.reset()
    failures: dict[str, str] = {}
    ledger.clear()
    trainers = make_trainers(config, args, mesh, dtype, failures)
    with gpu.limit(args.limit):
        errors = compare(trainers, config, mesh, dtype, failures) if args.check and "inductor" in trainers else {}
    with gpu.limit(args.limit):
        seen = {
            mode: gpu.attempt(f"profile {mode}", lambda t=t: profile_step(t.step, timer), failures)
            for mode, t in trainers.items()
        }
    with gpu.limit(args.limit):
        sides = {mode: gpu.Side(trainer.step) for mode, trainer in trainers.items()}
        raced = gpu.race(sides, timer, args.rounds, SEED, graphs=False)
    rows = tscompile.reports().to_json()["rows"]  # only now: ranks may have turned to the original ops on the way
    left = [row for row in rows if row["decision"] != "fused"]
    return {
        "name": config.name,
        "status": "done",
        "form": config.form,
        "layers": config.layers,
        "length": config.length,
        "rounds": {"eager": raced.eager},
        "errors": {mode: {"worst": max(found.values()), "loss": found["loss"]} for mode, found in errors.items()},
        "nccl_kernels": {mode: found[0] for mode, found in seen.items() if found is not None},
        "profiles": {mode: found[1] for mode, found in seen.items() if found is not None},
        "sites": [{key: row[key] for key in SITE_KEYS} for row in rows if row["decision"] == "fused"],
        "collectives": sum(len(row["collectives"]) for row in rows),
        "collectives_left": sum(len(row["collectives"]) for row in left),
        "kept": [{key: row[key] for key in model_report.KEPT_KEYS} for row in left],
        "failures": failures | raced.failures,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models that CPU ranks can do")
    parser.add_argument("--quick", action="store_true", help="8B S8192 alone, 3 rounds")
    parser.add_argument("--only", default="", metavar="TEXT", help="models whose name contains one of TEXT,TEXT,...")
    parser.add_argument(
        "--modes", help=f"of {','.join(MODES + GRAPHED)}; default: {','.join(MODES)}, on CPU no async_tp"
    )
    parser.add_argument("--fuse", default="auto", choices=("auto", "always"), help="tilescale.fuse")
    parser.add_argument("--layers", type=int, help="blocks of each model instead of 4 (8B) and 2 (70B)")
    parser.add_argument("--rounds", type=int, help="rounds per model (5)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--attention", default="any", choices=("any", "flash", "cudnn"), help="SDPA backend, for all modes"
    )
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--limit", type=float, default=240.0, metavar="SECONDS", help="for each step of a model's case")
    parser.add_argument("--resume", action="store_true", help="leave out models that the JSON has, hung ones too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR or FILE.json")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (3 if args.quick or args.tiny else 5)
    standard = [mode for mode in MODES if args.device == "cuda" or mode != "async_tp"]
    args.modes = args.modes.split(",") if args.modes else standard
    if args.check and "inductor" not in args.modes:
        parser.error("errors are judged by Inductor's: add inductor to --modes, or say --no-check")
    return args


def choose_attention(name: str) -> None:
    """One SDPA backend for all modes: which one runs is worth more than any overlap."""
    if name != "any":
        for other in ("flash", "mem_efficient", "math", "cudnn"):
            with contextlib.suppress(AttributeError):
                getattr(torch.backends.cuda, f"enable_{other}_sdp")(other in (name, "math"))  # math: for the truth


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    logging.getLogger("torch").setLevel(logging.WARNING)
    device = gpu.start(args.device)
    choose_attention(args.attention)
    torch._dynamo.config.recompile_limit = 64
    with gpu.limit(args.limit):
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        if "async_tp" in args.modes:
            from torch.distributed._symmetric_memory import enable_symm_mem_for_group

            enable_symm_mem_for_group(mesh.get_group().group_name)
        path = gpu_results.result_path(args.out, "model", device)
        results = gpu_results.Results(path, "gpu-model", gpu_results.environment(device, args.dtype), args.resume)
        timer = gpu.Timer(device, min_ms=150.0 if device.type == "cuda" else 5.0)
    todo = tiny_configs() if args.tiny else configs(args.layers)
    todo = todo[:1] if args.quick else todo
    for config in todo:
        if results.has(config.name) or not any(text in config.name for text in args.only.split(",")):
            continue
        results.put({"name": config.name, "status": "started"})
        gpu.say(config.name)
        record = run_config(config, args, mesh, timer, getattr(torch, args.dtype))
        results.put(record)
        gpu.say(*model_report.case_lines(record), sep="\n    ")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if dist.get_rank() == 0:
        print(f"\n{model_report.markdown(results.data)}\n\nwrote {results.path}", flush=True)
    gpu.finish()
    return 0


if __name__ == "__main__":
    sys.exit(gpu.guarded(main))
