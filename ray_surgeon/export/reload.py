"""Loads an export with transformers alone, in a process of its own; see `fresh_process`.

It writes logits and generates, or computes perplexities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ray_surgeon.models.loss import perplexity_of

_NUM_PROMPT_TOKENS = 8
_NUM_NEW_TOKENS = 6

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.03}
"""dtype -> tolerated error of the logits of half of the tokens.

The error of a token is the norm of the difference over that of the logits' deviations from their
mean.
"""


def agree(logits: Tensor, expected: Tensor, dtype: str, *, half: bool) -> bool:
    """Whether logits [..., vocabulary] are the same but for rounding.

    Args:
        logits: of one program.
        expected: of another.
        dtype: of the model.
        half: whether half of the tokens may be off by anything: in a mixture a token may be routed
            otherwise if attention rounds otherwise.
    """
    differences = (logits - expected).norm(dim=-1)
    errors = differences / (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
    allowed = TOLERANCE[dtype]
    return float(errors.median()) <= allowed and (half or float(errors.max()) <= 4 * allowed)


def _load(request: Mapping[str, Any]) -> PreTrainedModel:
    """Load a checkpoint as it is.

    Args:
        request: ``folder``; blocks beyond ``max_memory`` bytes come from the folder ``offload``
            when they run.

    Raises:
        RuntimeError: a tensor is missing or left over.
    """
    # exports have no code but ours
    options = {"dtype": "auto", "trust_remote_code": True, "output_loading_info": True}
    options |= {"device_map": "auto", "offload_folder": request["offload"]}
    model, info = AutoModelForCausalLM.from_pretrained(
        request["folder"], max_memory={"cpu": request["max_memory"]}, **options
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise RuntimeError(f"tensors do not fit the classes: {wrong}")
    loaded: PreTrainedModel = model.eval()
    return loaded


@torch.no_grad()
def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Write the logits [1, T, vocabulary] float32 of tokens, and generate; see `reload_difference`.

    If there are ``texts``, return the perplexity on every text instead.

    Raises:
        RuntimeError: a tensor is missing or left over; or the logits with a cache are not those
            without.
    """
    if "texts" in request:
        return _perplexities(request)
    model = _load(request)
    tokens = torch.tensor([request["tokens"]])
    logits = model(tokens, use_cache=False).logits.float()
    prompt = tokens[:, :_NUM_PROMPT_TOKENS]
    length = dict.fromkeys(("max_new_tokens", "min_new_tokens"), _NUM_NEW_TOKENS)
    generated = model.generate(
        prompt, return_dict_in_generate=True, output_logits=True, do_sample=False, **length
    )
    again = model(generated.sequences, use_cache=False).logits
    again = again[:, prompt.shape[1] - 1 : -1].float()
    cached = torch.stack(generated.logits, dim=1).float()
    if not agree(cached, again, request["dtype"], half=request["half"]):
        raise RuntimeError(
            f"with a cache the logits differ by {float((cached - again).abs().max()):g} from those "
            "without"
        )
    save_file({"logits": logits.contiguous()}, request["logits"])
    return {}


def _perplexities(request: Mapping[str, Any]) -> dict[str, float]:
    """Return exp of the mean over windows of the mean loss of a token, for every text."""
    torch.set_num_threads(request["num_threads"])
    model = _load(request)
    perplexities = {}
    for name, windows in request["texts"].items():
        losses = []
        for window in torch.tensor(windows):
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
        perplexities[name] = perplexity_of(sum(losses) / len(losses))
    return perplexities
