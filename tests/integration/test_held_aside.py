"""Windows held aside: no stage is fitted on them, stages are measured on them, and training that
does not help is undone.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from ray_surgeon.config.job import parse_spec
from ray_surgeon.config.sections import RecoverySection
from ray_surgeon.distributed.cluster import LocalCluster
from ray_surgeon.distributed.dense_states import CALIBRATION
from ray_surgeon.distributed.passes import forward_and_backward, remember
from ray_surgeon.maths.structured import A_CHOICES, G_CHOICES
from ray_surgeon.preparation.inputs import Inputs, check
from ray_surgeon.pruning.method import Method
from ray_surgeon.recovery.training import HARMLESS, RATES, CalibrationBatches, Training
from ray_surgeon.report.html_report import LivePage
from ray_surgeon.report.wording import sentence
from ray_surgeon.run_state import HELD, CalibrationText, held_measure, held_places
from tests.integration import runs
from tests.integration.runs import (
    ONE,
    Jobs,
    assert_same_shot,
    changes_of,
    copied_model,
    loaded,
)
from tests.integration.test_conversations import TEMPLATE

LORA = "recovery.rank=2; recovery.num_tokens=120; recovery.sequences_per_step=1"
TRAINING = "ray_surgeon.recovery.training"


def test_windows_held_aside_are_spread_over_all_texts() -> None:
    tokens = np.arange(20)[:, None] + np.zeros((1, 5), dtype=np.int64)
    counts = tokens % 2 == 0
    text = CalibrationText.split(tokens, counts, 4)
    assert text.held[:, 0].tolist() == [2, 7, 12, 17]
    assert sorted([*text.tokens[:, 0], *text.held[:, 0]]) == list(range(20))
    assert text.counts is not None
    assert text.held_counts is not None
    assert np.array_equal(text.counts, text.tokens % 2 == 0)
    assert np.array_equal(text.held_counts, text.held % 2 == 0)
    none = CalibrationText.split(tokens, None, 0)
    assert (len(none.tokens), len(none.held)) == (20, 0)
    assert none.counts is none.held_counts is None
    assert held_places(3, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("", 0),
        ("calibration.held_aside=0.01", 1),
        (f"{LORA}; calibration.held_aside=0", 0),
        (f"{LORA}; cluster.num_replicas=6", 0),
        (f"{LORA}; cluster.num_replicas=4", 2),
        ("curvature.damping=auto", 1),
        ("pruning.structure=groups; pruning.reconstruction={}", 1),
        (f"{LORA}; calibration.num_sequences=40", 4),
        (f"{LORA}; calibration.num_sequences=400", 6),
        (f"{LORA}; calibration.num_sequences=400; calibration.held_aside=0.1", 40),
    ],
)
def test_default_number_of_windows_held_aside(
    settings: str, expected: int, job: Jobs
) -> None:
    spec = job.spec(changes_of(settings))
    assert parse_spec(spec.read_text()).num_held == expected


def pruned(
    model: Path, num_shards: int = 1, num_replicas: int = 1
) -> tuple[LocalCluster, CalibrationText]:
    """Return a model with weakened feed-forward layers and the dense model's states, and a text
    with windows held aside.
    """
    cluster = loaded(model, num_shards, num_replicas)
    tokens = np.random.default_rng(0).integers(1, 300, (14, 24))
    text = CalibrationText.split(tokens, None, 4)
    remember(cluster, CALIBRATION, text.tokens)
    remember(cluster, HELD, text.held)
    for worker in cluster.workers.values():
        for name in worker.shard.linears:
            if "down_proj" in name:
                worker.shard.set_weight(name, worker.shard.weight(name) * 0.8)
    return cluster, text


def trained(cluster: LocalCluster, text: CalibrationText, **options: Any) -> Training:
    sizes = {"rank": 4, "num_tokens": 32 * 2 * 24, "sequences_per_step": 2}
    section = RecoverySection.model_validate(sizes | options)
    training = Training(
        section,
        cluster,
        text,
        CalibrationBatches(section, text, section.num_steps(text.tokens.shape[1]), 1),
    )
    training.train(1)
    return training


def measured(monkeypatch: pytest.MonkeyPatch, *measures: float) -> None:
    """Replace the measures on windows held aside."""
    come = iter(measures)
    monkeypatch.setattr(f"{TRAINING}.held_aside", lambda *_: (next(come), None))


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_corrections_choose_a_rate_and_lower_the_measure(loss: str, llama: Path) -> None:
    cluster, text = pruned(llama)
    before = held_measure(cluster, text, loss)
    found = trained(cluster, text, loss=loss)
    assert found.undone is None
    *harmful, first = found.tried
    assert (*harmful, first) == RATES[: len(found.tried)]
    assert all(found.tried[rate] > HARMLESS * before for rate in harmful)
    assert first / found.rate == 2 ** round(math.log2(first / found.rate)), (
        "the rate was halved some times or never"
    )
    assert (found.held[0].steps, found.held[0].value) == (0, before)
    after = held_measure(cluster, text, loss)
    assert after < before
    last = found.held[-1].value
    assert last == pytest.approx(after, rel=1e-3), (
        "the last measure is that of the absorbed weights"
    )
    assert last == pytest.approx(min(check.value for check in found.held), rel=1e-3)


@pytest.mark.parametrize(
    ("measures", "taken"),
    [([1.04], 0), ([1.06, 0.9], 1), ([math.inf, 1.06, 1.06], 2)],
    ids=str,
)
def test_highest_harmless_rate_is_chosen(
    measures: list[float], taken: int, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If all rates do harm, the lowest one is chosen. Every trial starts from the same state."""
    cluster, text = pruned(llama)
    losses = list[float]()

    def forward(*arguments: Any, **options: Any) -> list[float]:
        of_sequences = forward_and_backward(*arguments, **options)
        losses.append(of_sequences[0])
        return of_sequences

    measured(monkeypatch, 1.0, *measures, *[0.5] * 9)
    monkeypatch.setattr(f"{TRAINING}.forward_and_backward", forward)
    found = trained(cluster, text)
    assert found.tried == dict(zip(RATES, measures, strict=False))
    assert found.rate == RATES[taken]
    assert len(found.losses) == 32, (
        "the steps of the chosen trial count towards the training"
    )
    num_steps = (len(losses) - 32) // max(1, len(measures) - 1)
    assert len({losses[number * num_steps] for number in range(len(measures))}) == 1


