"""Presets: settings of text and method that fit together, under what a spec says itself.

A preset has no number that belongs to one model. Learning rates and damping are chosen in the run,
by windows held aside.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Literal

import yaml

PresetName = Literal["fast", "balanced", "quality"]

PRESETS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8")
)
"""Preset -> the sections that it sets.

`reconstruction` is a part of `pruning` of coupled groups.
"""

_RECONSTRUCTED = {"ffn", "shared_experts"}
_EXPERTS = {"experts", "expert_channels", "shared_experts"}
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
    plain = _mapping(document.get("pruning"))
    groups = plain.get("groups", ("ffn", "attention"))
    kinds = {str(kind) for kind in groups} if isinstance(groups, list | tuple) else set[str]()
    _under(document, "calibration", {"source": "auto"} | preset["calibration"])
    if plain.get("method", "llm_surgeon") == "llm_surgeon":
        kind = _mapping(document.get("curvature")).get("kind", "kfac")
        settings = _curvature_of(kind, kinds, preset["curvature"])
        count = _mapping(document["calibration"]).get("num_sequences")
        if isinstance(count, int) and "num_backward" in settings:
            settings["num_backward"] = min(settings["num_backward"], max(1, count))
        _under(document, "curvature", settings)
    if preset["correction"] is not None:
        _under(document, "correction", preset["correction"])
    if plain.get("structure") != "groups":
        return
    filled = dict(plain) if "sparsities" in plain else {"num_shots": 1, **plain}
    if _RECONSTRUCTED & kinds:
        _under(filled, "reconstruction", preset["reconstruction"])
    document["pruning"] = filled


def _mapping(section: Any) -> Mapping[str, Any]:
    """Return a section if it is one, and an empty one instead of anything else."""
    return section if isinstance(section, Mapping) else {}


def _curvature_of(kind: Any, groups: Set[str], preset: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preset's curvature without fields that the spec's kinds do not have."""
    needless = set[str]()
    if kind != "kfac" or _EXPERTS & groups:
        needless.add("num_backward")
    if kind in ("activations", "identity"):
        needless.add("fisher")
    if kind == "identity" or groups == {"experts"}:
        needless.add("damping")
    return {name: value for name, value in preset.items() if name not in needless}


def _under(document: dict[str, Any], name: str, settings: Mapping[str, Any]) -> None:
    """Put settings under those of a section; a section that is null stays so."""
    section = document.get(name, {})
    if isinstance(section, Mapping):
        document[name] = {**settings, **section}
