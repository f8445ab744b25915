"""Runs the examples of this folder, one after another, each on ranks of its own: one line for each, exit status 1 if one fails.

./dev examples [NAME ...] [--gpu]
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common import ExampleError, launch

HERE = Path(__file__).parent
NAMES = (
    "primitives",
    "simple_shift",
    "allgather",
    "allgather_two_level",
    "reduce_scatter_two_level",
    "all_to_all",
    "attention_all_to_all",
    "sp_ag_attention",
    "deepep",
    "allgather_gemm",
    "allgather_gemm_overlapped",
    "gemm_reduce_scatter_overlapped",
    "cannon",
    "summa",
)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="./dev examples"
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which ones; all if none is named: {', '.join(NAMES)}"
    )
    parser.add_argument("--gpu", action="store_true", help="one GPU per rank; without it ranks are CPU processes")
    parser.add_argument("--ranks", type=int, help="instead of each example's own number")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no {unknown[0]}; there are {', '.join(NAMES)}")
    options = [*(["--gpu"] if args.gpu else []), *([f"--ranks={args.ranks}"] if args.ranks else [])]
    failed = 0
    for name in args.names or NAMES:
        example = importlib.import_module(name).EXAMPLE
        if args.ranks and (reason := example.allowed(args.ranks)):
            print(f"{'-':6}  {name:30}  skipped: {reason}", flush=True)
            continue
        ranks = example.parse(options).ranks
        start = time.monotonic()
        try:
            outcome, said = "ok", launch(HERE / f"{name}.py", options, ranks)
        except ExampleError as error:
            outcome, said = "FAILED", str(error)
            failed += 1
        print(f"{outcome:6}  {name:30}  {ranks} ranks  {time.monotonic() - start:5.1f} s  {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
