"""What a run found: report.json, what it says at a glance, and whether a folder is the run's."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml

from ray_surgeon.checkpointing.run_directory import Record, RunDirectory
from ray_surgeon.report.events import Steps
from ray_surgeon.runtime.worker import LinearSummary
from ray_surgeon.spec.base import refusing
from ray_surgeon.spec.targets import UNITS
from ray_surgeon.storage import files as store
from ray_surgeon.storage import tensor_files


@dataclass
class RunReport:
    """The report of one run, growing shot by shot."""

    spec: Mapping[str, Any]  # the resolved job spec
    fingerprints: Mapping[str, Any]  # of model, tokenizer, texts and method
    environment: Mapping[str, str]  # versions and machine
    num_parameters: int  # of the whole dense model
    dense: dict[str, Any] = field(default_factory=dict)  # what was measured before the first shot
    shots: list[dict[str, Any]] = field(default_factory=list)  # one record a shot
    exports: list[dict[str, Any]] = field(default_factory=list)  # one record an export
    # where workers keep what, and the peaks and times that were expected
    plan: dict[str, Any] = field(default_factory=dict)
    # what was lost on the way, a record with cause and message each
    retries: list[dict[str, Any]] = field(default_factory=list)

    def add_shot(self, about: Record, linears: Sequence[LinearSummary], steps: Steps) -> Record:
        """Add the record of a shot and return it.

        Args:
            about: what the stages say of it.
            linears: what is left of each.
            steps: of this shot so far.
        """
        shot = {**about, **copy.deepcopy(steps.record)}
        shot["linears"] = list(map(_linear_record, linears))
        shot["num_nonzero"] = self.num_parameters - sum(s.size - s.num_nonzero for s in linears)
        shot["dense"] = self.dense
        self.shots.append(shot)
        return shot

    def as_record(self) -> dict[str, Any]:
        """Return the content of report.json."""
        linears = self.shots[-1]["linears"] if self.shots else []
        in_linears = sum(linear["rows"] * linear["columns"] for linear in linears)
        nonzero = sum(linear["num_nonzero"] for linear in linears)
        after = self.num_parameters - in_linears + nonzero
        parameters: dict[str, float] = {"before": self.num_parameters, "nonzero_after": after}
        parameters |= {"in_pruned_linears": in_linears, "nonzero_in_pruned_linears": nonzero}
        parameters |= {"whole_model_sparsity": 1 - after / self.num_parameters}
        elsewhere = ("linears", "dense")
        shots = [{k: v for k, v in s.items() if k not in elsewhere} for s in self.shots]
        record = vars(self) | {"shots": shots, "linears": linears, "parameters": parameters}
        del record["num_parameters"]  # which `parameters` has
        return record

    def model_card_facts(self, shot: int) -> dict[str, Any]:
        """Return what a model card tells of: the spec, the dense model and a shot."""
        return {"spec": self.spec, "dense": self.dense, "last": self.shots[shot - 1]}


_NAMES = {"num_rows": "rows", "num_columns": "columns", "predicted": "predicted_loss_increase"}
"""Fields of `LinearSummary` that have another name in a report."""


def _linear_record(linear: LinearSummary) -> dict[str, Any]:
    """Return what is said of a linear; its mask's sparsity counts the bias as a column."""
    record = vars(linear) | {"sparsity": 1 - linear.num_kept / linear.size}
    del record["num_kept"]
    return {_NAMES.get(name, name): value for name, value in record.items()}


def num_shots(record: Record) -> int:
    """Return how many shots the run of a report.json was to have."""
    pruning = record["spec"]["pruning"] or {"sparsities": None, "num_shots": 1}
    of_a_size = len(pruning["sparsities"] or range(pruning["num_shots"]))
    return of_a_size * len(sizes_of(record) or (None,))


def sizes_of(record: Record) -> list[float]:
    """Return the sizes that the run of a report.json passes through, if it makes a family."""
    return list((record["spec"]["pruning"] or {}).get("sizes") or ())


def size_name(record: Record, size: float) -> str:
    """Return what people call a size: a share that is gone, or a value of the target's unit."""
    target = record["spec"]["pruning"].get("target") or {}
    unit = next((unit for unit in UNITS if unit in target), None)
    return f"{100 * size:.4g} %" if unit is None else f"{unit} {size:.12g}"


def shots_by_size(record: Record) -> dict[float | None, Record]:
    """Return the size that an export has, None where there is one only -> the shot it is of."""
    shots = record["shots"]
    sizes = sizes_of(record)
    of_a_size = num_shots(record) // max(1, len(sizes))
    ends = zip(sizes, shots[of_a_size - 1 :: of_a_size], strict=False)
    return dict(ends) if sizes else dict.fromkeys((None,), shots[-1])


def family_of(record: Record) -> dict[float, Record]:
    """Return the sizes of a family -> the record of its shot, with its ``exports``."""
    of_sizes = shots_by_size(record) if sizes_of(record) else {}
    return {
        size: {**shot, "exports": [e for e in record["exports"] if e["size"] == size]}
        for size, shot in of_sizes.items()
        if size is not None
    }


