"""Sampling of tokens from the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from ray_surgeon.distributed import writing
from ray_surgeon.distributed.collectives import TensorPayload
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.distributed.writing import GenerationRequest, write_texts
from tests.conftest import CONFIGS, of_families
from tests.integration.runs import loaded

CLUSTERS = ((1, 1), (3, 1), (2, 2))
WANTED = GenerationRequest(prompts=((0, 5),) * 18, num_tokens=12, temperature=0.7, seed=3)
OF_MANY_LENGTHS = GenerationRequest(
    prompts=tuple(
        tuple(range(7 * i, 7 * i + n)) for i, n in enumerate((3, 1, 9, 1, 14, 2, 5, 30))
    ),
    num_tokens=20,
    temperature=0.9,
    seed=5,
)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "TOKENS_TOGETHER", 1)


def by_whole_passes(
    model: torch.nn.Module, wanted: GenerationRequest, number: int
) -> list[int]:
    """Return a text sampled without a cache, each token from the whole text before it."""
    generator = torch.Generator().manual_seed(wanted.seed + 1_000_003 * number)
    prompt = list(wanted.prompts[number])
    found = list[int]()
    for chance in torch.rand(wanted.num_tokens, generator=generator)[
        : wanted.room(number)
    ]:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + found])).logits[0, -1]
        if wanted.temperature:
            cumulated = torch.softmax(logits / wanted.temperature, dim=-1).cumsum(0)
            found.append(
                int(torch.searchsorted(cumulated, chance * cumulated[-1], right=True))
            )
        else:
            found.append(int(logits.argmax()))
        if found[-1] in wanted.ends:
            break
    return found


def lists(texts: list[NDArray[np.int64]]) -> list[list[int]]:
    return [text.tolist() for text in texts]


@pytest.mark.parametrize("family", of_families(CONFIGS))
def test_tokens_are_drawn_from_the_model(
    family: str, model_folders: dict[str, Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folders[family])
    numbers = (0, 8, 9, 17)  # in two batches
    expected = [by_whole_passes(model, WANTED, number) for number in numbers]
    for workers in CLUSTERS if family == "llama" else CLUSTERS[-1:]:
        found = lists(write_texts(loaded(model_folders[family], *workers), WANTED))
        assert [len(text) for text in found] == [12] * 18
        assert [found[number] for number in numbers] == expected


@pytest.mark.parametrize("family", ["opt", "gemma3", "deepseek_v3"])
def test_prompts_may_differ_in_length_and_texts_may_end_early(
    family: str, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "TEXTS_TOGETHER", 5)
    monkeypatch.setattr(writing, "PREFILL_TOKENS", 8)
    model = AutoModelForCausalLM.from_pretrained(model_folders[family])
    clusters = [loaded(model_folders[family], *workers) for workers in ((1, 1), (2, 2))]
    texts = [by_whole_passes(model, OF_MANY_LENGTHS, i) for i in range(8)]
    ends = frozenset({texts[0][3], texts[4][0], texts[6][-1]})
    for changes in (
        {},
        {"ends": ends},
        {"ends": ends, "temperature": 0},
        {"max_length": 30},
    ):
        wanted = replace(OF_MANY_LENGTHS, **changes)
        expected = [by_whole_passes(model, wanted, i) for i in range(8)]
        for cluster in clusters:
            assert lists(write_texts(cluster, wanted)) == expected
        if changes == {"ends": ends}:
            assert (len(expected[0]), len(expected[4])) <= (4, 1)
    assert expected[7] == [], "the prompt fills the maximum length"


def test_batch_stops_when_its_texts_have_ended(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    write_on = writing.write_on

    def counted(
        worker: Worker, batch: int, inputs: TensorPayload, *rest: Any
    ) -> TensorPayload:
        calls.append(len(inputs))
        return write_on(worker, batch, inputs, *rest)

    monkeypatch.setattr(writing, "write_on", counted)
    cluster = loaded(model_folders["llama"])
    wanted = replace(WANTED, prompts=WANTED.prompts[:8], num_tokens=60)
    whole = lists(write_texts(cluster, wanted))
    assert calls == [8] * 60
    calls.clear()
    ends = frozenset(text[2 + i] for i, text in enumerate(whole))
    ended = lists(write_texts(cluster, replace(wanted, ends=ends)))
    for text, before in zip(ended, whole, strict=True):
        last = next(i for i, token in enumerate(before) if token in ends)
        assert text == before[: last + 1]
    steps = max(map(len, ended))
    assert len(calls) <= steps + writing._STEPS_IN_FLIGHT
    assert len(set(calls)) > 1, "ended texts are removed from the batch"
    assert not cluster.workers[cluster.placement.workers[0]].state.writing


def test_prompts_of_similar_length_are_batched_together() -> None:
    prompts = tuple((1,) * n for n in (9, 1, 8, 2, 7, 3))
    assert GenerationRequest(prompts, 4, num_together=2).batches() == [
        [1, 3],
        [5, 4],
        [2, 0],
    ]
    assert GenerationRequest(prompts[:1] * 5, 4, num_together=4).batches() == [
        [0, 1, 2],
        [3, 4],
    ]
    assert GenerationRequest(prompts, 4, max_length=8, num_together=3).batches() == [
        [1, 3],
        [5, 4],
    ]
    assert GenerationRequest((), 4).batches() == []
