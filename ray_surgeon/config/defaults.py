"""Defaults of job specs: presets, and what version 3 chooses for the model and the machine.

A spec of version 2 keeps its own defaults, which are those of the sections. A preset contains no
values tuned to one model: learning rates and damping are chosen during the run on validation
windows.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import yaml

from ray_surgeon.config.base import fraction
from ray_surgeon.config.texts import CalibrationSection, TextSection

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
    if preset["recovery"] is not None and can_recover(document):
        _under(document, "recovery", preset["recovery"])
    if pruning.get("structure") == "groups":
        if "sparsities" in pruning:
            document["pruning"] = dict(pruning)
        else:
            document["pruning"] = {"num_shots": 1, **pruning}
        if is_taken("reconstruction"):
            _under(document["pruning"], "reconstruction", preset["reconstruction"])


def can_recover(document: Mapping[str, Any]) -> bool:
    """Whether a job prunes its model or has a teacher for its recovery."""
    prunes = document.get("pruning", {}) is not None
    return prunes or mapping(document.get("recovery")).get("teacher") is not None


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


NEWEST = 3
"""The newest version of the format of job specs."""
_WIDE = 8192
"""Feed-forward layers of this width or more keep multiples of 128 channels, others of 64."""
_LAYER_PARTS = {"attention_layers", "ffn_layers"}


@dataclass(frozen=True)
class ModelFacts:
    """Properties of a model that defaults depend on."""

    dtype: str = "auto"  # of the checkpoint; auto while the model has not been read
    kinds: tuple[str, ...] = ("ffn",)  # kinds of groups that can be pruned
    width: int = 0  # smallest number of channels of a feed-forward layer

    @property
    def default_groups(self) -> list[str]:
        """Kinds of groups to prune if a spec names none.

        Whole experts of a mixture, because the result is a plain model for every engine; otherwise
        channels of feed-forward layers, whose removal harms least at equal speed.
        """
        for kind in ("experts", "ffn"):
            if kind in self.kinds:
                return [kind]
        return list(self.kinds[:1])


def is_newest(document: Mapping[str, Any]) -> bool:
    """Whether a document has the defaults of the newest version; one without a version does."""
    return bool(document.get("version", NEWEST) == NEWEST)


def with_names(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document of any version with a name and a run directory.

    A model and an output may be given as text: the source of the model, the run directory.
    """
    filled = dict(document)
    if isinstance(filled.get("model"), str):
        filled["model"] = {"source": filled["model"]}
    if filled.get("name") is None:
        filled["name"] = run_name(filled)
    output = filled.get("output", {})
    if isinstance(output, str | os.PathLike):
        output = {"uri": output}
    if isinstance(output, Mapping):
        # a name may be anything, a bomb of nested lists included, until it is checked
        name = filled["name"] if isinstance(filled["name"], str) else "model"
        output = {"uri": f"./runs/{name}", **output}
    filled["output"] = output
    return filled


def completed(
    document: Mapping[str, Any], facts: ModelFacts | None = None
) -> dict[str, Any]:
    """Return a document of the newest version with its defaults, except for the workers.

    Args:
        document: of `with_names`; its sections are not validated yet.
        facts: of the model; assumes a dense model of unknown dtype if not given.
    """
    facts = facts or ModelFacts()
    filled: dict[str, Any] = {"version": NEWEST, **document}
    model = filled.get("model")
    if isinstance(model, Mapping) and "source" in model:
        filled["model"] = {"dtype": facts.dtype, **model}
        if model.get("dtype") == "auto":
            filled["model"]["dtype"] = facts.dtype
    pruning = filled.get("pruning")
    if isinstance(pruning, Mapping):
        filled["pruning"] = _pruning(pruning, facts)
    calibration = filled.get("calibration")
    if isinstance(calibration, Mapping):
        filled["calibration"] = {"source": "auto", **calibration}
    if "evaluation" not in filled:
        filled.update(_evaluation(mapping(filled.get("calibration"))))
    output = filled["output"]
    if isinstance(output, Mapping):
        filled["output"] = {"exports": _exports(filled.get("pruning")), **output}
    if "preset" not in filled and filled.get("time") is None:
        filled["preset"] = "balanced"
    return filled


def _pruning(pruning: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
    filled = dict(pruning)
    if "structure" not in filled and "method" not in filled:
        filled["structure"] = "groups"
    if filled.get("structure") != "groups":
        return filled
    kinds = filled.setdefault("groups", facts.default_groups)
    can_be_uniform = isinstance(kinds, list | tuple) and _LAYER_PARTS.isdisjoint(kinds)
    if "allocation" not in filled:
        filled["allocation"] = "uniform" if can_be_uniform else "global"
    devices = filled.get("tensor_parallel", 1)
    has_width = filled.get("width_multiple") is not None
    if facts.width >= _WIDE and isinstance(devices, int) and not has_width:
        filled["width_multiple"] = 128 * devices
    return filled


def _exports(pruning: Any) -> list[str]:
    """Return the exports of a job that names none: the smallest that plain classes load."""
    if pruning is None:
        return ["uniform"]
    section = mapping(pruning)
    if section.get("structure") != "groups":
        return ["masked"]
    if section.get("allocation") == "uniform":
        return ["uniform"]
    return ["per_block"]


def run_name(document: Mapping[str, Any]) -> str:
    """Return a name for a run, from its model and the amount to remove."""
    source = str(mapping(document.get("model")).get("source", "")).rstrip("/")
    last = source.rpartition("/")[2].lower().removesuffix(".gguf")
    name = re.sub(r"[^a-z0-9.-]", "-", last).strip("-.") or "model"
    sparsity = mapping(document.get("pruning")).get("target_sparsity")
    with contextlib.suppress(ValueError):  # the section refuses it later
        sparsity = fraction(sparsity)
    if isinstance(sparsity, Real) and 0 < float(sparsity) < 1:
        name = f"{name[:55]}-{100 * float(sparsity):.3g}pct"
    return name[:63]


_NOT_SHARED = {
    *(CalibrationSection.model_fields.keys() - TextSection.model_fields.keys()),
    "num_sequences",
    "stride",
    "seed",
    "split",
}
"""Fields of a calibration text that an evaluation text does not inherit."""


def _evaluation(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section `evaluation` of a job with a calibration text of its own.

    It is the test part of the text, with a quarter as many windows; empty for other jobs, which
    are measured on Python's help and docstrings.
    """
    is_own = calibration.get("source", "auto") not in ("auto", "self")
    if not is_own or calibration.get("split", "train") == "test":
        return {}
    text = {name: value for name, value in calibration.items() if name not in _NOT_SHARED}
    text["name"] = "test"
    text["num_sequences"] = 12
    count = calibration.get("num_sequences")
    if isinstance(count, Integral):
        text["num_sequences"] = max(1, int(count) // 4)
    return {"evaluation": {"texts": [text]}}
