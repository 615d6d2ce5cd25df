"""Generated answers of dense and pruned models: against transformers, on several workers, and in
reports.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_surgeon.config.sections import ModelSection
from ray_surgeon.distributed.cluster import LocalCluster
from ray_surgeon.evaluation.answers import (
    Answers,
    Generation,
    answers_of,
    check_prompts,
    dense_record,
    departure,
    is_caught,
    measure_answers,
    shot_record,
)
from ray_surgeon.export.card import card
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.report import display as tables
from ray_surgeon.report.html_report import excerpt, page
from ray_surgeon.report.summary import summary_lines
from ray_surgeon.run.result import PruneResult
from tests.conftest import VOCABULARY
from tests.integration.runs import Jobs, loaded

Record = dict[str, Any]
WORKERS = ((1, 1), (3, 2))
MAX_TOKENS = 9
PROMPTS = tuple(
    tuple(np.random.default_rng(number).integers(1, VOCABULARY, length).tolist())
    for number, length in enumerate((3, 9, 1, 6, 4))
)
ENDS = frozenset(range(0, VOCABULARY, 9))
"""End tokens, frequent enough that some answers end."""


def damage(cluster: LocalCluster, factor: float) -> None:
    """Scale the weights of all linears."""
    for worker in cluster.workers.values():
        for name in worker.shard.linears:
            worker.shard.set_weight(name, factor * worker.shard.weight(name))


@torch.no_grad()
def by_transformers(
    folder: Path, factor: float
) -> tuple[Answers, dict[str, float], list[list[int]]]:
    """Return the dense answers, their mean measures, and the answers of the damaged model, computed
    by transformers alone.
    """
    dense, pruned = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    for name in ModelLayout.of(dense.config).shapes if factor != 1 else ():
        for parameter in pruned.get_submodule(name).parameters():
            parameter.mul_(factor)

    def answer(model: torch.nn.Module, prompt: tuple[int, ...]) -> list[int]:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + MAX_TOKENS and (
            len(tokens) == len(prompt) or tokens[-1] not in ENDS
        ):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(prompt) :]

    answers = [answer(dense, prompt) for prompt in PROMPTS]
    sums = dict.fromkeys(("acceptance", "agreement", "divergence"), 0.0)
    for prompt, said in zip(PROMPTS, answers, strict=True):
        tokens = torch.tensor([[*prompt, *said]])
        p, q = (
            m(tokens).logits[0, len(prompt) - 1 : -1].double().softmax(dim=-1)
            for m in (dense, pruned)
        )
        sums["acceptance"] += float(torch.minimum(p, q).sum())
        sums["agreement"] += float((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
        sums["divergence"] += float((p * (p / q).log()).sum())
    num_tokens = sum(map(len, answers))
    own = [answer(pruned, prompt) for prompt in PROMPTS]
    means = {name: value / num_tokens for name, value in sums.items()}
    return Answers(PROMPTS, tuple(map(tuple, answers)), ENDS), means, own


def assert_as_by_itself(cluster: LocalCluster, answers: Answers) -> None:
    """The dense model accepts all of its own answers."""
    same = measure_answers(cluster, answers, MAX_TOKENS)
    assert (same.acceptance, same.agreement, same.divergence) == (1.0, 1.0, 0.0)
    assert same.departures == tuple(map(len, answers.answers))
    assert same.answers == answers.answers
    assert same.not_ended == 0.0


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "mixtral"])
def test_answers_match_transformers(family: str, model_folders: dict[str, Path]) -> None:
    # transformers stores its experts in one tensor
    factor = 1.0 if family == "mixtral" else 0.95
    expected, means, own = by_transformers(model_folders[family], factor)
    assert 0 < sum(expected.ended) < len(PROMPTS), "some answers end"
    found = []
    for workers in WORKERS:
        cluster = loaded(model_folders[family], *workers)
        answers = answers_of(cluster, PROMPTS, MAX_TOKENS, ENDS)
        assert answers == expected
        assert_as_by_itself(cluster, answers)
        damage(cluster, factor)
        found.append(measure_answers(cluster, answers, MAX_TOKENS))
    assert found[0] == found[1]
    for name, value in means.items():
        assert getattr(found[0], name) == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert list(map(list, found[0].answers)) == own
    assert found[0].departures == tuple(map(departure, expected.answers, own))
    ended = [
        answer[-1] in ENDS for answer, was in zip(own, expected.ended, strict=True) if was
    ]
    assert found[0].not_ended == 1 - sum(ended) / len(ended)


def test_measures_that_are_not_finite_are_an_error(llama: Path) -> None:
    cluster = loaded(llama)
    answers = answers_of(cluster, PROMPTS, MAX_TOKENS, ENDS)
    damage(cluster, float("nan"))
    with pytest.raises(
        FloatingPointError, match="divergence from the dense model on its answers"
    ):
        measure_answers(cluster, answers, MAX_TOKENS)
    with pytest.raises(
        FloatingPointError, match="hidden state of the dense model's answers"
    ):
        answers_of(cluster, PROMPTS, MAX_TOKENS, ENDS)


def test_departure_is_the_first_token_that_differs() -> None:
    assert departure([1, 2, 3], [1, 4, 3]) == 1
    assert departure([1, 2], [0, 2]) == 0
    assert departure([1, 2, 3], [1, 2]) == 2


def test_unsuitable_prompts_are_refused() -> None:
    check_prompts([(1, 2)], 6, 8, "generation.prompts")
    for prompts, longest, message in (
        ([(1,), ()], 99, "prompt 1 has 0 tokens"),
        ([(1, 2)], 7, "2 tokens and its answer up to 6, but the model takes at most 7"),
    ):
        with pytest.raises(ValueError, match=rf"generation\.prompts.*{message}"):
            check_prompts(prompts, 6, longest, "generation.prompts")


def test_loops_are_found_in_short_answers() -> None:
    text = np.random.default_rng(0).permutation(300).tolist()
    glad = [40, 41, 42, 43]  # I'm glad.
    assert is_caught([*text[100:124], *glad * 4])
    assert not is_caught([*text[100:124], *glad * 2])
    assert not is_caught(text[:40])
    assert not is_caught([*text[100:130], *[7] * 10]), "less than three tenths"
    assert is_caught([7] * 8)
    assert not is_caught([7] * 7)
    # as in calibration text
    assert is_caught([*text[:200], *[301] * 32])
    assert not is_caught([*text[:200], *[301] * 31])


# Reports

HOSTILE = "[bold]<script>alert('x')</script>\x1b[2J\u202eabc\nnext line " + "long " * 100
ANSWERS_OF_TWO = Answers(((5, 6, 7), (8,)), ((1,), (2, 3)), frozenset({1}))
FOUND = Generation(
    acceptance=0.875,
    agreement=0.75,
    divergence=0.125,
    departures=(1, 0),
    not_ended=0.0,
    repeating=0.5,
    answers=((1,), (4, 3)),
)


def decode(tokens: Any) -> str:
    return HOSTILE + " ".join(map(str, tokens))


def test_records_shorten_texts_and_summarise_departures() -> None:
    dense = dense_record(ANSWERS_OF_TWO, lambda tokens: f"{tokens}" + "x" * 10_000)
    assert (dense["num_tokens"], dense["share_ended"], dense["share_repeating"]) == (
        3,
        0.5,
        0,
    )
    assert len(dense["example"]["dense"]) == 2000
    shot = shot_record(ANSWERS_OF_TWO, FOUND, decode)
    assert shot["tokens_until_departure"] == {"mean": 0.5, "median": 0.5}


@pytest.fixture
def without(job: Jobs) -> Record:
    """Return the report of a run that compares no answers."""
    return job.baseline(name="old").report


@pytest.fixture
def compared(without: Record) -> Record:
    """Return a report with the answers of both shots."""
    record = copy.deepcopy(without)
    record["spec"]["name"] = "new"
    record["dense"]["generation"] = dense_record(ANSWERS_OF_TWO, decode)
    for shot in record["shots"]:
        shot["generation"] = shot_record(ANSWERS_OF_TWO, FOUND, decode)
    return record


def test_terminal_shows_acceptance(without: Record, compared: Record) -> None:
    shots = tables.shots_table(compared)
    assert [column.header for column in shots.columns][:3] == [
        "round",
        "agreement with the original",
        "sparsity",
    ]
    assert list(shots.columns[1].cells)[-2:] == ["87.5%", "87.5%"]
    both = tables.shots_table(without, compared).columns[3]
    assert both.header == "agreement with the original"
    assert list(both.cells) == ["", "", "", "100.0%", "87.5%", "87.5%"]
    assert "agreement with the original" not in [
        column.header for column in tables.shots_table(without).columns
    ]
    assert "answers" not in "".join(summary_lines(without, "run"))
    lines = summary_lines(compared, "run")
    text = "\n".join(lines)
    assert "agreement with the original 87.5 %; greedy answers agree for" in text
    assert "are caught in a loop" in text
    assert "[bold]<script>" in text
    assert not {"\x1b", "\u202e"} & set(text)
    assert all(len(line) <= 210 for line in lines)
    labels = [line.split(" ")[0] for line in lines]
    assert labels.index("pruned") == labels.index("original") + 1
    assert "do not end" in text
    compared["shots"][-1]["generation"]["not_ended"] = None
    assert "do not end" not in "\n".join(summary_lines(compared, "run"))


def test_page_escapes_answers(without: Record, compared: Record) -> None:
    html = page([compared])
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert not {"\x1b", "\u202e"} & set(html)
    assert html.index("Agreement with the original") < html.index("Perplexity, docs")
    assert 'id="run-1-answers"' in html
    together = page([without, compared])
    row = "<td>agreement with the original</td>"
    assert together.count(row) == 3, "one for both runs, and two for the second run"
    assert "agreement" not in page([without])
    compared["shots"][0].pop("generation")
    compared["shots"][1]["generation"]["not_ended"] = None
    compared["dense"].pop("generation")
    assert "run-1-answers" in page([compared])


def test_result_and_card_include_measured_answers(
    without: Record, compared: Record
) -> None:
    cards = []
    entry: Record = {"kind": "uniform", "uri": "x", "size_bytes": 1e6, "loaders": {}}
    entry["load"] = "from_pretrained(x)"
    for record in (without, compared):
        facts = {
            "spec": record["spec"],
            "dense": record["dense"],
            "num_parameters": record["parameters"]["before"],
            "last": record["shots"][-1],
        }
        model = ModelSection(**record["spec"]["model"])
        cards.append(card(entry, model, facts, has_template=False, names=[]))
    assert PruneResult("somewhere", without).generation is None
    assert (
        dict(PruneResult("somewhere", compared).generation or {})["acceptance"] == 0.875
    )
    old, new = cards
    assert "acceptance" not in old
    assert "| acceptance rate | 87.5% |" in new
    assert new.index("acceptance rate") < new.index("| text | perplexity before |")
    assert "script" not in new


def test_excerpts_are_one_line_of_printable_text() -> None:
    assert excerpt("a\n\tb\x00\x1b[0m c\u200b\u202e", 200) == "a b[0m c"
    assert excerpt("x" * 300, 200) == "x" * 197 + "..."
