"""Coupled groups: what is removed can be cut out without a change of the logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_surgeon.runtime.worker import Worker
from ray_surgeon.stages.prune.group_choice import Reach
from ray_surgeon.stages.prune.groups import Groups
from tests.conftest import CONFIGS, LAYOUTS
from tests.integration.runs import (
    MOST_BY_ORDER_OF_SUMS,
    assert_same_shot,
    difference,
    report_of,
    run,
    tensors_of_shot,
)

GROUPS: dict[str, Any] = {"pruning__structure": "groups", "pruning__width_multiple": 8}


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_groups_of_every_family(
    family: str, allocation: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Consumers lose exactly the columns whose producers lose their rows, and the masked model says
    so.
    """
    options = {**GROUPS, "pruning__allocation": allocation, "output__exports": ["masked"]}
    assert run(tmp_path, model_folders[family], **options, cluster__num_shards=2) == 0
    report = report_of(tmp_path / "run")
    tensors = tensors_of_shot(tmp_path / "run", 2)
    total = sum(s["rows"] * s["columns"] for s in report["linears"])
    gone = 0
    widths = set()
    for groups in LAYOUTS[family].group_sets:
        columns = tensors[f"{groups.consumer}.columns"]
        left = columns[groups.columns]
        assert (left.all(dim=1) | ~left.any(dim=1)).all(), "a group goes whole or not at all"
        removed = ~left.all(dim=1)
        for name, rows in groups.producers:
            assert torch.equal(~tensors[f"{name}.rows"][rows].all(dim=1), removed)
            assert torch.equal(tensors[f"{name}.rows"][rows].any(dim=1), ~removed)
        kept = int((~removed).sum())
        assert kept >= (1 if groups.kind == "attention" else 8)
        widths.add((groups.kind, kept))
        gone += int(removed.sum()) * groups.num_parameters
    shot = report["shots"][-1]
    assert gone / total == pytest.approx(shot["sparsity"])
    assert shot["sparsity"] >= 0.3
    if allocation == "uniform":
        assert len(widths) == 2
        assert next(n for kind, n in widths if kind == "ffn") % 8 == 0
    else:
        assert shot["sparsity"] < 0.36, "a KV group of a tiny model is large"


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_shards_and_replicas_and_resume(
    allocation: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    options = {**GROUPS, "pruning__allocation": allocation}
    for name, cluster in (
        ("one", {}),
        ("shards", {"cluster__num_shards": 3}),
        ("replicas", {"cluster__num_replicas": 2}),
    ):
        assert run(tmp_path / name, model_folders["llama"], **options, **cluster) == 0
    assert_same_shot(tmp_path / "one/run", tmp_path / "shards/run", 2)
    assert difference(tmp_path / "one/run", tmp_path / "replicas/run", 2) < MOST_BY_ORDER_OF_SUMS


def test_paths_that_went_far_enough_are_not_followed_again(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round for paths that were cut too early gives the same shot as one for all."""
    followed = dict[str, list[int]]()
    costs = Groups.costs

    def listening(self: Groups, worker: Worker, reach: Reach, shot: int) -> Any:
        reach = replace(reach, only=None) if name == "all" else reach
        found = costs(self, worker, reach, shot)
        followed.setdefault(name, []).append(len(found.costs))
        return found

    monkeypatch.setattr(Groups, "costs", listening)
    for name in ("some", "all"):
        assert run(tmp_path / name, model_folders["gpt2"], **GROUPS, pruning__num_shots=1) == 0
    every = len(LAYOUTS["gpt2"].group_sets)
    assert followed["some"][:2] == [every, every]
    assert followed["all"] == [every] * len(followed["some"])
    assert sum(followed["some"]) < sum(followed["all"])
    assert_same_shot(tmp_path / "some/run", tmp_path / "all/run", 1)


def test_only_ffn_channels_go_if_the_spec_says_so(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert run(tmp_path, model_folders["llama"], **GROUPS, pruning__groups=["ffn"]) == 0
    tensors = tensors_of_shot(tmp_path / "run", 2)
    for groups in LAYOUTS["llama"].group_sets:
        assert tensors[f"{groups.consumer}.columns"].all() == (groups.kind == "attention")


def test_a_removed_group_may_be_anything_upstream(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """What the masks call pruned does not reach the logits: noise in the rows that were removed,
    with the consumer's columns zero.
    """
    assert run(tmp_path, model_folders["llama"], **GROUPS, output__exports=["masked"]) == 0
    masked = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/masked")
    tensors = tensors_of_shot(tmp_path / "run", 2)
    tokens = torch.arange(40)[None]
    before = masked(tokens).logits
    with torch.no_grad():
        for groups in LAYOUTS["llama"].group_sets:
            if groups.kind == "ffn":
                gone = ~tensors[f"{groups.consumer}.columns"][groups.columns[:, 0]]
                for name, rows in groups.producers:
                    masked.get_parameter(f"{name}.weight")[rows[gone].flatten()] = 1.0
    torch.testing.assert_close(masked(tokens).logits, before)
    assert LAYOUTS["llama"].heads.num_kv == 2
