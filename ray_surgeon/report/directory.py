"""The run directory: what identifies a run, its committed shots, its events and its report.

A shot exists if its manifest does; the manifest is written after every file it names.
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from ray_surgeon.report.progress import has_its_files, is_complete
from ray_surgeon.runtime.saving import SavedFile
from ray_surgeon.storage import files as store
from ray_surgeon.storage import tensor_files

_FREE_SECTIONS = ("name", "cluster.", "memory.", "output.")
"""What may differ between a run and its resumption."""
_MOST_CHANGES = 8
_EVENTS_EVERY_S = 20.0
"""How often a store that cannot append gets all events again, besides the end of every shot."""
_BEFORE_A_RUN = (".writable", "attempt", "spec.yaml", "source")
"""All there is of a run that was killed before its first record.

`source` is a model that was in memory.
"""


def _fields(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a spec by their dotted names."""
    items = (
        section.items()
        if isinstance(section, dict)
        else enumerate(section)
        if isinstance(section, list)
        else ()
    )
    leaves = {k: v for key, value in items for k, v in _fields(value, f"{prefix}{key}.").items()}
    return leaves if leaves or not prefix else {prefix[:-1]: section}


class TakenOverError(RuntimeError):
    """Another try of the run has begun in its folder."""


@dataclass
class Attempt:
    """A try of a run; one that goes on after a loss is the same."""

    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    has_begun: bool = False  # and has taken the folder


@dataclass(frozen=True)
class CommittedShot:
    """A shot that can be resumed from."""

    index: int  # its number, from 1
    files: tuple[SavedFile, ...]  # its weights and masks
    record: dict[str, Any]  # its entry in the report


