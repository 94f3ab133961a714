"""`bi demo`: a real language model, each prompt alone and in batches, in stock torch and with the
library on, compared bit for bit.

Measuring makes a `Report` and prints nothing; rendering reads the report and measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import random
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batch_invariant.cli import models
from batch_invariant.errors import BatchInvariantError, ConfigurationError, UnknownBackend

if TYPE_CHECKING:
    import torch

    from batch_invariant.cli.render import Line

BATCH_SIZES = (1, 2, 3, 7, 8, 16, 32)
DTYPES = ("bfloat16", "float32", "float16")
NEW_TOKENS = 8
PROMPTS = Path(__file__).with_name("demo_prompts.json")
PLACES = 4  # at how many positions of the batch each prompt is seen, where a batch has so many


@dataclass(frozen=True)
class Decoded:
    """What greedy decoding of one prompt gave, up to and including its end-of-text token."""

    tokens: torch.Tensor  # [steps], int64
    logits: torch.Tensor  # [steps, vocabulary], float32: what `generate` hands out


@dataclass(frozen=True)
class Difference:
    """How a prompt's decoding in a batch differs from its decoding alone."""

    logits: bool  # the bits of the logits differ at some step
    token_step: int | None  # the first step with another token, or None
    largest: float  # largest |difference| of logits that follow the same tokens; NaN counts as inf


@dataclass(frozen=True)
class SizeResult:
    """One batch size: how many of the prompts differed in any of their batches."""

    batch_size: int
    batches: int
    prompts: int
    logits_differ: int
    tokens_differ: int
    largest_difference: float
    seconds: float


@dataclass(frozen=True)
class Example:
    """One prompt whose text the batch changed."""

    prompt: str
    batch_size: int
    position: int
    token_step: int
    text_alone: str
    text_in_batch: str


@dataclass(frozen=True)
class Column:
    """One way of running: every batch size, and the prompts that differed at any size."""

    alone_seconds: float
    sizes: list[SizeResult]
    logits_differ: int
    tokens_differ: int
    example: Example | None

    @property
    def same(self) -> bool:
        return self.logits_differ == 0 and self.tokens_differ == 0


@dataclass(frozen=True)
class Report:
    """Everything `bi demo` found; `--json` prints these fields."""

    model: str
    dtype: str
    parameters: int
    prompts: int
    prompt_tokens: tuple[int, int]  # the shortest and the longest prompt
    max_new_tokens: int
    machine: dict[str, Any]
    versions: dict[str, str]
    backend: str
    load_seconds: float
    stock: Column
    invariant: Column

    @property
    def ok(self) -> bool:
        return self.invariant.same


