"""A Llama with 47 thousand random or briefly trained weights, and its tokenizer.

With this model the examples run in seconds, without a download.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WINDOW = 64
"""Tokens per training window."""
WINDOWS_PER_STEP = 8


def tiny_llama() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return the model and its tokenizer.

    Replace them with your own, e.g. from `AutoModelForCausalLM.from_pretrained`.
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


def trained_llama(
    num_steps: int = 300,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return the model after some seconds of training on Python's help, and its tokenizer.

    With random weights, every method of pruning would give the same perplexity.
    """
    model, tokenizer = tiny_llama()
    tokens = torch.tensor(tokenizer("\n\n".join(topics.values()))["input_ids"])
    last_start = (
        len(tokens) * 3 // 4 - WINDOW
    )  # the last fifth is the text of evaluations
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=5e-3, total_steps=num_steps
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        starts = torch.randint(last_start, (WINDOWS_PER_STEP,), generator=generator)
        windows = torch.stack([tokens[start : start + WINDOW] for start in starts])
        model(windows, labels=windows).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer
