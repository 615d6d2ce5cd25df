"""The report of a run, questions about a report.json, and the check that a folder is the run's."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml

from ray_surgeon.checkpointing import Record, RunDirectory
from ray_surgeon.config.base import refusing
from ray_surgeon.config.schedule import UNITS
from ray_surgeon.distributed.worker import LinearSummary
from ray_surgeon.errors import ConfigError
from ray_surgeon.report.events import Steps, leaves
from ray_surgeon.storage import files as store
from ray_surgeon.storage import tensor_files


@dataclass
class RunReport:
    """The report of one run, growing shot by shot."""

    spec: Mapping[str, Any]  # the resolved job spec
    fingerprints: Mapping[str, Any]  # of model, tokenizer, texts and method
    environment: Mapping[str, str]  # versions and machine
    num_parameters: int  # of the whole dense model
    # measurements before the first shot
    dense: dict[str, Any] = field(default_factory=dict)
    shots: list[dict[str, Any]] = field(default_factory=list)  # one record per shot
    exports: list[dict[str, Any]] = field(default_factory=list)  # one record per export
    # where workers keep tensors, and the expected peaks and times
    plan: dict[str, Any] = field(default_factory=dict)
    # losses after which the run went on, each with cause and message
    retries: list[dict[str, Any]] = field(default_factory=list)
    # name of a module in place of an attention, which is not pruned -> the blocks that have it
    left_whole: dict[str, list[int]] = field(default_factory=dict)
    source_bytes: int = 0  # of the weight files that were given; 0 if not known
    proof: str = ""  # what was proved of the model's family before the run
    # event of every step of all tries that has ended
    ended_steps: list[Record] = field(default_factory=list)

    def add_shot(
        self,
        about: Record,
        linears: Sequence[LinearSummary],
        steps: Steps,
        num_parameters: int | None,
    ) -> Record:
        """Add the record of a shot and return it.

        Args:
            about: entries of the stages.
            linears: summaries of the linears after the shot.
            steps: of this shot so far.
            num_parameters: of the smaller model; None if pruned entries are not cut out, so that
                those which are not zero count.
        """
        num_removed = sum(linear.size - linear.num_nonzero for linear in linears)
        num_nonzero = self.num_parameters - num_removed
        if num_parameters is None:
            num_parameters = num_nonzero
        shot = {
            **about,
            **copy.deepcopy(steps.record),
            "linears": [_linear_record(linear) for linear in linears],
            "num_parameters": num_parameters,
            "num_nonzero": num_nonzero,
            "dense": self.dense,
        }
        self.shots.append(shot)
        return shot

    def as_record(self) -> dict[str, Any]:
        """Return the content of report.json."""
        linears = self.shots[-1]["linears"] if self.shots else []
        in_linears = sum(linear["rows"] * linear["columns"] for linear in linears)
        nonzero = sum(linear["num_nonzero"] for linear in linears)
        nonzero_after = self.num_parameters - in_linears + nonzero
        after = self.num_parameters
        if self.shots:
            after = self.shots[-1]["num_parameters"]
        shots = []
        for shot in self.shots:
            shot = dict(shot)
            shot.pop("linears", None)  # those of the last shot are below
            shot.pop("dense", None)
            shots.append(shot)
        steps = []
        for event in self.ended_steps:
            steps.append({name: event[name] for name in ("step", "shot", "seconds")})
        further: dict[str, Any] = {}  # reports of earlier versions lack these
        if steps:
            further["steps"] = steps
        if self.proof:
            further["proof"] = self.proof
        return {
            "spec": self.spec,
            "fingerprints": self.fingerprints,
            "environment": self.environment,
            "dense": self.dense,
            "shots": shots,
            "exports": self.exports,
            "plan": self.plan,
            "retries": self.retries,
            "left_whole": self.left_whole,
            "source": {"bytes": self.source_bytes},
            "linears": linears,
            "parameters": {
                "before": self.num_parameters,
                "after": after,
                "nonzero_after": nonzero_after,
                "in_pruned_linears": in_linears,
                "nonzero_in_pruned_linears": nonzero,
                "whole_model_sparsity": 1 - after / self.num_parameters,
            },
            **further,
        }

    def model_card_facts(self, shot: int) -> dict[str, Any]:
        """Return the facts of a model card: the spec, the dense model and a shot."""
        return {
            "spec": self.spec,
            "num_parameters": self.num_parameters,
            "dense": self.dense,
            "last": self.shots[shot - 1],
        }


def _linear_record(linear: LinearSummary) -> dict[str, Any]:
    """Return the entry of a linear; its mask's sparsity counts the bias as a column."""
    return {
        "name": linear.name,
        "rows": linear.num_rows,
        "columns": linear.num_columns,
        "rows_kept": linear.rows_kept,
        "columns_kept": linear.columns_kept,
        "num_nonzero": linear.num_nonzero,
        "predicted_loss_increase": linear.predicted,
        "residual": linear.residual,
        "sparsity": 1 - linear.num_kept / linear.size,
    }


def num_shots(record: Record) -> int:
    """Return the planned number of shots of the run of a report.json."""
    pruning = record["spec"]["pruning"]
    if not pruning:
        return 1
    num_sizes = max(1, len(sizes_of(record)))
    if pruning["sparsities"]:
        return num_sizes * len(pruning["sparsities"])
    return num_sizes * int(pruning["num_shots"])


def sizes_of(record: Record) -> list[float]:
    """Return the sizes that the run of a report.json passes through; empty if there is only one."""
    pruning = record["spec"]["pruning"] or {}
    return list(pruning.get("sizes") or ())


def size_name(record: Record, size: float) -> str:
    """Return a size for people: a removed percentage, or a value with the target's unit."""
    target = record["spec"]["pruning"].get("target") or {}
    for unit in UNITS:
        if unit in target:
            return f"{unit} {size:.12g}"
    return f"{100 * size:.4g} %"


def shots_by_size(record: Record) -> dict[float | None, Record]:
    """Return the shot of each size; the only key is None if the run has one size only."""
    shots = record["shots"]
    sizes = sizes_of(record)
    if not sizes:
        return {None: shots[-1]}
    shots_per_size = num_shots(record) // len(sizes)
    last_shots = shots[shots_per_size - 1 :: shots_per_size]
    return dict(zip(sizes, last_shots, strict=False))


def family_of(record: Record) -> dict[float, Record]:
    """Return the record of the shot of each size of a family, with its ``exports``."""
    if not sizes_of(record):
        return {}
    family: dict[float, Record] = {}
    for size, shot in shots_by_size(record).items():
        if size is not None:
            exports = [export for export in record["exports"] if export["size"] == size]
            family[size] = {**shot, "exports": exports}
    return family


def structure_of(record: Record) -> str:
    """Return the structure that the run of a report.json removes."""
    pruning = record["spec"]["pruning"]
    if not pruning:
        return "none"
    return str(pruning["structure"])


def num_exports(record: Record) -> int:
    """Return the planned number of exports of the run of a report.json."""
    output = record["spec"]["output"]
    exports_per_size = len(output["exports"])
    if output.get("quantize") is not None:
        exports_per_size += 1
    sizes = output.get("sizes") or sizes_of(record)
    return max(1, len(sizes)) * exports_per_size


def is_complete(record: Record) -> bool:
    """Whether the run of a report.json has all its shots and exports."""
    has_exports = len(record["exports"]) >= num_exports(record)
    return has_exports and len(record["shots"]) == num_shots(record)


def has_its_files(export: Record) -> bool:
    """Whether the files of an export in a report.json exist, with their whole sizes."""
    uri = export["uri"]
    if "files" in export:
        written = list(export["files"])
        if export.get("imatrix"):
            written.append(export["imatrix"])
        for file in written:
            if store.size_bytes(store.join(uri, file["file"])) != file["size_bytes"]:
                return False
        return True
    names = store.list_names(uri)
    size = 0
    for name in names:
        if re.fullmatch(r"model.*\.safetensors", name):
            size += store.size_bytes(store.join(uri, name)) or 0
    return "config.json" in names and size == export["size_bytes"]


def has_generation(records: Sequence[Record]) -> bool:
    """Whether a run has compared the model's answers with the dense model's."""
    return any(shot.get("generation") for record in records for shot in record["shots"])


