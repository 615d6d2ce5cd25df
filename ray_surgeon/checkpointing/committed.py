"""What a run can go on from: shots, and parts of them, as their manifests describe them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ray_surgeon.runtime.weights import SavedFile
from ray_surgeon.storage import files as store

Save = Callable[[str], Iterable[SavedFile]]
"""Lets workers write files into a folder."""


class CommittedShot(NamedTuple):
    """A shot that can be resumed from."""

    files: tuple[SavedFile, ...]  # its weights and masks
    record: dict[str, Any]  # its entry in the report


class CommittedPart(NamedTuple):
    """A shot as far as a stage in its middle has come."""

    files: tuple[SavedFile, ...]  # weights and masks as this stage found them
    of_stage: tuple[SavedFile, ...]  # what its workers go on from
    record: dict[str, Any]  # what it goes on from itself, and what the stages before it have left


def entry(file: SavedFile) -> dict[str, Any]:
    """Return what a manifest says of a file."""
    name = file.uri.rpartition("/")[2]
    return {"name": name, "size_bytes": file.size_bytes, "keys": list(file.keys)}


def files_of(folder: str, entries: Iterable[Mapping[str, Any]]) -> tuple[SavedFile, ...]:
    """Return the files that a manifest in a folder names."""
    return tuple(
        SavedFile(store.join(folder, about["name"]), about["size_bytes"], tuple(about["keys"]))
        for about in entries
    )


def check_files(files: Iterable[SavedFile], remedy: str) -> None:
    """Refuse files of which one is missing or cut short.

    Raises:
        ValueError: names the first one that is missing or has another size, and the remedy.
    """
    for file in files:
        size = store.size_bytes(file.uri)
        problem = "is missing" if size is None else f"has {size} bytes, not {file.size_bytes}"
        if size != file.size_bytes:
            raise ValueError(f"{file.uri} {problem}; {remedy}")