def plan(prompts: int, batch_size: int, places: int = PLACES) -> list[list[int]]:
    """Which prompts go into which batch: lists of exactly `batch_size` indices below `prompts`.

    There are min(batch_size, places) rounds. A round holds every prompt; from round to round a
    prompt moves to another position and meets other neighbours, so it is padded otherwise too.
    Positions left over in a round's last batch are filled with more of the prompts.
    """
    rounds = min(batch_size, places)
    batches = []
    for turn in range(rounds):
        shift = turn * (batch_size // rounds)
        queues: list[list[int]] = [[] for _ in range(batch_size)]  # one for each position
        for prompt in range(prompts):
            queues[(prompt + shift) % batch_size].append(prompt)
        shuffle = random.Random(batch_size * places + turn).shuffle  # the same on every run
        for queue in queues:
            shuffle(queue)
        while any(queues):
            batch = [queue.pop() if queue else -1 for queue in queues]
            others = [prompt for prompt in range(prompts) if prompt not in batch]
            shuffle(others)
            for position, prompt in enumerate(batch):
                if prompt < 0:
                    batch[position] = others.pop() if others else position % prompts
            batches.append(batch)
    return batches


def compare(alone: Decoded, batched: Decoded) -> Difference:
    """Two decodings of one prompt: integer views of the bits, no tolerance.

    Logits are compared for as long as the tokens before them agree; from the first other token on
    the decodings are of different texts, and count as different.
    """
    import torch

    steps = min(len(alone.tokens), len(batched.tokens))
    other = (alone.tokens[:steps] != batched.tokens[:steps]).nonzero()
    token_step = int(other[0]) if len(other) else None
    if token_step is None and len(alone.tokens) != len(batched.tokens):
        token_step = steps
    shared = steps if token_step is None else min(token_step + 1, steps)
    ours, theirs = alone.logits[:shared], batched.logits[:shared]
    changed = ours.view(torch.int32) != theirs.view(torch.int32)
    gap = (ours[changed].double() - theirs[changed].double()).abs().nan_to_num(nan=math.inf)
    return Difference(
        logits=bool(changed.any()) or token_step is not None,
        token_step=token_step,
        largest=float(gap.max()) if gap.numel() else 0.0,
    )


def decode(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> list[Decoded]:
    """Greedy decoding of the prompts as one batch: left padding, `model.generate`, KV cache."""
    import torch

    encoded = tokenizer(list(prompts), return_tensors="pt", padding=True)
    ends = _end_tokens(model, tokenizer)
    config = type(model.generation_config)(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    out = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        generation_config=config,
    )
    tokens = out.sequences[:, encoded["input_ids"].shape[1] :]
    logits = torch.stack(out.logits, dim=1)  # [rows, steps, vocabulary], float32
    rows = []
    for row in range(len(prompts)):
        stops = [i for i, token in enumerate(tokens[row].tolist()) if token in ends]
        steps = stops[0] + 1 if stops else tokens.shape[1]
        rows.append(Decoded(tokens[row, :steps], logits[row, :steps]))
    return rows


def measure(
    prompts: Sequence[str],
    batch_sizes: Sequence[int],
    decode_batch: Callable[[Sequence[str]], list[Decoded]],
    text: Callable[[torch.Tensor], str],
    step: Callable[[str, int], None],
) -> Column:
    """Every prompt alone, then in the batches of `plan` at every size, each against itself alone.

    decode_batch: prompts to one `Decoded` each; text: tokens to text; step: told what is being
    worked on and how many more batches are done. Only `decode_batch` is timed.
    """
    clock = 0.0

    def timed(batch: Sequence[str]) -> list[Decoded]:
        nonlocal clock
        began = time.perf_counter()
        rows = decode_batch(batch)
        clock += time.perf_counter() - began
        return rows

    alone = []
    for prompt in prompts:
        step("each prompt alone", 0)
        alone += timed([prompt])
        step("each prompt alone", 1)
    alone_seconds = clock

    sizes = []
    any_logits: set[int] = set()
    any_tokens: set[int] = set()
    example: Example | None = None
    for size in batch_sizes:
        clock = 0.0
        largest = 0.0
        logits: set[int] = set()
        tokens: set[int] = set()
        batches = plan(len(prompts), size)
        for batch in batches:
            step(f"batches of {size}", 0)
            rows = timed([prompts[index] for index in batch])
            for position, (index, row) in enumerate(zip(batch, rows, strict=True)):
                found = compare(alone[index], row)
                largest = max(largest, found.largest)
                if found.logits:
                    logits.add(index)
                if found.token_step is None:
                    continue
                tokens.add(index)
                if example is None or found.token_step < example.token_step:
                    example = Example(
                        prompt=prompts[index],
                        batch_size=size,
                        position=position,
                        token_step=found.token_step,
                        text_alone=text(alone[index].tokens),
                        text_in_batch=text(row.tokens),
                    )
            step(f"batches of {size}", 1)
        any_logits |= logits
        any_tokens |= tokens
        sizes.append(
            SizeResult(size, len(batches), len(prompts), len(logits), len(tokens), largest, clock)
        )
    return Column(alone_seconds, sizes, len(any_logits), len(any_tokens), example)


def demonstrate(
    model_name: str,
    *,
    dtype: str,
    prompts: Sequence[str],
    batch_sizes: Sequence[int],
    new_tokens: int,
    backend: str | None,
    step: Callable[[str, int], None],
) -> Report:
    """Loads the model and measures it twice, in stock torch and with the library on.

    Raises `WeightsNotFound`, and what selecting the backend and running the model raise.
    """
    weights = models.locate(model_name)

    import torch

    import batch_invariant as bi

    if bi.is_enabled():
        raise ConfigurationError(
            "the mode is on already, so stock torch cannot be measured: run bi demo without "
            "VLLM_BATCH_INVARIANT"
        )
    with bi.use_backend(backend) if backend else nullcontext():
        chosen = bi.current_backend("cpu").name  # an unusable one fails here, before the wait
        step(f"loading {weights.name}", 0)
        began = time.perf_counter()
        model, tokenizer = models.load(weights, dtype)
        load_seconds = time.perf_counter() - began

        def decode_batch(batch: Sequence[str]) -> list[Decoded]:
            return decode(model, tokenizer, batch, new_tokens)

        def column(name: str) -> Column:
            return measure(
                prompts,
                batch_sizes,
                decode_batch,
                tokenizer.decode,
                lambda label, done: step(f"{name}: {label}", done),
            )

        with models.quiet():
            stock = column("stock torch")
            with bi.enabled():
                invariant = column("batch_invariant")
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    import transformers

    return Report(
        model=weights.name,
        dtype=dtype,
        parameters=model.num_parameters(),
        prompts=len(prompts),
        prompt_tokens=(min(lengths), max(lengths)),
        max_new_tokens=new_tokens,
        machine={
            "processor": _processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
        },
        versions={
            "batch_invariant": bi.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        backend=chosen,
        load_seconds=load_seconds,
        stock=stock,
        invariant=invariant,
    )


def as_json(report: Report) -> str:
    """The report as one JSON object; a difference that is not finite is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({**plain(dataclasses.asdict(report)), "ok": report.ok}, indent=2)


def as_lines(report: Report) -> list[Line]:
    """The report for people, in 80 columns where names and figures are not unusually long."""
    machine, versions = report.machine, report.versions
    threads = machine["threads"]
    shortest, longest = report.prompt_tokens
    lines: list[Line] = [
        (
            f"bi demo  {report.model}, {report.parameters / 1e6:.1f} M parameters, {report.dtype}",
            "bold",
        ),
        f"torch {versions['torch']}, transformers {versions['transformers']}, "
        f"backend {report.backend}, {threads} thread{'s' if threads > 1 else ''}",
        f"{machine['processor']} ({machine['capability']})",
        f"{report.prompts} prompts of {shortest} to {longest} tokens, "
        f"{report.max_new_tokens} new tokens each, greedy, left padding",
        "",
        "Prompts whose logits (bit for bit) or tokens in a batch are not those they get",
        "alone, and the largest |difference| of two logits:",
        "",
    ]
    from batch_invariant.cli import render

    def cells(result: SizeResult) -> list[str]:
        return [
            f"{result.logits_differ}/{result.prompts}",
            f"{result.tokens_differ}/{result.prompts}",
            f"{result.largest_difference:.2g}",
            f"{result.seconds:.1f} s",
        ]

    alone = [f"{column.alone_seconds:.1f} s" for column in (report.stock, report.invariant)]
    rows = [["alone", "", "", "", alone[0], "", "", "", alone[1]]]
    for stock, invariant in zip(report.stock.sizes, report.invariant.sizes, strict=True):
        rows.append([str(stock.batch_size), *cells(stock), *cells(invariant)])
    figures = ["logits", "tokens", "largest", "time"]
    lines += render.table(
        ["batch", *figures, *figures],
        rows,
        [("", 1), ("stock torch", 4), ("batch_invariant", 4)],
    )
    lines += ["", *_verdict(report)]
    return lines


def _verdict(report: Report) -> list[Line]:
    def changed(column: Column) -> str:
        return (
            f"the batch changed the logits of {column.logits_differ} of {report.prompts} prompts, "
            f"the text of {column.tokens_differ}."
        )

    stock, invariant = report.stock, report.invariant
    lines: list[Line] = []
    if stock.same:
        lines.append(
            "stock torch: no difference on this machine for these prompts and batch sizes."
        )
    else:
        lines += textwrap.wrap(f"stock torch: {changed(stock)}", 80)
        lines += _show(stock.example)
    if invariant.same:
        lines.append(("batch_invariant: the same bits alone and in every batch.", "bold green"))
    else:
        failure = textwrap.wrap(f"batch_invariant FAILED: {changed(invariant)}", 80)
        lines += [(line, "bold red") for line in failure]
        lines += _show(invariant.example)
    return lines


def _show(example: Example | None) -> list[Line]:
    if example is None:
        return []
    from batch_invariant.cli import render

    where = f"in a batch of {example.batch_size}"
    parts = {
        "prompt": example.prompt,
        "alone": example.text_alone,
        where: example.text_in_batch,
    }
    width = max(map(len, parts))
    return [
        f"  {name:{width}}  {render.clip(json.dumps(text, ensure_ascii=False), 74 - width)}"
        for name, text in parts.items()
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bi demo`; building them imports neither torch nor transformers."""
    parser.description = textwrap.dedent(
        """\
        Greedy-decode real prompts with a real language model, each alone and in batches of every
        size, first in stock torch and then with the library on; compare the logits bit for bit.
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
        batches = len(prompts) + sum(len(plan(len(prompts), size)) for size in args.batch_sizes)
        with (
            _threads(args.threads),
            render.progress(2 * batches, plain=not args.json) as step,
        ):
            report = demonstrate(
                args.model,
                dtype=args.dtype,
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
    if args.json:
        print(as_json(report))
    else:
        render.emit(as_lines(report))
    return 0 if report.ok else 1


def read_prompts(file: Path) -> list[str]:
    """The prompts in a JSON list or, one on each line, in a text file; `ConfigurationError`."""
    try:
        content = file.read_text(encoding="utf-8")
        prompts = json.loads(content) if file.suffix == ".json" else content.splitlines()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--prompts {file}: {error}") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigurationError(f"--prompts {file}: expected a JSON list of strings")
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ConfigurationError(f"--prompts {file}: no prompt in it")
    return prompts


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


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
