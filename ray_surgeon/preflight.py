"""Everything that is read and checked before a worker starts, so that a job which cannot work fails in seconds."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

import ray_surgeon
from ray_surgeon import storage
from ray_surgeon.checkpoint import RunDirectory
from ray_surgeon.cluster.placement import Placement, place
from ray_surgeon.data import TextSource, Windows, cut_windows, interleaved, token_stream
from ray_surgeon.export.kinds import check_export
from ray_surgeon.export.tasks import check_tasks
from ray_surgeon.job import Job, check_budget, task_options
from ray_surgeon.models.adapters import check_family, check_sizes
from ray_surgeon.models.budgets import Budget, bytes_budget, fewest_left, flops_budget, linears_budget, parameters_budget
from ray_surgeon.models.gguf import convert_gguf
from ray_surgeon.models.skeleton import check_buildable, check_checkpoint, linear_shapes, num_parameters
from ray_surgeon.sources import ModelSource, open_model
from ray_surgeon.spec import JobSpec
from ray_surgeon.text_sections import SourceSection


def prepare(spec: JobSpec, *, resume: bool, dry_run: bool = False) -> tuple[Job, PretrainedConfig, Placement]:
    """Read the model's configuration and headers, the tokenizer and the texts, and check them against each other.

    Args:
        spec: parsed.
        resume: whether the run directory may already hold this run.
        dry_run: whether to leave the run directory untouched.

    Returns:
        The job, the model's configuration, and the placement of its blocks.

    Raises:
        ValueError: something cannot work; names the field, what was found, and the remedy.
    """
    spec = with_absolute_paths(spec)
    source = ModelSource(spec.model.source, spec.model.revision, spec.model.wheel, spec.model.wheel_sha256)
    with _as_input_error(f"model.source: cannot read {source.source}"):
        files = open_model(source, convert_gguf)
        folder = files.small_files_folder()
    config = _load_config(folder, files.origin)
    check_buildable(config, files.origin)
    placement = place(config, spec.cluster.num_shards, spec.cluster.num_replicas)
    for kind in spec.output.exports:
        check_export(kind, config)
    budget, fewest = None, {}
    if spec.pruning.structure == "groups":
        budget = _budget(config, spec)
        fewest = fewest_left(config, spec.pruning.groups, spec.pruning.fewest_groups, uniform=spec.pruning.allocation == "uniform")
        if budget is not None:
            check_budget(budget, spec.pruning, fewest)
    if spec.pruning.structure == "n_m":
        _check_pattern(config, spec.pruning.n_m[1])
    with _as_input_error(f"model.source: cannot read {files.origin}"):
        shapes, model_fingerprint = files.shapes_and_fingerprint()
    check_checkpoint(config, shapes, files.origin)
    tokenizer, tokenizer_fingerprint = _load_tokenizer(folder, files.origin)
    length = spec.calibration.sequence_length
    places = ["calibration", *(f"calibration.mix[{i}]" for i in range(len(spec.calibration.mix)))]
    parts = zip(spec.calibration.shares, places, strict=True)
    calibration = interleaved([_windows(text, count, length, tokenizer, config, place) for (text, count), place in parts])
    evaluation = {
        t.name: _windows(t, t.num_sequences, t.sequence_length, tokenizer, config, f"evaluation[{i}] {t.name!r}")
        for i, t in enumerate(spec.evaluation.texts)
    }
    spec_yaml = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)
    fingerprints: dict[str, Any] = {
        "code": ray_surgeon.__version__,
        "method": spec.method_fingerprint(),
        "model": model_fingerprint,
        "tokenizer": tokenizer_fingerprint,
        "calibration": calibration.fingerprint,
        "evaluation": {name: windows.fingerprint for name, windows in evaluation.items()},
    }
    if (tasks := task_options(spec)) is not None:
        check_tasks(tasks)
    with _as_input_error(f"output.uri: cannot use {spec.output.uri}"):
        RunDirectory(spec.output.uri).check(fingerprints, spec_yaml, resume=resume)
        if not dry_run:
            RunDirectory(spec.output.uri).check_writable()
    job = Job(
        spec,
        spec_yaml,
        files.pinned,
        calibration.tokens,
        {name: windows.tokens for name, windows in evaluation.items()},
        fingerprints,
        _environment(),
        num_parameters(config),
        fewest,
        budget,
    )
    return job, config, placement


def _budget(config: PretrainedConfig, spec: JobSpec) -> Budget | None:
    """Return what structure groups save from; None if it must be measured first."""
    target = spec.pruning.target
    if target is None:
        return linears_budget(config)
    if target.unit == "latency_s":
        return None
    if target.unit == "flops":
        return flops_budget(config, target.request.prompt_length)
    if target.unit == "parameters":
        return parameters_budget(config)
    return bytes_budget(config, getattr(torch, spec.model.dtype).itemsize)


def _check_pattern(config: PretrainedConfig, m: int) -> None:
    for shape in linear_shapes(config):
        if (shape.num_columns - shape.has_bias) % m:
            raise ValueError(
                f"pruning.n_m: {shape.name} has {shape.num_columns - shape.has_bias} inputs, which is no multiple of {m}; choose another M"
            )


def with_absolute_paths(spec: JobSpec) -> JobSpec:
    """Return the spec with local paths made absolute: workers run in other folders than the driver."""
    model, output, evaluation = spec.model, spec.output, spec.evaluation
    if Path(model.source).exists():
        model = model.model_copy(update={"source": str(Path(model.source).resolve())})
    if "://" not in output.uri:
        output = output.model_copy(update={"uri": str(Path(output.uri).expanduser().resolve())})
    if evaluation.tasks is not None and evaluation.tasks.include is not None and "://" not in evaluation.tasks.include:
        include = str(Path(evaluation.tasks.include).expanduser().resolve())
        evaluation = evaluation.model_copy(update={"tasks": evaluation.tasks.model_copy(update={"include": include})})
    return spec.model_copy(update={"model": model, "output": output, "evaluation": evaluation})


@contextlib.contextmanager
def _as_input_error(what: str) -> Iterator[None]:
    """Turn a failing file system into a clear error of the user's input."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{what}: {error}; check the address, the permissions, the credentials and the network") from error


