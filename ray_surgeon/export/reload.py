"""Loads an export with transformers alone, in a process of its own; see `fresh_process`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

_NUM_PROMPT_TOKENS = 8
_NUM_NEW_TOKENS = 6

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.03}
"""dtype -> tolerated error of the logits of half of the tokens; see `errors_of_tokens`."""


def errors_of_tokens(logits: Tensor, expected: Tensor) -> Tensor:
    """Return the relative error of each token's logits [..., vocabulary].

    It is the norm of the difference over that of their deviations from their mean.
    """
    errors: Tensor = (logits - expected).norm(dim=-1) / (
        expected - expected.mean(dim=-1, keepdim=True)
    ).norm(dim=-1)
    return errors


def agree(logits: Tensor, expected: Tensor, dtype: str, *, half: bool) -> bool:
    """Whether logits [..., vocabulary] are the same but for rounding.

    Args:
        logits: of one program.
        expected: of another.
        dtype: of the model.
        half: whether half of the tokens may be off by anything: a token whose best experts are
            nearly equal goes to others if attention rounds otherwise.
    """
    errors = errors_of_tokens(logits, expected)
    allowed = TOLERANCE[dtype]
    return float(errors.median()) <= allowed and (half or float(errors.max()) <= 4 * allowed)


def load(request: Mapping[str, Any]) -> PreTrainedModel:
    """Load a checkpoint as it is.

    Args:
        request: ``folder``; ``shipped_code``, whether modeling code lies beside the weights;
            ``max_memory`` and ``offload`` if there is more than fits in memory.

    Raises:
        RuntimeError: a tensor is missing or left over.
    """
    options = {
        "dtype": "auto",
        "trust_remote_code": request["shipped_code"],
        "output_loading_info": True,
    }
    if "max_memory" in request:  # what does not fit stays in its files and comes block by block
        options |= {
            "device_map": "auto",
            "max_memory": {"cpu": request["max_memory"]},
            "offload_folder": request["offload"],
        }
    model, info = AutoModelForCausalLM.from_pretrained(request["folder"], **options)
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise RuntimeError(f"tensors do not fit the classes: {wrong}")
    loaded: PreTrainedModel = model.eval()
    return loaded


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Write the logits [1, T, vocabulary] float32 of tokens, and generate.

    See `reload_difference`.

    Raises:
        RuntimeError: see `load`; or the logits with a cache are not those without.
    """
    model = load(request)
    tokens = torch.tensor([request["tokens"]])
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits.float()
        prompt = tokens[:, :_NUM_PROMPT_TOKENS]
        settings = {
            "max_new_tokens": _NUM_NEW_TOKENS,
            "min_new_tokens": _NUM_NEW_TOKENS,
            "do_sample": False,
        }
        generated = model.generate(
            prompt, return_dict_in_generate=True, output_logits=True, **settings
        )
        again = (
            model(generated.sequences, use_cache=False).logits[:, prompt.shape[1] - 1 : -1].float()
        )
    cached = torch.stack(generated.logits, dim=1).float()
    if not agree(cached, again, request["dtype"], half=request["half"]):
        raise RuntimeError(
            f"with a cache the logits differ by {float((cached - again).abs().max()):g} from those "
            "without"
        )
    save_file({"logits": logits.contiguous()}, request["logits"])
    return {}
