"""Everything that is read and checked before a worker starts.

So a job which cannot work fails in seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from transformers import AutoConfig, PretrainedConfig

import ray_surgeon
from ray_surgeon.export.for_engines import Shrinking, check_quantised
from ray_surgeon.export.kinds import check_export
from ray_surgeon.export.tasks import check_tasks
from ray_surgeon.models.budgets import (
    Budget,
    bytes_budget,
    fewest_left,
    flops_budget,
    linears_budget,
    parameters_budget,
)
from ray_surgeon.models.checkpoint import check_checkpoint, check_tied
from ray_surgeon.models.families import check_family, check_not_quantised, check_sizes
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.llama_cpp import tokenizer_names
from ray_surgeon.models.pruned_config import check_rope, kv_heads_left
from ray_surgeon.plan.devices import Device, Room
from ray_surgeon.plan.needs import Job
from ray_surgeon.plan.plan import Plan, plan_job
from ray_surgeon.report.directory import RunDirectory
from ray_surgeon.runtime.placement import Placement, place
from ray_surgeon.spec.cluster import LocalSection
from ray_surgeon.spec.job import JobSpec, with_absolute_paths
from ray_surgeon.spec.model import ModelSection
from ray_surgeon.spec.output import KERNEL_COLUMNS
from ray_surgeon.spec.targets import FlopsTarget, LatencyTarget, ParametersTarget
from ray_surgeon.spec.texts import SourceSection
from ray_surgeon.spec.written import SelfSection
from ray_surgeon.stages.answers.prompts import (
    Yardstick,
    can_write_prompts,
    held_prompts,
    yardstick_of,
)
from ray_surgeon.stages.answers.section import GenerationSection
from ray_surgeon.stages.calibration import CalibrationText
from ray_surgeon.stages.correction import further_sequences
from ray_surgeon.stages.prune import METHODS, CoupledSection, Groups, Method
from ray_surgeon.stages.search import Search
from ray_surgeon.stages.self_text.conversations import Request, WrittenText, to_be_written
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import open_model
from ray_surgeon.storage.texts import (
    Windows,
    cut_windows,
    default_mix,
    first_token,
    interleaved,
    is_saved_whole,
    load_tokenizer,
    order,
    token_stream,
    windows_of,
)


@dataclass(frozen=True)
class Inputs:
    """A checked job spec and everything that was read for it."""

    spec: JobSpec  # what was asked for
    layout: ModelLayout  # of the model
    placement: Placement  # of its blocks on workers
    method: Method  # of pruning
    model: ModelSection  # where the weights are, pinned to what was checked
    calibration: NDArray[np.int64] = field(
        repr=False
    )  # [num_sequences, sequence_length] tokens, 0 where the model will write them
    texts: Mapping[str, NDArray[np.int64]] = field(repr=False)  # evaluation text -> windows
    fingerprints: Mapping[
        str, Any
    ]  # of model, tokenizer, texts and method; empty for a plan from config.json alone
    environment: Mapping[str, str]  # versions and machine, for the report
    written: Mapping[int, Request] = field(
        default_factory=dict
    )  # number of a calibration text -> what the dense model is to write for it
    searched: NDArray[np.int64] = field(
        default_factory=lambda: _nothing(0, 0), repr=False
    )  # what a search measures on, as `calibration`
    counts: NDArray[np.bool_] | None = field(
        default=None, repr=False
    )  # which tokens of the calibration count, likewise; None if all do
    yardstick: Yardstick | None = None  # prompts whose answers are compared; None if they are not
    chosen_text: str | None = None  # what was chosen for a calibration of source auto, for people

    @property
    def text(self) -> CalibrationText:
        """What stages are fitted on, and what is held aside from them."""
        return CalibrationText.split(self.calibration, self.counts, self.spec.num_held)

    def with_written(self, texts: Mapping[int, WrittenText]) -> Inputs:
        """Return the inputs with what the dense model wrote for some of the calibration texts."""
        calibration = self.calibration.copy()
        counts = np.ones(self.calibration.shape, dtype=bool)
        for row, (number, i) in enumerate(
            order([count for _, count in self.spec.calibration.shares])
        ):
            if number not in texts:
                continue
            calibration[row] = texts[number].tokens[i]
            if texts[number].answers.any():
                counts[row] = texts[number].answers[i]
        weighs = self.spec.calibration.weigh == "answers"
        return replace(self, calibration=calibration, counts=counts if weighs else None)

    @property
    def spec_yaml(self) -> str:
        """The resolved spec, as it is kept in the run directory."""
        return yaml.safe_dump(self.spec.model_dump(mode="json"), sort_keys=False)

    @property
    def goal(self) -> str:
        """What the run is to reach, for people."""
        pruning = self.spec.pruning
        method = self.method
        if pruning.last_sparsity is not None:
            return f"{pruning.last_sparsity:.1%}"
        assert isinstance(method, Groups)
        assert method.section.target is not None
        of = "" if method.budget is None else f" of {method.budget.dense:.6g}"
        return f"{method.section.target.allowed:.6g}{of} {method.section.target.unit}"

    @property
    def widths(self) -> str | None:
        """What engines think of the widths that will be left; None if nothing gets narrower."""
        pruning = self.spec.pruning
        if not isinstance(pruning, CoupledSection) or not pruning.has_widths:
            return None
        whose = "feed-forward layers" if "ffn" in pruning.groups else "experts"
        said = f"{whose} keep multiples of {pruning.multiple} channels"
        liked = KERNEL_COLUMNS * pruning.tensor_parallel
        return (
            said
            if pruning.multiple % liked == 0
            else f"{said}; to quantise later, set pruning.width_multiple to {liked}"
        )

    @property
    def precision(self) -> str | None:
        """What to know of a float32 job whose config.json says a narrower dtype, or None."""
        stored = str(getattr(self.layout.config, "dtype", None)).removeprefix("torch.")
        if stored not in ("bfloat16", "float16") or self.spec.model.dtype != "float32":
            return None
        return (
            f"config.json says {stored}, but this job and its exports are in float32, twice as "
            "large; model.dtype: bfloat16 halves it"
        )

    @property
    def notes(self) -> list[str]:
        """What to know of a job before it starts, for people, a line each."""
        return [line for line in (self.precision, self.chosen_text) if line is not None]

    def plan(self, room: Room, device: Device) -> Plan:
        """Return how the job runs.

        Args:
            room: of every worker.
            device: how fast theirs is.

        Raises:
            DoesNotFitError: no way to run it fits.
        """
        job = job_of(
            self.spec,
            self.layout,
            self.method,
            None if self.yardstick is None else self.yardstick.section,
        )
        return plan_job(self.layout, self.placement, job, self.spec.memory, room, device)


def job_of(
    spec: JobSpec, layout: ModelLayout, method: Method, generation: GenerationSection | None = None
) -> Job:
    """Return what a plan depends on.

    Args:
        spec: of the job.
        layout: of its model.
        method: of pruning.
        generation: how prompts are answered; None if they are not.
    """
    texts = [(text.num_sequences, text.sequence_length) for text in spec.evaluation.texts]
    if spec.num_held:
        texts.append((spec.num_held, spec.calibration.sequence_length))
    length = spec.calibration.sequence_length
    written = tuple(
        text.sizes(count, length)
        for text, count in spec.calibration.shares
        if isinstance(text, SelfSection)
    )
    quantize = spec.output.quantize
    if generation is not None:
        written += ((generation.num_prompts, generation.max_new_tokens),)
        texts.append((generation.num_prompts, _PROMPT_TOKENS + generation.max_new_tokens))
    job = method.job(
        layout,
        spec.model.dtype,
        (spec.calibration.num_sequences, spec.calibration.sequence_length),
        texts,
    )
    job = replace(
        job,
        written=written,
        answers=generation is not None,
        rounds=quantize is not None and quantize.scheme == "w4a16",
    )
    if (search := Search.of(method)) is not None:
        units = {
            (groups.block, groups.kind)
            for groups in layout.group_sets
            if groups.consumer in job.needs
        }
        rounds = search.section.rounds
        job = replace(
            job,
            num_searched=search.section.num_sequences,
            num_trials=rounds + 1,
            num_undone=rounds * len(units),
        )
    if spec.correction is None:
        return job
    section = spec.correction
    num_sequences = spec.calibration.num_sequences - spec.num_held
    num_steps = section.steps_per_shot + section.final_epochs * -(
        -num_sequences // section.sequences_per_step
    )
    tried, measured = further_sequences(section, num_steps, spec.num_held)
    passing = (
        section.steps_per_shot * section.sequences_per_step + section.final_epochs * num_sequences
    )
    passing += tried + -(-measured // 3)  # a pass forward alone has a third of the operations
    remembers = section.loss == "kl"
    return replace(
        job,
        remembers_calibration=remembers,
        lora_rank=section.lora_rank,
        num_correction_sequences=passing,
        num_correction_states=int(measured > 0),
    )


def check(spec: JobSpec, *, resume: bool = False, dry_run: bool = False) -> Inputs:
    """Read the model's configuration, headers, tokenizer and texts, and check them.

    Args:
        spec: parsed.
        resume: whether the run directory may already hold this run.
        dry_run: whether to leave the run directory untouched. A model without weights is enough
            then.

    Raises:
        ValueError: something cannot work; names the field, what was found, and the remedy.
    """
    spec = with_absolute_paths(spec)
    if (
        not dry_run
        and isinstance(spec.cluster, LocalSection)
        and spec.cluster.device == "cuda"
        and not torch.cuda.is_available()
    ):
        raise ValueError(
            "cluster.gpus_per_worker: 1, but torch sees no GPU here; set it to 0, or install torch "
            "with CUDA and a driver"
        )
    if any(part.startswith("_ray_pkg_") for part in Path(spec.output.uri).parts):
        raise ValueError(
            f"output.uri: {spec.output.uri} is in Ray's copy of the working directory, which goes "
            "with the job; give a whole path or a URI"
        )
    with _as_input_error(f"output.uri: cannot use {spec.output.uri}"):
        RunDirectory(spec.output.uri).is_new()  # raises if it holds something else
    with _as_input_error(f"model.source: cannot read {spec.model.source}"):
        source = open_model(spec.model)
        folder = source.small_files_folder()
    layout = ModelLayout.of(_load_config(folder, source.origin), source.origin)
    placement = place(layout, spec.cluster.num_shards, spec.cluster.num_replicas)
    if isinstance(spec.pruning, CoupledSection):
        pruning = spec.pruning
        shrinking = Shrinking(
            pruning.groups,
            pruning.fewest_groups,
            pruning.multiple,
            pruning.uniform,
            pruning.tensor_parallel,
        )
        for kind in spec.output.exports:
            check_export(kind, layout, shrinking)
        if spec.output.quantize is not None:
            check_quantised(layout, shrinking, spec.output.quantize)
    method = method_for(spec, layout)
    _check_lengths(spec, layout)
    if dry_run and not source.has_weights:
        nothing = _nothing(spec.calibration.num_sequences, spec.calibration.sequence_length)
        return Inputs(
            spec, layout, placement, method, source.pinned, nothing, {}, {}, _environment()
        )
    with _as_input_error(f"model.source: cannot read {source.origin}"):
        shapes, model_fingerprint = source.shapes_and_fingerprint()
        check_checkpoint(layout, shapes, source.origin)
        if layout.tied.keys() & shapes.keys():
            check_tied(layout, shapes, source.reader().read, source.origin)
    tokenizer = load_tokenizer(folder, source.origin)
    if "gguf" in spec.output.exports:
        tokenizer_names(json.loads(tokenizer.backend_tokenizer.to_str()))
    chosen_text = None
    if spec.calibration.source == "auto":
        calibration_section, chosen_text = default_mix(spec.calibration, tokenizer)
        spec = spec.model_copy(update={"calibration": calibration_section})
        spec.check_borders()
    tasks = spec.evaluation.tasks
    search = Search.of(method)
    if tasks is not None:
        check_tasks(tasks)
    num_searched = 0 if search is None else search.section.num_sequences
    calibration, searched, texts = _read_texts(spec, num_searched, tokenizer, layout.config)
    fingerprints: dict[str, Any] = {
        "code": ray_surgeon.__version__,
        "method": spec.method_fingerprint(),
        "model": model_fingerprint,
        "tokenizer": hashlib.sha256(
            repr(sorted(tokenizer.get_vocab().items())).encode()
        ).hexdigest(),
        "calibration": calibration.fingerprint,
        "evaluation": {name: windows.fingerprint for name, windows in texts.items()},
    }
    if search is not None:
        fingerprints["search"] = searched.fingerprint
    # scores before and after are of the same tasks; a run may go on without tasks that fail
    fingerprints["tasks"] = (
        None if tasks is None else tasks.model_dump(mode="json", exclude={"batch_size"})
    )
    tokens = {name: windows.tokens for name, windows in texts.items()}
    requests = to_be_written(spec.calibration, tokenizer, layout.config)
    here = _environment()
    yardstick, written = _yardstick(
        spec.evaluation.generation, tokenizer, layout.config, requests, next(iter(tokens.values()))
    )
    if yardstick is not None:  # answers before and after are to the same prompts
        given = (
            None
            if yardstick.request is not None
            else hashlib.sha256(repr(yardstick.prompts).encode()).hexdigest()
        )
        fingerprints["generation"] = yardstick.section.model_dump(
            mode="json", exclude={"prompts"}
        ) | {"prompts": given}
    inputs = Inputs(
        spec,
        layout,
        placement,
        method,
        source.pinned,
        calibration.tokens,
        tokens,
        fingerprints,
        here,
        written,
        searched.tokens,
        yardstick=yardstick,
        chosen_text=chosen_text,
    )
    with _as_input_error(f"output.uri: cannot use {spec.output.uri}"):
        RunDirectory(spec.output.uri).check(fingerprints, inputs.spec_yaml, resume=resume)
        if not dry_run:
            RunDirectory(spec.output.uri).check_writable()
    return inputs


def _yardstick(
    section: GenerationSection | str | None,
    tokenizer: Any,
    config: PretrainedConfig,
    written: Mapping[int, Request],
    windows: NDArray[np.int64],
) -> tuple[Yardstick | None, Mapping[int, Request]]:
    """Return the prompts whose answers are compared, and what is left for the model to write.

    Args:
        section: `evaluation.generation`.
        tokenizer: of the model.
        config: of the model.
        written: number of a calibration text -> what the model is to write for it.
        windows: [num_sequences, sequence_length] of the first evaluation text.
    """
    if isinstance(section, GenerationSection):
        return yardstick_of(section, tokenizer, config, windows), written
    if section is None:
        return None, written
    default = GenerationSection.model_validate({})
    yardstick, rest = held_prompts(default, written, tokenizer, config)
    if yardstick is not None or not can_write_prompts(default, tokenizer, config):
        return yardstick, rest
    return yardstick_of(default, tokenizer, config, windows), written


def _check_lengths(spec: JobSpec, layout: ModelLayout) -> None:
    """Refuse timed requests that are longer than the table of positions.

    They would fail after all pruning.

    Raises:
        ValueError: names the field.
    """
    target = getattr(spec.pruning, "target", None)
    asked = {
        "output.speed": spec.output.speed,
        "pruning.target.request": target.request if isinstance(target, LatencyTarget) else None,
    }
    longest = layout.config.max_position_embeddings if layout.family.positions else None
    for where, request in asked.items():
        if (
            longest is not None
            and request is not None
            and request.prompt_length + request.num_new_tokens > longest
        ):
            raise ValueError(
                f"{where}: a prompt of {request.prompt_length} tokens and {request.num_new_tokens} "
                f"new ones, but the model takes at most {longest}; give fewer"
            )


def method_for(spec: JobSpec, layout: ModelLayout) -> Method:
    """Return the method of a job spec for a model.

    Raises:
        ValueError: the method cannot do what is asked to this model.
    """
    pruning = spec.pruning
    if (
        layout.num_experts
        and spec.curvature is not None
        and spec.curvature.sequences_backward is not None
    ):
        raise ValueError(
            "curvature.num_backward: the experts of a mixture see too few tokens to leave some out "
            "of G; remove it"
        )
    if isinstance(pruning, CoupledSection):
        heads = layout.heads
        devices = pruning.tensor_parallel
        if heads.num_kv not in kv_heads_left(layout, devices, uniform=pruning.uniform):
            raise ValueError(
                f"pruning.tensor_parallel: {devices}, but no engine splits the dense model's "
                f"{heads.num_query} query heads and {heads.num_kv} KV heads so; give a number that "
                "divides them"
            )
        for of in (
            of for of in layout.group_sets if of.kind != "attention" and len(of.columns) % devices
        ):
            raise ValueError(
                f"pruning.tensor_parallel: {devices}, but {of.consumer} has {len(of.columns)} "
                "channels; give a divisor"
            )
        _check_kinds(layout, pruning)
        fewest = fewest_left(
            layout, pruning.groups, pruning.fewest_groups, devices, uniform=pruning.uniform
        )
        consumers = {
            groups.kind: layout.shapes[groups.consumer].role for groups in layout.group_sets
        }
        roles = frozenset(consumers[kind] for kind in pruning.groups if kind != "experts")
        method = Groups(
            pruning, spec.curvature, _budget(layout, pruning, spec.model.dtype), fewest, roles
        )
        method.check()
        return method
    pattern = getattr(pruning, "pattern", None) or getattr(pruning, "n_m", None)
    if pattern is not None and pruning.structure == "n_m":
        _check_pattern(layout, pattern[1])
    other: Method = METHODS[type(pruning)](pruning, spec.curvature)
    if pruning.target_sparsity > (most := other.reach(layout)):
        raise ValueError(
            f"pruning.target_sparsity: {pruning.target_sparsity:g}, but {most:.4g} is all that "
            f"{pruning.method} can take from this model, because biases count and stay; lower it"
        )
    return other


def _check_kinds(layout: ModelLayout, pruning: CoupledSection) -> None:
    missing = [kind for kind in pruning.groups if kind not in layout.kinds]
    if missing:
        raise ValueError(
            f"pruning.groups: {', '.join(missing)}, but {layout.config.model_type} has "
            f"{', '.join(layout.kinds)} that can be pruned here; name some of these"
        )
    sparse = layout.family.sparse
    if layout.num_experts and isinstance(pruning.target, LatencyTarget):
        raise ValueError(
            "pruning.target: a latency is not measured for mixtures of experts; give parameters, "
            "bytes or flops"
        )
    if "experts" not in pruning.groups:
        return
    assert sparse is not None
    num_groups = (
        1 if sparse.num_groups is None else int(getattr(layout.config, sparse.num_groups) or 1)
    )
    if num_groups > 1:
        raise ValueError(
            f"pruning.groups: the router chooses among {num_groups} groups of experts of one size "
            f"({sparse.num_groups} in config.json), so no single expert can go; use expert_channels"
        )
    if isinstance(pruning.target, FlopsTarget):
        raise ValueError(
            "pruning.target: whole experts save no flops, because a token goes to as many of the "
            "others; give parameters or bytes"
        )


def _budget(layout: ModelLayout, pruning: CoupledSection, dtype: str) -> Budget | None:
    """Return what groups save from; None if it must be measured first."""
    target = pruning.target
    if target is None:
        return linears_budget(layout)
    if isinstance(target, LatencyTarget):
        return None
    if isinstance(target, FlopsTarget):
        return flops_budget(layout, target.prompt_length)
    if isinstance(target, ParametersTarget):
        return parameters_budget(layout)
    return bytes_budget(layout, getattr(torch, dtype).itemsize)


_PROMPT_TOKENS = 256
"""Tokens of a prompt whose answers are compared, chat template included; a guess for the plan."""


def _nothing(num_sequences: int, sequence_length: int) -> NDArray[np.int64]:
    return np.broadcast_to(np.int64(0), (num_sequences, sequence_length))


def _read_texts(
    spec: JobSpec, num_searched: int, tokenizer: Any, config: PretrainedConfig
) -> tuple[Windows, Windows, dict[str, Windows]]:
    """Return the calibration, the windows of a search, and the evaluation texts.

    The windows of a search lie beside the calibration's in the same texts.
    """
    section = spec.calibration
    for i, measured in enumerate(spec.evaluation.texts):
        if is_saved_whole(measured):
            section.check_border(measured, f"evaluation.{i}")
    length = section.sequence_length
    further = section.further(num_searched)
    parts = list[Windows]()
    beside = list[NDArray[np.int64]]()
    for number, ((text, count), more) in enumerate(zip(section.shares, further, strict=True)):
        if isinstance(text, SelfSection):
            parts.append(windows_of(np.zeros((count, length), dtype=np.int64)))
            continue
        overlapping = (
            (length - 1) // text.stride if text.stride and more else 0
        )  # windows that begin in the calibration's last one
        where = f"calibration.mix.{number - 1}" if number else "calibration"
        windows = _windows(text, count + overlapping + more, length, tokenizer, config, where)
        parts.append(windows_of(windows.tokens[:count]))
        beside.append(windows.tokens[count + overlapping :])
    calibration = interleaved(parts)
    texts = {
        t.name: _windows(
            t, t.num_sequences, t.sequence_length, tokenizer, config, f"evaluation.{i} ({t.name})"
        )
        for i, t in enumerate(spec.evaluation.texts)
    }
    return calibration, windows_of(np.concatenate(beside) if beside else _nothing(0, length)), texts


def _check_pattern(layout: ModelLayout, m: int) -> None:
    for shape in layout.linears:
        if (shape.num_columns - shape.has_bias) % m:
            raise ValueError(
                f"pruning.n_m: {shape.name} has {shape.num_columns - shape.has_bias} inputs, not a "
                f"multiple of {m}; choose another M"
            )


@contextlib.contextmanager
def _as_input_error(what: str) -> Iterator[None]:
    """Turn a failing file system into a clear error of the user's input."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{what}: {error}; check the address, the permissions, the credentials and the network"
        ) from error


