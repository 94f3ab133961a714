"""The main job on a real model: SmolLM2-135M-Instruct, alone and in batches, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import batch_invariant as bi
from batch_invariant.cli import models
from batch_invariant.cli.demo import batches
from batch_invariant.cli.demo.comparing import Decoded
from batch_invariant.cli.demo.generation import Generator
from batch_invariant.cli.demo.prompts import PROMPTS, read_prompts
from batch_invariant.cli.demo.report import Column

SIZES = (1, 3, 8)
NEW_TOKENS = 4


@dataclass(frozen=True)
class Real:
    model: Any
    tokenizer: Any
    prompts: list[str]

    def cast(self, dtype: torch.dtype) -> None:
        """The parameters only: `model.to` would round the rotary frequencies as well."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)

    def measure(self, dtype: torch.dtype) -> Column:
        self.cast(dtype)

        def decode(batch: Sequence[str]) -> list[Decoded]:
            return Generator(self.model, self.tokenizer, NEW_TOKENS).greedy(batch)

        with models.quiet():
            return batches.measure(
                self.prompts, SIZES, decode, self.tokenizer.decode, lambda label, done: None
            )


@pytest.fixture(scope="module")
def weights() -> models.Weights:
    absent = [name for name in ("transformers", "accelerate", "gguf") if find_spec(name) is None]
    if absent:
        pytest.skip(f"loading the real model needs {', '.join(absent)}")
    try:
        return models.locate(models.DEFAULT)
    except models.WeightsNotFound as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def real(weights: models.Weights) -> Real:
    """Loaded once, in bfloat16: float32 holds the same numbers exactly."""
    model, tokenizer = models.load(weights, "bfloat16")
    return Real(model, tokenizer, read_prompts(PROMPTS)[:8])


DTYPES = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prompt_has_the_same_bits_alone_and_in_every_batch(
    real: Real, dtype: torch.dtype
) -> None:
    with bi.enabled():
        column = real.measure(dtype)
    assert [(s.batch_size, s.logits_differ, s.tokens_differ) for s in column.sizes] == [
        (size, 0, 0) for size in SIZES
    ]
    assert column.same


def test_stock_torch_shows_a_difference_so_the_test_above_can_fail(real: Real) -> None:
    for dtype in DTYPES:
        column = real.measure(dtype)
        alone_again, *batches = column.sizes
        assert (alone_again.batch_size, alone_again.logits_differ) == (1, 0)
        if any(size.logits_differ for size in batches):
            return
    pytest.skip(
        "stock torch is batch-invariant on this machine for this model, in bfloat16 and float32: "
        "the test with the library on proves nothing here"
    )


def test_the_model_still_says_what_it_says_in_stock_torch(real: Real) -> None:
    """Invariant, but of what? The first token of a confident answer is the same in both."""
    real.cast(torch.float32)
    prompt = ["The capital of France is"]
    with models.quiet():
        (stock,) = Generator(real.model, real.tokenizer, 1).greedy(prompt)
        with bi.enabled():
            (invariant,) = Generator(real.model, real.tokenizer, 1).greedy(prompt)
    assert real.tokenizer.decode(invariant.tokens).strip() == "Paris"
    assert torch.equal(stock.tokens, invariant.tokens)
    torch.testing.assert_close(invariant.logits, stock.logits, rtol=1e-3, atol=1e-3)


# What a user runs: transformers and torch, and not a word about this library.
SCRIPT = """
import hashlib, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
prompts = ["Water boils at 100 degrees Celsius, which is", "The opposite of generous is",
           "Which planet has the most moons, and how do astronomers count them?"]

def digests(batch):
    inputs = tokenizer(batch, return_tensors="pt", padding=True)
    out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False,
                         output_logits=True, return_dict_in_generate=True)
    logits = torch.stack(out.logits, dim=1)
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in logits]

print("alone", *[digests([prompt])[0] for prompt in prompts])
print("batch", *digests(prompts))
"""


def run_script(
    tmp_path: Path, weights: models.Weights, switch: str | None
) -> tuple[list[str], list[str]]:
    script = tmp_path / "plain.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_BATCH_INVARIANT"}
    if switch is not None:
        environment["VLLM_BATCH_INVARIANT"] = switch
    done = subprocess.run(
        [sys.executable, str(script), weights.source, str(weights.gguf_file)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alone, batch = (line.split() for line in done.stdout.splitlines())
    assert (alone[0], batch[0], len(alone), len(batch)) == ("alone", "batch", 4, 4)
    return alone[1:], batch[1:]


def test_an_unmodified_script_is_batch_invariant_under_the_variable(
    tmp_path: Path, weights: models.Weights
) -> None:
    assert "batch_invariant" not in SCRIPT
    alone, batch = run_script(tmp_path, weights, "1")
    assert alone == batch
    assert len(set(alone)) == 3


def test_the_same_script_without_the_variable_is_not(
    tmp_path: Path, weights: models.Weights
) -> None:
    """The negative control of the test above."""
    alone, batch = run_script(tmp_path, weights, None)
    if alone == batch:
        pytest.skip("stock torch shows no difference for this script on this machine")
    assert len(set(alone)) == 3
