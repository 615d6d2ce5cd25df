"""Commits from which a run can be resumed: shots and parts of shots, with their manifests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ray_surgeon.distributed.weights import SavedFile
from ray_surgeon.storage import files as store

Save = Callable[[str], Iterable[SavedFile]]
"""Function that lets workers write files into a folder."""


class CommittedShot(NamedTuple):
    """A shot that can be resumed from."""

    files: tuple[SavedFile, ...]  # its weights and masks
    record: dict[str, Any]  # its entry in the report


class CommittedPart(NamedTuple):
    """The state of a shot in the middle of a stage."""

    files: tuple[SavedFile, ...]  # weights and masks as this stage found them
    of_stage: tuple[SavedFile, ...]  # state of the stage on the workers
    # state of the stage on the coordinator, and results of earlier stages
    record: dict[str, Any]


def entry(file: SavedFile) -> dict[str, Any]:
    """Return the entry of a file in a manifest."""
    name = file.uri.rpartition("/")[2]
    return {"name": name, "size_bytes": file.size_bytes, "keys": list(file.keys)}


def files_of(folder: str, entries: Iterable[Mapping[str, Any]]) -> tuple[SavedFile, ...]:
    """Return the files that are named in a folder's manifest."""
    files = []
    for about in entries:
        uri = store.join(folder, about["name"])
        files.append(SavedFile(uri, about["size_bytes"], tuple(about["keys"])))
    return tuple(files)


def check_files(files: Iterable[SavedFile], remedy: str) -> None:
    """Refuse missing or truncated files.

    Raises:
        ValueError: names the first file that is missing or has another size, and the remedy.
    """
    for file in files:
        size = store.size_bytes(file.uri)
        if size is None:
            raise ValueError(f"{file.uri} is missing; {remedy}")
        if size != file.size_bytes:
            raise ValueError(
                f"{file.uri} has {size} bytes, not {file.size_bytes}; {remedy}"
            )
