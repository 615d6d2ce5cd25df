"""Reads and checks a job's inputs: the configuration, the tokenizer and the texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from ray_surgeon.config.base import refusing
from ray_surgeon.config.job import JobSpec
from ray_surgeon.config.sections import LocalSection, ModelSection
from ray_surgeon.config.texts import SourceSection
from ray_surgeon.data.documents import is_saved_whole
from ray_surgeon.data.texts import Windows, interleaved, read_windows, windows_of
from ray_surgeon.distributed.memory_plan.device_resources import named_device
from ray_surgeon.errors import ConfigError
from ray_surgeon.models.attention import check_rope
from ray_surgeon.models.checkpoint import check_checkpoint, check_tied
from ray_surgeon.models.families import (
    FAMILIES,
    check_depth,
    check_family,
    check_not_quantised,
)
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.recovery.recovery import LoadTeacher
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import ModelFiles, open_model


class Texts(NamedTuple):
    """The inputs of a job other than its model."""

    tokenizer: Any  # None if nothing is read, for a plan from config.json alone
    calibration: Windows
    measured: Mapping[str, Windows]  # evaluation texts by name
    teacher: LoadTeacher | None = None  # stage that loads a model to train towards


def unread_texts(spec: JobSpec) -> Texts:
    """Return placeholders for the texts in a plan from config.json alone."""
    shape = (spec.calibration.num_sequences, spec.calibration.sequence_length)
    tokens = np.broadcast_to(np.int64(0), shape)  # all tokens share their memory
    return Texts(tokenizer=None, calibration=windows_of(tokens), measured={})


def read_texts(spec: JobSpec, tokenizer: Any, config: PretrainedConfig) -> Texts:
    """Read the calibration and the evaluation texts."""

    def windows_in(text: SourceSection, count: int, length: int, where: str) -> Windows:
        check_length(length, config, f"{where}.sequence_length")
        windows = read_windows(text, count, length, tokenizer, where)
        largest = int(windows.tokens.max())
        if largest >= config.vocab_size:
            raise ConfigError(
                field="model.source",
                found=(
                    f"the tokenizer gives token {largest}, the vocabulary is {config.vocab_size}"
                ),
                remedy="it belongs to another model",
            )
        return windows

    section = spec.calibration
    for i, later in enumerate(spec.evaluation.texts):
        if is_saved_whole(later):
            section.check_border(later, f"evaluation.{i}")
    length = section.sequence_length
    parts = list[Windows]()
    for number, (share, count) in enumerate(section.shares):
        if share.is_written:
            parts.append(windows_of(np.zeros((count, length), dtype=np.int64)))
            continue
        where = f"calibration.mix.{number - 1}" if number else "calibration"
        parts.append(windows_in(share, count, length, where))
    measured = {}
    for i, text in enumerate(spec.evaluation.texts):
        where = f"evaluation.{i} ({text.name})"
        measured[text.name] = windows_in(
            text,
            text.num_sequences,
            text.sequence_length,
            where,
        )
    return Texts(tokenizer=tokenizer, calibration=interleaved(parts), measured=measured)


def check_length(length: int, config: PretrainedConfig, where: str) -> None:
    """Refuse windows that are longer than the model takes.

    Raises:
        ValueError: names the field.
    """
    longest = getattr(config, "max_position_embeddings", length)
    if length > longest:
        raise ConfigError(
            field=where,
            found=f"{length}, but the model takes at most {longest}",
            remedy="shorten it",
        )


def as_input_error(what: str) -> AbstractContextManager[None]:
    """Turn errors of a file system into a ValueError on the user's input."""
    remedy = "check the address, the permissions, the credentials and the network"
    return refusing(what, remedy)


def opened(model: ModelSection) -> tuple[ModelFiles, Path, ModelLayout]:
    """Return a model's files, a local folder with the small ones, and its layout.

    Raises:
        ValueError: the model cannot be read, or is not supported.
    """
    with as_input_error(f"model.source: cannot read {model.source}"):
        source = open_model(model)
        folder = source.small_files_folder()
    config = load_config(folder, source.origin)
    family = None
    if config.model_type not in FAMILIES:
        # only models of unknown families are probed
        from ray_surgeon.models.probe import probed_family

        family = probed_family(config)
    return source, folder, ModelLayout.of(config, source.origin, family)


