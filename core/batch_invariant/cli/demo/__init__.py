"""`bi demo`: a real language model, each prompt alone and in batches, in stock torch and with the
library on, compared bit for bit.

Measuring makes a `Report` and prints nothing; rendering reads the report and measures nothing.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from batch_invariant.cli import models
from batch_invariant.cli.demo.prompts import PROMPTS, read_prompts
from batch_invariant.errors import BatchInvariantError, ConfigurationError, UnknownBackend

BATCH_SIZES = (1, 2, 3, 7, 8, 16, 32)
DEVICES = ("cpu", "cuda")
DTYPES = ("bfloat16", "float32", "float16")
NEW_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bi demo`; building them imports neither torch nor transformers."""
    parser.description = textwrap.dedent(
        """\
        Greedy-decode real prompts with a real language model, each alone and in batches of every
        size, first in stock torch and then with the library on; compare the logits bit for bit.
        Then the same requests sampled, with their prompts in chunks, and behind a cached prefix.
        Exit status: 0 if the library gave the same bits everywhere, 1 if not, 2 for wrong usage
        or missing weights."""
    )
    parser.add_argument(
        "--model",
        default=models.DEFAULT,
        metavar="PATH_OR_ID",
        help=f"{models.DEFAULT} (the default) or {models.GEMMA}, from their packages; a .gguf "
        "file; a folder in the Hugging Face format; or a hub id",
    )
    parser.add_argument(
        "--batch-sizes",
        type=_sizes,
        default=list(BATCH_SIZES),
        metavar="N,N,...",
        help=f"default: {','.join(map(str, BATCH_SIZES))}",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=_positive,
        default=NEW_TOKENS,
        metavar="N",
        help=f"default: {NEW_TOKENS}; the logits of every step are kept, 4 bytes for each prompt, "
        "step and word of the vocabulary",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help="default: bfloat16, which models are served in, and in which the batch changes the "
        "text and not only the last bits of the logits, as it mostly does in float32",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a JSON list of strings, or a text file with one prompt on each line; default: the "
        "committed prompts",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default=DEVICES[0],
        help="default: cpu; cuda needs a GPU and batch-invariant-cuda",
    )
    parser.add_argument("--backend", metavar="NAME", help="default: the one that bi doctor shows")
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="torch's threads; default: as torch chooses"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")


def run(args: argparse.Namespace) -> int:
    """`bi demo` with parsed options; returns the exit status."""
    from batch_invariant.cli import render

    try:
        prompts = read_prompts(args.prompts or PROMPTS)
        from batch_invariant.cli.demo import experiment

        calls = experiment.steps(len(prompts), args.batch_sizes)
        with _threads(args.threads), render.progress(calls, plain=not args.json) as step:
            report = experiment.demonstrate(
                args.model,
                dtype=args.dtype,
                device=args.device,
                prompts=prompts,
                batch_sizes=args.batch_sizes,
                new_tokens=args.max_new_tokens,
                backend=args.backend,
                step=step,
            )
    except (models.WeightsNotFound, ConfigurationError, UnknownBackend) as error:
        print(f"bi demo: {error}", file=sys.stderr)
        return 2
    except BatchInvariantError as error:
        print(f"bi demo: {error}", file=sys.stderr)
        return 1
    from batch_invariant.cli.demo.lines import as_lines
    from batch_invariant.cli.demo.report import as_json

    if args.json:
        print(as_json(report))
    else:
        render.emit(as_lines(report))
    return 0 if report.ok else 1


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _sizes(text: str) -> list[int]:
    return sorted({_positive(part.strip()) for part in text.split(",")})


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
