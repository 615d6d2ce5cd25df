"""Writes a checkpoint with a large model's shapes and random weights.

It allows measuring the memory and time of a run without the model's weights.

``python -m benchmarks.shaped_model llama-2-7b FOLDER --blocks 3``
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ray_surgeon.models.layout import ModelLayout

_QWEN3_MOE = {
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "head_dim": 128,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
_LLAMA_3 = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
}
SHAPES: dict[str, PretrainedConfig] = {
    "llama-2-7b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    "llama-3-8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        **_LLAMA_3,
    ),
    "llama-3-70b": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        **_LLAMA_3,
    ),
    "llama-3-405b": LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        **_LLAMA_3,
    ),
    "qwen3-32b": Qwen3Config(
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
    ),
    "qwen3-30b-a3b": Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        **_QWEN3_MOE,
    ),
    "qwen3-235b-a22b": Qwen3MoeConfig(
        hidden_size=4096,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=94,
        num_attention_heads=64,
        **_QWEN3_MOE,
    ),
    "opt-1.3b": OPTConfig(
        hidden_size=2048,
        ffn_dim=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        vocab_size=50272,
        word_embed_proj_dim=2048,
        max_position_embeddings=2048,
    ),
}


def shaped_config(name: str, num_blocks: int | None = None) -> PretrainedConfig:
    """Return the configuration `name` of `SHAPES`, with `num_blocks` blocks if given."""
    config = SHAPES[name]
    document = config.to_dict() | (
        {"num_hidden_layers": num_blocks} if num_blocks else {}
    )
    document.pop("layer_types", None)
    return type(config)(**document)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer of at most `vocab_size` tokens, trained on Python's help."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        list(topics.values()), vocab_size=min(8000, vocab_size), show_progress=False
    )
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer).save_pretrained(folder)


def write(name: str, folder: Path, num_blocks: int | None, dtype: torch.dtype) -> None:
    """Write the configuration, a tokenizer, and random weights in one file per block."""
    config = shaped_config(name, num_blocks)
    layout = ModelLayout.of(config)
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    of_file: dict[int, list[str]] = {}
    for key in layout.parameters:
        block = layout.block_of(key)
        number = 0 if block is None else block + 1
        of_file.setdefault(number, []).extend([key] if key not in layout.tied else [])
    weight_map = dict[str, str]()
    total = 0
    for number, keys in sorted(of_file.items()):
        file = f"model-{number + 1:05d}-of-{len(of_file):05d}.safetensors"
        tensors = {key: _random(layout.parameters[key], dtype, generator) for key in keys}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return (
        torch.empty(shape, dtype=torch.bfloat16)
        .normal_(0, 0.02, generator=generator)
        .to(dtype)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write a checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shaped_model",
        description="Write a checkpoint of random weights.",
    )
    parser.add_argument("name", choices=sorted(SHAPES), help="whose shapes")
    parser.add_argument("folder", type=Path, help="a folder that does not exist")
    parser.add_argument("--blocks", type=int, help="number of blocks; default: all")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float32"],
        help="of the weights",
    )
    arguments = parser.parse_args(argv)
    write(
        arguments.name,
        arguments.folder,
        arguments.blocks,
        getattr(torch, arguments.dtype),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
