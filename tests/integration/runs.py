"""Tiny jobs that run through the entry point of the command line."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from types import MappingProxyType
from typing import Any

import torch
import yaml
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from ray_surgeon.config.job import parse_spec
from ray_surgeon.config.sections import ModelSection
from ray_surgeon.distributed.cluster import LocalCluster
from ray_surgeon.distributed.placement import place
from ray_surgeon.distributed.weights import ModelRecipe, load
from ray_surgeon.memory.stores import Stores
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.pipeline import main
from ray_surgeon.preparation.inputs import Inputs, check
from ray_surgeon.storage import tensor_files
from tests.conftest import CONFIGS, SPARSE_CONFIGS, make_once

Changes = Mapping[str, Any]
NO_CHANGES: Changes = MappingProxyType({})
ONE = {"pruning__num_shots": 1}
GREEDY = {"pruning__costs": "greedy"}
ELEMENT = {"pruning__structure": "element"}
N_M = {"pruning__structure": "n_m"}
SPARSEGPT = ELEMENT | {"pruning__method": "sparsegpt"}
GROUPS: dict[str, Any] = {"pruning__structure": "groups", "pruning__width_multiple": 8}
LORA: dict[str, Any] = {
    "recovery__rank": 2,
    "recovery__num_tokens": 120,
    "recovery__num_tokens_between_shots": 120,
    "recovery__sequences_per_step": 1,
}
"""Three steps of corrections after every shot."""
MASKED = {"output__exports": ["masked"]}
DISK = {"memory__weights": "disk", "memory__factors": "disk"}
FOUR = {"cluster__num_shards": 2, "cluster__num_replicas": 2}


def windows(source: str | Path, num_sequences: int = 4, **more: Any) -> dict[str, Any]:
    """Return a text section of a spec with windows of a source."""
    size = {"num_sequences": num_sequences, "sequence_length": 40, "max_tokens": 4000}
    return {"source": str(source), **size, **more}


def tiny_spec(folder: Path, model: Path, **changes: Any) -> Path:
    """Write a job spec and a text; `changes` are dotted paths with __ for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text("\n\n".join(list(topics.values())[:8])[:12000], encoding="utf-8")
    again = windows(text, 3, name="again", split="train", sequence_length=32)
    document: dict[str, Any] = {
        "version": 2,
        "name": "tiny",
        "model": {"source": str(model)},
        "calibration": windows(text, 6, stride=64),
        "evaluation": [windows(text, name="docs"), again],
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


def changes_of(settings: str) -> dict[str, Any]:
    """Return the changes of ``section.field=value; section.field=value``."""
    pairs = [one.split("=", 1) for one in settings.split("; ") if one]
    return {path.replace(".", "__"): yaml.safe_load(value) for path, value in pairs}


def config_like(family: str, **changes: Any) -> Any:
    """Return the configuration of a tiny model with changes."""
    config = (CONFIGS | SPARSE_CONFIGS)[family]
    return type(config)(**{**config.to_dict(), **changes})


def new_model(config: PretrainedConfig, folder: Path, tokenizer_of: Path) -> Path:
    """Write a random model with the tokenizer of another model."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in tokenizer_of.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def copied_model(model: Path, folder: Path, **changes: Any) -> Path:
    """Copy a model and change entries of its configuration."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


Given = tuple[Any, Any]
"""A model in memory and its tokenizer."""


def in_memory(folder: Path) -> Given:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(
        folder
    )


@dataclass(frozen=True)
class Done:
    """A finished job: the folder of its run, and its output."""

    uri: Path
    out: str
    error: str  # in one line

    @property
    def report(self) -> dict[str, Any]:
        return report_of(self.uri)

    @property
    def shots(self) -> list[dict[str, Any]]:
        shots: list[dict[str, Any]] = self.report["shots"]
        return shots

    @property
    def shot(self) -> dict[str, Any]:
        return self.shots[-1]

    @property
    def exports(self) -> list[dict[str, Any]]:
        exports: list[dict[str, Any]] = self.report["exports"]
        return exports

    def export(self, kind: str) -> Path:
        return self.uri / "export" / kind

    @property
    def events(self) -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for line in (self.uri / "events.jsonl").read_text().splitlines()
        ]

    def tensors(self, shot: int) -> dict[str, Tensor]:
        return tensors_of_shot(self.uri, shot)