def texts_of(records: Sequence[Record]) -> list[str]:
    """Return the names of the texts on which the runs were measured."""
    names: dict[str, None] = {}
    for record in records:
        names.update(dict.fromkeys(record["dense"]["perplexity"]))
    return list(names)


def dense_bytes(record: Record) -> int:
    """Return the bytes of the dense model's weights in the dtype of the run."""
    dtype = getattr(torch, record["spec"]["model"]["dtype"])
    return int(record["parameters"]["before"] * dtype.itemsize)


def source_bytes(record: Record) -> int:
    """Return the bytes of the weight files that were given to the run of a report.json."""
    given = record.get("source", {}).get("bytes")
    return int(given or dense_bytes(record))


_FREE_SECTIONS = ("name", "cluster.", "memory.", "output.", "recovery.commit_minutes")
"""Fields that may differ between a run and its resumption."""
_MOST_CHANGES = 8
"""The most changed fields that an error names."""


def check_folder(
    directory: RunDirectory,
    fingerprints: Mapping[str, Any],
    spec_yaml: str,
    *,
    resume: bool,
) -> None:
    """Refuse a folder that holds anything else, before expensive work starts.

    Args:
        directory: of the run.
        fingerprints: of this run; None for those that need not match the folder's run.
        spec_yaml: its resolved spec.
        resume: whether the folder may hold committed shots of it.

    Raises:
        ValueError: the folder holds another run, or holds this one and `resume` is not given, or
            lacks files from which this one resumes.
    """
    if directory.is_new():
        return
    uri = directory.uri
    elsewhere = shlex.quote(uri.rstrip("/") + "-2")
    held = store.read_json(directory.path("run.json"))["fingerprints"]
    different = _different_fingerprints(held, fingerprints)
    if different:
        changes = _changes(directory, spec_yaml)
        if held.get("code") != fingerprints["code"]:
            changes.append(
                f"version {held.get('code')} there, {fingerprints['code']} here"
            )
        raise ConfigError(
            field="output.uri",
            found=(
                f"{uri} holds another run: different "
                f"{', '.join(different)}{_in_parentheses(changes)}"
            ),
            remedy=f"choose another folder, for instance --set output.uri={elsewhere}",
        )
    if not resume:
        raise ConfigError(
            field="output.uri",
            found=(
                f"{uri} already holds this run, of which "
                f"{len(directory.committed_indices())} pruning rounds are committed"
            ),
            remedy=(
                "continue it with --resume (resume=True in Python), or choose "
                f"another folder, for instance --set output.uri={elsewhere} (output "
                "in Python)"
            ),
        )
    if directory.check_tensors():
        _check_dense_states(directory.dense_states)


def _different_fingerprints(held: Record, fingerprints: Record) -> list[str]:
    """Return the names of fingerprints that differ, without those that may be anything."""
    different = []
    for name in sorted({*held, *fingerprints}):
        is_free = name in fingerprints and fingerprints[name] is None
        if not is_free and held.get(name) != fingerprints.get(name):
            different.append(name)
    return different


def _in_parentheses(changes: list[str]) -> str:
    if not changes:
        return ""
    shown = changes[:_MOST_CHANGES]
    if len(changes) > _MOST_CHANGES:
        shown.append("...")
    return f" ({'; '.join(shown)})"


def _check_dense_states(uri: str) -> None:
    remedy = "the dense model that wrote it is gone, too; put it back, or start a new run"
    with refusing(f"{uri} is gone or damaged", remedy, (FileNotFoundError, ValueError)):
        tensor_files.Reader().names(uri)


def _changes(directory: RunDirectory, spec_yaml: str) -> list[str]:
    """Return the fields in which a spec differs from the folder's, for an error."""
    file = directory.path("spec.yaml")
    if not store.exists(file):
        return []
    old = leaves(yaml.safe_load(store.read_text(file)))
    if not old:
        return []
    new = leaves(yaml.safe_load(spec_yaml))
    changes = []
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name) and not name.startswith(_FREE_SECTIONS):
            changes.append(f"{name} {old.get(name)!r} there, {new.get(name)!r} here")
    return changes
