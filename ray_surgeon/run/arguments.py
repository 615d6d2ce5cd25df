"""The job spec that the arguments of prune() stand for."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ray_surgeon.run.in_memory import dtype_of
from ray_surgeon.spec.base import Positive, local_path
from ray_surgeon.spec.calibration import CalibrationSection
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.parsing import absolute, validation_message
from ray_surgeon.spec.texts import TextSection
from ray_surgeon.storage import files

_EXAMPLES = {
    "calibration": "such as {'source': 'python-docs', 'num_sequences': 64, 'sequence_length': 512}",
    "pruning": "such as {'structure': 'groups', 'groups': ['ffn'], 'target_sparsity': 0.2}",
}
_NOT_SHARED = CalibrationSection.model_fields.keys() - TextSection.model_fields.keys()
_NOT_SHARED |= {"num_sequences", "stride", "seed", "split"}
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
    document: dict[str, Any] = {"version": 2, "name": "model", "cluster": {}} | dict(sections)
    if isinstance(model, str):
        model = {"source": model}
    _check_kinds(model, tokenizer, document)
    if isinstance(model, Mapping) and "name" not in sections:
        document["name"] = _as_name(str(model["source"]))
    if isinstance(document["cluster"], Mapping):
        document["cluster"] = {"backend": "local", **document["cluster"]}
    output = document.get("output", {})
    output = dict(output) if isinstance(output, Mapping) else {"uri": local_path(output)}
    document["output"] = {"uri": f"./runs/{document['name']}"} | output
    pruning = document["pruning"]
    if "exports" not in output and pruning.get("structure") == "groups":
        uniform = pruning.get("allocation") == "uniform"
        document["output"]["exports"] = ["uniform" if uniform else "per_block"]
    calibration = document.get("calibration", {})
    if "evaluation" not in document and calibration.get("source", "auto") not in ("auto", "self"):
        document["evaluation"] = [_test_part(calibration)]
    if isinstance(model, PreTrainedModel):
        source = files.join(absolute(str(document["output"]["uri"])), "source")
        model = {"source": source, "dtype": dtype_of(model)}
    try:
        return JobSpec.model_validate(document | {"model": model})
    except ValidationError as error:
        derived = () if "evaluation" in sections else ("evaluation",)
        raise ValueError(validation_message(error, "what prune() was given", derived)) from error


def _check_kinds(
    model: Mapping[str, Any] | PreTrainedModel | None, tokenizer: Any, document: Mapping[str, Any]
) -> None:
    """Refuse arguments that are no sections of a job spec.

    Raises:
        ValueError: names the argument, and what to give.
    """
    if model is None:
        raise ValueError(
            "model: give a Hub id, a folder, a URI, or a model in memory; or a whole spec"
        )
    if isinstance(model, Mapping) and "source" not in model:
        raise ValueError(
            f"model: got a {type(model).__name__} of {', '.join(map(str, list(model)[:3]))}; "
            "give its source, or a causal LM"
        )
    if isinstance(model, Mapping) and tokenizer is not None:
        raise ValueError(
            "tokenizer: belongs to a model in memory; that of a folder, URI or Hub id is read "
            "from there"
        )
    if isinstance(model, PreTrainedModel) and tokenizer is None:
        raise ValueError(
            "tokenizer: a model in memory needs its tokenizer; give it as the second argument"
        )
    for section in ("calibration", "pruning") if "preset" not in document else ("pruning",):
        if not isinstance(document.get(section), Mapping):
            value = (
                f"got {reprlib.repr(document[section])}" if section in document else "is missing"
            )
            raise ValueError(
                f"{section}: {value}; give the fields of that section of a job spec, "
                f"{_EXAMPLES[section]}"
            )
    if not isinstance(document.get("output", {}), str | os.PathLike | Mapping):
        raise ValueError(
            f"output: got {document['output']!r}; give a folder, a URI, or the section of that name"
        )


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
