"""How far a run has come, by its report.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    return len(record["shots"]) == num_shots(record) and len(record["exports"]) == num_exports(
        record
    )


def has_its_files(export: Mapping[str, Any]) -> bool:
    """Whether an export in a report.json lies where it was written, with its whole size."""
    if "files" in export:
        return all(
            files.size_bytes(files.join(export["uri"], file["file"])) == file["size_bytes"]
            for file in export["files"]
        )
    names_there = files.list_names(export["uri"])
    names = [
        name for name in names_there if name.startswith("model") and name.endswith(".safetensors")
    ]
    return "config.json" in names_there and bool(
        sum(files.size_bytes(files.join(export["uri"], name)) or 0 for name in names)
        == export["size_bytes"]
    )
