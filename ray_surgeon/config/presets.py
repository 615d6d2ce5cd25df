"""Presets: matching defaults of text and method for the fields that a spec omits.

A preset contains no values tuned to one model. Learning rates and damping are chosen during the run
on windows held aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import yaml

PresetName = Literal["fast", "balanced", "quality"]
PRESET_SECONDS: dict[str, float] = {"fast": 240.0, "balanced": 720.0, "quality": 3600.0}
"""Preset of version 3 -> the time that a job may take."""

_FILE = Path(__file__).with_name("presets.yaml")
LEVELS: dict[str, dict[str, Any]]
"""Level of effort, from the least to the most -> its sections. The first three are presets.

`reconstruction` belongs to `pruning` of coupled groups.
"""
_TAKEN: dict[str, dict[str, list[str]]]
"""Setting -> the jobs to which it applies."""
_TEXTS: list[dict[str, Any]]
"""Evaluation texts of a run without its own."""
LEVELS, _TAKEN, _TEXTS = yaml.safe_load_all(_FILE.read_text(encoding="utf-8"))


def with_preset(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job spec's document, completed by its preset and by default evaluation texts.

    Args:
        document: a mapping of sections, not validated yet.
    """
    filled = dict(document)
    name = document.get("preset")
    if name is None and document.get("time") is not None:
        name = "balanced"
    if isinstance(name, str) and name in LEVELS:
        fill(filled, LEVELS[name])
    balanced = LEVELS["balanced"]["calibration"]
    filled.setdefault("calibration", {"source": "auto", **balanced})
    evaluation = filled.get("evaluation")
    if evaluation is None:
        evaluation = {}
    if isinstance(evaluation, Mapping) and "texts" not in evaluation:
        length = mapping(filled["calibration"]).get("sequence_length", 512)
        texts = [{**text, "sequence_length": length} for text in _TEXTS]
        filled["evaluation"] = {"texts": texts, **evaluation}
    return filled


def fill(document: dict[str, Any], preset: Mapping[str, Any]) -> None:
    """Add the settings of a level to a document, as far as its job takes them.

    Args:
        document: a mapping of sections; what it says itself stays.
        preset: a value of `LEVELS`.
    """
    pruning = mapping(document.get("pruning"))
    kind = mapping(document.get("curvature")).get("kind", "kfac")
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
        count = mapping(document["calibration"]).get("num_sequences")
        if isinstance(count, Integral) and "num_backward" in settings:
            settings["num_backward"] = min(settings["num_backward"], max(1, int(count)))
        if settings:
            _under(document, "curvature", settings)
    has_teacher = mapping(document.get("recovery")).get("teacher") is not None
    if preset["recovery"] is not None and (prunes or has_teacher):
        _under(document, "recovery", preset["recovery"])
    if pruning.get("structure") == "groups":
        if "sparsities" in pruning:
            document["pruning"] = dict(pruning)
        else:
            document["pruning"] = {"num_shots": 1, **pruning}
        if is_taken("reconstruction"):
            _under(document["pruning"], "reconstruction", preset["reconstruction"])


def mapping(section: Any) -> Mapping[str, Any]:
    """Return a section if it is a mapping, else an empty one."""
    if isinstance(section, Mapping):
        return section
    return {}


def _under(document: dict[str, Any], name: str, settings: Mapping[str, Any]) -> None:
    """Add the missing settings of a section; a section that is null stays null."""
    section = document.get(name, {})
    if isinstance(section, Mapping):
        document[name] = {**settings, **section}