def structure_of(record: Record) -> str:
    """Return what the run of a report.json removes."""
    return str((record["spec"]["pruning"] or {"structure": "none"})["structure"])


def num_exports(record: Record) -> int:
    """Return how many exports it was to write."""
    output = record["spec"]["output"]
    num_sizes = len(output.get("sizes") or sizes_of(record) or (None,))
    return num_sizes * (len(output["exports"]) + (output.get("quantize") is not None))


def is_complete(record: Record) -> bool:
    """Whether it has all its shots and exports."""
    has_exports = len(record["exports"]) >= num_exports(record)
    return has_exports and len(record["shots"]) == num_shots(record)


def has_its_files(export: Record) -> bool:
    """Whether an export in a report.json lies where it was written, with its whole size."""
    if "files" in export:
        written = [*export["files"], *filter(None, [export.get("imatrix")])]
        sizes = {store.join(export["uri"], f["file"]): f["size_bytes"] for f in written}
        return all(store.size_bytes(uri) == size for uri, size in sizes.items())
    names = store.list_names(export["uri"])
    weights = (name for name in names if re.fullmatch(r"model.*\.safetensors", name))
    size = sum(store.size_bytes(store.join(export["uri"], name)) or 0 for name in weights)
    return "config.json" in names and size == export["size_bytes"]


def has_generation(records: Sequence[Record]) -> bool:
    """Whether a run has compared the model's answers with the dense model's."""
    return any(shot.get("generation") for record in records for shot in record["shots"])


def texts_of(records: Sequence[Record]) -> list[str]:
    """Return the names of the texts that the runs were measured on."""
    return list(dict.fromkeys(text for record in records for text in record["dense"]["perplexity"]))


def dense_bytes(record: Record) -> int:
    """Return the bytes of the dense model's weights in the dtype of the run."""
    dtype = getattr(torch, record["spec"]["model"]["dtype"])
    return int(record["parameters"]["before"] * dtype.itemsize)


_FREE_SECTIONS = ("name", "cluster.", "memory.", "output.", "recovery.commit_minutes")
"""What may differ between a run and its resumption."""
_MOST_CHANGES = 8
"""How many changed fields an error names."""


def check_folder(
    directory: RunDirectory, fingerprints: Mapping[str, Any], spec_yaml: str, *, resume: bool
) -> None:
    """Refuse a folder that holds something else, before anything expensive starts.

    Args:
        directory: where the run is to write.
        fingerprints: of this run; None for what may be whatever the folder's run had.
        spec_yaml: its resolved spec.
        resume: whether the folder may hold committed shots of it.

    Raises:
        ValueError: the folder holds another run, or holds this one and `resume` is not asked for,
            or lacks what this one resumes from.
    """
    if directory.is_new():
        return
    uri = directory.uri
    elsewhere = shlex.quote(uri.rstrip("/") + "-2")
    another = f"choose another folder, for instance --set output.uri={elsewhere}"
    held = store.read_json(directory.path("run.json"))["fingerprints"]
    free = {key for key, value in fingerprints.items() if value is None}
    names = sorted({*held, *fingerprints} - free)
    different = [name for name in names if held.get(name) != fingerprints.get(name)]
    if different:
        changes = _changes(directory, spec_yaml)
        if held.get("code") != fingerprints["code"]:
            changes.append(f"version {held.get('code')} there, {fingerprints['code']} here")
        shown = "; ".join(changes[:_MOST_CHANGES] + ["..."] * (len(changes) > _MOST_CHANGES))
        problem = f"different {', '.join(different)}{f' ({shown})' if changes else ''}"
        raise ValueError(f"output.uri: {uri} holds another run: {problem}; {another}")
    shots = directory.committed_indices()
    if not resume:
        problem = f"{uri} already holds this run, of which {len(shots)} shots are committed"
        remedy = "continue it with --resume (resume=True in Python)"
        raise ValueError(f"output.uri: {problem}; {remedy}, or {another} (output in Python)")
    if directory.check_tensors():
        _check_dense_states(directory.dense_states)


def _check_dense_states(uri: str) -> None:
    remedy = "the dense model that wrote it is gone, too; put it back, or start a new run"
    with refusing(f"{uri} is gone or damaged", remedy, (FileNotFoundError, ValueError)):
        tensor_files.Reader().names(uri)


def _changes(directory: RunDirectory, spec_yaml: str) -> list[str]:
    """Return the fields in which a spec differs from the folder's, for an error."""
    file = directory.path("spec.yaml")
    old = leaves(yaml.safe_load(store.read_text(file))) if store.exists(file) else {}
    new = leaves(yaml.safe_load(spec_yaml)) if old else {}
    return [
        f"{name} {old.get(name)!r} there, {new.get(name)!r} here"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name) and not name.startswith(_FREE_SECTIONS)
    ]


def leaves(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a spec by their dotted names."""
    items = dict(enumerate(section)) if isinstance(section, list) else section
    if not items or not isinstance(items, dict):
        return {prefix[:-1]: section} if prefix else {}
    return {
        name: leaf
        for key, value in items.items()
        for name, leaf in leaves(value, f"{prefix}{key}.").items()
    }
