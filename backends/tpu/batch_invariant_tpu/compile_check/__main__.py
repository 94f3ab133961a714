"""The command: sets what libtpu reads at its start, then checks. Exit 0 good, 1 not, 2 usage."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from batch_invariant.errors import BatchInvariantError
from batch_invariant_tpu.compile_check.compiler import TOPOLOGIES
from batch_invariant_tpu.processes import JOBS
from batch_invariant_tpu.requirements import libtpu_problem


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m batch_invariant_tpu.compile_check",
        description="Does the TPU compiler make one program for every size of the batch?",
    )
    parser.add_argument("--full", action="store_true", help="v4 and v5p too, and more shapes")
    parser.add_argument("--generation", action="append", default=[], metavar="NAME")
    parser.add_argument("--dtype", action="append", default=[], choices=("bfloat16", "float32"))
    parser.add_argument("--batches", default="1,8,256,1024", help="sizes of the batch")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this")
    parser.add_argument("--report", type=Path, metavar="PATH", help="write the findings as JSON")
    parser.add_argument(
        "--jobs", type=int, default=JOBS, help="processes that compile (default: %(default)s)"
    )
    args = parser.parse_args()
    if (problem := libtpu_problem()) is not None:
        sys.stderr.write(f"compile check: {problem[0]}; {problem[1]}\n")
        return 1
    if unknown := sorted(set(args.generation) - set(TOPOLOGIES)):
        sys.stderr.write(
            f"compile check: unknown TPU generation {', '.join(unknown)}; known: "
            f"{', '.join(TOPOLOGIES)}\n"
        )
        return 2
    os.environ["JAX_PLATFORMS"] = "cpu"
    from batch_invariant_tpu.compile_check import check

    try:
        found = check.check(
            args.generation or (check.FULL if args.full else check.QUICK),
            args.dtype or check.DTYPES,
            [int(size) for size in args.batches.split(",")],
            _say,
            full=args.full,
            only=args.only,
            jobs=args.jobs,
        )
    except BatchInvariantError as error:
        sys.stderr.write(f"compile check: {error}\n")
        return 1
    if args.report:
        args.report.write_text(json.dumps(found, indent=1) + "\n")
    good = sum(not entry["faults"] for entry in found["checks"])
    sys.stdout.write(
        f"{good} of {len(found['checks'])} hold; {found['versions']}\n"
        f"This proves: {found['proves']}.\nThis does not prove: {found['does_not_prove']}.\n"
    )
    return 0 if found["holds"] else 1


def _say(what: str, good: bool, more: str) -> None:
    sys.stdout.write(f"{'ok  ' if good else 'FAIL'} {what}{f': {more}' if more else ''}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
