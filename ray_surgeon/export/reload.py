"""Loads an export with transformers alone, in a process of its own; see `fresh_process`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

_NUM_PROMPT_TOKENS, _NUM_NEW_TOKENS = 8, 6


def load(request: Mapping[str, Any]) -> PreTrainedModel:
    """Load a checkpoint as it is.

    Args:
        request: ``folder``; ``shipped_code``, whether modeling code lies beside the weights; ``max_memory`` and ``offload`` if there
            is more than fits in memory.

    Raises:
        RuntimeError: a tensor is missing or left over.
    """
    options = {"dtype": "auto", "trust_remote_code": request["shipped_code"], "output_loading_info": True}
    if "max_memory" in request:  # what does not fit stays in its files and comes block by block
        options |= {"device_map": "auto", "max_memory": {"cpu": request["max_memory"]}, "offload_folder": request["offload"]}
    model, info = AutoModelForCausalLM.from_pretrained(request["folder"], **options)
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise RuntimeError(f"tensors do not fit the classes: {wrong}")
    loaded: PreTrainedModel = model.eval()
    return loaded


def main() -> None:
    """Write the logits [1, T, vocabulary] float32 of a token sequence, and generate from its first tokens; see `reload_difference`.

    Raises:
        RuntimeError: see `load`; or the logits with a cache are not those without.
    """
    request = json.load(sys.stdin)
    model = load(request)
    tokens = torch.tensor([request["tokens"]])
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits.float()
        prompt = tokens[:, :_NUM_PROMPT_TOKENS]
        settings = {"max_new_tokens": _NUM_NEW_TOKENS, "min_new_tokens": _NUM_NEW_TOKENS, "do_sample": False}
        found = model.generate(prompt, return_dict_in_generate=True, output_logits=True, **settings)
        again = model(found.sequences, use_cache=False).logits[:, prompt.shape[1] - 1 : -1].float()
    cached = torch.stack(found.logits, dim=1).float()
    of_tokens = (cached - again).abs().amax(dim=-1)
    if not float(of_tokens.median() if request["half"] else of_tokens.max()) <= 0.05 * float(again.abs().max()):
        raise RuntimeError(f"with a cache the logits differ by {float(of_tokens.max()):g} from those without")
    save_file({"logits": logits.contiguous()}, request["logits"])
    sys.stdout.write("{}\n")


if __name__ == "__main__":
    main()
