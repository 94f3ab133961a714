"""`bi verify`: a backend's operators under transforms of the batch, beside plain torch."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from batch_invariant.cli.render import Line, emit, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bi verify`."""
    parser.add_argument("--backend", metavar="NAME", help="verify this backend (default: selected)")
    parser.add_argument(
        "--op", action="append", default=[], metavar="NAME", help="only this operator (repeatable)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """0 if every operator holds, 1 if one breaks or the backend cannot run, 2 for bad arguments."""
    import torch

    from batch_invariant.errors import BatchInvariantError, ConfigurationError, UnknownBackend
    from batch_invariant.ops import CONTRACTS
    from batch_invariant.proof.verify import Result, verify

    started = time.perf_counter()
    results: list[Result] = []
    total = sum(len(CONTRACTS[n].dtypes) for n in (args.op or CONTRACTS) if n in CONTRACTS)
    try:
        with progress(total, plain=False) as step:
            for result in verify(args.backend, args.op, lambda text: step(text, 0)):
                results.append(result)
                step(f"{result.op} {result.dtype}", 1)
    except (ConfigurationError, UnknownBackend) as error:
        sys.stderr.write(f"bi verify: {error}\n")
        return 2
    except BatchInvariantError as error:
        sys.stderr.write(f"bi verify: {error}\n")
        return 1
    good = bool(results) and all(result.ok for result in results)
    seconds = time.perf_counter() - started
    if args.json:
        report: dict[str, Any] = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "ok": good,
            "seconds": round(seconds, 2),
            "results": [result.as_dict() for result in results],
        }
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        emit(_lines(results, seconds))
    return 0 if good else 1


def _lines(results: list[Any], seconds: float) -> list[Line]:
    import torch

    from batch_invariant import selector
    from batch_invariant.proof.transforms import POPULATIONS, ROWS

    backend = selector.current_backend("cpu").name
    lines: list[Line] = [
        f"bi verify  {backend}  torch {torch.__version__}  {torch.get_num_threads()} threads",
        f"rows {' '.join(map(str, POPULATIONS))} of {ROWS}, moved, padded, beside random, huge, "
        "denormal, inf and nan rows; bit for bit",
        "",
        f"  {'op':28} {'dtype':9} {'checks':>6}  {'here':6} plain torch on this machine",
    ]
    for result in results:
        stock = "same" if not result.stock else f"differs under {_transforms(result.stock)}"
        verdict = "same" if result.ok else "BREAKS"
        lines.append(
            (
                f"  {result.op:28} {result.dtype:9} {result.checks:6}  {verdict:6} {stock}",
                "" if result.ok else "bold red",
            )
        )
        lines += [
            f"      {found.transform}, {found.case} {found.data}: {found.detail}"
            for found in result.breaks
        ]
    names = {result.op for result in results}
    held = {n for n in names if all(r.ok for r in results if r.op == n)}
    lines += ["", f"{len(held)} of {len(names)} ops hold. {seconds:.1f} s"]
    return lines


def _transforms(found: list[str]) -> str:
    return ", ".join(sorted({entry.split(" ")[0] for entry in found}))
