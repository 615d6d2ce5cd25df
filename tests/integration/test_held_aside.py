"""Windows held aside: no stage is fitted on them, stages are measured on them, and what does not
help is undone.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from ray_surgeon.maths.damping import A_CHOICES, G_CHOICES
from ray_surgeon.run.inputs import check
from ray_surgeon.runtime.local import LocalCluster
from ray_surgeon.runtime.passes import remember
from ray_surgeon.runtime.pipelines import forward_and_backward
from ray_surgeon.runtime.wave import CALIBRATION
from ray_surgeon.spec.parsing import parse_spec
from ray_surgeon.stages.answers.answers import DenseAnswers
from ray_surgeon.stages.correction.section import CorrectionSection
from ray_surgeon.stages.correction.training import HARMLESS, RATES, Corrections, Trained
from ray_surgeon.stages.curvature.section import KfacSection
from ray_surgeon.stages.prune.elements import ElementsSection
from ray_surgeon.stages.prune.method import Method
from ray_surgeon.stages.self_text.stage import SelfText
from ray_surgeon.stages.stage import HELD, CalibrationText, held_measure, held_places
from tests.conftest import COMMON, ROTARY, SPARSE
from tests.integration.runs import (
    assert_same_shot,
    loaded,
    report_of,
    run,
    tensors_of_shot,
    tiny_spec,
)
from tests.integration.test_conversations import TEMPLATE

WORKERS = ((1, 1), (2, 2))
CORRECTION: dict[str, Any] = {"correction__lora_rank": 2, "correction__steps_per_shot": 6}


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
    ("changes", "expected"),
    [
        ({}, 0),
        ({"calibration.held_aside": 0.3}, 2),
        ({"calibration.held_aside": 0.01}, 1),
        ({"correction.lora_rank": 2}, 1),
        ({"correction.lora_rank": 2, "calibration.held_aside": 0}, 0),
        ({"correction.lora_rank": 2, "cluster.num_replicas": 6}, 0),
        ({"correction.lora_rank": 2, "cluster.num_replicas": 3}, 3),
        ({"correction.lora_rank": 2, "cluster.num_replicas": 4}, 2),
        ({"curvature.damping": "auto"}, 1),
        ({"pruning.structure": "groups", "pruning.search": "{num_sequences: 3}"}, 1),
        ({"pruning.structure": "groups", "pruning.reconstruction": "{}"}, 1),
        ({"correction.lora_rank": 2, "calibration.num_sequences": 40}, 4),
        ({"correction.lora_rank": 2, "calibration.num_sequences": 400}, 6),
        (
            {
                "correction.lora_rank": 2,
                "calibration.num_sequences": 400,
                "calibration.held_aside": 0.1,
            },
            40,
        ),
    ],
)
def test_a_tenth_is_held_aside_where_a_stage_checks_itself(
    changes: dict[str, Any], expected: int, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    overrides = [f"{field}={value}" for field, value in changes.items()]
    spec = parse_spec(tiny_spec(tmp_path, model_folders["llama"]).read_text(), overrides)
    assert spec.num_held == expected


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
            worker.shard.set_weight(
                name, worker.shard.weight(name) * (0.8 if "down_proj" in name else 1.0)
            )
    return cluster, text


def weights(cluster: LocalCluster) -> dict[str, torch.Tensor]:
    return {
        name: worker.shard.weight(name)
        for worker in cluster.workers.values()
        for name in worker.shard.linears
    }


def trained(cluster: LocalCluster, text: CalibrationText, **options: Any) -> Trained:
    section = CorrectionSection.model_validate(
        {"lora_rank": 4, "steps_per_shot": 32, "sequences_per_step": 2} | options
    )
    return Corrections(section).train(cluster, text, 1, 1)


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_corrections_choose_a_rate_and_end_better_than_they_began(
    loss: str, model_folders: dict[str, Path]
) -> None:
    cluster, text = pruned(model_folders["llama"])
    before = held_measure(cluster, text, loss)
    found = trained(cluster, text, loss=loss)
    assert found.undone is None
    *harmful, first = found.tried
    assert (*harmful, first) == RATES[: len(found.tried)]
    assert all(found.tried[rate] > HARMLESS * before for rate in harmful)
    assert first / found.rate == 2 ** round(math.log2(first / found.rate)), "halved, or as it was"
    assert found.held[0] == (0, before)
    after = held_measure(cluster, text, loss)
    assert after < before
    assert found.held[-1][1] == pytest.approx(after, rel=1e-3), (
        "the last measure is that of the absorbed weights"
    )
    assert found.held[-1][1] == pytest.approx(min(value for _, value in found.held), rel=1e-3)
    record = found.as_record()
    assert record["correction_held_aside"][0] == {"steps": 0, "value": before}
    assert (found.facts["held aside before"], found.facts["held aside after"]) == (
        before,
        found.held[-1][1],
    )


@pytest.mark.parametrize(
    ("measures", "taken"),
    [([1.04], 0), ([1.06, 0.9], 1), ([math.inf, 2.0, 0.9], 2), ([1.06, 1.06, 1.06], 2)],
    ids=str,
)
def test_the_highest_rate_that_does_no_harm_goes_on(
    measures: list[float],
    taken: int,
    model_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of all that are harmful the lowest one; every trial begins where the first one did."""
    cluster, text = pruned(model_folders["llama"])
    come = iter([1.0, *measures, *[0.5] * 9])
    losses = list[float]()

    def forward(*arguments: Any, **options: Any) -> list[float]:
        of_sequences = forward_and_backward(*arguments, **options)
        losses.append(of_sequences[0])
        return of_sequences

    monkeypatch.setattr(
        "ray_surgeon.stages.correction.training.held_measure", lambda *_: next(come)
    )
    monkeypatch.setattr("ray_surgeon.stages.correction.training.forward_and_backward", forward)
    found = trained(cluster, text)
    assert found.tried == dict(zip(RATES, measures, strict=False))
    assert found.rate == RATES[taken]
    assert len(found.losses) == 32, (
        "the steps of the trial that was taken are those of the training"
    )
    num_steps = (len(losses) - 32) // max(1, len(measures) - 1)
    assert len({losses[number * num_steps] for number in range(len(measures))}) == 1


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_corrections_that_diverge_leave_the_model_as_it_was_and_say_why(
    rate: float, model_folders: dict[str, Path]
) -> None:
    cluster, text = pruned(model_folders["llama"])
    before = weights(cluster)
    found = trained(cluster, text, learning_rate=rate)
    assert found.undone is not None
    assert "no state was better on the windows held aside" in found.undone
    assert "diverged" in found.undone
    assert len(found.losses) < 32, "it was given up"
    assert found.absorbed == 0
    assert found.facts["undone"] == found.undone
    for name, W in weights(cluster).items():
        assert torch.equal(W, before[name]), name
    assert held_measure(cluster, text) == pytest.approx(found.held[0][1], rel=1e-6)


