"""Tiny jobs, run through the command line's own entry."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import yaml
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from ray_surgeon.memory.stores import Stores
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.pipeline import main
from ray_surgeon.runtime.loading import ModelRecipe, load
from ray_surgeon.runtime.local import LocalCluster
from ray_surgeon.runtime.placement import place
from ray_surgeon.spec.sections import ModelSection
from ray_surgeon.storage import tensor_files
from tests.conftest import CONFIGS, SPARSE_CONFIGS

Refused = Callable[..., str]


def tiny_spec(folder: Path, model: Path, **changes: Any) -> Path:
    """Write a job spec and a text; `changes` are dotted paths with __ for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text("\n\n".join(list(topics.values())[:8])[:12000], encoding="utf-8")
    document: dict[str, Any] = {
        "version": 2,
        "name": "tiny",
        "model": {"source": str(model)},
        "calibration": {
            "source": str(text),
            "num_sequences": 6,
            "sequence_length": 40,
            "stride": 64,
            "max_tokens": 4000,
        },
        "evaluation": [
            {
                "name": "docs",
                "source": str(text),
                "num_sequences": 4,
                "sequence_length": 40,
                "max_tokens": 4000,
            },
            {
                "name": "again",
                "source": str(text),
                "split": "train",
                "num_sequences": 3,
                "sequence_length": 32,
                "max_tokens": 4000,
            },
        ],
        "pruning": {"target_sparsity": 0.3, "num_shots": 2},
        "cluster": {"backend": "local"},
        "output": {"uri": str(folder / "run"), "exports": [], "keep_shots": 0},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = document
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    spec = folder / "spec.yaml"
    spec.write_text(yaml.safe_dump(document))
    return spec


def run(folder: Path, model: Path, *arguments: str, **changes: Any) -> int:
    return main([str(tiny_spec(folder, model, **changes)), *arguments])


def completed(folder: Path, model: Path, *arguments: str, **changes: Any) -> dict[str, Any]:
    """Run to the end, and return the report."""
    assert run(folder, model, *arguments, **changes) == 0
    return report_of(folder / "run")


def overrides(settings: str) -> list[str]:
    """Return the arguments that set all of ``section.field=value; section.field=value``."""
    return [part for one in settings.split("; ") if one for part in ("--set", one)]


def config_like(family: str, **changes: Any) -> Any:
    """Return the configuration of a tiny model, changed."""
    config = (CONFIGS | SPARSE_CONFIGS)[family]
    return type(config)(**{**config.to_dict(), **changes})


def new_model(config: PretrainedConfig, folder: Path, tokenizer_of: Path) -> Path:
    """Write a random model with the tokenizer of another one."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in tokenizer_of.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def copied_model(model: Path, folder: Path, **changes: Any) -> Path:
    """Copy a model; `changes` are of its configuration."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def loaded(
    model: Path, num_shards: int = 1, num_replicas: int = 1, stores: Stores | None = None
) -> LocalCluster:
    """Return workers in this process that have loaded a model."""
    layout = ModelLayout.of(AutoConfig.from_pretrained(model))
    cluster = LocalCluster(layout, place(layout, num_shards, num_replicas), 1)
    cluster.stores = stores or cluster.stores
    cluster.run_all(load, ModelRecipe(ModelSection(source=str(model))), False, cluster.stores)
    return cluster


def overflowing_model(model: Path, folder: Path) -> Path:
    """Write a copy of a Llama with finite weights, whose second block's products are not."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.model.layers[1].mlp.up_proj.weight.fill_(1e30)
        loaded.model.layers[1].mlp.gate_proj.weight.fill_(1e30)
    loaded.save_pretrained(folder)
    for path in model.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def beginning(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """Return a copy that puts special tokens around a text."""
    changed = copy.deepcopy(tokenizer)
    special = [("<end>", changed.bos_token_id)]
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=special
    )
    return changed


def wait_for(what: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def tensors_of_shot(uri: Path, shot: int) -> dict[str, Tensor]:
    folder = uri / "shots" / f"{shot:04d}"
    return {
        k: v
        for path in sorted(folder.glob("*.safetensors"))
        for k, v in tensor_files.read(str(path)).items()
    }


def report_of(uri: Path) -> dict[str, Any]:
    record = json.loads((uri / "report.json").read_text())
    assert isinstance(record, dict)
    return record


def assert_same_shot(one: Path, other: Path, shot: int) -> None:
    a = tensors_of_shot(one, shot)
    b = tensors_of_shot(other, shot)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} differ: {different[:3]}"


def difference(one: Path, other: Path, shot: int) -> float:
    """Return how different two shots are: the mean share of mask entries that differ, or the median
    relative difference of weights.
    """
    a = tensors_of_shot(one, shot)
    b = tensors_of_shot(other, shot)
    assert a.keys() == b.keys()
    masks = [
        float((a[name] != b[name]).double().mean()) for name in a if a[name].dtype == torch.bool
    ]
    weights = sorted(
        float((a[name] - b[name]).norm() / a[name].norm()) for name in a if name.endswith("weight")
    )
    return max(sum(masks) / len(masks), weights[len(weights) // 2])


MOST_BY_ORDER_OF_SUMS = 5e-3
"""What another order of sums may change in a tiny random model: 3.4e-3 was found. A sum without one
replica changes 1.5e-2 or more.
"""
