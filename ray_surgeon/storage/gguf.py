"""GGUF checkpoints: dequantised by transformers into a plain safetensors folder, once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a Hugging Face folder in float32.

    The quantisation's own configuration is dropped: what is saved is not quantised any more.

    Raises:
        ValueError: the package gguf is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "model.source: reading GGUF needs the package gguf; run `pip install gguf` (or install "
            "ray-surgeon[quickstart])"
        )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
