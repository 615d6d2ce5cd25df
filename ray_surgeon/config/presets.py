"""Presets: matching defaults of text and method for the fields that a spec omits.

A preset contains no values tuned to one model. Learning rates and damping are chosen during the run
on windows held aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

PresetName = Literal["fast", "balanced", "quality"]

_FILE = Path(__file__).with_name("presets.yaml")
PRESETS: dict[str, dict[str, Any]]
"""Preset -> its sections.

`reconstruction` belongs to `pruning` of coupled groups.
"""
_TAKEN: dict[str, dict[str, list[str]]]
"""Setting -> the jobs to which it applies."""
_TEXTS: list[dict[str, Any]]
"""Evaluation texts of a run without its own."""
PRESETS, _TAKEN, _TEXTS = yaml.safe_load_all(_FILE.read_text(encoding="utf-8"))


def with_preset(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job spec's document, completed by its preset and by default evaluation texts.

    Args:
        document: a mapping of sections, not validated yet.
    """
    filled = dict(document)
    preset = PRESETS.get(str(document.get("preset")))
    if preset:
        _fill(filled, preset)
    balanced = PRESETS["balanced"]["calibration"]
    filled.setdefault("calibration", {"source": "auto", **balanced})
    evaluation = filled.get("evaluation")
    if evaluation is None:
        evaluation = {}
    if isinstance(evaluation, Mapping) and "texts" not in evaluation:
        length = _mapping(filled["calibration"]).get("sequence_length", 512)
        texts = [{**text, "sequence_length": length} for text in _TEXTS]
        filled["evaluation"] = {"texts": texts, **evaluation}
    return filled


def _fill(document: dict[str, Any], preset: Mapping[str, Any]) -> None:
    pruning = _mapping(document.get("pruning"))
    kind = _mapping(document.get("curvature")).get("kind", "kfac")
    groups = pruning.get("groups", ("ffn", "attention"))
    kinds = set(map(str, groups)) if isinstance(groups, list | tuple) else set[str]()

    def is_taken(name: str) -> bool:
        jobs = _TAKEN[name]
        has_kinds = kinds.isdisjoint(jobs["without"]) and not kinds.isdisjoint(
            jobs["one_of"]
        )
        return has_kinds and kind in jobs["curvature"]

    _under(document, "calibration", {"source": "auto", **preset["calibration"]})
    prunes = document.get("pruning", pruning) is not None
    if prunes and pruning.get("method", "llm_surgeon") == "llm_surgeon":
        settings = {
            name: value for name, value in preset["curvature"].items() if is_taken(name)
        }
        count = _mapping(document["calibration"]).get("num_sequences")
        if isinstance(count, int) and "num_backward" in settings:
            settings["num_backward"] = min(settings["num_backward"], max(1, count))
        if settings:
            _under(document, "curvature", settings)
    has_teacher = _mapping(document.get("recovery")).get("teacher") is not None
    if preset["recovery"] is not None and (prunes or has_teacher):
        _under(document, "recovery", preset["recovery"])
    if pruning.get("structure") == "groups":
        if "sparsities" in pruning:
            document["pruning"] = dict(pruning)
        else:
            document["pruning"] = {"num_shots": 1, **pruning}
        if is_taken("reconstruction"):
            _under(document["pruning"], "reconstruction", preset["reconstruction"])


def _mapping(section: Any) -> Mapping[str, Any]:
    """Return a section if it is a mapping, else an empty one."""
    if isinstance(section, Mapping):
        return section
    return {}


def _under(document: dict[str, Any], name: str, settings: Mapping[str, Any]) -> None:
    """Add the missing settings of a section; a section that is null stays null."""
    section = document.get(name, {})
    if isinstance(section, Mapping):
        document[name] = {**settings, **section}
