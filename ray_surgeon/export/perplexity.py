"""The perplexity of a checkpoint as transformers computes it, in a fresh process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file

from ray_surgeon.export.reload import load
from ray_surgeon.models.loss import perplexity_of


def answer(request: Mapping[str, Any]) -> dict[str, float]:
    """Return the perplexity on every text; see `fresh_process.run_module`.

    It is exp of the mean over windows of the mean loss of a token.
    """
    torch.set_num_threads(request["num_threads"])
    model = load(request)
    perplexities = {}
    with torch.no_grad():
        for name, windows in load_file(request["windows"]).items():
            losses = []
            for window in windows:
                logits = model(window[None], use_cache=False).logits[0, :-1].float()
                losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
            perplexities[name] = perplexity_of(sum(losses) / len(losses))
    return perplexities
