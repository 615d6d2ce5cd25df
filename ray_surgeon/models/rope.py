"""What a config.json says of rotary embeddings, for programs that know one name or the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig


def of_full_attention(parameters: Mapping[str, Any]) -> Any:
    """Return what `rope_parameters` says of full attention, which may have a table of its own."""
    return parameters.get("full_attention", parameters)


def rope_of(config: PretrainedConfig) -> Mapping[str, Any]:
    """Return what a configuration says of rotary embeddings of full attention.

    Nothing if it has none.
    """
    parameters: Mapping[str, Any] = of_full_attention(
        getattr(config, "rope_parameters", None) or {}
    )
    return parameters


def rope_kind(config: PretrainedConfig) -> str:
    """Return the type of a model's rotary embeddings, ``default`` if there are none."""
    return str(rope_of(config).get("rope_type", "default"))


def for_older_readers(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json that older programs read, too.

    They do not know `rope_parameters`, but ``rope_theta``.
    """
    parameters = document.get("rope_parameters")
    if not parameters:
        return dict(document)
    of_all = of_full_attention(parameters)
    older = {"rope_theta": of_all["rope_theta"]}
    if "sliding_attention" in parameters:
        older["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    if "partial_rotary_factor" in of_all:
        older["partial_rotary_factor"] = of_all["partial_rotary_factor"]
    if of_all.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: of_all[name] for name in of_all if name not in older}
    return dict(document) | older


def check_rope(document: Mapping[str, Any]) -> None:
    """Refuse a config.json that says two things of the rotary embeddings.

    Programs read one or the other.

    Raises:
        ValueError: names both.
    """
    parameters = document.get("rope_parameters")
    if parameters is None:
        return
    tables: dict[str, Any] = parameters if isinstance(parameters, dict) else {}
    of_all = of_full_attention(tables)
    for table in (of_all, tables.get("sliding_attention", of_all)):
        if not isinstance(table, dict) or not isinstance(table.get("rope_theta"), int | float):
            raise ValueError(
                f"model.source: rope_parameters in config.json is {str(parameters)[:200]}, "
                "expected an object with rope_theta; fetch it again"
            )
    scaling = document.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(
            f"model.source: rope_scaling in config.json is {str(scaling)[:200]}, expected an "
            "object; fetch it again"
        )
    said = for_older_readers(document) | dict(of_all)
    older = {
        name: document.get(name)
        for name in ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")
    }
    for name, value in (older | scaling).items():
        if value is not None and name in said and value != said[name]:
            raise ValueError(
                f"model.source: config.json has {name} {value}, and {said[name]} in "
                "rope_parameters; programs read one or the other: remove the wrong one"
            )
