"""The run directory: what identifies a run, its committed shots, its events and its report.

A shot exists if its manifest does; the manifest is written after every file it names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray_surgeon import storage
from ray_surgeon.cluster.messages import SavedFile


@dataclass(frozen=True)
class CommittedShot:
    """A shot that can be resumed from.

    Attributes:
        index: its number, from 1.
        weights: URIs of its weight files.
        masks: URIs of its mask files.
        record: its entry in the report.
    """

    index: int
    weights: tuple[str, ...]
    masks: tuple[str, ...]
    record: dict[str, Any]


class RunDirectory:
    """A folder on any fsspec URI that belongs to one run."""

    def __init__(self, uri: str) -> None:
        """Name the folder; nothing is read or written yet."""
        self.uri = uri
        self._events: list[str] = []

    def path(self, *parts: str) -> str:
        """Return the URI of something in the folder."""
        return storage.join(self.uri, *parts)

    def check(self, fingerprints: Mapping[str, Any], *, resume: bool) -> None:
        """Refuse a folder that holds something else, before anything expensive starts.

        Raises:
            ValueError: the folder holds another run, or holds this one and `resume` is not asked for.
        """
        if not storage.list_names(self.uri):
            return
        if not storage.exists(self.path("run.json")):
            raise ValueError(f"output.uri: {self.uri} is not empty and holds no run of this program; choose another folder")
        held = storage.read_json(self.path("run.json"))["fingerprints"]
        different = [key for key in sorted({*held, *fingerprints}) if held.get(key) != fingerprints.get(key)]
        if different:
            raise ValueError(
                f"output.uri: {self.uri} holds another run: different {', '.join(different)}; choose another folder, for instance "
                f"--set output.uri={self.uri.rstrip('/')}-2"
            )
        if not resume:
            raise ValueError(
                f"output.uri: {self.uri} already holds this run, with {len(self.committed_indices())} committed shots; continue it "
                f"with --resume, or choose another folder, for instance --set output.uri={self.uri.rstrip('/')}-2"
            )

    def start(self, spec_yaml: str, fingerprints: Mapping[str, Any]) -> None:
        """Take the folder for this run, or go on in it."""
        if not storage.exists(self.path("run.json")):
            storage.write_text(self.path("spec.yaml"), spec_yaml)
            storage.write_json(self.path("run.json"), {"fingerprints": dict(fingerprints)})
        elif storage.exists(self.path("events.jsonl")):
            self._events = storage.read_text(self.path("events.jsonl")).splitlines()

    def add_event(self, event: Mapping[str, Any]) -> None:
        """Append to events.jsonl."""
        line = json.dumps(event)
        storage.append_line(self.path("events.jsonl"), line, self._events)
        self._events.append(line)

    def shot_folder(self, index: int) -> str:
        """Return the URI of a shot's folder, e.g. ``shots/0003``."""
        return self.path("shots", f"{index:04d}")

    def commit_shot(self, index: int, files: Sequence[SavedFile], record: Mapping[str, Any]) -> None:
        """Make a shot exist: write its manifest."""
        entries = [{"name": f.uri.rpartition("/")[2], "size_bytes": f.size_bytes} for f in files]
        storage.write_json(
            storage.join(self.shot_folder(index), "manifest.json"), {"index": index, "files": entries, "record": dict(record)}
        )

    def committed_indices(self) -> list[int]:
        """Return the numbers of the committed shots."""
        names = [name for name in storage.list_names(self.path("shots")) if re.fullmatch(r"\d{4}", name)]
        return [int(name) for name in names if storage.exists(self.path("shots", name, "manifest.json"))]

    def read_shot(self, index: int) -> CommittedShot:
        """Return a committed shot.

        Raises:
            ValueError: a file that its manifest names is missing.
        """
        folder = self.shot_folder(index)
        manifest = storage.read_json(storage.join(folder, "manifest.json"))
        names = [entry["name"] for entry in manifest["files"]]
        missing = sorted(set(names) - set(storage.list_names(folder)))
        if missing:
            raise ValueError(f"{folder}: the manifest names {missing[:3]}, which are missing; remove the folder to repeat this shot")
        uris = [storage.join(folder, name) for name in names]
        masks = tuple(uri for name, uri in zip(names, uris, strict=True) if name.startswith("masks-"))
        return CommittedShot(index, tuple(uri for uri in uris if uri not in masks), masks, manifest["record"])

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Write report.json."""
        storage.write_json(self.path("report.json"), report)


def record_of(message: Any) -> dict[str, Any]:
    """Return a frozen message as a JSON record."""
    return asdict(message)