def check_vocabularies(tokenizers: Sequence[Any], sizes: Sequence[int]) -> None:
    """Refuse a teacher with another vocabulary.

    Args:
        tokenizers: of the model and of its teacher; empty if they were not read.
        sizes: of the vocabularies of both.

    Raises:
        ValueError: says what differs.
    """
    different = set[tuple[str, int]]()  # entries of one vocabulary alone
    for tokenizer in tokenizers:
        different.symmetric_difference_update(tokenizer.get_vocab().items())
    size, teacher_size = sizes
    if not different and size == teacher_size:
        return
    example = ""
    if different:
        word, _ = min(different)
        example = f", such as {word!r}"
    raise ValueError(
        f"vocab_size is {teacher_size}, and that of model.source {size}; "
        f"{len(different)} entries of the tokenizers differ{example}; both must have one "
        "vocabulary, so give the model that this one was pruned from"
    )


def load_config(folder: Path, origin: str) -> PretrainedConfig:
    """Return the configuration of a checkpoint.

    Args:
        folder: with config.json.
        origin: of the checkpoint, for errors.

    Raises:
        ValueError: the configuration cannot be read, or its family or kind is not supported.
    """
    document = files.read_json(str(folder / "config.json"))
    if not isinstance(document, dict):
        raise ConfigError(
            field="model.source",
            found=f"config.json of {origin} is a {type(document).__name__}, expected an object",
            remedy="fetch it again",
        )
    model_type = str(document.get("model_type", ""))
    of_text = document.get("text_config")
    is_known = model_type in FAMILIES or model_type in CONFIG_MAPPING
    if document.get("auto_map") and not is_known:
        raise ConfigError(
            field="model.source",
            found=f"{origin} comes with code of its own (auto_map), which is never run",
            remedy="give a model whose code transformers has",
        )
    if of_text is not None or not is_known:
        check_family(model_type)
    check_depth(document, origin)
    check_not_quantised(document)
    refused = f"model.source: transformers cannot read config.json of {origin}"
    # the code of any family may raise anything
    with refusing(refused, "give a checkpoint it knows", Exception):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder,
            trust_remote_code=False,
        )
    check_rope(document)
    return config


def check_machine(spec: JobSpec, *, dry_run: bool) -> None:
    """Refuse a GPU that this machine lacks, and an output folder that vanishes with the job.

    Raises:
        ValueError: names the field.
    """
    section = spec.cluster
    if section.device_speed is not None:
        named_device(section.device_speed, section.cpus_per_worker)
    wants_gpu = isinstance(section, LocalSection) and section.device == "cuda"
    if not dry_run and wants_gpu and not torch.cuda.is_available():
        raise ConfigError(
            field="cluster.gpus_per_worker",
            found="1, but torch sees no GPU here",
            remedy="set it to 0, or install torch with CUDA and a driver",
        )
    if any(part.startswith("_ray_pkg_") for part in Path(spec.output.uri).parts):
        raise ConfigError(
            field="output.uri",
            found=(
                f"{spec.output.uri} is in Ray's copy of the working directory, and goes with it"
            ),
            remedy="give a whole path or a URI",
        )


def check_weights(source: ModelFiles, layout: ModelLayout) -> Any:
    """Check the headers of a checkpoint, and return its fingerprint.

    Raises:
        ValueError: tensors are missing, or have other shapes.
    """
    with as_input_error(f"model.source: cannot read {source.origin}"):
        shapes, fingerprint = source.shapes_and_fingerprint()
        check_checkpoint(layout, shapes, source.origin)
        if layout.tied.keys() & shapes.keys():
            check_tied(layout, shapes, source.read, source.origin)
    return fingerprint


def check_requests(spec: JobSpec, layout: ModelLayout) -> None:
    """Refuse a timed request that is longer than the table of positions.

    Otherwise it would fail only after all pruning.

    Raises:
        ValueError: names the field.
    """
    request = spec.output.speed
    if request is None or not layout.family.positions:
        return
    longest = layout.config.max_position_embeddings
    if request.prompt_length + request.num_new_tokens > longest:
        raise ConfigError(
            field="output.speed",
            found=(
                f"a prompt of {request.prompt_length} tokens and "
                f"{request.num_new_tokens} new ones, but the model takes at most "
                f"{longest}"
            ),
            remedy="give fewer",
        )