def test_nan_loss_undoes_the_training(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, text = pruned(llama)
    before = runs.weights_of(cluster)
    nothing = [math.nan, math.nan]
    monkeypatch.setattr(f"{TRAINING}.forward_and_backward", lambda *_, **__: nothing)
    found = trained(cluster, text)
    assert found.undone is not None
    assert all(
        torch.equal(W, before[name]) for name, W in runs.weights_of(cluster).items()
    )
    assert held_measure(cluster, text) == pytest.approx(found.held[0].value, rel=1e-6)
    record = found.as_record()
    assert record["recovery_losses"] == []
    assert {entry["held_aside"] for entry in record["recovery_tried"]} == {None}


def test_rate_is_halved_if_the_measure_rises(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training continues from the best state, which is also absorbed."""
    cluster, text = pruned(llama)
    # the start, two trials, then three checks: 0.7 is the best, and the others exceed it
    # by more than the tolerance; last the best state after rounding
    measured(monkeypatch, 1.0, 1.1, 0.8, 0.7, 0.9, 0.85, 0.72)
    found = trained(cluster, text)
    assert list(found.tried.values()) == [1.1, 0.8]
    assert found.rate == RATES[1] / 2
    assert (found.held[-1].steps, found.held[-1].value) == (11, 0.72)
    assert min(check.value for check in found.held) == 0.7
    assert found.undone is None


def test_corrections_do_not_depend_on_shards_and_replicas(llama: Path) -> None:
    clusters = [pruned(llama, *workers) for workers in ((1, 1), (2, 2))]
    one, other = (trained(cluster, text, num_tokens=480) for cluster, text in clusters)
    assert one.rate == other.rate
    measures, of_other = ([check.value for check in found.held] for found in (one, other))
    assert measures == pytest.approx(of_other, rel=1e-3)
    after, expected = (runs.weights_of(cluster) for cluster, _ in clusters)
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("rate", "dtype", "why"), [(1e-7, "bfloat16", ""), (1.0, "float32", "diverged")]
)
def test_diverging_corrections_are_undone(
    rate: float, dtype: str, why: str, job: Jobs
) -> None:
    """Corrections that rounding removes are undone, too: tiny ones change no bfloat16 weight."""
    options = ONE | {"model__dtype": dtype}
    done = job(
        options,
        recovery={
            "rank": 2,
            "num_tokens": 1280,
            "sequences_per_step": 1,
            "learning_rate": rate,
        },
    )
    (shot,) = done.shots
    assert "no state was better on the validation windows" in shot["recovery_undone"]
    assert why in shot["recovery_undone"]
    assert shot["recovery_absorbed"] == 0
    assert (len(shot["recovery_losses"]) < 32) == (why == "diverged"), (
        "diverging training stops early"
    )
    assert shot["divergence_held_aside"] == pytest.approx(
        shot["recovery_held_aside"][0]["value"]
    )
    (event,) = [event for event in done.events if event["step"] == "recovery"]
    assert why in json.dumps(event)
    plain = job(options, folder="plain", calibration__held_aside=0.1)
    assert_same_shot(done.uri, plain.uri, 1)


def test_every_check_is_reported_and_drawn(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log and the page show the checks during the training and after it."""
    pages = list[Mapping[str, Any]]()
    monkeypatch.setattr(
        LivePage, "draw", lambda self, record, *, final: pages.append(record)
    )
    done = job(
        ONE, calibration__held_aside=0.3, **runs.LORA, recovery__learning_rate=1e-3
    )
    held = done.shot["recovery_held_aside"]
    *before, last = (
        event for event in done.events if event["step"] in ("check", "recovery")
    )
    assert last["step"] == "recovery"
    for told, event in zip(held, before, strict=True):
        facts = {name: value for name, value in told.items() if value is not None}
        assert event["facts"] == facts | {"held_aside": facts.pop("value"), "rate": 1e-3}
        assert 0 < event["facts"]["acceptance"] <= 1
        assert sentence("check", event["facts"]) in done.out
    assert [told["steps"] for told in held[:4]] == [0, 1, 2, 3]
    assert held[3]["tokens"] == 120
    drawn = [
        page["present"]["recovery_held_aside"] for page in pages if "present" in page
    ]
    assert drawn == [held[: number + 1] for number in range(len(held))]
    assert "present" not in done.report


CHOOSES = {"curvature__damping": "auto", "calibration__held_aside": 0.3}


@pytest.mark.parametrize(
    "settings",
    [
        "pruning.num_shots=2",
        pytest.param("pruning.structure=element", marks=pytest.mark.slow),
        pytest.param("curvature.kind=activations", marks=pytest.mark.slow),
        "curvature.kind=extended_kfac",
    ],
)
def test_lowest_cost_held_aside_chooses_the_damping(
    settings: str, job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = list[tuple[float, float]]()
    plain = Method.of_loss

    def noting(self: Method, linears: Any) -> Any:
        damping = self.used_curvature.as_damping
        used.append((damping.a, damping.g))
        return plain(self, linears)

    monkeypatch.setattr(Method, "of_loss", noting)
    shots = job(ONE | CHOOSES | changes_of(settings)).shots
    for shot, damping in zip(shots, used, strict=True):
        chosen = shot["damping_chosen"]
        has_G = "activations" not in settings
        assert damping == (chosen["a"], chosen["g"] if has_G else 0.0)
        costs = {(entry["a"], entry["g"]): entry["cost"] for entry in chosen["tried"]}
        assert costs[chosen["a"], chosen["g"]] == min(costs.values())
        assert {a for a, _ in costs} == set(A_CHOICES)
        if has_G:
            assert {g for _, g in costs} == set(G_CHOICES)


def test_chosen_damping_does_not_depend_on_shards_and_replicas(job: Jobs) -> None:
    options = runs.GROUPS | ONE | CHOOSES | {"pruning__width_multiple": 1}
    chosen = job(options).shot["damping_chosen"]
    other = job(options | runs.FOUR, folder="four").shot["damping_chosen"]
    assert (chosen["a"], chosen["g"]) == (other["a"], other["g"])
    costs, expected = ([entry["cost"] for entry in c["tried"]] for c in (chosen, other))
    assert costs == pytest.approx(expected, rel=1e-3)


def test_default_damping_with_fewer_windows_than_replicas(job: Jobs) -> None:
    """Without a window for each replica, the damping is the default one."""
    options = ONE | CHOOSES | {"cluster__num_replicas": 4}
    auto = job(options)
    assert "damping_chosen" not in auto.shot
    given = job(options, folder="given", curvature__damping={"a": 0.01, "g": 0.1})
    assert_same_shot(auto.uri, given.uri, 1)


PYTHON_DOCS = {
    "name": "docs",
    "source": "python-docs",
    "num_sequences": 3,
    "sequence_length": 40,
}


def prompts_file(folder: Path, *records: Any) -> str:
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))
    return str(folder / "prompts.jsonl")


def test_run_weighs_only_answers_of_conversations(job: Jobs) -> None:
    """A whole run with a chat template generates conversations, trains corrections, compares
    answers and resumes.
    """
    model = copied_model(job.models["llama"], job.folder / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    asked = [
        {"role": "user", "content": f"Say {i} and what comes after it"} for i in range(12)
    ]
    prompts = prompts_file(job.folder, *({"messages": [one]} for one in asked))
    generation = {"num_prompts": 2, "max_new_tokens": 6, "prompts": prompts}
    calibration = {"source": "self", "prompts": prompts, "weigh": "answers"}
    options = {
        "model": model,
        "calibration": calibration | {"num_sequences": 6, "sequence_length": 96},
        "evaluation": {"texts": [PYTHON_DOCS], "generation": generation},
        "recovery": {"rank": 2, "num_tokens": 240, "sequences_per_step": 1},
    }
    done = job(options)
    report = done.report
    assert report["dense"]["generation"]["num_prompts"] == 2
    for shot in report["shots"]:
        assert 0 < shot["generation"]["acceptance"] < 1
        assert set(shot["generation"]["example"]) == {"prompt", "dense", "pruned"}
    whole = shutil.copytree(done.uri, job.folder / "whole")
    shutil.rmtree(done.uri / "shots/0002")
    (done.uri / "report.json").unlink()
    again = job(options, "--resume")
    assert_same_shot(again.uri, whole, 2)
    assert again.shot["generation"] == report["shots"][1]["generation"]


def test_calibration_holds_prompts_aside_for_evaluation(job: Jobs) -> None:
    prompts = prompts_file(
        job.folder, *({"prompt": f"text number {i} of many"} for i in range(20))
    )
    calibration = {
        "source": "self",
        "prompts": prompts,
        "num_sequences": 2,
        "sequence_length": 100,
    }

    def checked(evaluation: Any) -> Inputs:
        spec = job.spec(calibration=calibration, evaluation=evaluation)
        return check(parse_spec(spec.read_text()), dry_run=True)

    inputs = checked([PYTHON_DOCS])
    (request,) = inputs.stages.self_text.requests.values()
    left = {prompt.tokens for prompt in request.prompts}
    held = inputs.stages.dense_answers.prompt_set.prompts
    assert (len(held), len(left)) == (2, 18)
    assert not left & set(held)
    by_hand = checked({"texts": [PYTHON_DOCS], "generation": {"max_new_tokens": 8}})
    beginnings = by_hand.stages.dense_answers.prompt_set.prompts
    assert len(beginnings) == 3, "prompts are cut from the windows of the evaluation text"
    off = checked({"texts": [PYTHON_DOCS], "generation": None})
    assert off.stages.dense_answers is None
