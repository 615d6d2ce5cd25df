"""Tiny models whose head sizes the engines' kernels support, and their exports."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ray_surgeon.models.llama_cpp import PRE_TOKENIZERS
from tests.integration.runs import run

VOCABULARY = 320
END = 0
PROMPTS = [list(range(1, 6)), list(range(40, 59)), list(range(100, 170))]

_SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
_TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 512}
_TEXT |= {"bos_token_id": 0, "eos_token_id": 0}
_BASE: dict[str, Any] = (
    _SIZES | _TEXT | {"intermediate_size": 256, "num_key_value_heads": 2}
)
_BASE |= {"initializer_range": 0.15}
_GEMMA = {"head_dim": 32, "sliding_window": 16, "num_hidden_layers": 7}
_GEMMA |= {"query_pre_attn_scalar": 32, "pad_token_id": 0}
_OPT = {"ffn_dim": 256, "word_embed_proj_dim": 128, "init_std": 0.15, "pad_token_id": 0}
_GPT2 = {"n_embd": 128, "n_inner": 256, "n_layer": 4, "n_head": 4, "n_positions": 512}
_SPARSE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_SPARSE |= {"norm_topk_prob": True}
_EIGHT = {"num_local_experts": 8, "num_experts_per_tok": 2}

_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}

_of = AutoConfig.for_model
# not Qwen3.5: vLLM 0.32's linear attention on CPUs takes bfloat16 alone
FAMILIES = {
    "llama": _of("llama", **_BASE, tie_word_embeddings=True),
    "mistral": _of("mistral", **_BASE, sliding_window=None, tie_word_embeddings=False),
    "qwen2": _of("qwen2", **_BASE, tie_word_embeddings=True),
    "qwen3": _of("qwen3", **_BASE, head_dim=32, tie_word_embeddings=True),
    "gemma3": _of("gemma3_text", **(_BASE | _GEMMA)),
    "phi3": _of("phi3", **_BASE, pad_token_id=0),
    "granite": _of("granite", **_BASE, **_MULTIPLIERS, tie_word_embeddings=True),
    "opt": _of("opt", **_SIZES, **_TEXT, **_OPT),
    "gpt2": _of("gpt2", **_GPT2, vocab_size=VOCABULARY, initializer_range=0.15),
}
MIXTURES = {
    "mixtral": _of("mixtral", **_BASE, **_EIGHT, sliding_window=None),
    "qwen2_moe": _of(
        "qwen2_moe", **_BASE, **_SPARSE, shared_expert_intermediate_size=128
    ),
    "gpt_oss": _of("gpt_oss", **_BASE, **_EIGHT, head_dim=32, sliding_window=16),
    "qwen3_moe": _of("qwen3_moe", **_BASE, **_SPARSE, head_dim=32),
}
"""Mixtures of experts. vLLM 0.32's OLMoE is left out: on a CPU it differs from transformers' on the
dense model, too, by 2 nats.
"""


BLOCKS: dict[str, Any] = {"pruning__groups": ["blocks"], "pruning__width_multiple": None}
BLOCKS |= {"pruning__target_sparsity": 0.25}
"""Settings that remove whole blocks."""


def exported(family: str, *kinds: str, folder: Path, **options: Any) -> Path:
    """Prune a tiny model and return the folder of its first export."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config((FAMILIES | MIXTURES)[family])
    model.save_pretrained(folder / "model")
    cuts_as = "gpt-4o" if family == "gpt_oss" else ""
    tokenizer(cuts_as).save_pretrained(folder / "model")
    kind = kinds[0]
    settings: dict[str, Any] = {
        "pruning": {"structure": "groups", "target_sparsity": 0.3, "num_shots": 1},
        "pruning__width_multiple": 32,
        "pruning__allocation": "uniform" if kind == "uniform" else "global",
        "output__exports": list(kinds),
    }
    assert run(folder, folder / "model", **(settings | options)) == 0
    export = folder / "run" / "export" / kind
    config = json.loads((export / "config.json").read_text())
    if kind == "per_block":
        layers = config["per_layer_config"].values()
        assert len({layer["num_key_value_heads"] for layer in layers}) > 1
    return export


def of_pieces() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Llama 2's: SentencePiece's BPE with byte fallback and a space in
    front.
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = "\u2581"
    parts = [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    trained.normalizer = normalizers.Sequence(parts)
    whole = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    trained.decoder = decoders.Sequence([*whole, decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, show_progress=False, max_token_length=12
    )
    texts = [text.replace("\n", " ") for text in topics.values() if text.isascii()][:40]
    trained.train_from_iterator(texts, trainer)
    document = json.loads(trained.to_str())
    document["added_tokens"] = [
        token for token in document["added_tokens"] if token["id"] < 3
    ]
    trained = Tokenizer.from_str(json.dumps(document))
    special_tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=trained, **special_tokens)


def tokenizer(cuts_as: str = "") -> PreTrainedTokenizerFast:
    """Return a tokenizer of ASCII alone, which cuts text as GPT-2, or as llama.cpp's name says.

    llama.cpp's server holds back a token that ends within a character of several bytes.
    """
    trained = Tokenizer(models.BPE())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cuts_as)
    trained.pre_tokenizer = pieces
    if cuts_as:
        (pattern,) = (text for text, name in PRE_TOKENIZERS.items() if name == cuts_as)
        cut = pre_tokenizers.Split(Regex(pattern), "isolated")
        trained.pre_tokenizer = pre_tokenizers.Sequence([cut, pieces])
    trained.decoder = decoders.ByteLevel()
    settings: dict[str, Any] = {"special_tokens": ["<end>"], "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, **settings)
    trained.train_from_iterator(
        [text for text in topics.values() if text.isascii()][:40], trainer
    )
    assert trained.get_vocab_size() == VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token="<end>", bos_token="<end>"
    )