class RunDirectory:
    """A folder on any fsspec URI that belongs to one run."""

    def __init__(self, uri: str, attempt: Attempt | None = None) -> None:
        """Name the folder, and the try of the run that will write there.

        Nothing is read or written yet.
        """
        self.uri = uri
        self._events: list[str] = []
        self._events_written_s = -math.inf
        self._num_dropped = 0  # shots whose tensors are gone
        self._attempt = attempt or Attempt()

    def path(self, *parts: str) -> str:
        """Return the URI of something in the folder."""
        return store.join(self.uri, *parts)

    @property
    def dense_states(self) -> str:
        """The URI of what later shots are compared with, which is there once a shot is."""
        return self.path("dense.safetensors")

    def check(self, fingerprints: Mapping[str, Any], spec_yaml: str, *, resume: bool) -> None:
        """Refuse a folder that holds something else, before anything expensive starts.

        Args:
            fingerprints: of this run; None for what may be whatever the folder's run had.
            spec_yaml: its resolved spec.
            resume: whether the folder may hold committed shots of it.

        Raises:
            ValueError: the folder holds another run, or holds this one and `resume` is not asked
                for, or lacks what this one resumes from.
        """
        if self.is_new():
            return
        held = store.read_json(self.path("run.json"))["fingerprints"]
        free = {key for key, value in fingerprints.items() if value is None}
        different = [
            key
            for key in sorted({*held, *fingerprints} - free)
            if held.get(key) != fingerprints.get(key)
        ]
        if different:
            raise ValueError(
                f"output.uri: {self.uri} holds another run: different {', '.join(different)}"
                f"{self._changes(held, fingerprints, spec_yaml)}; choose another folder, for "
                f"instance --set output.uri={shlex.quote(self.uri.rstrip('/') + '-2')}"
            )
        if not resume:
            raise ValueError(
                f"output.uri: {self.uri} already holds this run, of which "
                f"{len(self.committed_indices())} shots are committed; continue it with --resume "
                "(resume=True in Python), or choose another folder, for instance --set "
                f"output.uri={shlex.quote(self.uri.rstrip('/') + '-2')} (output in Python)"
            )
        if done := self.committed_indices():
            self.check_tensors(self.read_shot(done[-1]))
            try:
                tensor_files.Reader().names(self.dense_states)
            except FileNotFoundError as error:
                raise ValueError(
                    f"{self.dense_states} is gone, and the dense model with it; put it back, or "
                    "start a new run"
                ) from error
            except ValueError as error:
                raise ValueError(
                    f"{error.args[0].partition('; ')[0]}, and the dense model is gone; put it "
                    "back, or start a new run"
                ) from error

    def is_new(self) -> bool:
        """Whether no run has begun here.

        Raises:
            ValueError: the folder holds something else.
        """
        if all(name in _BEFORE_A_RUN for name in store.list_names(self.uri)):
            return True
        if not store.exists(self.path("run.json")):
            raise ValueError(
                f"output.uri: {self.uri} is not empty and holds no run of this program; choose "
                "another folder"
            )
        return False

    def _changes(
        self, held: Mapping[str, Any], fingerprints: Mapping[str, Any], spec_yaml: str
    ) -> str:
        """Return the fields of the two specs that differ, and the versions, for an error."""
        document = (
            store.read_text(self.path("spec.yaml")) if store.exists(self.path("spec.yaml")) else ""
        )
        old = _fields(yaml.safe_load(document))
        new = _fields(yaml.safe_load(spec_yaml))
        names = [
            name
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name) and not name.startswith(_FREE_SECTIONS)
        ]
        changes = (
            [f"{name} {old.get(name)!r} there, {new.get(name)!r} here" for name in names]
            if old
            else []
        )
        if held.get("code") != fingerprints["code"]:
            changes.append(f"version {held.get('code')} there, {fingerprints['code']} here")
        shown = "; ".join(changes[:_MOST_CHANGES]) + (
            "; ..." if len(changes) > _MOST_CHANGES else ""
        )
        return f" ({shown})" if changes else ""

    def report(self) -> dict[str, Any]:
        """Return what the run has written at its end.

        Raises:
            FileNotFoundError: it has not ended.
            ValueError: the file is damaged.
        """
        report: dict[str, Any] = store.read_json(self.path("report.json"))
        return report

    def report_if_finished(self, spec: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the report if a run of this very spec has ended here and lies here whole."""
        try:
            report = self.report()
            is_finished = (
                report["spec"] == dict(spec)
                and is_complete(report)
                and all(map(has_its_files, report["exports"]))
            )
            return (
                report
                if is_finished and len(self.committed_indices()) == len(report["shots"])
                else None
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # not there, or damaged
            return None

    def check_writable(self) -> None:
        """Write and remove a small file.

        Raises:
            OSError: the folder cannot be written to.
        """
        probe = self.path(".writable")
        store.write_text(probe, "")
        store.remove(probe)

    def start(self, spec_yaml: str, fingerprints: Mapping[str, Any]) -> None:
        """Take the folder for this try, and remove what a killed process left half written.

        The run may be new, or go on.

        The last try that starts owns the folder.

        Raises:
            TakenOverError: this try has started before, and another one since.
        """
        if self._attempt.has_begun:
            self.check_attempt()
        else:
            store.write_text(self.path("attempt"), self._attempt.name)
            self._attempt.has_begun = True
        store.remove_files(self.uri, [])
        if not store.exists(self.path("run.json")):
            store.write_text(self.path("spec.yaml"), spec_yaml)
            store.write_json(self.path("run.json"), {"fingerprints": dict(fingerprints)})
        elif store.exists(self.path("events.jsonl")):
            whole, newline, torn = store.read_text(self.path("events.jsonl")).rpartition("\n")
            self._events = whole.splitlines()
            if torn:  # by a full disk or a killed process
                store.write_text(self.path("events.jsonl"), whole + newline)

    def last_attempt(self) -> str | None:
        """Return the name of the try that has begun last, or None before any has."""
        try:
            return store.read_text(self.path("attempt"))
        except FileNotFoundError:
            return None

    def check_attempt(self) -> None:
        """End this try if another one has started since, as by a second job with this spec.

        Raises:
            TakenOverError: it has.
        """
        if self._attempt.has_begun and self.last_attempt() not in (None, self._attempt.name):
            raise TakenOverError(
                f"another try of this run has begun in {self.uri}, so this one ends; committed "
                "shots are kept"
            )

    def retries(self) -> list[dict[str, Any]]:
        """Return the facts of every loss after which the run went on."""
        return [
            event["facts"] for event in map(json.loads, self._events) if event["step"] == "retry"
        ]

    def add_event(self, event: Mapping[str, Any]) -> None:
        """Append to events.jsonl.

        Object stores cannot append, so there the whole file is written again, now and then.

        A store that fails meanwhile does not end the run for that: the lines are there the next
        time, at the latest with the report.
        """
        self._events.append(json.dumps(event))
        if store.is_local(self.uri):
            self.check_attempt()
            store.append_line(self.path("events.jsonl"), self._events[-1])
            return
        with contextlib.suppress(OSError):
            self.check_attempt()
            if time.monotonic() - self._events_written_s > _EVENTS_EVERY_S:
                self.write_events()

    def write_events(self) -> None:
        """Write events.jsonl on an object store."""
        if not store.is_local(self.uri):
            store.write_text(
                self.path("events.jsonl"), "".join(f"{line}\n" for line in self._events)
            )
            self._events_written_s = time.monotonic()

    def shot_folder(self, index: int) -> str:
        """Return the URI of a shot's folder, e.g. ``shots/0003``."""
        return self.path("shots", f"{index:04d}")

    def commit_shot(
        self, index: int, files: Sequence[SavedFile], record: Mapping[str, Any]
    ) -> None:
        """Make a shot exist: write its manifest. Raises as `check_attempt` does."""
        self.check_attempt()
        entries = [
            {"name": f.uri.rpartition("/")[2], "size_bytes": f.size_bytes, "keys": list(f.keys)}
            for f in files
        ]
        store.write_json(
            store.join(self.shot_folder(index), "manifest.json"),
            {"index": index, "files": entries, "record": dict(record)},
        )

    def drop_tensors(self, last: int) -> None:
        """Remove the weights and masks of all shots up to one; their manifests stay.

        No run will resume from these.

        Raises as `check_attempt` does, because another try may resume from them.
        """
        self.check_attempt()
        while self._num_dropped < last:
            self._num_dropped += 1
            store.remove_files(self.shot_folder(self._num_dropped), ["*.safetensors"])

    def committed_indices(self) -> list[int]:
        """Return 1, 2, ... up to the last shot before which every shot is committed."""
        index = 0
        while store.exists(store.join(self.shot_folder(index + 1), "manifest.json")):
            index += 1
        return list(range(1, index + 1))

    def read_shot(self, index: int) -> CommittedShot:
        """Return a committed shot.

        Its files may have been removed if it is not the last one; see `check_tensors`.
        """
        folder = self.shot_folder(index)
        manifest = store.read_json(store.join(folder, "manifest.json"))
        entries = manifest["files"]
        files = tuple(
            SavedFile(store.join(folder, e["name"]), e["size_bytes"], tuple(e["keys"]))
            for e in entries
        )
        return CommittedShot(index, files, manifest["record"])

    def check_tensors(self, shot: CommittedShot) -> None:
        """Refuse to resume from a shot of which a file is missing or cut short.

        Raises:
            ValueError: names the first file that is missing or has another size.
        """
        for file in shot.files:
            size = store.size_bytes(file.uri)
            if size != file.size_bytes:
                problem = (
                    "is missing" if size is None else f"has {size} bytes, not {file.size_bytes}"
                )
                raise ValueError(
                    f"{file.uri} {problem}; remove {self.shot_folder(shot.index)} to repeat this "
                    "shot from the one before, if that still has its tensors"
                )

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Write report.json, and the events so far."""
        self.write_events()
        store.write_json(self.path("report.json"), report)
