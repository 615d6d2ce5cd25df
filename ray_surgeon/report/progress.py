"""What a report.json says at a glance: how far its run has come, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ray_surgeon.storage import files


def num_shots(record: Mapping[str, Any]) -> int:
    """Return how many shots the run of a report.json was to have."""
    pruning = record["spec"]["pruning"]
    return len(pruning["sparsities"] or range(pruning["num_shots"]))


def num_exports(record: Mapping[str, Any]) -> int:
    """Return how many exports it was to write."""
    output = record["spec"]["output"]
    return len(output["exports"]) + (output.get("quantize") is not None)


def is_complete(record: Mapping[str, Any]) -> bool:
    """Whether it has all its shots and exports."""
    has_exports = len(record["exports"]) == num_exports(record)
    return has_exports and len(record["shots"]) == num_shots(record)


def has_its_files(export: Mapping[str, Any]) -> bool:
    """Whether an export in a report.json lies where it was written, with its whole size."""
    if "files" in export:
        return all(
            files.size_bytes(files.join(export["uri"], file["file"])) == file["size_bytes"]
            for file in export["files"]
        )
    names = files.list_names(export["uri"])
    weights = (name for name in names if re.fullmatch(r"model.*\.safetensors", name))
    size = sum(files.size_bytes(files.join(export["uri"], name)) or 0 for name in weights)
    return "config.json" in names and size == export["size_bytes"]


def has_generation(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a run has compared the model's answers with the dense model's."""
    return any(shot.get("generation") for record in records for shot in record["shots"])


def texts_of(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the texts that the runs were measured on."""
    return list(dict.fromkeys(text for record in records for text in record["dense"]["perplexity"]))


def dense_bytes(record: Mapping[str, Any]) -> int:
    """Return the bytes of the dense model's weights in the dtype of the run."""
    dtype = getattr(torch, record["spec"]["model"]["dtype"])
    return int(record["parameters"]["before"] * dtype.itemsize)
