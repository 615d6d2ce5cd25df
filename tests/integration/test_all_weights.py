"""Recovery that trains all weights of the blocks."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_surgeon.distributed.cluster import LocalCluster
from ray_surgeon.models.whole_weights import block_parameters
from ray_surgeon.recovery.recovery import Recovery
from ray_surgeon.storage import tensor_files
from tests.integration.runs import GROUPS, LORA, Jobs, assert_same_shot
from tests.integration.test_held_aside import pruned, trained

ALL = LORA | {"recovery__rank": "all", "recovery__learning_rate": 1e-3}


def parameters(cluster: LocalCluster, replica: int) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach()
        for index, worker in cluster.workers.items()
        for name, parameter in block_parameters(worker.shard).items()
        if index.replica == replica
    }


def test_sharded_and_replicated_training_matches_one_process(llama: Path) -> None:
    options: dict[str, Any] = {
        "rank": "all",
        "num_tokens": 3 * 2 * 24,
        "learning_rate": 1e-3,
    }
    start = parameters(pruned(llama)[0], 0)
    results = []
    for sizes in ((1, 1), (2, 2)):
        cluster, text = pruned(llama, *sizes)
        found = trained(cluster, text, **options)
        assert found.undone is None
        assert found.held[-1].value < found.before
        # float32 weights need no separate masters
        assert found.absorbed == pytest.approx(1)
        results.append([parameters(cluster, replica) for replica in range(sizes[1])])
    ((alone,), replicas) = results
    for name, weight in alone.items():
        assert torch.equal(replicas[0][name], replicas[1][name])
        change = weight - start[name]
        assert change.any()
        error = float((replicas[0][name] - weight).norm())
        assert error < 5e-3 * float(change.norm()), name


def test_training_that_does_not_help_is_undone(llama: Path) -> None:
    cluster, text = pruned(llama, 1, 2)
    before = {name: p.clone() for name, p in parameters(cluster, 1).items()}
    found = trained(cluster, text, rank="all", num_tokens=4 * 2 * 24, learning_rate=1.0)
    assert found.undone is not None
    for replica in (0, 1):
        assert all(
            torch.equal(p, before[n]) for n, p in parameters(cluster, replica).items()
        )


def test_all_weights_are_committed_resumed_and_exported(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports = {
        "pruning__allocation": "uniform",
        "output__exports": ["uniform", "per_block"],
    }
    changes = GROUPS | ALL | exports
    done = job(changes, folder="whole")
    for shot in done.shots:
        assert shot["recovery_undone"] is None
        assert shot["recovery_absorbed"] == pytest.approx(1)
        assert (
            shot["recovery_held_aside"][-1]["value"]
            < shot["recovery_held_aside"][0]["value"]
        )
    assert done.report["plan"]["stores"]["weights"] == "device"
    norm = "model.layers.1.input_layernorm.weight"
    dense = tensor_files.read(str(job.models["llama"] / "model.safetensors"))
    first, second = (done.tensors(shot)[norm] for shot in (1, 2))
    assert not torch.equal(first, dense[norm])
    assert not torch.equal(second, first)
    for export in done.exports:
        assert export["reload_max_logit_difference"] < 1e-4
        written = tensor_files.read(
            str(done.export(export["kind"]) / "model.safetensors")
        )
        assert torch.equal(written[norm], second)
        assert torch.equal(
            written["model.embed_tokens.weight"], dense["model.embed_tokens.weight"]
        )
    run = Recovery.train
    ends: list[Callable[[], None]] = [lambda: sys.exit("killed"), lambda: None]

    def run_once(stage: Recovery, state: Any, facts: Any) -> None:
        if state.shot == 2:
            return ends.pop(0)()
        return run(stage, state, facts)

    with monkeypatch.context() as patch:
        patch.setattr(Recovery, "train", run_once)
        with pytest.raises(SystemExit):
            job(changes, folder="resumed")
        shutil.copytree(job.folder / "resumed/run", job.folder / "aside")
        untrained = job(changes, "--resume", folder="resumed", output__exports=[])
        assert torch.equal(untrained.tensors(2)[norm], first), (
            "the weights that an earlier attempt trained are kept"
        )
    shutil.rmtree(untrained.uri)
    (job.folder / "aside").rename(untrained.uri)
    again = job(changes, "--resume", folder="resumed")
    assert_same_shot(done.uri, again.uri, 2)
    assert again.shot["perplexity"] == done.shot["perplexity"]


def test_training_all_weights_refuses_weights_on_disk(job: Jobs) -> None:
    said = job.refused("", **ALL, memory__weights="disk")
    assert "memory.weights: disk does not go with recovery.rank all" in said
