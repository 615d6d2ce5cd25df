"""``python -m ray_surgeon.export.reload FOLDER TOKENS.json LOGITS.safetensors``: load an export with transformers alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main(folder: str, tokens_file: str, logits_file: str) -> None:
    """Write the logits [1, T, vocabulary] float32 of a token sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokens = torch.tensor([json.loads(Path(tokens_file).read_text())])
    with torch.no_grad():
        logits = model.eval()(tokens).logits.float()
    save_file({"logits": logits.contiguous()}, logits_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
