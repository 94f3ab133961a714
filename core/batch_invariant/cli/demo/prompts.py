"""The prompts: a list of strings, committed or the user's."""

from __future__ import annotations

import json
from pathlib import Path

from batch_invariant.errors import ConfigurationError

PROMPTS = Path(__file__).with_name("prompts.json")


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
