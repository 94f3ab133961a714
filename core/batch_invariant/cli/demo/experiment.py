"""The whole measurement: the model is loaded, and run in stock torch and with the library on."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

import batch_invariant as bi
from batch_invariant.cli import models
from batch_invariant.cli.demo import batches, paths
from batch_invariant.cli.demo.generation import Generator
from batch_invariant.cli.demo.report import Column, Report
from batch_invariant.errors import ConfigurationError


def steps(prompts: int, batch_sizes: Sequence[int]) -> int:
    """How many calls `demonstrate` reports as done."""
    in_batches = sum(len(batches.plan(prompts, size)) for size in batch_sizes)
    return 2 * (prompts + in_batches + paths.steps(prompts))


def demonstrate(
    model_name: str,
    *,
    dtype: str,
    device: str,
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
    if bi.is_enabled():
        raise ConfigurationError(
            "the mode is on already, so stock torch cannot be measured: run bi demo without "
            "VLLM_BATCH_INVARIANT"
        )
    with bi.use_backend(backend) if backend else nullcontext():
        chosen = bi.current_backend(device).name  # an unusable one fails here, before the wait
        step(f"loading {weights.name}", 0)
        began = time.perf_counter()
        model, tokenizer = models.load(weights, dtype)
        model.to(device)
        load_seconds = time.perf_counter() - began
        generator = Generator(model, tokenizer, new_tokens, device)

        def column(name: str, keyed: bool) -> Column:
            def say(label: str, done: int) -> None:
                step(f"{name}: {label}", done)

            return batches.measure(
                prompts,
                batch_sizes,
                generator.greedy,
                tokenizer.decode,
                say,
                lambda alone: paths.measure(prompts, alone, generator, keyed, say),
            )

        with models.quiet():
            stock = column("stock torch", keyed=False)
            with bi.enabled():
                invariant = column("batch_invariant", keyed=True)
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
            "processor": _processor(device),
            "capability": _capability(device),
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
        device=device,
        load_seconds=load_seconds,
        stock=stock,
        invariant=invariant,
    )


def _capability(device: str) -> str:
    if device == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    major, minor = torch.cuda.get_device_capability()
    return f"compute capability {major}.{minor}"


def _processor(device: str) -> str:
    """The processor's name, where the system tells it."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
