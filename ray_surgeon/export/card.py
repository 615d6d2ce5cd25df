"""Model cards of exports, with metadata as the Hub reads it.

The Hub's fields: https://huggingface.co/docs/hub/model-cards. `base_model_relation` is one of
adapter, merge, quantized and finetune. A model that lost weights or was trained is a finetune, and
a dense one in another format is quantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from ray_surgeon.config.sections import ModelSection
from ray_surgeon.config.texts import TEXT_SUFFIXES, CalibrationSection
from ray_surgeon.report.html_report import rendered
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import gguf_file, is_licence, open_model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LICENCE_FIELDS = ("license", "license_name", "license_link")
"""Fields of the metadata, in the Hub's spelling."""


def hub_id(source: str) -> str | None:
    """Return the source of a model if it is an id on the Hub, else None.

    Local folders that exist have absolute paths in a job spec.
    """
    if _HUB_ID.fullmatch(source) is None:
        return None
    return source


def public_name(source: str) -> str:
    """Return a public name of a model or text, without local paths and addresses.

    Names of texts and ids on the Hub do not change; other sources are reduced to their last part.
    """
    is_file = source.endswith(TEXT_SUFFIXES) or Path(source).exists()
    if hub_id(source) is not None and not is_file:
        return source
    return source.rstrip("/").rpartition("/")[2]


def licence_of(model: ModelSection) -> dict[str, str]:
    """Return the fields on the licence in the source's metadata; empty if there are none.

    They come from the model card of a folder or of the Hub, or from a GGUF file.
    """
    gguf = gguf_file(model)
    if gguf is not None:
        return _valid(_metadata_of_gguf(gguf))
    source = open_model(model)
    if "README.md" not in source.names:
        return {}
    text = source.fetch("README.md").read_text(encoding="utf-8", errors="replace")
    return _valid(front_matter(text))


def front_matter(card: str) -> dict[str, Any]:
    """Return the metadata at the beginning of a model card; empty if there is none."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, flags=re.DOTALL)
    if match is None:
        return {}
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError:  # an invalid card of the source is not an error
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _metadata_of_gguf(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    metadata = {}
    names = ("general.license", "general.license.name", "general.license.link")
    for name, key in zip(_LICENCE_FIELDS, names, strict=True):
        if key in fields:
            metadata[name] = fields[key].contents()
    return metadata


def _valid(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields on the licence that the Hub would accept."""
    licence = metadata.get("license")
    if not isinstance(licence, str) or _LICENCE_ID.fullmatch(licence) is None:
        return {}
    found = {}
    for name in _LICENCE_FIELDS:
        value = metadata.get(name)
        if isinstance(value, str) and value.isprintable():
            found[name] = value
    return found


def calibration_of(spec: Mapping[str, Any]) -> str:
    """Return a description of the calibration windows of a run.

    For example "228 windows of 512 tokens: 69 of python-docs, 159 written by the model itself".

    Args:
        spec: the resolved job spec.
    """
    section = CalibrationSection.model_validate(spec["calibration"])
    parts = []
    for text, count in section.shares:
        name = public_name(text.source)
        if text.is_written:
            parts.append(f"{count} written by the model itself")
        elif text.source == "auto":
            parts.append(f"{count} of texts that suit the model")
        else:
            parts.append(f"{count} of {name}")
    windows = f"{section.num_sequences} windows of {section.sequence_length} tokens"
    if len(parts) == 1:
        return f"{windows}, {parts[0]}"
    return f"{windows}: {', '.join(parts)}"


def write_card(
    entry: Mapping[str, Any], model: ModelSection, facts: Mapping[str, Any]
) -> None:
    """Write the model card of an export into its folder.

    Args:
        entry: of the export in the report.
        model: the dense model, and the dtype of the run.
        facts: see `RunReport.model_card_facts`.
    """
    uri = entry["uri"]
    names = files.list_files(uri)
    text = card(entry, model, facts, has_template=_has_template(uri, names), names=names)
    files.write_text(files.join(uri, "README.md"), text)


def _has_template(uri: str, names: list[str]) -> bool:
    if "chat_template.jinja" in names:
        return True
    if "tokenizer_config.json" not in names:
        return False
    settings = files.read_json(files.join(uri, "tokenizer_config.json"))
    return bool(settings.get("chat_template"))


def card(
    entry: Mapping[str, Any],
    model: ModelSection,
    facts: Mapping[str, Any],
    *,
    has_template: bool,
    names: list[str],
) -> str:
    """Return the model card of an export.

    Args:
        entry: of the export in the report.
        model: the dense model, and the dtype of the run.
        facts: see `RunReport.model_card_facts`.
        has_template: whether the tokenizer has a chat template.
        names: files of the export.
    """
    spec = facts["spec"]
    is_changed = bool(spec["pruning"] or spec["recovery"])
    metadata: dict[str, Any] = {
        "library_name": _library(entry),
        "pipeline_tag": _pipeline_tag(entry),
    }
    base = hub_id(model.source)
    if base is not None:
        metadata["base_model"] = base
        metadata["base_model_relation"] = "finetune" if is_changed else "quantized"
    licence = licence_of(model)
    metadata.update(licence)
    metadata["tags"] = _tags(spec)
    dtype = getattr(torch, model.dtype)
    teacher = None
    if spec["pruning"] is None and spec["recovery"]:
        teacher = public_name(spec["recovery"]["teacher"]["source"])
    licence_files = [name for name in names if is_licence(name)]
    return rendered(
        "card.md.jinja",
        metadata=metadata,
        entry=entry,
        facts=facts,
        source=public_name(model.source),
        base=base,
        teacher=teacher,
        licence=licence,
        licence_files=licence_files,
        calibration=calibration_of(spec),
        dense_bytes=facts["num_parameters"] * dtype.itemsize,
        dtype=model.dtype,
        has_template=has_template,
    )


def _pipeline_tag(entry: Mapping[str, Any]) -> str:
    if "ImageTextToText" in entry["load"]:
        return "image-text-to-text"
    return "text-generation"


def _library(entry: Mapping[str, Any]) -> str:
    if "from_pretrained" in entry["load"]:
        return "transformers"
    if "files" in entry:
        return "llama.cpp"
    return "vllm"


def _tags(spec: Mapping[str, Any]) -> list[str]:
    """Return tags of the method."""
    if spec["pruning"]:
        return ["pruning", spec["pruning"]["method"].replace("_", "-")]
    if spec["recovery"]:
        return ["pruning", "recovery"]
    return ["quantization"]
