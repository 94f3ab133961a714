"""The command `bi`. Subcommands are imported when they run, so `bi --help` loads no torch."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

_COMMANDS = {
    "audit": "runs a script and lists every operator that ran: covered, harmless or uncovered",
    "demo": "a real language model: each prompt alone and in batches, stock torch and invariant",
    "doctor": "what is installed, what works, what is selected, what to do next",
    "fingerprint": "the order in which operators add, at several sizes of the batch",
    "tune": "the fastest schedules of a backend on this machine; they change no bit",
    "verify": "every operator of a backend under transforms of the batch, bit for bit",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code: 0 good, 1 not good, 2 usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = next((word for word in words if not word.startswith("-")), "")
    parser = argparse.ArgumentParser(
        prog="bi", description="Batch-invariant operators: proof, diagnosis, demonstration."
    )
    from batch_invariant import __version__

    parser.add_argument("--version", action="version", version=f"batch-invariant {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, summary in _COMMANDS.items():
        subparser = subparsers.add_parser(command, help=summary, description=summary)
        if command == name:
            module = importlib.import_module(f"batch_invariant.cli.{command}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(words)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        sys.stderr.write("bi: interrupted\n")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
