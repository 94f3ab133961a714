"""`bi verify`: a backend's operators under every check, and the certificate of what was found."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from batch_invariant.cli.render import Line, emit, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bi verify`."""
    parser.add_argument(
        "--backend", metavar="NAME", help="verify this backend (default: the CPU's)"
    )
    parser.add_argument(
        "--op", action="append", default=[], metavar="NAME", help="only this operator (repeatable)"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="every case and kind of data, gradients and torch's own checks: minutes, not seconds",
    )
    parser.add_argument("--json", action="store_true", help="the certificate on standard output")
    parser.add_argument("--report", metavar="PATH", type=Path, help="write the certificate there")
    parser.add_argument(
        "--against",
        metavar="PATH",
        type=Path,
        help="compare with an earlier certificate; promises or bits that changed are a failure",
    )


def run(args: argparse.Namespace) -> int:
    """0 if everything holds (and nothing changed), 1 if not or the backend cannot run, 2 usage."""
    from batch_invariant import registry, selector
    from batch_invariant.errors import BatchInvariantError, ConfigurationError, UnknownBackend
    from batch_invariant.proof import certificate, checks
    from batch_invariant.proof.changes import changes
    from batch_invariant.proof.control import stock_varies

    started = time.perf_counter()
    scope = "full" if args.full else "quick"
    try:
        old = certificate.read(args.against) if args.against else None
        backend = args.backend or selector.current_backend("cpu").name
        items = checks.plan(backend, args.op, full=args.full)
        if old and old["scope"] == "partial":
            raise ConfigurationError(f"{args.against} is of a run that was broken off or cut down")
        if old and old["scope"] != scope:
            raise ConfigurationError(
                f"{args.against} is a {old['scope']} certificate, and this run is {scope}; "
                f"run with{'out' if args.full else ''} --full"
            )
        if args.report and not args.report.absolute().parent.is_dir():
            raise ConfigurationError(f"--report {args.report}: there is no such folder")
    except (ConfigurationError, UnknownBackend) as error:
        sys.stderr.write(f"bi verify: {error}\n")
        return 2
    except BatchInvariantError as error:
        sys.stderr.write(f"bi verify: {error}\n")
        return 1
    outcomes = []
    varies: dict[str, list[str] | None] = {}
    with progress(len(items), plain=False) as step:
        for item in items:
            step(item.label, 0)
            if item.check == "kernel" and item.subject is not None:
                varies[item.subject.label] = stock_varies(item.subject)
            outcomes.append(checks.run(item))
            step(item.label, 1)
    made = certificate.make(backend, scope, (outcome.as_dict() for outcome in outcomes))
    evidence = None if args.op else registry.load(backend).evidence(args.full)
    if evidence is not None:
        made["evidence"] = dict(evidence.details)
        made["holds"] = made["holds"] and evidence.holds
    found = changes(old, made, args.op) if old else []
    good = made["holds"] and not any(change.numeric for change in found)
    if args.report:
        args.report.write_text(certificate.text(made))
    if args.json:
        sys.stdout.write(certificate.text(made))
    else:
        emit(_lines(made, outcomes, varies, time.perf_counter() - started))
        if evidence is not None:
            emit([_verdict(line, not evidence.holds) for line in ("", *evidence.lines)])
    if old is not None:
        emit(_difference(args.against, found), sys.stderr if args.json else None)
    return 0 if good else 1


def _lines(
    made: dict[str, Any],
    outcomes: list[Any],
    varies: dict[str, list[str] | None],
    seconds: float,
) -> list[Line]:
    versions = made["versions"]
    machine = made["machine"]
    lines: list[Line] = [
        f"bi verify  {made['backend']}  torch {versions['torch']}  "
        f"{machine.get('device') or machine['processor']}  {machine['threads']} threads",
        "",
        f"  {'op':28} {'dtype':9} {'guarantee':10} {'checks':>6} {'bits':>7}  {'ulps':>6}  "
        "plain torch  order",
    ]
    for op, dtypes in made["ops"].items():
        for dtype, found in dtypes.items():
            if dtype != "cases":
                lines += _operator(op, dtype, found, varies.get(f"{op} {dtype}"))
    if whole := made.get("whole"):
        bad_whole = whole.get("broken", {}).keys() != whole.get("gaps", {}).keys()
        state = "BREAKS" if bad_whole else "holds"
        lines.append(_verdict(f"  {', '.join(whole['checks']):28} {state}", bad_whole))
        lines += _findings(whole)
    names = list(made["ops"])
    bad = {outcome.item.subject.op.name for outcome in outcomes if _failed(outcome)}
    gaps = sum(outcome.item.gap is not None for outcome in outcomes)
    compared = sum(outcome.looked_at for outcome in outcomes)
    missing = {name for name, dtypes in made["ops"].items() if _missing(dtypes)} - bad
    held = len(names) - len(bad) - len(missing)
    last = f"{held} of {len(names)} operators hold"
    last += f", {len(missing)} are declared missing" if missing else ""
    last += f", {compared} comparisons"
    lines += ["", f"{last}{f', {gaps} declared gaps' if gaps else ''}. {seconds:.1f} s"]
    return lines


def _missing(dtypes: dict[str, Any]) -> bool:
    """Whether there is no kernel in any dtype, which the backend says."""
    return all(_gap(found) for dtype, found in dtypes.items() if dtype != "cases")


def _gap(found: dict[str, Any]) -> str | None:
    """Why there is no kernel, if the backend declares it and it is so."""
    reason: str | None = found.get("gaps", {}).get("kernel")
    return reason if "kernel" in found.get("broken", {}) else None


def _failed(outcome: Any) -> bool:
    return outcome.item.subject is not None and not outcome.ok


def _operator(op: str, dtype: str, found: dict[str, Any], varies: list[str] | None) -> list[Line]:
    if (reason := _gap(found)) is not None:
        return [f"  {op:28} {dtype:9} {'-':10} {'-':>6} {'gap':>7}  {'':>6}  {'-':11}  {reason}"]
    broken, gaps = found.get("broken", {}), found.get("gaps", {})
    bad = broken.keys() != gaps.keys()
    order = found.get("text") or found.get("order", "")
    names = [transform.split()[0] for transform in varies or ()]
    stock = "-" if varies is None else " ".join(names) or "same"
    line = (
        f"  {op:28} {dtype:9} {found.get('guarantee', '-'):10} {sum(found['checks'].values()):6} "
        f"{'BREAKS' if bad else 'same':>7}  {found.get('ulps', '')!s:>6}  {stock:11}  {order}"
        f"{', portable' if found.get('portable') else ''}"
    )
    return [_verdict(line, bad), *_findings(found)]


def _findings(found: dict[str, Any]) -> list[Line]:
    """What is broken, and what is a declared gap, a line each."""
    broken, gaps = found.get("broken", {}), found.get("gaps", {})
    lines: list[Line] = []
    for check, reason in gaps.items():
        state = "as expected" if check in broken else "HOLDS: the gap is closed, remove it"
        lines.append(f"      {check}: declared gap, {state}: {reason}")
    for check, texts in broken.items():
        if check not in gaps:
            lines += [f"      {check}: {text}" for text in texts]
    return lines


def _verdict(line: str, broken: bool) -> Line:
    return (line, "bold red") if broken else line


def _difference(path: Path, found: list[Any]) -> list[Line]:
    if not found:
        return ["", f"Nothing differs from {path}."]
    lines: list[Line] = ["", f"Against {path}:"]
    lines += [(f"  {change}", "bold red" if change.numeric else "") for change in found]
    return lines
