"""Text that the model itself writes: tokens are drawn one after the other, from caches of keys and values that stay on the workers.

Source: Williams et al. 2024 (arXiv 2410.17170), self-calibration. The draws of a sequence depend on the seed and its number alone, and
the sequences that are computed together on their number and length, so that shards, replicas and backends change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from ray_surgeon.cluster.cluster import Cluster
from ray_surgeon.cluster.passes import token_payload
from ray_surgeon.cluster.placement import WorkerIndex
from ray_surgeon.cluster.transport import TensorPayload
from ray_surgeon.cluster.worker import Worker
from ray_surgeon.sections.texts import CalibrationSection, SelfSection
from ray_surgeon.storage.texts import first_token

TEXTS_TOGETHER = 16
"""That are written, at most, if they are long; a matrix of weights is read once for all of them."""
TOKENS_TOGETHER = 8192
"""Of short texts, which are more."""
_TOKENS_IN_FLIGHT = 4
"""Submitted ahead of the ones that are there."""


@dataclass(frozen=True)
class Wanted:
    """What is to be written."""

    prompt: tuple[int, ...]  # tokens that stand before every sequence and are no part of it
    temperature: float  # logits are divided by it
    seed: int  # of the draws
    num_sequences: int  # how many
    sequence_length: int  # tokens of each that are written
    first: int | None = None  # token that then stands at the beginning of every sequence, as at that of other windows


@dataclass
class _Writing:
    """Sequences that are being written, on a worker."""

    caches: dict[int, DynamicCache] = field(default_factory=dict)  # number of a batch -> keys and values
    chances: dict[int, Tensor] = field(default_factory=dict)  # of the last shard: [m, T]
    tokens: dict[int, list[Tensor]] = field(default_factory=dict)  # likewise: [m] each


def to_be_written(section: CalibrationSection, tokenizer: Any, config: PretrainedConfig) -> dict[int, Wanted]:
    """Return number of a calibration text -> what the dense model is to write for it.

    Raises:
        ValueError: the model cannot write it; names the field.
    """
    length, found, first = section.sequence_length, {}, first_token(tokenizer)
    for number, (text, count) in enumerate(section.shares):
        if not isinstance(text, SelfSection):
            continue
        where = f"calibration.mix.{number - 1}"
        if text.prompt is not None:
            prompt = tuple(tokenizer(text.prompt, add_special_tokens=False)["input_ids"])
        else:
            begins = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
            if not begins:
                raise ValueError(f"{where}.prompt: the tokenizer has no token that begins a text; give a prompt")
            prompt = (int(begins[0]),)
        num_texts, of_text = text.sizes(count, length)
        longest = getattr(config, "max_position_embeddings", len(prompt) + of_text)
        if not prompt or len(prompt) + of_text > longest:
            raise ValueError(
                f"{where}: the prompt has {len(prompt)} tokens and each text {of_text}, but the model takes at most {longest} together, "
                "and the prompt needs at least one; change the prompt or the lengths"
            )
        begin = prompt[-1] if first is None and text.texts_per_sequence > 1 else first
        found[number] = Wanted(prompt, text.temperature, text.seed, num_texts, of_text - (begin is not None), begin)
    return found


# On a worker


def begin(worker: Worker, batch: int, numbers: Sequence[int], wanted: Wanted) -> None:
    """Prepare a batch of sequences with these numbers."""
    writing = worker.keeping(_Writing)
    writing.caches[batch] = worker.runner.new_cache()
    if worker.shard.blocks.is_last:
        generators = [torch.Generator().manual_seed(wanted.seed + 1_000_003 * number) for number in numbers]
        writing.chances[batch] = torch.stack([torch.rand(wanted.sequence_length, generator=g) for g in generators])
        writing.tokens[batch] = []


def write_on(worker: Worker, batch: int, inputs: TensorPayload, temperature: float) -> TensorPayload:
    """Take tokens [m, n] or hidden states [m, n, d] of a batch; return hidden states, or from the last shard the next tokens [m, 1]."""
    writing = worker.kept(_Writing)
    hidden = worker.runner.go_on(worker.unpack(inputs), writing.caches[batch])
    if not worker.shard.blocks.is_last:
        return worker.pack(hidden)
    written = writing.tokens[batch]
    chances = writing.chances[batch][:, len(written)].to(hidden.device)
    written.append(worker.shard.next_tokens(hidden[:, -1], chances, temperature))
    return worker.pack(written[-1][:, None])


def end(worker: Worker, batch: int) -> TensorPayload | None:
    """Forget a batch, and return its sequences [m, T] if this is the last shard."""
    writing = worker.kept(_Writing)
    del writing.caches[batch]
    return worker.pack(torch.stack(writing.tokens.pop(batch), dim=1)) if writing.chances.pop(batch, None) is not None else None


# On the coordinator


def write_text(cluster: Cluster, wanted: Wanted) -> NDArray[np.int64]:
    """Let the model write sequences.

    Args:
        cluster: with loaded workers.
        wanted: what.

    Returns:
        [num_sequences, sequence_length] tokens, one more with a first one.
    """
    batches = _batches(wanted)
    together = cluster.placement.num_shards * cluster.placement.num_replicas  # so many keep all workers busy
    rounds = [range(start, min(start + together, len(batches))) for start in range(0, len(batches), together)]
    cluster.progress.begin(len(rounds) * wanted.sequence_length, "tokens")
    found: list[TensorPayload] = []
    for number, numbers in enumerate(rounds):
        found += _write_batches(cluster, wanted, {batch: batches[batch] for batch in numbers}, number * wanted.sequence_length)
    written = np.concatenate([payload.array.astype(np.int64) for payload in found])
    return written if wanted.first is None else np.insert(written, 0, wanted.first, axis=1)


def _write_batches(cluster: Cluster, wanted: Wanted, batches: Mapping[int, Sequence[int]], done: int) -> list[TensorPayload]:
    """Write some batches together, each on its replica, and return their sequences."""
    shards, num_replicas = range(cluster.placement.num_shards), cluster.placement.num_replicas
    moving: dict[int, TensorPayload] = {}
    begun = []
    for batch, numbers in batches.items():
        begun += [cluster.submit(WorkerIndex(shard, batch % num_replicas), begin, batch, numbers, wanted) for shard in shards]
        moving[batch] = token_payload(np.tile(np.array(wanted.prompt, dtype=np.int64), (len(numbers), 1)))
    cluster.get(begun)
    in_flight: list[list[TensorPayload]] = []
    for place in range(wanted.sequence_length):
        for batch in batches:
            for shard in shards:
                moving[batch] = cluster.submit(WorkerIndex(shard, batch % num_replicas), write_on, batch, moving[batch], wanted.temperature)
        in_flight.append(list(moving.values()))
        if len(in_flight) > _TOKENS_IN_FLIGHT:
            cluster.get(in_flight.pop(0))
            cluster.progress.reach(done + place + 1 - _TOKENS_IN_FLIGHT)
    ended = [cluster.submit(WorkerIndex(shard, batch % num_replicas), end, batch) for batch in batches for shard in shards]
    found = [payload for payload in cluster.get(ended) if payload is not None]
    cluster.progress.reach(done + wanted.sequence_length)
    return found


def _batches(wanted: Wanted) -> list[list[int]]:
    """Return the numbers of the sequences of each batch, of nearly the same size, whatever the cluster is."""
    count, length = wanted.num_sequences, wanted.sequence_length + (wanted.first is not None)
    return [part.tolist() for part in np.array_split(np.arange(count), num_batches(count, length))]


def num_batches(num_texts: int, length: int) -> int:
    """Return in how many batches texts of so many tokens are written, whatever the cluster is."""
    return -(-num_texts // texts_together(length))


def texts_together(length: int) -> int:
    """Return how many texts of so many tokens are written together, at most."""
    return max(TEXTS_TOGETHER, TOKENS_TOGETHER // length)
