"""A whole model, eager: are the last logits of row 0 the same at every batch size, at what cost?

HF Qwen3 of 8B widths with 8 layers and random weights, bf16, sdpa. `peer.py` runs it beside a peer;
alone it compares stock torch and this library's mode:

    python backends/cuda/benchmarks/model.py --out docs/benchmarks/cuda_model.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import triton
from transformers import Qwen3Config, Qwen3ForCausalLM

import batch_invariant as bi

TOKENS = (1, 17, 256)
BATCHES = (1, 2, 3, 8, 32, 64)
VOCABULARY = 151936


WIDTHS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def model(device: str = "cuda", **widths: int) -> torch.nn.Module:
    """Qwen3 of 8B widths, 8 layers, seeded random weights; or of other widths."""
    torch.manual_seed(0)
    config = Qwen3Config(**(WIDTHS | widths), tie_word_embeddings=False)
    with torch.device(device):
        made = Qwen3ForCausalLM._from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return made.eval()


def milliseconds(call: Callable[[], Any], trials: int = 7) -> float:
    """The median wall time of a call with an empty queue, after one that is not counted."""
    call()
    times = []
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(trials):
        wait()
        started = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - started)
    return round(sorted(times)[trials // 2] * 1e3, 3)


@torch.inference_mode()
def measure(network: torch.nn.Module) -> dict[str, dict[str, float]]:
    """For each number of tokens and rows: logits of row 0 that are not those alone, and ms."""
    found = {}
    for tokens in TOKENS:
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(0, 150000, (max(BATCHES), tokens), generator=generator).cuda()
        alone = None
        for rows in BATCHES:

            def call(rows: int = rows, ids: torch.Tensor = ids) -> torch.Tensor:
                return network(input_ids=ids[:rows], use_cache=False, logits_to_keep=1).logits

            logits = call()[0, -1].view(torch.int16)
            alone = logits if alone is None else alone
            found[f"S{tokens}B{rows}"] = {
                "elements_differ": int((logits != alone).sum()),
                "ms": milliseconds(call),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="write the report to this file")
    options = parser.parse_args()
    network = model()
    whole = {}
    for label, mode in {"stock": nullcontext, "batch_invariant": bi.enabled}.items():
        with mode():
            whole[label] = measure(network)
    lines = {
        size: {label: found[size] for label, found in whole.items()} for size in whole["stock"]
    }
    for size, line in lines.items():
        print(f"{size:8}", line)
    report = {
        "command": "python backends/cuda/benchmarks/model.py --out docs/benchmarks/cuda_model.json",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": torch.cuda.get_device_name(),
        "method": "ms per eager forward, and logits of row 0 that differ from those alone",
        "lines": lines,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