def test_a_loss_that_is_no_number_ends_a_training_and_not_the_run(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, text = pruned(model_folders["llama"])
    before = weights(cluster)
    monkeypatch.setattr(
        "ray_surgeon.stages.correction.training.forward_and_backward",
        lambda *_, **__: [math.nan, math.nan],
    )
    found = trained(cluster, text)
    assert found.undone is not None
    assert all(torch.equal(W, before[name]) for name, W in weights(cluster).items())
    record = found.as_record()
    assert record["correction_losses"] == []
    assert {entry["held_aside"] for entry in record["correction_tried"]} == {None}


def test_a_rate_is_halved_where_the_measure_rises(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the best state on, which is the one that is absorbed."""
    cluster, text = pruned(model_folders["llama"])
    measures = iter([1.0, 1.1, 0.8, 0.7, 0.9, 0.85, 0.72])
    monkeypatch.setattr(
        "ray_surgeon.stages.correction.training.held_measure", lambda *_: next(measures)
    )
    found = trained(cluster, text)
    # before, two trials, then three checks, of which 0.7 is the best and the others are above it by
    # more than is tolerated; then the best state as it is rounded
    assert list(found.tried.values()) == [1.1, 0.8]
    assert found.rate == RATES[1] / 2**2
    assert found.held[-1] == (11, 0.72)
    assert min(found.held, key=lambda pair: pair[1])[1] == 0.7
    assert found.undone is None


def test_corrections_are_equal_for_every_cluster(model_folders: dict[str, Path]) -> None:
    found = []
    after = []
    for shards, replicas in WORKERS:
        cluster, text = pruned(model_folders["llama"], shards, replicas)
        found.append(trained(cluster, text, steps_per_shot=10))
        after.append(
            {
                name: W
                for worker in cluster.workers.values()
                for name, W in ((n, worker.shard.weight(n)) for n in worker.shard.linears)
            }
        )
    assert found[0].rate == found[1].rate
    assert [value for _, value in found[0].held] == pytest.approx(
        [value for _, value in found[1].held], rel=1e-3
    )
    for name, W in after[0].items():
        torch.testing.assert_close(W, after[1][name], rtol=0, atol=2e-3)


def test_what_rounding_takes_away_again_is_undone(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """In bfloat16 a tiny correction changes no weight."""
    options = CORRECTION | {
        "correction__learning_rate": 1e-7,
        "model__dtype": "bfloat16",
        "pruning__num_shots": 1,
    }
    assert run(tmp_path, model_folders["llama"], **options) == 0
    (shot,) = report_of(tmp_path / "run")["shots"]
    assert shot["correction_undone"] is not None
    assert shot["correction_absorbed"] == 0
    assert (
        run(
            tmp_path / "plain",
            model_folders["llama"],
            model__dtype="bfloat16",
            pruning__num_shots=1,
            calibration__held_aside=0.1,
        )
        == 0
    )
    assert_same_shot(tmp_path / "run", tmp_path / "plain/run", 1)


def test_a_run_says_what_a_stage_did_on_the_windows_held_aside(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert (
        run(
            tmp_path,
            model_folders["llama"],
            **CORRECTION,
            correction__learning_rate=1.0,
            pruning__num_shots=1,
        )
        == 0
    )
    (shot,) = report_of(tmp_path / "run")["shots"]
    assert "diverged" in shot["correction_undone"]
    assert shot["divergence_held_aside"] == pytest.approx(shot["correction_held_aside"][0]["value"])
    events = [
        line
        for line in (tmp_path / "run/events.jsonl").read_text().splitlines()
        if '"step": "correction"' in line
    ]
    assert "diverged" in events[0]


@pytest.mark.parametrize(
    "options",
    [
        {"pruning__structure": "groups", "pruning__width_multiple": 1},
        {"pruning__structure": "rows_columns"},
        {"pruning__structure": "element"},
        {"curvature__kind": "activations"},
        {"curvature__kind": "extended_kfac"},
    ],
)
def test_damping_is_chosen_in_every_shot_and_used(
    options: dict[str, Any],
    model_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = list[tuple[float, float]]()
    plain = Method.of_loss

    def noting(self: Method, linears: Any) -> Any:
        damping = self.used_curvature.as_damping
        used.append((damping.a, damping.g))
        return plain(self, linears)

    monkeypatch.setattr(Method, "of_loss", noting)
    assert (
        run(
            tmp_path,
            model_folders["llama"],
            **options,
            curvature__damping="auto",
            calibration__held_aside=0.3,
        )
        == 0
    )
    shots = report_of(tmp_path / "run")["shots"]
    for shot, damping in zip(shots, used, strict=True):
        chosen = shot["damping_chosen"]
        has_G = options.get("curvature__kind") != "activations"
        assert damping == (chosen["a"], chosen["g"] if has_G else 0.0)
        assert chosen["a"] in A_CHOICES
        best = min(chosen["tried"], key=lambda entry: entry["cost"])
        assert {entry["a"] for entry in chosen["tried"]} == set(A_CHOICES)
        assert (best["a"], best["g"]) == (chosen["a"], chosen["g"])
        if has_G:
            assert {entry["g"] for entry in chosen["tried"]} == set(G_CHOICES)


def test_damping_is_chosen_alike_on_every_cluster(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    tried = []
    for name, (shards, replicas) in zip(("one", "four"), WORKERS, strict=True):
        workers = {"cluster__num_shards": shards, "cluster__num_replicas": replicas}
        options = {
            "pruning__structure": "groups",
            "pruning__width_multiple": 1,
            "calibration__held_aside": 0.3,
        }
        assert (
            run(
                tmp_path / name,
                model_folders["llama"],
                **options,
                **workers,
                curvature__damping="auto",
                pruning__num_shots=1,
            )
            == 0
        )
        tried.append(report_of(tmp_path / name / "run")["shots"][0]["damping_chosen"])
    assert (tried[0]["a"], tried[0]["g"]) == (tried[1]["a"], tried[1]["g"])
    assert [e["cost"] for e in tried[0]["tried"]] == pytest.approx(
        [e["cost"] for e in tried[1]["tried"]], rel=1e-3
    )


def test_damping_with_fewer_windows_held_aside_than_replicas_is_that_of_the_defaults(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    options = {"curvature__damping": "auto", "cluster__num_replicas": 4, "pruning__num_shots": 1}
    assert run(tmp_path, model_folders["llama"], **options) == 0
    (shot,) = report_of(tmp_path / "run")["shots"]
    assert "damping_chosen" not in shot


def test_damping_without_windows_held_aside_is_that_of_the_defaults(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    for name, damping in (("auto", "auto"), ("given", {"a": 0.01, "g": 0.1})):
        options = {
            "curvature__damping": damping,
            "calibration__held_aside": 0,
            "pruning__num_shots": 1,
        }
        assert run(tmp_path / name, model_folders["llama"], **options) == 0
    assert_same_shot(tmp_path / "auto/run", tmp_path / "given/run", 1)


def test_experts_that_promise_a_gain_stay_beyond_the_next_step(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A random mixture of eight experts, of which a fifth is to go, loses two of them; four and
    more have negative costs.
    """
    sizes = {**ROTARY, **COMMON, **SPARSE, "initializer_range": 0.05}
    config = Qwen3MoeConfig(**sizes, num_experts=8, head_dim=8, norm_topk_prob=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = {
        "pruning__structure": "groups",
        "pruning__groups": ["experts"],
        "pruning__allocation": "uniform",
        "pruning__target_sparsity": 0.18,
        "pruning__num_shots": 1,
        "output__exports": ["uniform"],
    }
    assert run(tmp_path, tmp_path / "model", **options) == 0
    report = report_of(tmp_path / "run")
    (shot,) = report["shots"]
    gone = [
        sum(f"layers.{block}." in name for name in shot["experts_removed"])
        for block in range(ROTARY["num_hidden_layers"])
    ]
    assert set(gone) == {2}
    assert sum(cost < 0 for cost in shot["expert_costs"].values()) > sum(gone), (
        "more of them promised a gain"
    )


def test_answers_alone_count_where_they_are_weighed(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """In a whole run with a chat template: written conversations, corrections, the comparison of
    answers, and going on later.
    """
    model = tmp_path / "chatty"
    model.mkdir()
    for path in model_folders["llama"].iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        f'{{"messages": [{{"role": "user", "content": "Say the number {i} and what comes after '
        f'it"}}]}}'
        for i in range(12)
    ]
    prompts.write_text("\n".join(lines))
    options = CORRECTION | {
        "calibration": {
            "source": "self",
            "prompts": str(prompts),
            "num_sequences": 6,
            "sequence_length": 96,
            "weigh": "answers",
        },
        "evaluation": {
            "texts": [
                {"name": "docs", "source": "python-docs", "num_sequences": 3, "sequence_length": 40}
            ],
            "generation": {"num_prompts": 2, "max_new_tokens": 6, "prompts": str(prompts)},
        },
    }
    assert run(tmp_path, model, **options) == 0
    report = report_of(tmp_path / "run")
    assert report["dense"]["generation"]["num_prompts"] == 2
    for shot in report["shots"]:
        assert 0 < shot["generation"]["acceptance"] < 1
        assert set(shot["generation"]["example"]) == {"prompt", "dense", "pruned"}
    inputs = check(parse_spec((tmp_path / "spec.yaml").read_text()), resume=True, dry_run=True)
    assert inputs.stage(DenseAnswers) is not None
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    shutil.rmtree(tmp_path / "run/shots/0002")
    (tmp_path / "run/report.json").unlink()
    assert run(tmp_path, model, "--resume", **options) == 0
    again = tensors_of_shot(tmp_path / "run", 2)
    first = tensors_of_shot(tmp_path / "whole", 2)
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert report_of(tmp_path / "run")["shots"][1]["generation"] == report["shots"][1]["generation"]


def test_a_calibration_with_prompts_holds_some_aside_for_the_comparison(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(f'{{"prompt": "text number {i} of many"}}' for i in range(20)))
    options: dict[str, Any] = {
        "calibration": {
            "source": "self",
            "prompts": str(prompts),
            "num_sequences": 2,
            "sequence_length": 100,
        },
        "evaluation": [
            {"name": "docs", "source": "python-docs", "num_sequences": 3, "sequence_length": 40}
        ],
    }
    changed = {"evaluation": {"texts": options["evaluation"], "generation": {"max_new_tokens": 8}}}
    inputs = check(
        parse_spec(tiny_spec(tmp_path, model_folders["llama"], **options).read_text()), dry_run=True
    )
    self_text = inputs.stage(SelfText)
    assert self_text is not None
    (request,) = self_text.requests.values()
    answers = inputs.stage(DenseAnswers)
    assert answers is not None
    left = {prompt.tokens for prompt in getattr(request, "prompts", None) or ()}
    assert len(answers.yardstick.prompts) == 2
    assert len(left) == 18
    assert not left & set(answers.yardstick.prompts)
    by_hand = check(
        parse_spec(tiny_spec(tmp_path, model_folders["llama"], **(options | changed)).read_text()),
        dry_run=True,
    )
    of_text = by_hand.stage(DenseAnswers)
    assert of_text is not None
    assert len(of_text.yardstick.prompts) == 3, "the beginnings of the evaluation text's windows"
    off = changed["evaluation"] | {"generation": None}
    assert (
        check(
            parse_spec(
                tiny_spec(
                    tmp_path, model_folders["llama"], **(options | {"evaluation": off})
                ).read_text()
            ),
            dry_run=True,
        ).stage(DenseAnswers)
        is None
    )


def test_elements_have_no_damping_of_one_model_if_it_is_chosen() -> None:
    section = KfacSection.model_validate({"damping": "auto"})
    assert section.chooses_damping
    assert (section.as_damping.a, section.as_damping.g) == (0.01, 0.1)
    assert ElementsSection(structure="element", target_sparsity=0.5, num_shots=2).removed_in(
        2
    ) == pytest.approx(1 / 3)
    assert replace(CalibrationText(np.zeros((2, 3), dtype=np.int64))).counts is None
