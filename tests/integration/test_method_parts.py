"""Parts of methods by themselves: labels, curves, choices, and corrections' losses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ray_surgeon.maths.masks import ElementMask
from ray_surgeon.models.low_rank import LowRankCorrections
from ray_surgeon.run.inputs import check
from ray_surgeon.runtime.passes import BlockPass
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.spec.parsing import parse_spec
from ray_surgeon.stages.correction.section import CorrectionSection
from ray_surgeon.stages.correction.steps import start
from ray_surgeon.stages.correction.training import Corrections
from ray_surgeon.stages.curvature.stage import calibrate
from ray_surgeon.stages.stage import CalibrationText
from tests.conftest import LAYOUTS
from tests.integration.runs import loaded, tiny_spec


def test_labels_are_drawn_anew_in_every_shot(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    inputs = check(
        parse_spec(
            tiny_spec(tmp_path, model_folders["llama"], curvature__fisher="sampled").read_text()
        )
    )
    cluster = loaded(model_folders["llama"])
    found = []
    (worker,) = cluster.workers.values()
    for shot in (1, 2, 1):
        calibrate(inputs.method, cluster, inputs.text, shot, remembers=False)
        found.append(worker.shard.factors("model.layers.3.mlp.down_proj").G.dense())
    assert torch.equal(found[0], found[2])
    assert float((found[1] - found[0]).norm() / found[0].norm()) > 0.05


@pytest.mark.parametrize("structure", ["element", "n_m"])
def test_a_choice_of_elements_says_how_many_go_in_all(
    structure: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    method = (
        found := check(
            parse_spec(
                tiny_spec(
                    tmp_path, model_folders["llama"], pruning__structure=structure
                ).read_text()
            )
        )
    ).method
    cluster = loaded(model_folders["llama"])
    (worker,) = cluster.workers.values()
    for name, shape in worker.layout.shapes.items():
        worker.masks[name] = ElementMask(
            torch.ones(shape.num_rows, shape.num_columns, dtype=torch.bool)
        )
    for shot in (1, 2):
        calibrate(method, cluster, found.text, shot, remembers=False)
        choice = method.choose(cluster, method.score(cluster, shot), shot)
        method.apply(cluster, found.calibration, choice, shot)
        masks = worker.masks.values()
        assert choice.facts["sparsity"] == pytest.approx(
            1 - sum(m.num_kept for m in masks) / LAYOUTS["llama"].linear_size
        )


@pytest.mark.parametrize(("size", "steps", "epochs"), [(1, 13, 0), (4, 5, 2), (9, 3, 2)])
def test_corrections_pass_over_all_sequences_in_an_order_of_every_pass(
    size: int, steps: int, epochs: int
) -> None:
    """Six sequences, the last step of a pass over what is left of them; the final passes are over
    all of them.
    """
    corrections = Corrections(
        CorrectionSection(sequences_per_step=size, steps_per_shot=steps, final_epochs=epochs)
    )
    first, last = (corrections.batches(shot, 2, 6) for shot in (1, 2))
    per_pass = math.ceil(6 / size)
    assert (len(first), len(last)) == (steps, steps + epochs * per_pass)
    passes = [
        part[i : i + per_pass]
        for part in (first, last[:steps], last[steps:])
        for i in range(0, len(part), per_pass)
    ]
    orders = [[number for batch in one for number in batch] for one in passes]
    assert all(len(batch) == size for one in passes for batch in one[: per_pass - 1])
    assert all(
        sorted(order) == list(range(6))
        for order, one in zip(orders, passes, strict=True)
        if len(one) == per_pass
    )
    assert len({tuple(order) for order in orders}) == len(orders)


def test_losses_of_corrections_are_those_of_the_tokens_of_each_step(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Of a dense model that hardly changes; the second step has two sequences."""
    sequences = check(
        parse_spec(tiny_spec(tmp_path, model_folders["llama"]).read_text())
    ).calibration
    section = CorrectionSection(
        loss="cross_entropy",
        sequences_per_step=4,
        steps_per_shot=2,
        learning_rate=1e-12,
        lora_rank=1,
    )
    found = Corrections(section).train(
        loaded(model_folders["llama"]), CalibrationText(sequences), 1, 1
    )
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    for loss, batch in zip(found.losses, Corrections(section).batches(1, 1, 6), strict=True):
        tokens = torch.from_numpy(sequences[batch])
        assert loss == pytest.approx(float(model(tokens, labels=tokens).loss.detach()), rel=1e-5)
    assert found.absorbed < 0.5, "steps are too short for float32"


def test_corrections_of_linears_and_shots_start_from_their_own(
    model_folders: dict[str, Path],
) -> None:
    (worker,) = loaded(model_folders["llama"]).workers.values()
    starts = []
    for shot in (1, 2):
        start(worker, CorrectionSection(lora_rank=1), shot)
        parts = worker.drop(LowRankCorrections)
        parts.absorb()
        starts += [tuple(part.A.flatten().tolist()) for part in parts.parts.values()]
    assert len(set(starts)) == len(starts)


def test_the_seed_of_corrections_is_that_of_their_start_and_of_the_order(
    model_folders: dict[str, Path],
) -> None:
    (worker,) = loaded(model_folders["llama"]).workers.values()
    starts = []
    orders = []
    for seed in (0, 1):
        section = CorrectionSection(lora_rank=1, seed=seed)
        start(worker, section, 1)
        parts = worker.drop(LowRankCorrections)
        parts.absorb()
        starts.append(parts.parts["model.layers.0.self_attn.q_proj"].A.flatten().tolist())
        orders.append(Corrections(section).batches(1, 1, 20))
    assert starts[0] != starts[1]
    assert orders[0] != orders[1]


def test_gradients_of_corrections_are_of_the_mean_over_the_tokens_of_a_step(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of an epoch may have fewer sequences."""
    plain = LowRankCorrections.gradients
    seen = set[int]()

    def noting(self: LowRankCorrections, name: str, num_tokens: int) -> Any:
        seen.add(num_tokens)
        return plain(self, name, num_tokens)

    monkeypatch.setattr(LowRankCorrections, "gradients", noting)
    section = CorrectionSection(
        loss="cross_entropy", sequences_per_step=4, steps_per_shot=2, lora_rank=1
    )
    Corrections(section).train(
        loaded(model_folders["llama"]), CalibrationText(np.arange(6 * 20).reshape(6, 20)), 1, 1
    )
    assert seen == {4 * 19, 2 * 19}


@dataclass(frozen=True)
class Noting(BlockPass):
    """Keeps what it is given for every linear."""

    def change(self, worker: Worker, name: str, A: Tensor) -> None:
        worker.keeping(dict)[name] = A.clone()


@pytest.mark.parametrize("family", ["olmoe", "opt"])
def test_moments_in_a_pass_by_blocks_are_means_over_the_tokens_of_all_replicas(
    family: str, model_folders: dict[str, Path]
) -> None:
    sequences = np.arange(8).reshape(2, 4)
    found = list[dict[str, Tensor]]()
    for num_replicas in (1, 2):
        cluster = loaded(model_folders[family], 1, num_replicas)
        Noting().pass_all(cluster, sequences)
        found.append(
            {
                name: A
                for worker in cluster.workers.values()
                if worker.has(dict)
                for name, A in worker.kept(dict).items()
            }
        )
    one, two = found
    assert one.keys() == two.keys() == set(LAYOUTS[family].shapes)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
        if LAYOUTS[family].shapes[name].has_bias:
            assert float(one[name][-1, -1]) == pytest.approx(1)