def _load_config(folder: Path, origin: str) -> PretrainedConfig:
    document = storage.read_json(str(folder / "config.json"))
    if not isinstance(document, dict):
        raise ValueError(f"model.source: config.json of {origin} is a {type(document).__name__}, expected an object; fetch it again")
    check_family(str(document.get("model_type", "")))
    check_sizes(document, origin)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the code of any family may raise anything
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model.source: transformers cannot read config.json of {origin}: {reason}; give a checkpoint it knows") from error


def _load_tokenizer(folder: Path, origin: str) -> tuple[Any, str]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # so may that of any tokenizer
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model.source: {origin} has no tokenizer that loads ({reason}); copy its files beside config.json") from error
    vocabulary = sorted(tokenizer.get_vocab().items())
    return tokenizer, hashlib.sha256(repr(vocabulary).encode()).hexdigest()


def _windows(
    section: SourceSection, num_sequences: int, sequence_length: int, tokenizer: Any, config: PretrainedConfig, where: str
) -> Windows:
    longest = getattr(config, "max_position_embeddings", sequence_length)
    if sequence_length > longest:
        raise ValueError(f"{where}.sequence_length: {sequence_length}, but the model takes at most {longest}; shorten it")
    text = TextSource(section.source, section.config, section.split, section.column, section.revision, section.max_tokens)
    stream = token_stream(text, tokenizer, where)
    windows = cut_windows(stream, num_sequences, sequence_length, section.stride, section.seed, f"{where} ({section.source})")
    if int(windows.tokens.max()) >= config.vocab_size:
        raise ValueError(
            f"model.source: the tokenizer gives token {int(windows.tokens.max())}, the model's vocabulary is {config.vocab_size}; "
            "the tokenizer belongs to another model"
        )
    return windows


def _environment() -> dict[str, str]:
    from importlib.metadata import version

    packages = {name: version(name) for name in ("torch", "transformers", "ray", "numpy", "safetensors")}
    return {"ray_surgeon": ray_surgeon.__version__, "python": platform.python_version(), "machine": platform.machine()} | packages
