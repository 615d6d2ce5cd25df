"""Reads what a job names, and checks it: the configuration, the tokenizer and the texts."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from ray_surgeon.data.documents import is_saved_whole
from ray_surgeon.data.texts import Windows, interleaved, read_windows, windows_of
from ray_surgeon.models.attention import check_rope
from ray_surgeon.models.checkpoint import check_checkpoint, check_tied
from ray_surgeon.models.families import check_depth, check_family, check_not_quantised
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.plan.device_resources import named_device
from ray_surgeon.recovery.teacher import LoadTeacher
from ray_surgeon.spec.base import refusing
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.sections import LocalSection, ModelSection
from ray_surgeon.spec.texts import SourceSection
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import ModelFiles, open_model


class Texts(NamedTuple):
    """What a job reads beside its model."""

    tokenizer: Any  # None if nothing is read, for a plan from config.json alone
    calibration: Windows
    measured: Mapping[str, Windows]  # by name, what is evaluated on
    teacher: LoadTeacher | None = None  # what loads a model to train towards


def unread_texts(spec: JobSpec) -> Texts:
    """Return what stands for the texts in a plan from config.json alone."""
    shape = (spec.calibration.num_sequences, spec.calibration.sequence_length)
    tokens = np.broadcast_to(np.int64(0), shape)  # all places share their memory
    return Texts(None, windows_of(tokens), {})


def read_texts(spec: JobSpec, tokenizer: Any, config: PretrainedConfig) -> Texts:
    """Read the calibration and the evaluation texts."""

    def windows_in(text: SourceSection, count: int, length: int, where: str) -> Windows:
        check_length(length, config, f"{where}.sequence_length")
        windows = read_windows(text, count, length, tokenizer, where)
        largest = int(windows.tokens.max())
        if largest >= config.vocab_size:
            problem = f"the tokenizer gives token {largest}, the vocabulary is {config.vocab_size}"
            raise ValueError(f"model.source: {problem}; it belongs to another model")
        return windows

    section = spec.calibration
    for i, later in enumerate(spec.evaluation.texts):
        if is_saved_whole(later):
            section.check_border(later, f"evaluation.{i}")
    length = section.sequence_length
    parts = list[Windows]()
    for number, (text, count) in enumerate(section.shares):
        if text.is_written:
            parts.append(windows_of(np.zeros((count, length), dtype=np.int64)))
            continue
        where = f"calibration.mix.{number - 1}" if number else "calibration"
        parts.append(windows_in(text, count, length, where))
    measured = {
        t.name: windows_in(t, t.num_sequences, t.sequence_length, f"evaluation.{i} ({t.name})")
        for i, t in enumerate(spec.evaluation.texts)
    }
    return Texts(tokenizer, interleaved(parts), measured)


def check_length(length: int, config: PretrainedConfig, where: str) -> None:
    """Refuse windows that are longer than a model takes.

    Raises:
        ValueError: names the field.
    """
    longest = getattr(config, "max_position_embeddings", length)
    if length > longest:
        raise ValueError(f"{where}: {length}, but the model takes at most {longest}; shorten it")


def as_input_error(what: str) -> AbstractContextManager[None]:
    """Turn a failing file system into a clear error of the user's input."""
    return refusing(what, "check the address, the permissions, the credentials and the network")


def opened(model: ModelSection) -> tuple[ModelFiles, Path, ModelLayout]:
    """Return a model's files, those that are small on this machine, and its layout.

    Raises:
        ValueError: it cannot be read, or is not supported.
    """
    with as_input_error(f"model.source: cannot read {model.source}"):
        source = open_model(model)
        folder = source.small_files_folder()
    return source, folder, ModelLayout.of(load_config(folder, source.origin), source.origin)


def check_vocabularies(tokenizers: Sequence[Any], sizes: Sequence[int]) -> None:
    """Refuse a teacher whose distributions are of other tokens.

    Args:
        tokenizers: of the model and of its teacher; empty if they were not read.
        sizes: of the vocabularies of both.

    Raises:
        ValueError: says what differs.
    """
    entries = [frozenset(tokenizer.get_vocab().items()) for tokenizer in tokenizers]
    wrong: list[tuple[str, int]] = sorted(functools.reduce(operator.xor, entries, frozenset()))
    if wrong or sizes[0] != sizes[1]:
        raise ValueError(
            f"vocab_size is {sizes[1]}, and that of model.source {sizes[0]}; {len(wrong)} entries "
            f"of the tokenizers differ{f', such as {wrong[0][0]!r}' if wrong else ''}; both must "
            "have one vocabulary, so give the model that this one was pruned from"
        )


def load_config(folder: Path, origin: str) -> PretrainedConfig:
    """Return the configuration of a checkpoint.

    Args:
        folder: with config.json.
        origin: of the checkpoint, for errors.

    Raises:
        ValueError: it cannot be read, or is of a family or a kind that is not supported.
    """
    document = files.read_json(str(folder / "config.json"))
    if not isinstance(document, dict):
        problem = f"config.json of {origin} is a {type(document).__name__}, expected an object"
        raise ValueError(f"model.source: {problem}; fetch it again")
    check_family(str(document.get("model_type", "")), document.get("text_config"))
    check_depth(document, origin)
    check_not_quantised(document)
    refused = f"model.source: transformers cannot read config.json of {origin}"
    # the code of any family may raise anything
    with refusing(refused, "give a checkpoint it knows", Exception):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    check_rope(document)
    return config


def check_machine(spec: JobSpec, *, dry_run: bool) -> None:
    """Refuse a GPU that is not here, and an output folder that goes with the job.

    Raises:
        ValueError: names the field.
    """
    section = spec.cluster
    if section.device_speed is not None:
        named_device(section.device_speed, section.cpus_per_worker)
    wants_gpu = isinstance(section, LocalSection) and section.device == "cuda"
    if not dry_run and wants_gpu and not torch.cuda.is_available():
        problem = "cluster.gpus_per_worker: 1, but torch sees no GPU here"
        raise ValueError(f"{problem}; set it to 0, or install torch with CUDA and a driver")
    if any(part.startswith("_ray_pkg_") for part in Path(spec.output.uri).parts):
        problem = f"{spec.output.uri} is in Ray's copy of the working directory, and goes with it"
        raise ValueError(f"output.uri: {problem}; give a whole path or a URI")


def check_weights(source: ModelFiles, layout: ModelLayout) -> Any:
    """Check the headers of a checkpoint, and return its fingerprint.

    Raises:
        ValueError: it lacks tensors, or has other shapes.
    """
    with as_input_error(f"model.source: cannot read {source.origin}"):
        shapes, fingerprint = source.shapes_and_fingerprint()
        check_checkpoint(layout, shapes, source.origin)
        if layout.tied.keys() & shapes.keys():
            check_tied(layout, shapes, source.read, source.origin)
    return fingerprint


def check_requests(spec: JobSpec, layout: ModelLayout) -> None:
    """Refuse a timed request that is longer than the table of positions.

    It would fail after all pruning.

    Raises:
        ValueError: names the field.
    """
    request = spec.output.speed
    if request is None or not layout.family.positions:
        return
    longest = layout.config.max_position_embeddings
    if request.prompt_length + request.num_new_tokens > longest:
        raise ValueError(
            f"output.speed: a prompt of {request.prompt_length} tokens and "
            f"{request.num_new_tokens} new ones, but the model takes at most {longest}; give fewer"
        )
