"""`bi tune`: the fastest schedules of a backend on this machine, and the check of somebody's table.

A schedule decides how fast a product is and nothing else: a backend's tuner times only those that
have the bits of the contract.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batch_invariant.cli.render import emit

if TYPE_CHECKING:
    from batch_invariant.backend import Tuner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bi tune`."""
    parser.add_argument(
        "shapes", nargs="*", type=_shape, metavar="KxN", help="products to tune, such as 4096x6144"
    )
    parser.add_argument(
        "--backend", default="cuda", metavar="NAME", help="tune this backend (default: cuda)"
    )
    parser.add_argument(
        "--dtype", action="append", default=[], metavar="NAME", help="repeatable; default: one"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the table to write (default: schedules.json)"
    )
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="check the bits of a table, and write nothing"
    )


def run(args: argparse.Namespace) -> int:
    """0 if a table was written, or holds; 1 if not; 2: usage."""
    from batch_invariant.errors import BatchInvariantError, ConfigurationError, UnknownBackend

    try:
        if (args.check is None) == (not args.shapes):
            raise ConfigurationError("give products to tune, such as 4096x6144, or --check FILE")
        if args.check is not None and (args.out is not None or args.dtype):
            raise ConfigurationError("--check writes nothing and reads the dtypes from its file")
        tuner = _tuner(args.backend)
        return _check(tuner, args.check) if args.check is not None else _tune(tuner, args)
    except (ConfigurationError, UnknownBackend) as error:
        sys.stderr.write(f"bi tune: {error}\n")
        return 2
    except BatchInvariantError as error:
        sys.stderr.write(f"bi tune: {error}\n")
        return 1


def _shape(text: str) -> tuple[int, int]:
    k, _, n = text.partition("x")
    if not (k.isdecimal() and n.isdecimal() and int(k) and int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape KxN, such as 4096x6144")
    return int(k), int(n)


def _tuner(name: str) -> Tuner:
    from batch_invariant import registry
    from batch_invariant.errors import BackendUnavailable, ConfigurationError

    backend = registry.load(name)
    available = backend.probe()
    if not available.ok:
        raise BackendUnavailable(name, available.reason, available.remedy)
    tuner = backend.tuner()
    if tuner is None:
        raise ConfigurationError(
            f"the backend {name!r} has no schedules to tune; name another one with --backend"
        )
    return tuner


def _tune(tuner: Tuner, args: argparse.Namespace) -> int:
    from batch_invariant.errors import ConfigurationError

    if unknown := set(args.dtype) - set(tuner.dtypes):
        raise ConfigurationError(
            f"--dtype {sorted(unknown)[0]}: there are schedules for {', '.join(tuner.dtypes)}"
        )
    out = args.out or Path("schedules.json")
    if not out.resolve().parent.is_dir() or out.is_dir():  # before minutes of measuring, not after
        raise ConfigurationError(f"--out {out}: no file can be written there")
    dtypes = list(dict.fromkeys(args.dtype)) or [tuner.dtypes[0]]
    table = tuner.tune(args.shapes, dtypes, lambda line: emit([line], sys.stderr))
    try:
        out.write_text(json.dumps(table, indent=1) + "\n")
    except OSError as error:
        raise ConfigurationError(f"--out {out}: {error.strerror}") from error
    emit([f"wrote {out}; check it elsewhere with: bi tune --backend {args.backend} --check {out}"])
    return 0


def _check(tuner: Tuner, path: Path) -> int:
    from batch_invariant.errors import ConfigurationError

    try:
        data: Any = json.loads(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"--check {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"--check {path}: no JSON: {error}") from error
    bad = tuner.refused(data, str(path))
    emit([f"refused: {line}" for line in bad])
    emit(
        [f"{path}: {len(bad)} lines must not be used here" if bad else f"{path}: every line holds"]
    )
    return 1 if bad else 0
