"""Parts of methods: labels, choices of what to remove, and losses of corrections."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_surgeon.config.curvature import KfacSection
from ray_surgeon.config.pruning import RowsColumnsSection
from ray_surgeon.config.sections import RecoverySection
from ray_surgeon.maths.threshold import StructureCosts
from ray_surgeon.models.low_rank import LowRankCorrections
from ray_surgeon.pruning.calibration import calibrate
from ray_surgeon.pruning.method import Scores
from ray_surgeon.pruning.rows_columns import RowsColumns
from ray_surgeon.recovery.training import CalibrationBatches, Training
from ray_surgeon.run_state import CalibrationText
from tests.integration.runs import Jobs, loaded


def test_every_shot_samples_new_labels(job: Jobs) -> None:
    inputs = job.inputs(curvature__fisher="sampled")
    cluster = loaded(job.models["llama"])
    (worker,) = cluster.workers.values()
    found = []
    for shot in (1, 2, 1):
        calibrate(inputs.method, cluster, inputs.text, shot, remembers=False)
        found.append(worker.shard.factors("model.layers.3.mlp.down_proj").G.dense())
    assert torch.equal(found[0], found[2])
    assert float((found[1] - found[0]).norm() / found[0].norm()) > 0.05


@pytest.mark.parametrize(("size", "steps"), [(1, 13), (4, 9)])
def test_recovery_shuffles_windows_in_every_pass(size: int, steps: int) -> None:
    """Every pass takes all six sequences in a new order, and its last step has the remaining ones.
    Trainings between shots are shorter.
    """
    text = CalibrationText(np.arange(60).reshape(6, 10))
    sizes = {"num_tokens": steps * size * 10 - 3, "num_tokens_between_shots": 10}
    section = RecoverySection(sequences_per_step=size, **sizes)
    first, last = (
        CalibrationBatches(section, text, section.num_steps(10, ends=shot == 2), shot)
        for shot in (1, 2)
    )
    assert (first.num_steps, last.num_steps) == (1, steps)
    numbers = [list(last.batch(i).numbers) for i in range(steps)]
    per_pass = math.ceil(6 / size)
    passes = [numbers[i : i + per_pass] for i in range(0, steps, per_pass)]
    orders = [[number for batch in own for number in batch] for own in passes]
    for own, order in zip(passes, orders, strict=True):
        assert all(len(batch) == size for batch in own[: per_pass - 1])
        assert len(own) < per_pass or sorted(order) == list(range(6))
    assert len({tuple(order) for order in orders}) == len(orders)


def test_losses_and_gradients_of_corrections_are_means_over_tokens(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are means over the tokens of a step. The learning rate is so low that the model stays
    dense; the second step has two sequences.
    """
    plain = LowRankCorrections.gradients
    seen = set[int]()

    def noting(self: LowRankCorrections, name: str, num_tokens: int) -> Any:
        seen.add(num_tokens)
        return plain(self, name, num_tokens)

    monkeypatch.setattr(LowRankCorrections, "gradients", noting)
    sequences = job.inputs().calibration
    steps = {"sequences_per_step": 4, "num_tokens": 2 * 4 * 40, "learning_rate": 1e-12}
    section = RecoverySection.model_validate(steps | {"loss": "cross_entropy", "rank": 1})
    cluster = loaded(job.models["llama"])
    text = CalibrationText(sequences)
    found = Training(
        section,
        cluster,
        text,
        CalibrationBatches(section, text, section.num_steps(text.tokens.shape[1]), 1),
    )
    found.train(1)
    assert seen == {4 * 39, 2 * 39}
    model = AutoModelForCausalLM.from_pretrained(job.models["llama"])
    for number, loss in enumerate(found.losses):
        tokens = torch.from_numpy(sequences[found.batches.batch(number).numbers])
        assert loss == pytest.approx(
            float(model(tokens, labels=tokens).loss.detach()), rel=1e-5
        )
    assert found.absorbed < 0.5, "the steps are too small for float32"


COSTS = (
    StructureCosts(40, 8, 5, torch.arange(1.0, 9.0), torch.tensor([3.5, 4.5, 5.5, 6.5])),
    StructureCosts(12, 4, 3, torch.arange(2.0, 6.0), torch.tensor([1.5, 2.5, 3.5])),
)


class Propagating:
    """Workers whose propagation removes `extra` more entries of each linear at any threshold."""

    def __init__(self, extra: int) -> None:
        self.extra = extra

    def run_all(self, step: Any, value: float) -> list[int]:
        def kept(c: StructureCosts) -> int:
            rows = int((c.rows > value).sum() + c.num_rows - len(c.rows))
            return rows * int((c.columns > value).sum() + c.num_columns - len(c.columns))

        return [max(0, kept(c) - self.extra) for c in COSTS]


@pytest.mark.parametrize(("extra", "target"), [(0, 0.05), (3, 0.31), (40, 25.5 / 52)])
def test_lowest_sufficient_threshold_counts_propagated_removals(
    extra: int, target: float
) -> None:
    method = RowsColumns(
        RowsColumnsSection(target_sparsity=target, num_shots=1), KfacSection()
    )
    cluster: Any = Propagating(extra)

    def removed(value: float) -> int:
        return 52 - sum(cluster.run_all(None, value))

    values = sorted(
        {0.0, *(float(x) for c in COSTS for side in (c.rows, c.columns) for x in side)}
    )
    expected = next(value for value in values if removed(value) >= target * 52 - 1e-6)
    choice = method.choose(cluster, Scores(COSTS, 52, 52), 1)
    assert choice.threshold == expected == choice.facts["threshold"]
    assert choice.facts["sparsity"] == pytest.approx(removed(expected) / 52)
