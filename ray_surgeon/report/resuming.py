"""Whether a run directory may be used by a job: it is new, or holds the run that is to go on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from ray_surgeon.report.directory import RunDirectory
from ray_surgeon.storage import files as store
from ray_surgeon.storage import tensor_files

_FREE_SECTIONS = ("name", "cluster.", "memory.", "output.")
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
    held = store.read_json(directory.path("run.json"))["fingerprints"]
    free = {key for key, value in fingerprints.items() if value is None}
    names = sorted({*held, *fingerprints} - free)
    different = [name for name in names if held.get(name) != fingerprints.get(name)]
    if different:
        changes = _changes(directory, spec_yaml)
        if held.get("code") != fingerprints["code"]:
            changes.append(f"version {held.get('code')} there, {fingerprints['code']} here")
        shown = "; ".join(changes[:_MOST_CHANGES] + ["..."] * (len(changes) > _MOST_CHANGES))
        raise ValueError(
            f"output.uri: {uri} holds another run: different {', '.join(different)}"
            f"{f' ({shown})' if changes else ''}; choose another folder, for instance --set "
            f"output.uri={elsewhere}"
        )
    shots = directory.committed_indices()
    if not resume:
        raise ValueError(
            f"output.uri: {uri} already holds this run, of which {len(shots)} shots are committed; "
            "continue it with --resume (resume=True in Python), or choose another folder, for "
            f"instance --set output.uri={elsewhere} (output in Python)"
        )
    if shots:
        directory.check_tensors(directory.read_shot(shots[-1]))
        _check_dense_states(directory.dense_states)


def _check_dense_states(uri: str) -> None:
    try:
        tensor_files.Reader().names(uri)
    except (FileNotFoundError, ValueError) as error:
        problem = (
            f"{uri} is gone, and the dense model with it"
            if isinstance(error, FileNotFoundError)
            else f"{error.args[0].partition('; ')[0]}, and the dense model is gone"
        )
        raise ValueError(f"{problem}; put it back, or start a new run") from error


def _changes(directory: RunDirectory, spec_yaml: str) -> list[str]:
    """Return the fields in which a spec differs from the folder's, for an error."""
    file = directory.path("spec.yaml")
    old = _fields(yaml.safe_load(store.read_text(file))) if store.exists(file) else {}
    new = _fields(yaml.safe_load(spec_yaml)) if old else {}
    return [
        f"{name} {old.get(name)!r} there, {new.get(name)!r} here"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name) and not name.startswith(_FREE_SECTIONS)
    ]


def _fields(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a spec by their dotted names."""
    items = dict(enumerate(section)) if isinstance(section, list) else section
    if not items or not isinstance(items, dict):
        return {prefix[:-1]: section} if prefix else {}
    return {
        name: leaf
        for key, value in items.items()
        for name, leaf in _fields(value, f"{prefix}{key}.").items()
    }
