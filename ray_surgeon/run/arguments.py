"""The job spec that the arguments of prune() stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ray_surgeon.spec.base import Positive
from ray_surgeon.spec.calibration import OF_CALIBRATION
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.parsing import absolute, validation_message
from ray_surgeon.spec.written import WritingSection
from ray_surgeon.storage import files

_NOT_SHARED = {
    "num_sequences",
    "mix",
    "stride",
    "seed",
    "split",
    *WritingSection.model_fields,
    *OF_CALIBRATION,
}
"""Fields of a calibration text that an evaluation text does not take over."""


def spec_of(
    model: str | Mapping[str, Any] | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    sections: Mapping[str, Any],
) -> JobSpec:
    """Return the job spec that the arguments of `prune` stand for.

    Raises:
        ValueError: it is none that can work; names the argument, and the remedy.
    """
    if isinstance(model, PreTrainedModel) == (tokenizer is None):
        raise ValueError(
            "tokenizer: belongs to a model in memory, which needs its tokenizer as the second "
            "argument; that of a folder, URI or Hub id is read from there"
        )
    document: dict[str, Any] = {"version": 2, "name": "model", "cluster": {}, "output": {}}
    document |= sections
    if isinstance(model, str):
        model = {"source": model}
    if not isinstance(model, PreTrainedModel):
        if not model or "source" not in model:
            raise ValueError(
                "model: give a Hub id, a folder, a URI, a model in memory, or a section that "
                "gives its source; or a whole spec"
            )
        document["name"] = sections.get("name", _as_name(str(model["source"])))
    if isinstance(document["cluster"], Mapping):
        document["cluster"] = {"backend": "local", **document["cluster"]}
    if not isinstance(document["output"], Mapping):
        document["output"] = {"uri": document["output"]}
    output = document["output"] = {"uri": f"./runs/{document['name']}", **document["output"]}
    pruning = _fields(sections.get("pruning"))
    if pruning.get("structure") == "groups":
        uniform = pruning.get("allocation") == "uniform"
        output.setdefault("exports", ["uniform" if uniform else "per_block"])
    calibration = _fields(sections.get("calibration"))
    if "evaluation" not in sections and calibration.get("source", "auto") not in ("auto", "self"):
        document["evaluation"] = [_test_part(calibration)]
    if isinstance(model, PreTrainedModel):
        source = files.join(absolute(str(output["uri"])), "source")
        model = {"source": source, "dtype": str(model.dtype).removeprefix("torch.")}
    try:
        return JobSpec.model_validate(document | {"model": model})
    except ValidationError as error:
        derived = () if "evaluation" in sections else ("evaluation",)
        raise ValueError(validation_message(error, "what prune() was given", derived)) from error


def _fields(section: Any) -> Mapping[str, Any]:
    """Return the fields of a section; none of what is refused later because it is no section."""
    return section if isinstance(section, Mapping) else {}


def _test_part(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Return the evaluation text of a run that names none.

    It is a quarter as many windows of the test part of the calibration text.

    Raises:
        ValueError: the calibration reads that part.
    """
    if calibration.get("split", "train") == "test":
        raise ValueError(
            "evaluation: the calibration reads the test part of its text, so name another text "
            "to measure on"
        )
    text = {name: value for name, value in calibration.items() if name not in _NOT_SHARED}
    try:
        count = TypeAdapter(Positive).validate_python(calibration.get("num_sequences"))
    except ValidationError:
        count = 1  # it is refused in its own place
    return text | {"name": "test", "split": "test", "num_sequences": max(1, count // 4)}


def _as_name(source: str) -> str:
    last = source.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9.-]", "-", last).strip("-.")[:63] or "model"
