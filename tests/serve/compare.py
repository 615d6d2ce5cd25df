"""Comparison of an engine's results with transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.serve.models import END, PROMPTS

NUM_NEW_TOKENS = 64
TOLERANCE = 1e-4
"""Largest difference of a log-probability in float32, where sums have another order."""


def compare(
    found: dict[str, Any],
    folder: Path,
    engine: str,
    scored: list[int] | None = None,
    *,
    without_end: bool = False,
    tolerance: float = TOLERANCE,
) -> None:
    """Compare the new tokens of each prompt, and the log-probabilities of prompts and new tokens.

    Args:
        found: what the engine printed.
        folder: of an export that transformers loads, with the same weights.
        engine: its name, for the line that is printed.
        scored: positions of the prompts' tokens whose log-probabilities there are; all but the
            first if not given.
        without_end: whether the engine never chooses the end of the text.
        tolerance: largest difference of a log-probability.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None
    settings: dict[str, Any] = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False}
    settings |= {"suppress_tokens": [END]} if without_end else {}
    for prompt, result in zip(PROMPTS, found["results"], strict=True):
        with torch.no_grad():
            tokens = model.generate(torch.tensor([prompt]), **settings)[0].tolist()
        places = [
            place for place in scored or range(1, len(prompt)) if place < len(prompt)
        ]
        difference = float(differences(model, tokens, places, result).max())
        said = f"{len(prompt)} + {NUM_NEW_TOKENS} tokens, log-probabilities within {difference:.1e}"
        kind = f"{model.config.model_type} {folder.name}"
        sys.stdout.write(f"{engine} {found['version']} {kind}: {said}\n")
        assert result["tokens"] == tokens[len(prompt) :]
        assert difference < tolerance


@torch.no_grad()
def differences(
    model: Any, tokens: list[int], places: list[int], result: dict[str, Any]
) -> torch.Tensor:
    """Return the differences of log-probabilities of prompt tokens and of new tokens."""
    given = torch.tensor([tokens])
    chances = model(given).logits[0, :-1].log_softmax(dim=-1)
    logprobs = chances.gather(1, given[0, 1:, None])[:, 0]
    new = range(len(tokens) - len(result["tokens"]), len(tokens))
    here = logprobs[torch.tensor([*places, *new]) - 1]
    return (here - torch.tensor(result["prompt_logprobs"] + result["logprobs"])).abs()


def mean_difference(found: dict[str, Any], folder: Path, engine: str) -> float:
    """Return the mean difference of the log-probabilities of all tokens read and written."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parts = [
        differences(model, prompt + result["tokens"], list(range(1, len(prompt))), result)
        for prompt, result in zip(PROMPTS, found["results"], strict=True)
    ]
    mean = float(torch.cat(parts).mean())
    said = f"log-probabilities differ by {mean:.1e} in the mean"
    sys.stdout.write(f"{engine} {found['version']} {folder.name}: {said}\n")
    return mean
