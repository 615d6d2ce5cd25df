"""Tiny models whose heads the engines' kernels know, and their exports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.integration.runs import run

VOCABULARY = 320
END = 0
PROMPTS = [list(range(1, 6)), list(range(40, 59)), list(range(100, 170))]

_ROTARY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_GEMMA = {
    "head_dim": 32,
    "sliding_window": 16,
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 32,
    "pad_token_id": 0,
}
_OPT = {
    "hidden_size": 128,
    "ffn_dim": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 128,
    "init_std": 0.15,
}
_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@dataclass(frozen=True)
class Served:
    """One family."""

    config: PretrainedConfig
    vllm_class: str  # that serves its uniform export


FAMILIES = {
    "llama": Served(
        LlamaConfig(**_ROTARY, **_COMMON, tie_word_embeddings=True), "LlamaForCausalLM"
    ),
    "llama-wide": Served(
        LlamaConfig(
            **(_ROTARY | {"intermediate_size": 1024}), **_COMMON, tie_word_embeddings=False
        ),
        "DeciLMForCausalLM",
    ),
    "mistral": Served(
        MistralConfig(**_ROTARY, **_COMMON, sliding_window=None, tie_word_embeddings=False),
        "MistralForCausalLM",
    ),
    "qwen2": Served(
        Qwen2Config(**_ROTARY, **_COMMON, tie_word_embeddings=True), "Qwen2ForCausalLM"
    ),
    "qwen3": Served(
        Qwen3Config(**_ROTARY, **_COMMON, head_dim=32, tie_word_embeddings=True), "Qwen3ForCausalLM"
    ),
    "gemma3": Served(Gemma3TextConfig(**(_ROTARY | _COMMON | _GEMMA)), "Gemma3ForCausalLM"),
    "phi3": Served(Phi3Config(**_ROTARY, **_COMMON, pad_token_id=0), "Phi3ForCausalLM"),
    "opt": Served(
        OPTConfig(**_OPT, **_ENDS, vocab_size=VOCABULARY, max_position_embeddings=512),
        "OPTForCausalLM",
    ),
    "gpt2": Served(
        GPT2Config(
            n_embd=128,
            n_inner=256,
            n_layer=4,
            n_head=4,
            n_positions=512,
            vocab_size=VOCABULARY,
            initializer_range=0.15,
        ),
        "GPT2LMHeadModel",
    ),
}

_SPARSE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}
MIXTURES = {
    "mixtral": Served(
        MixtralConfig(**_ROTARY, **_COMMON, num_local_experts=8, sliding_window=None),
        "MixtralForCausalLM",
    ),
    "qwen2_moe": Served(
        Qwen2MoeConfig(**_ROTARY, **_COMMON, **_SPARSE, shared_expert_intermediate_size=128),
        "Qwen2MoeForCausalLM",
    ),
    "gpt_oss": Served(
        GptOssConfig(
            **_ROTARY,
            **_COMMON,
            num_local_experts=8,
            num_experts_per_tok=2,
            head_dim=32,
            sliding_window=16,
        ),
        "GptOssForCausalLM",
    ),
    "qwen3_moe": Served(
        Qwen3MoeConfig(**_ROTARY, **_COMMON, **_SPARSE, head_dim=32), "Qwen3MoeForCausalLM"
    ),
}
"""Mixtures of experts. vLLM 0.32's OLMoE is left out: on a CPU it differs from transformers' on the
dense model, too, by 2 nats.
"""

PLAIN = sorted(set(FAMILIES) - {"llama-wide"})


def exported(family: str, *kinds: str, folder: Path, **options: Any) -> Path:
    """Prune a tiny model and return the folder of its first export."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config((FAMILIES | MIXTURES)[family].config).save_pretrained(
        folder / "model"
    )
    tokenizer().save_pretrained(folder / "model")
    pruning: dict[str, Any] = {
        "pruning__structure": "groups",
        "pruning__num_shots": 1,
        "pruning__width_multiple": 32,
    }
    pruning |= {"pruning__allocation": "global" if kinds[0] == "per_block" else "uniform"}
    if kinds[0] == "deci":
        pruning |= {
            "pruning__groups": ["ffn"],
            "pruning__width_multiple": 256,
            "pruning__allocation": "global",
        }
    assert (
        run(folder, folder / "model", **(pruning | {"output__exports": list(kinds)} | options)) == 0
    )
    export = folder / "run" / "export" / kinds[0]
    config = json.loads((export / "config.json").read_text())
    if kinds[0] == "per_block":
        assert (
            len({layer["num_key_value_heads"] for layer in config["per_layer_config"].values()}) > 1
        )
    if kinds[0] == "deci":
        assert len({str(block["ffn"]) for block in config["block_configs"]}) > 1
    return export


def of_pieces() -> PreTrainedTokenizerFast:
    """Return a tokenizer as Llama 2 has it: SentencePiece's BPE, bytes for what has no piece, a
    space in front.
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trained.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, show_progress=False, max_token_length=12
    )
    trained.train_from_iterator(
        [text.replace("\n", " ") for text in topics.values() if text.isascii()][:40], trainer
    )
    document = json.loads(trained.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < 3]
    trained = Tokenizer.from_str(json.dumps(document))
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of ASCII alone: llama.cpp's server keeps back a token that ends within a
    character of several bytes.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], show_progress=False
    )
    trained.train_from_iterator([text for text in topics.values() if text.isascii()][:40], trainer)
    assert trained.get_vocab_size() == VOCABULARY
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<end>", bos_token="<end>")
