"""A Llama of 47 thousand random weights, and its tokenizer.

Examples run in seconds with it, without a download.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_llama() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return the model and its tokenizer.

    Replace them by your own, e.g. from `AutoModelForCausalLM.from_pretrained`.
    """
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        list(topics.values())[:20],
        vocab_size=320,
        special_tokens=["<end>"],
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<end>", bos_token="<end>"
    )
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(
        **sizes,
        vocab_size=320,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), tokenizer
