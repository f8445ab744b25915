"""`python -m tscompile.doctor`: what is installed, what will run fused on this machine, and what to do about the rest.

Not for repairs: it changes nothing. Every probe is guarded, so that one broken part does not hide the others.

Exit status: 0 fused execution is possible, 1 the original ops run instead, 2 the installation is broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict

from .probes import PROBES, Check


def examine() -> list[Check]:
    """Run every probe."""
    checks: list[Check] = []
    for probe in PROBES:
        try:
            checks += probe()
        except Exception as error:
            checks.append(Check("warn", probe.__name__.removeprefix("_probe_"), f"could not be examined: {error!r}"))
    return checks


def exit_status(checks: Iterable[Check]) -> int:
    """0 fused execution is possible, 1 the original ops run instead, 2 the installation is broken."""
    checks = list(checks)
    if any(check.status == "fail" for check in checks):
        return 2
    return 1 if any(check.fallback for check in checks) else 0


def verdict(checks: Iterable[Check]) -> list[str]:
    """What will run, in plain words."""
    checks = list(checks)
    status = exit_status(checks)
    if status == 2:
        failed = ", ".join(check.what for check in checks if check.status == "fail")
        return [f'torch.compile(backend="tilescale") will not work here: see {failed} above.']
    return [_cpu_line(checks), _gpu_line(checks)]


def _reasons(checks: list[Check], ranks: str) -> str:
    return ", ".join(check.what for check in checks if check.fallback and check.ranks in ("all", ranks))


def _cpu_line(checks: list[Check]) -> str:
    if reasons := _reasons(checks, "cpu"):
        return f"CPU ranks: sites are matched and reported, and run the original ops, because of {reasons}."
    return "CPU ranks of one host: sites run fused, over shared memory. Ranks on other hosts: the original ops."


def _gpu_line(checks: list[Check]) -> str:
    if not any(check.what == "GPU memory" and check.status == "ok" for check in checks):
        return "GPU ranks: none here, or their GPUs do not reach each other; sites would run the original ops."
    if reasons := _reasons(checks, "gpu"):
        return f"GPU ranks: sites are matched and reported, and run the original ops, because of {reasons}."
    return "GPU ranks of one host: bfloat16 and float16 sites run fused on H100 and H200, over NVLink."


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m tscompile.doctor`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tscompile.doctor", description=(__doc__ or "").strip())
    parser.add_argument("--json", action="store_true", help="print JSON")
    parsed = parser.parse_args(arguments)
    checks = examine()
    status = exit_status(checks)
    if parsed.json:
        result = {"schema": 1, "checks": [asdict(check) for check in checks]}
        print(json.dumps({**result, "verdict": verdict(checks), "exit_status": status}, indent=2))
    else:
        print("\n".join([*map(str, checks), "", *verdict(checks)]))
    return status


if __name__ == "__main__":
    sys.exit(main())
