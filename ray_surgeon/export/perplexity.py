"""The perplexity of a checkpoint as transformers computes it, in a process of its own; see `fresh_process`."""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import load_file

from ray_surgeon.export.reload import load
from ray_surgeon.models.loss import perplexity_of


def main() -> None:
    """Print the perplexity on every text: exp of the mean over windows of the mean loss of a token."""
    request = json.load(sys.stdin)
    torch.set_num_threads(request["num_threads"])
    model = load(request)
    found = {}
    with torch.no_grad():
        for name, windows in load_file(request["windows"]).items():
            losses = []
            for window in windows:
                logits = model(window[None], use_cache=False).logits[0, :-1].float()
                losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
            found[name] = perplexity_of(sum(losses) / len(losses))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
