"""How the demonstration runs a model: greedy or sampled, as one batch or behind a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from batch_invariant.cli.demo.comparing import Decoded

SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_k": 50}


@dataclass(frozen=True)
class Generator:
    """A model with its tokenizer, on a device; every result is on the CPU."""

    model: Any
    tokenizer: Any
    new_tokens: int
    device: str = "cpu"

    def greedy(self, prompts: Sequence[str]) -> list[Decoded]:
        """The prompts as one batch: left padding, `model.generate`, KV cache."""
        return self._generate(self._encode(prompts), {})

    def sampled(self, prompts: Sequence[str], seeds: Sequence[int], keyed: bool) -> list[Decoded]:
        """The same with draws: keyed by the seeds, or torch's stream from the first of them."""
        encoded = self._encode(prompts)
        if not keyed:
            torch.manual_seed(seeds[0])
            return self._generate(encoded, {"do_sample": True, **SAMPLING})
        from batch_invariant.integrations.generation import SeededSampling

        processor = SeededSampling(seeds, encoded["attention_mask"], **SAMPLING)
        return self._generate(encoded, {}, logits_processor=[processor])

    def chunked(self, prompt: str, chunk: int) -> Decoded:
        """Greedy, after a prefill in chunks of so many tokens."""
        encoded = self._encode([prompt])
        ids = encoded["input_ids"]
        return self._behind(encoded, self._prefilled(ids[:, :-1].split(chunk, dim=1)))

    def reused(self, prompt: str, other: str) -> Decoded:
        """Greedy, with the first half of the prompt taken from the cache of an earlier batch, in
        which another prompt stood beside it."""
        encoded = self._encode([prompt])
        ids = encoded["input_ids"]
        half = ids.size(1) // 2
        beside = self._encode([other])["input_ids"]
        beside = torch.cat([beside, ids.flip(1)], dim=1)[:, :half]
        cache = self._prefilled([torch.cat([ids[:, :half], beside])] if half else [])
        if half:
            cache.batch_select_indices(torch.tensor([0], device=self.device))
        return self._behind(encoded, cache)

    def _encode(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        encoded = self.tokenizer(list(prompts), return_tensors="pt", padding=True)
        names = ("input_ids", "attention_mask")
        return {name: encoded[name].to(self.device) for name in names}

    def _prefilled(self, parts: Sequence[torch.Tensor]) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        with torch.no_grad():
            for part in parts:
                if part.size(1):
                    self.model(input_ids=part, past_key_values=cache, logits_to_keep=1)
        return cache

    def _behind(self, encoded: dict[str, torch.Tensor], cache: Any) -> Decoded:
        (found,) = self._generate(encoded, {}, past_key_values=cache)
        return found

    def _generate(
        self, encoded: dict[str, torch.Tensor], options: dict[str, Any], **more: Any
    ) -> list[Decoded]:
        ends = self._end_tokens()
        config = type(self.model.generation_config)(
            max_new_tokens=self.new_tokens,
            eos_token_id=ends,
            pad_token_id=self.tokenizer.pad_token_id,
            output_logits=True,
            return_dict_in_generate=True,
            **{"do_sample": False, **options},
        )
        out = self.model.generate(**encoded, generation_config=config, **more)
        tokens = out.sequences[:, encoded["input_ids"].shape[1] :].cpu()
        logits = torch.stack(out.logits, dim=1).cpu()  # [rows, steps, vocabulary], float32
        rows = []
        for row in range(len(tokens)):
            stops = [i for i, token in enumerate(tokens[row].tolist()) if token in ends]
            steps = stops[0] + 1 if stops else tokens.shape[1]
            rows.append(Decoded(tokens[row, :steps], logits[row, :steps]))
        return rows

    def _end_tokens(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        return [ends] if isinstance(ends, int) else list(ends or [])
