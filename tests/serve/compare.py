"""What an engine computed, against transformers."""

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
    settings = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False} | (
        {"suppress_tokens": [END]} if without_end else {}
    )
    for prompt, result in zip(PROMPTS, found["results"], strict=True):
        with torch.no_grad():
            tokens = model.generate(torch.tensor([prompt]), **settings)
            logprobs = (
                model(tokens)
                .logits[0, :-1]
                .log_softmax(dim=-1)
                .gather(1, tokens[0, 1:, None])[:, 0]
            )
        places = (
            list(range(1, len(prompt)))
            if scored is None
            else [place for place in scored if place < len(prompt)]
        )
        here = logprobs[torch.tensor([*places, *range(len(prompt), tokens.shape[1])]) - 1]
        difference = float(
            (here - torch.tensor(result["prompt_logprobs"] + result["logprobs"])).abs().max()
        )
        said = f"{len(prompt)} + {NUM_NEW_TOKENS} tokens, log-probabilities within {difference:.1e}"
        sys.stdout.write(
            f"{engine} {found['version']} {model.config.model_type} {folder.name}: {said}\n"
        )
        assert result["tokens"] == tokens[0, len(prompt) :].tolist()
        assert difference < tolerance


def mean_difference(found: dict[str, Any], folder: Path, engine: str) -> float:
    """Return the mean difference of the log-probabilities of all tokens that the engine read and
    wrote.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    differences = []
    for prompt, result in zip(PROMPTS, found["results"], strict=True):
        tokens = torch.tensor([prompt + result["tokens"]])
        with torch.no_grad():
            here = (
                model(tokens)
                .logits[0, :-1]
                .log_softmax(dim=-1)
                .gather(1, tokens[0, 1:, None])[:, 0]
            )
        differences.append(
            (here - torch.tensor(result["prompt_logprobs"] + result["logprobs"])).abs()
        )
    mean = float(torch.cat(differences).mean())
    sys.stdout.write(
        f"{engine} {found['version']} {folder.name}: log-probabilities differ by {mean:.1e} in the "
        "mean\n"
    )
    return mean
