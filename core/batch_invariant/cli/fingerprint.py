"""`bi fingerprint`: the order in which operators add, measured at several sizes of the batch."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from batch_invariant.cli.render import Line, emit, progress

_DEFAULT_OPS = ("sum", "mean", "cumsum", "mm", "linear", "scaled_dot_product_attention", "softmax")
_DEFAULT_ROWS = (1, 2, 8, 64, 256, 1024)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bi fingerprint`."""
    parser.add_argument("--backend", metavar="NAME", help="probe this backend (default: selected)")
    parser.add_argument(
        "--op", action="append", default=[], metavar="NAME", help="only this operator (repeatable)"
    )
    parser.add_argument("--dtype", default="float32", metavar="NAME", help="default: float32")
    parser.add_argument(
        "--rows",
        type=_numbers,
        default=_DEFAULT_ROWS,
        metavar="M,M",
        help=f"sizes of the batch; default: {','.join(map(str, _DEFAULT_ROWS))}",
    )
    parser.add_argument("--terms", type=_number, metavar="N", help="how many terms are added")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """0 if the backend has one order for each operator, the declared one; 1 if not; 2: usage.

    What cannot be seen of any implementation is not held against it, unless it was named.
    """
    import torch

    from batch_invariant.errors import BatchInvariantError, ConfigurationError, UnknownBackend
    from batch_invariant.proof.order.orders import Orders, orders

    started = time.perf_counter()
    results: list[Orders] = []
    names = args.op or list(_DEFAULT_OPS)
    try:
        with progress(_steps(names, len(args.rows)), plain=False) as step:
            for found in orders(args.backend, names, args.dtype, args.rows, args.terms, step):
                results.append(found)
    except (ConfigurationError, UnknownBackend) as error:
        sys.stderr.write(f"bi fingerprint: {error}\n")
        return 2
    except BatchInvariantError as error:
        sys.stderr.write(f"bi fingerprint: {error}\n")
        return 1
    judged = [found for found in results if args.op or found.here.reachable]
    good = bool(judged) and all(found.ok for found in judged)
    seconds = time.perf_counter() - started
    if args.json:
        report: dict[str, Any] = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "ok": good,
            "seconds": round(seconds, 2),
            "results": [found.as_dict() for found in results],
        }
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        emit(_lines(results, args.dtype, seconds))
    return 0 if good else 1


def _lines(results: list[Any], dtype: str, seconds: float) -> list[Line]:
    import torch

    backend = results[0].backend
    lines: list[Line] = [
        f"bi fingerprint  {backend}  {dtype}  torch {torch.__version__}  "
        f"{torch.get_num_threads()} threads",
        "the order of the additions, measured by probing; one digest is one order",
    ]
    for found in results:
        name = f"{found.op} {found.layout}" if found.layout else found.op
        lines += ["", f"{name}, {found.terms} terms: {found.sum_of}"]
        for label, side in (("plain torch", found.stock), (backend, found.here)):
            style = "bold red" if label == backend and not found.ok else ""
            verdict = "" if side.unseen else _count(len(side.groups()))
            lines.append((f"  {label:12} {verdict}".rstrip(), style))
            if side.unseen:
                lines.append(f"    not seen: {side.unseen}")
            lines += [
                f"    {digest}  M {' '.join(map(str, sizes)):20} {text}"
                for digest, sizes, text in side.lines()
            ]
            lines += [f"      {sentence}" for sentence in side.notes()]
        lines.append((f"  declared     {found.verdict}", "" if found.ok else "bold red"))
        lines += [f"  not seen     {limit}" for limit in found.here.limits()]
    held = sum(found.ok for found in results)
    hidden = sum(not found.here.reachable for found in results)
    lines += [
        "",
        f"{held} of {len(results) - hidden} sums have one order, as declared"
        + (f"; {hidden} cannot be seen" if hidden else "")
        + f". {seconds:.1f} s",
    ]
    return lines


def _steps(names: list[str], sizes: int) -> int:
    from batch_invariant.ops import CONTRACTS

    probes = (CONTRACTS[name].probe for name in names if name in CONTRACTS)
    return 2 * sizes * sum(1 + len(probe.layouts) for probe in probes if probe)


def _count(orders: int) -> str:
    return "one order" if orders == 1 else f"{orders} DIFFERENT orders"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_number(part) for part in text.split(","))


def _number(text: str) -> int:
    value = int(text) if text.strip().isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected numbers from 1, such as 1,2,64; got {text!r}")
    return value