@dataclass(frozen=True)
class Jobs:
    """Tiny jobs of a test. Calling it with changes and command-line arguments runs one job, whose
    exit code must be `code`. Costs are `obs` by default, since greedy paths take three quarters of
    the time of a tiny run.

    Attributes:
        models: folders of the tiny models by family.
        folder: of this test.
        shared_folder: of runs that tests share.
    """

    models: Mapping[str, Path]
    folder: Path
    shared_folder: Path

    def __call__(
        self,
        changes: Changes = NO_CHANGES,
        *arguments: str,
        folder: str = "",
        code: int = 0,
        **more: Any,
    ) -> Done:
        spec = self.spec(changes, folder, **more)
        out = io.StringIO()
        error = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            ended_with = main([str(spec), *arguments])
        assert ended_with == code, out.getvalue() + error.getvalue()
        in_one_line = " ".join(error.getvalue().split())
        return Done(self.folder / folder / "run", out.getvalue(), in_one_line)

    def baseline(self, changes: Changes = NO_CHANGES, **more: Any) -> Done:
        """Return a finished run of these options that all tests of the session share.

        Tests only read it: a run that is resumed needs the path of its text, which differs here
        from that of the test. Call this before any monkeypatch that changes runs. Paths in the
        report are those before the folder was renamed.
        """
        options = {**changes, **more}
        document = json.dumps(options, sort_keys=True, default=str)
        name = hashlib.sha256(document.encode()).hexdigest()[:16]

        def run_job(folder: Path) -> None:
            Jobs(self.models, folder, self.shared_folder)(options)

        folder = make_once(self.shared_folder / name, run_job)
        return Done(folder / "run", out="", error="")

    def refused(self, settings: str = "", *arguments: str, **changes: Any) -> str:
        """Run a job that must be refused, and return the message; `settings` override `changes`."""
        found = self(changes | changes_of(settings), *arguments, code=2)
        assert found.error.startswith("error: ")
        assert "Traceback" not in found.error
        return found.error

    def spec(self, changes: Changes = NO_CHANGES, folder: str = "", **more: Any) -> Path:
        options = {"model": "llama", **changes, **more}
        model = options.pop("model")  # a family or a folder
        if not options.keys() & {"pruning", "pruning__structure", "pruning__method"}:
            options.setdefault("pruning__costs", "obs")
        return tiny_spec(self.folder / folder, self.models.get(model, model), **options)

    def inputs(
        self, changes: Changes = NO_CHANGES, folder: str = "", **more: Any
    ) -> Inputs:
        return check(parse_spec(self.spec(changes, folder, **more).read_text()))


def loaded(
    model: Path, num_shards: int = 1, num_replicas: int = 1, stores: Stores | None = None
) -> LocalCluster:
    """Return workers in this process that have loaded a model."""
    layout = ModelLayout.of(AutoConfig.from_pretrained(model))
    cluster = LocalCluster(layout, place(layout, num_shards, num_replicas), 1)
    cluster.stores = stores or cluster.stores
    cluster.run_all(
        load, ModelRecipe(ModelSection(source=str(model))), False, cluster.stores
    )
    return cluster


def weights_of(cluster: LocalCluster) -> dict[str, Tensor]:
    return {
        name: worker.shard.weight(name)
        for worker in cluster.workers.values()
        for name in worker.shard.linears
    }


def overflowing_model(model: Path, folder: Path) -> Path:
    """Write a copy of a Llama with finite weights whose second block overflows."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.model.layers[1].mlp.up_proj.weight.fill_(1e30)
        loaded.model.layers[1].mlp.gate_proj.weight.fill_(1e30)
    loaded.save_pretrained(copied_model(model, folder))
    return folder


def beginning(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> PreTrainedTokenizerFast:
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
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def tensors_of_shot(uri: Path, shot: int) -> dict[str, Tensor]:
    return tensors_in(uri / "shots" / f"{shot:04d}")


def tensors_in(folder: Path) -> dict[str, Tensor]:
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


def kept_of(tensors: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Return the kept entries of every linear, after checking that all other weights are zero."""
    found = {}
    for name in (
        name.removesuffix(".weight") for name in tensors if name.endswith(".weight")
    ):
        W = tensors[f"{name}.weight"].T if family == "gpt2" else tensors[f"{name}.weight"]
        if f"{name}.kept" in tensors:
            kept = tensors[f"{name}.kept"]
            assert kept[:, W.shape[1] :].all(), "biases are kept"
        else:
            kept = torch.outer(tensors[f"{name}.rows"], tensors[f"{name}.columns"])
            bias = tensors.get(f"{name}.bias")
            assert bias is None or not bias[~tensors[f"{name}.rows"]].any()
            assert bias is None or tensors[f"{name}.columns"][-1], (
                "the bias column is never pruned"
            )
        assert not W[~kept[:, : W.shape[1]]].any()
        found[name] = kept
    return found


def difference(one: Path, other: Path, shot: int) -> float:
    """Return the larger one of the mean share of mask entries that differ between two shots and the
    median relative difference of their weights.
    """
    a = tensors_of_shot(one, shot)
    b = tensors_of_shot(other, shot)
    assert a.keys() == b.keys()
    masks = [
        float((a[name] != b[name]).double().mean())
        for name in a
        if a[name].dtype == torch.bool
    ]
    weights = sorted(
        float((a[name] - b[name]).norm() / a[name].norm())
        for name in a
        if name.endswith("weight")
    )
    return max(sum(masks) / len(masks), weights[len(weights) // 2])


MOST_BY_ORDER_OF_SUMS = 5e-3
"""Upper bound of the difference that another order of sums makes in a tiny random model. The
largest one measured is 3.4e-3; leaving a replica out of a sum changes 1.5e-2 or more.
"""
