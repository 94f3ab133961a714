"""`bi audit SCRIPT`: runs a script and lists every operator and generated kernel that ran."""

from __future__ import annotations

import argparse
import contextlib
import json
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batch_invariant.cli.render import Line, emit

_STYLES = {"covered": "green", "harmless": "", "uncovered": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bi audit`."""
    parser.add_argument("--json", action="store_true", help="the report on standard output")
    parser.add_argument(
        "--strict", action="store_true", help="stop the script at the first uncovered operator"
    )
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="NAME",
        help="a Triton kernel, or an operator of another library (lib::op), that was checked",
    )
    parser.add_argument(
        "--enable", action="store_true", help="turn the mode on before the script runs"
    )
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="a Python file")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the script"
    )


def run(args: argparse.Namespace) -> int:
    """0 if nothing uncovered ran, 1 if something did or the script failed, 2 usage."""
    if not args.script.is_file():
        sys.stderr.write(f"bi audit: there is no file {args.script}\n")
        return 2
    from batch_invariant import mode
    from batch_invariant.auditing.audit import auditing

    was_on = mode.is_enabled()
    failed = ""
    with auditing(args.strict, args.trust) as found:
        try:
            if args.enable:
                mode.enable()
            # The script's own output would spoil the JSON.
            with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
                failed = _script(args.script, args.arguments)
        finally:
            report = found(str(args.script), mode.is_enabled(), None)
            if mode.is_enabled() and not was_on:
                mode.disable()
    if args.json:
        print(json.dumps({**report.as_dict(), "failed": failed}, indent=2))
    else:
        emit(_lines(report, failed))
    if failed:
        sys.stderr.write(f"bi audit: {args.script} failed: {failed}\n")
    return 0 if report.ok and report.ran and not failed else 1


def _script(path: Path, arguments: list[str]) -> str:
    """Runs it as the main program; why it failed, or ""."""
    with _as_main(path, arguments):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            return f"exit code {stop.code}" if stop.code not in (None, 0) else ""
        except Exception as error:  # the script's own: it is reported, as Python would
            traceback.print_exc()
            return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


@contextlib.contextmanager
def _as_main(path: Path, arguments: list[str]) -> Iterator[None]:
    argv, folders = sys.argv, sys.path
    sys.argv = [str(path), *arguments]
    sys.path = [str(path.absolute().parent), *folders]
    try:
        yield
    finally:
        sys.argv, sys.path = argv, folders


def _lines(report: Any, failed: str) -> Iterator[Line]:
    yield f"bi audit  {report.function}"
    yield f"  {report.summary()}"
    yield ""
    for kind, count, how, op, known, places in report.rows():
        yield f"  {kind:9} {count:>6}x  {how:13}  {op}", _STYLES[kind]
        yield f"{'':35}{known}"
        if kind == "uncovered":
            for place in places:
                yield f"{'':35}{place}"
    yield ""
    if not report.ran:
        yield "no operator ran", "red"
    elif report.ok:
        yield "everything that ran is covered or harmless" + (", until it failed" if failed else "")
    else:
        off = "; the mode was off: bi audit --enable turns it on" if report.mode == "off" else ""
        yield f"NOT covered: {len(report.of('uncovered'))} places{off}", "red"
