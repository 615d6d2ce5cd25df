"""The run directory: identity of a run, its committed shots, its events and its report.

A shot exists if its manifest does; the manifest is written after all files that it names. The same
holds for a part of a shot, from which a run can resume in the middle of a long stage.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ray_surgeon.config.base import refusing
from ray_surgeon.distributed.weights import SavedFile
from ray_surgeon.errors import ConfigError
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


_EVENTS_EVERY_S = 20.0
"""How often all events are written again to a store that cannot append."""
_BEFORE_A_RUN = (".writable", "attempt", "spec.yaml", "source")
"""Names that a run which was killed before its first record may have left.

`source` is a model that was in memory.
"""
_DAMAGED = (ValueError, KeyError, TypeError)
"""Errors that reading a damaged manifest raises."""
_REPEAT = "remove {folder} to repeat this shot from its beginning"


Record = Mapping[str, Any]
"""A JSON object: a report, an entry of one, or fingerprints."""


class TakenOverError(RuntimeError):
    """Another try of the run has begun in its folder."""


@dataclass
class Attempt:
    """A try of a run; it stays the same when the run continues after a loss."""

    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    has_begun: bool = False  # whether it has taken over the folder


class RunDirectory:
    """A folder on any fsspec URI that belongs to one run."""

    def __init__(self, uri: str, attempt: Attempt | None = None) -> None:
        """Initialize for a folder and the try of the run that will write there.

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
        """URI of the dense model's states, which exist once a shot does."""
        return self.path("dense.safetensors")

    def is_new(self) -> bool:
        """Whether no run has begun here.

        Raises:
            ValueError: the folder holds something else.
        """
        if all(name in _BEFORE_A_RUN for name in store.list_names(self.uri)):
            return True
        if not store.exists(self.path("run.json")):
            raise ConfigError(
                field="output.uri",
                found=f"{self.uri} is not empty and holds no run of this program",
                remedy="choose another folder",
            )
        return False

    def report(self) -> dict[str, Any]:
        """Return the report that the run has written.

        Raises:
            FileNotFoundError: there is none yet.
            ValueError: the file is damaged.
        """
        return dict(store.read_json(self.path("report.json")))

    def check_writable(self) -> None:
        """Write and remove a small file.

        Raises:
            OSError: the folder cannot be written to.
        """
        store.write_text(self.path(".writable"), "")
        store.remove_files(self.uri, [".writable"])

    def start(self, spec_yaml: str, fingerprints: Record) -> None:
        """Take over the folder for this try, and remove incomplete files of a killed process.

        The run may be new or be resumed. The last try that starts owns the folder.

        Raises:
            TakenOverError: this try has started before, and another one has started since.
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
            uri = self.path("events.jsonl")
            whole, newline, torn = store.read_text(uri).rpartition("\n")
            self._events = whole.splitlines()
            if torn:  # by a full disk or a killed process
                store.write_text(uri, whole + newline)

    def check_attempt(self) -> None:
        """Check that no other try has started since, for example by a second job with this spec.

        Raises:
            TakenOverError: another try has started.
        """
        if not self._attempt.has_begun:
            return
        with contextlib.suppress(FileNotFoundError):
            if store.read_text(self.path("attempt")) != self._attempt.name:
                raise TakenOverError(
                    f"another try of this run has begun in {self.uri}, so this one ends; "
                    "committed rounds are kept"
                )

    def retries(self) -> list[dict[str, Any]]:
        """Return the facts of every loss after which the run continued."""
        facts = []
        for line in self._events:
            event = json.loads(line)
            if event["step"] == "retry":
                facts.append(event["facts"])
        return facts

    def ended_steps(self) -> list[dict[str, Any]]:
        """Return the event of every step that ended in earlier tries."""
        events = map(json.loads, self._events)
        # other events are told inside of a step, and have no seconds of workers
        return [event for event in events if event.get("worker_seconds")]

    def add_event(self, event: Record) -> None:
        """Append an event with the current time to events.jsonl.

        Object stores cannot append, so there the whole file is written again from time to time. If
        that fails, the run does not end: the lines are written the next time, at the latest with
        the report.
        """
        self._events.append(json.dumps({**event, "time": time.time()}))
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
            lines = "".join(f"{line}\n" for line in self._events)
            store.write_text(self.path("events.jsonl"), lines)
            self._events_written_s = time.monotonic()

    def shot_folder(self, index: int) -> str:
        """Return the URI of a shot's folder, e.g. ``shots/0003``."""
        return self.path("shots", f"{index:04d}")

    def commit_shot(self, index: int, files: Sequence[SavedFile], record: Record) -> None:
        """Commit a shot by writing its manifest. Raises as `check_attempt` does."""
        self.check_attempt()
        manifest = {
            "index": index,
            "files": [entry(file) for file in files],
            "record": dict(record),
        }
        store.write_json(store.join(self.shot_folder(index), "manifest.json"), manifest)

    def part_folder(self, index: int) -> str:
        """Return the URI of the folder of a shot's part."""
        return self.path("shots", f"{index:04d}", "part")

    def commit_part(self, index: int, part: CommittedPart) -> None:
        """Commit a part of a shot in place of an earlier one. Raises as `check_attempt` does.

        Files that the part does not name are removed from its folder.
        """
        self.check_attempt()
        folder = self.part_folder(index)
        files = [entry(file) for file in part.files]
        of_stage = [entry(file) for file in part.of_stage]
        manifest = {"files": files, "of_stage": of_stage, "record": part.record}
        store.write_json(store.join(folder, "manifest.json"), manifest)
        kept = {"manifest.json"}
        kept.update(about["name"] for about in files + of_stage)
        unnamed = [name for name in store.list_names(folder) if name not in kept]
        store.remove_files(folder, unnamed)

    def read_part(self, index: int) -> CommittedPart | None:
        """Return the committed part of a shot, if there is one.

        Raises:
            ValueError: its manifest is damaged.
        """
        folder = self.part_folder(index)
        uri = store.join(folder, "manifest.json")
        if not store.exists(uri):
            return None
        with refusing(f"{uri} is damaged", _REPEAT.format(folder=folder), _DAMAGED):
            manifest = store.read_json(uri)
            return CommittedPart(
                files=files_of(folder, manifest["files"]),
                of_stage=files_of(folder, manifest["of_stage"]),
                record=manifest["record"],
            )

    def remove_part(self, index: int) -> None:
        """Remove the committed part of a shot. Raises as `check_attempt` does."""
        self.check_attempt()
        store.remove_folder(self.part_folder(index))

    def drop_tensors(self, last: int, kept: Collection[int] = ()) -> None:
        """Remove the weights and masks of the shots up to `last`, except `kept`.

        Their manifests stay, but no run can resume from these shots. Raises as `check_attempt`
        does, because another try may resume from them.
        """
        self.check_attempt()
        while self._num_dropped < last:
            self._num_dropped += 1
            if self._num_dropped not in kept:
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
        return CommittedShot(files_of(folder, manifest["files"]), manifest["record"])

    def check_tensors(self) -> bool:
        """Refuse to resume from a commit with a missing or truncated file.

        Returns:
            Whether there is a commit, of a shot or of a part.

        Raises:
            ValueError: names the first file that is missing or has another size.
        """
        last = len(self.committed_indices())
        part = self.read_part(last + 1)
        if part is not None:
            remedy = _REPEAT.format(folder=self.part_folder(last + 1))
            check_files(part.files + part.of_stage, remedy)
            return True
        if last:
            remedy = (
                f"remove {self.shot_folder(last)} to repeat this shot from the one before, "
                "if that still has its tensors"
            )
            check_files(self.read_shot(last).files, remedy)
            return True
        return False

    def write_report(self, report: Record) -> None:
        """Write report.json, and the events so far."""
        self.write_events()
        store.write_json(self.path("report.json"), report)
