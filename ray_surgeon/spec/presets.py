"""Presets: settings of text and method that fit together, under what a spec says itself.

A preset has no number that belongs to one model. Learning rates and damping are chosen in the run,
by windows held aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

PresetName = Literal["fast", "balanced", "quality"]

PRESETS: dict[str, dict[str, Any]]
"""Preset -> the sections that it sets.

`reconstruction` is a part of `pruning` of coupled groups.
"""
_TAKEN: dict[str, dict[str, list[str]]]
"""Setting -> which jobs take it."""
PRESETS, _TAKEN = yaml.safe_load_all(
    Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8")
)

_EVALUATION = ("python-docs", "python-docstrings")
"""Texts that a run is measured on if it names none."""


def with_preset(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job spec's document with its preset's settings under its own.

    Default texts to measure on are added.

    Args:
        document: a mapping of sections; a section may be anything yet.
    """
    filled = dict(document)
    preset = PRESETS.get(str(document.get("preset")))
    if preset is not None:
        _fill(filled, preset)
    filled.setdefault("calibration", {"source": "auto"} | PRESETS["balanced"]["calibration"])
    evaluation = {} if filled.get("evaluation") is None else filled["evaluation"]
    if isinstance(evaluation, Mapping) and "texts" not in evaluation:
        length = _mapping(filled["calibration"]).get("sequence_length", 512)
        windows = {"num_sequences": 12, "sequence_length": length}
        texts = [{"name": name, "source": name, **windows} for name in _EVALUATION]
        filled["evaluation"] = {"texts": texts, **evaluation}
    return filled


def _fill(document: dict[str, Any], preset: Mapping[str, Any]) -> None:
    pruning = _mapping(document.get("pruning"))
    groups = pruning.get("groups", ("ffn", "attention"))
    _under(document, "calibration", {"source": "auto"} | preset["calibration"])
    if pruning.get("method", "llm_surgeon") == "llm_surgeon":
        kind = _mapping(document.get("curvature")).get("kind", "kfac")
        settings = {n: v for n, v in preset["curvature"].items() if _is_taken(n, kind, groups)}
        count = _mapping(document["calibration"]).get("num_sequences")
        if isinstance(count, int) and "num_backward" in settings:
            settings["num_backward"] = min(settings["num_backward"], max(1, count))
        _under(document, "curvature", settings)
    if preset["correction"] is not None:
        _under(document, "correction", preset["correction"])
    if pruning.get("structure") == "groups":
        shots = {} if "sparsities" in pruning else {"num_shots": 1}
        document["pruning"] = {**shots, **pruning}
        if _is_taken("reconstruction", None, groups):
            _under(document["pruning"], "reconstruction", preset["reconstruction"])


def _mapping(section: Any) -> Mapping[str, Any]:
    """Return a section if it is one, and an empty one instead of anything else."""
    return section if isinstance(section, Mapping) else {}


def _is_taken(name: str, curvature: Any, groups: Any) -> bool:
    """Whether a job with a kind of curvature, and kinds of groups, takes a setting."""
    taken = _TAKEN[name]
    kinds = set(map(str, groups)) if isinstance(groups, list | tuple) else set[str]()
    return (
        curvature in taken.get("curvature", [curvature])
        and kinds.isdisjoint(taken.get("without", ()))
        and not kinds.isdisjoint(taken.get("one_of", kinds))
    )


def _under(document: dict[str, Any], name: str, settings: Mapping[str, Any]) -> None:
    """Put settings under those of a section; a section that is null stays so."""
    section = document.get(name, {})
    if isinstance(section, Mapping):
        document[name] = {**settings, **section}