def _load_config(folder: Path, origin: str) -> PretrainedConfig:
    document = files.read_json(str(folder / "config.json"))
    if not isinstance(document, dict):
        raise ValueError(
            f"model.source: config.json of {origin} is a {type(document).__name__}, expected an "
            "object; fetch it again"
        )
    check_family(str(document.get("model_type", "")), document.get("text_config"))
    check_sizes(document, origin)
    check_not_quantised(document)
    check_rope(document)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the code of any family may raise anything
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model.source: transformers cannot read config.json of {origin}: {reason}; give a "
            "checkpoint it knows"
        ) from error


def _windows(
    section: SourceSection,
    num_sequences: int,
    sequence_length: int,
    tokenizer: Any,
    config: PretrainedConfig,
    where: str,
) -> Windows:
    longest = getattr(config, "max_position_embeddings", sequence_length)
    if sequence_length > longest:
        raise ValueError(
            f"{where}.sequence_length: {sequence_length}, but the model takes at most {longest}; "
            "shorten it"
        )
    first = (
        first_token(tokenizer)
        if section.bos is None
        else tokenizer.bos_token_id
        if section.bos
        else None
    )
    if section.bos and first is None:
        raise ValueError(f"{where}.bos: true, but the tokenizer has no BOS token; remove it")
    stream = token_stream(section, tokenizer, where)
    windows = cut_windows(
        stream,
        num_sequences,
        sequence_length,
        section.stride,
        section.seed,
        f"{where} ({section.source})",
        first,
    )
    if int(windows.tokens.max()) >= config.vocab_size:
        raise ValueError(
            f"model.source: the tokenizer gives token {int(windows.tokens.max())}, the model's "
            f"vocabulary is {config.vocab_size}; the tokenizer belongs to another model"
        )
    return windows


def _environment() -> dict[str, str]:
    packages = {
        name: version(name) for name in ("torch", "transformers", "ray", "numpy", "safetensors")
    }
    return {
        "ray_surgeon": ray_surgeon.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    } | packages
