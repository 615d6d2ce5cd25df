"""Greedy completions and likelihoods of a checkpoint in transformers, in batches.

Batches hold texts of similar length and are the same in every call with the same texts and batch
size, so results are deterministic on one machine. Another batch size pads differently, which can
change the last bits of a logit, and rarely a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def loaded(folder: str, dtype: str, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """Return the model and the tokenizer of a checkpoint; the tokenizer pads on the left."""
    trust = {"trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **trust)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), **trust
    )
    if tokenizer.pad_token_id is None:
        first_end = ends_of(folder, tokenizer)[0]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(first_end)
    return model.eval(), tokenizer


def ends_of(folder: str, tokenizer: Any) -> list[int]:
    """Return the end-of-text tokens: those of generation and the tokenizer's special ones."""
    found = set(tokenizer.all_special_ids)
    if Path(folder, "generation_config.json").exists():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        if isinstance(ends, int):
            found.add(ends)
        elif ends is not None:
            found.update(ends)
    return sorted(found)


def greedy_completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_size: int,
    num_new_tokens: int,
    is_complete: Callable[[str], bool],
    add_special_tokens: bool = True,
) -> list[str]:
    """Return a greedy completion of each prompt.

    Args:
        model: from `loaded`.
        tokenizer: from `loaded`.
        prompts: texts to complete.
        batch_size: number of prompts per batch.
        num_new_tokens: maximum number of tokens of a completion.
        is_complete: whether a completion needs no further tokens.
        add_special_tokens: False for prompts from a chat template, which has written them.
    """
    texts: dict[int, str] = {}
    for numbers in _batches(prompts, batch_size):
        batch = tokenizer(
            [prompts[number] for number in numbers],
            padding=True,
            return_tensors="pt",
            add_special_tokens=add_special_tokens,
        )
        found = _completed_batch(
            model,
            tokenizer,
            batch,
            num_new_tokens=num_new_tokens,
            is_complete=is_complete,
        )
        texts |= dict(zip(numbers, found, strict=True))
    return [texts[number] for number in range(len(prompts))]


def _batches(texts: Sequence[str], batch_size: int) -> list[list[int]]:
    """Return the indices of the texts, from short to long, in batches."""
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    return [
        order[start : start + batch_size] for start in range(0, len(order), batch_size)
    ]


def _completed_batch(
    model: Any,
    tokenizer: Any,
    batch: Any,
    *,
    num_new_tokens: int,
    is_complete: Callable[[str], bool],
) -> list[str]:
    width = batch["input_ids"].shape[1]
    ends = ends_of(model.name_or_path, tokenizer)

    def written(row: Tensor) -> str:
        new = row[width:].tolist()
        new = new[: next((i for i, token in enumerate(new) if token in ends), len(new))]
        return str(tokenizer.decode(new, clean_up_tokenization_spaces=False))

    def are_complete(rows: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.tensor([is_complete(written(row)) for row in rows])

    settings = GenerationConfig(
        max_new_tokens=num_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    rows = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        generation_config=settings,
        stopping_criteria=[are_complete],
    )
    return [written(row) for row in rows]


@torch.no_grad()
def log_likelihoods(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], *, batch_size: int
) -> list[float]:
    """Return the log-likelihood of each continuation given its context, summed over its tokens.

    Args:
        model: from `loaded`.
        tokenizer: from `loaded`.
        pairs: context, and a continuation that begins with its space. The tokens of the
            continuation are those of both together, after as many as the context alone has.
        batch_size: number of pairs per batch.
    """
    texts = [context + continuation for context, continuation in pairs]
    found: dict[int, float] = {}
    for numbers in _batches(texts, batch_size):
        batch = tokenizer(
            [texts[number] for number in numbers], padding=True, return_tensors="pt"
        )
        lengths = []
        for number, mask in zip(numbers, batch["attention_mask"], strict=True):
            num_context = len(tokenizer(pairs[number][0]).input_ids)
            lengths.append(int(mask.sum()) - num_context)
        scores = _scores_of_ends(model, batch, lengths)
        found |= dict(zip(numbers, scores, strict=True))
    return [found[number] for number in range(len(pairs))]


def _scores_of_ends(model: Any, batch: Any, lengths: Sequence[int]) -> list[float]:
    """Return the summed log-probability of the last `lengths` tokens of each row."""
    mask = batch["attention_mask"]
    tokens = batch["input_ids"]  # batch x width
    kept = max(lengths)
    logits = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        logits_to_keep=kept + 1,
    ).logits
    logits = logits[:, -kept - 1 : -1].float()  # batch x kept x vocabulary
    targets = tokens[:, -kept:]
    chosen = logits.gather(2, targets.unsqueeze(2)).squeeze(2)
    log_probabilities = chosen - logits.logsumexp(dim=2)
    scores = []
    for row, length in zip(log_probabilities, lengths, strict=True):
        scores.append(float(row[kept - length :].double().sum()))
    return scores
