"""A compiled model, with the mode and without: are its logits those of one row alone, at what cost?

The model of `model.py` under `torch.compile`. Every graph is compiled by a process of its own with
empty caches, all at once; then the processes measure one after another, with the GPU to themselves.

    python compiled.py --out cuda_compiled.json

`decode` is one token in a CUDA graph (mode="reduce-overhead"), `prefill` the dynamic graph of
several rows and tokens. The compile time is that of the first call, after an eager one, so that
Triton has compiled the kernels of the library before. `eager_bits` is the mode with that option,
and `logits_unlike_eager` the part of all logits of that call whose bits eager code does not give;
--smoke: tiny, on a CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from model import BATCHES, milliseconds, model

SEVERAL = tuple(reversed(BATCHES[1:]))
PARTS: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    # How it is compiled, tokens, rows; the first number of rows is timed.
    "prefill": ({"dynamic": True}, 256, SEVERAL[:1]),
    "decode": ({"mode": "reduce-overhead"}, 1, (1,)),
    "prefills": ({"dynamic": True}, 256, SEVERAL[1:]),
    "short": ({"dynamic": True}, 17, SEVERAL),
    "decodes": ({"dynamic": True}, 1, SEVERAL),
    "prefill_alone": ({"dynamic": True}, 256, (1,)),
    "short_alone": ({"dynamic": True}, 17, (1,)),
}
PROCESSES = (
    *(("ours", part) for part in PARTS),
    *(("stock", part) for part in ("prefill", "decode", "prefills")),
    *(("eager_bits", part) for part in ("prefill", "decode")),
)
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def ids(rows: int, tokens: int, smoke: bool) -> torch.Tensor:
    """The first rows of the prompts of that length."""
    generator = torch.Generator().manual_seed(tokens)
    most = SMALL["vocab_size"] if smoke else 150000
    drawn = torch.randint(0, most, (max(BATCHES), tokens), generator=generator)[:rows]
    return drawn if smoke else drawn.cuda()


@torch.inference_mode()
def work(channel: Any, variant: str, part: str, smoke: bool, profile: str) -> None:
    """Compiles a part, says so, and measures when told to."""
    options, tokens, rows = PARTS[part]
    if smoke and "mode" in options:
        options = {}
    network = model("cpu", **SMALL) if smoke else model()
    mode: Any = contextlib.nullcontext()
    if variant != "stock":
        import batch_invariant

        mode = batch_invariant.enabled(eager_bits=variant == "eager_bits")
    compiled = torch.compile(network, **options)

    def logits(given: torch.Tensor, of: Any = compiled) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        out: torch.Tensor = of(input_ids=given, use_cache=False, logits_to_keep=1).logits
        return out

    first = ids(rows[0], tokens, smoke)
    with mode:
        started = time.perf_counter()
        eager = logits(first, network)
        kernels = time.perf_counter() - started
        started = time.perf_counter()
        got = logits(first)
        taken = time.perf_counter() - started
        unlike = int((got.view(torch.int16) != eager.view(torch.int16)).sum())
        bits = {
            f"S{tokens}B{b}": logits(ids(b, tokens, smoke))[0, -1].view(torch.int16).cpu().numpy()
            for b in rows
        }
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        channel.send("ready")
        channel.recv()
        figures: dict[str, float] = {"compile_s": round(taken, 2), "graphs": graphs}
        figures["first_eager_s"] = round(kernels, 2)
        figures["logits_unlike_eager"] = round(unlike / got.numel(), 6)
        figures["ms"] = milliseconds(lambda: logits(first))
        figures["eager_ms"] = milliseconds(lambda: logits(first, network))
        if profile:
            with torch.profiler.profile() as seen:
                logits(first)
            table = seen.key_averages().table(sort_by="self_device_time_total", row_limit=40)
            Path(profile, f"{variant}_{part}.txt").write_text(table)
        channel.send((figures, bits))


def measured(smoke: bool, profile: str, patience: float, only: list[str]) -> dict[str, Any]:
    """Runs the processes; their figures, and how many logits of row 0 differ from its own alone."""
    context = get_context("spawn")
    running = {}
    for variant, part in PROCESSES:
        if only and part not in only:
            continue
        folder = tempfile.mkdtemp()
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ[name] = os.path.join(folder, name)
        here, there = context.Pipe()
        given = (there, variant, part, smoke, profile)
        process = context.Process(target=work, args=given, daemon=True)
        process.start()
        there.close()
        running[variant, part] = (process, here)
    found: dict[tuple[str, str], Any] = {}
    end = time.monotonic() + patience
    ready = {}
    for key, (process, channel) in running.items():
        with contextlib.suppress(EOFError):  # it failed, and has said why
            if channel.poll(max(0.0, end - time.monotonic())):
                channel.recv()
                ready[key] = channel
                continue
        process.kill()
    print("compiled:", *ready, flush=True)
    for key, channel in ready.items():
        channel.send("go")
        with contextlib.suppress(EOFError):
            found[key] = channel.recv()
            print(*key, found[key][0], flush=True)
    bits = {key: values for key, (_, values) in found.items()}
    ours = {at: got for (v, _), values in bits.items() if v == "ours" for at, got in values.items()}
    stock = {**bits.get(("stock", "prefill"), {}), **bits.get(("stock", "prefills"), {})}
    differ, control = _unlike(ours, "B1"), _unlike(stock, "B2")
    figures = {f"{variant}_{part}": figures for (variant, part), (figures, _) in found.items()}
    return {
        "logits_that_differ_from_alone": differ,
        "stock_logits_that_differ_from_two_rows": control,
        "figures": figures,
        "ratios": {
            f"{variant}_{part}_{name}": round(
                figures[f"{variant}_{part}"][name] / figures[f"stock_{part}"][name], 3
            )
            for variant in ("ours", "eager_bits")
            for part in ("prefill", "decode")
            for name in ("ms", "compile_s")
            if {f"{variant}_{part}", f"stock_{part}"} <= set(figures)
        },
    }


def _unlike(found: dict[str, Any], base: str) -> dict[str, int]:
    """How many logits differ from those of that number of rows, at as many tokens."""
    bases = {at: found.get(at.partition("B")[0] + base) for at in found}
    return {at: int((got != bases[at]).sum()) for at, got in found.items() if bases[at] is not None}


def main() -> None:
    """Prints the JSON, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the JSON there")
    parser.add_argument("--profile", default="", help="a folder for the kernels of one call each")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument(
        "--patience",
        type=float,
        default=3600,
        help="seconds after which what is not compiled is left out (default 3600)",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], choices=list(PARTS), help="these parts (default: all)"
    )
    given = parser.parse_args()
    if given.profile:
        Path(given.profile).mkdir(exist_ok=True)
    device = "CPU, tiny" if given.smoke else torch.cuda.get_device_name()
    versions = {"device": device, "torch": torch.__version__, "cores": os.cpu_count()}
    text = json.dumps(
        {**versions, **measured(given.smoke, given.profile, given.patience, given.only)}, indent=1
    )
    print(text)
    if given.out:
        Path(given.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
