"""Everything that is read and checked before a worker starts.

So a job which cannot work fails in seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

import ray_surgeon
from ray_surgeon.models.checkpoint import check_checkpoint, check_tied
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.llama_cpp import tokenizer_names
from ray_surgeon.plan.devices import Device, Room
from ray_surgeon.plan.plan import Plan, plan_job
from ray_surgeon.plan.work import Work
from ray_surgeon.report.directory import RunDirectory
from ray_surgeon.report.resuming import check_folder
from ray_surgeon.run.reading import as_input_error, environment, load_config, nothing, read_texts
from ray_surgeon.run.stages import Stages, stages_after_shots, stages_of
from ray_surgeon.runtime.placement import Placement, place
from ray_surgeon.spec.cluster import LocalSection
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.model import ModelSection
from ray_surgeon.spec.output import KERNEL_COLUMNS
from ray_surgeon.spec.parsing import with_absolute_paths
from ray_surgeon.spec.targets import LatencyTarget
from ray_surgeon.stages.calibration import CalibrationText
from ray_surgeon.stages.prune.groups import Groups
from ray_surgeon.stages.prune.groups_section import CoupledSection, GroupsSection
from ray_surgeon.stages.prune.method import Method
from ray_surgeon.stages.prune.methods import method_for
from ray_surgeon.stages.stage import Stage
from ray_surgeon.storage.default_text import default_mix
from ray_surgeon.storage.sources import ModelFiles, open_model
from ray_surgeon.storage.texts import Windows, load_tokenizer, windows_of

S = TypeVar("S", bound=Stage)


@dataclass(frozen=True)
class Inputs:
    """A checked job spec and everything that was read for it."""

    spec: JobSpec  # what was asked for
    layout: ModelLayout  # of the model
    placement: Placement  # of its blocks on workers
    method: Method  # of pruning
    stages: Stages
    model: ModelSection  # where the weights are, pinned to what was checked
    # [num_sequences, sequence_length] tokens, 0 where the model will write them
    calibration: NDArray[np.int64] = field(repr=False)
    texts: Mapping[str, NDArray[np.int64]] = field(repr=False)  # evaluation text -> windows
    # of model, tokenizer, texts and stages; empty for a plan from config.json alone
    fingerprints: Mapping[str, Any]
    environment: Mapping[str, str]  # versions and machine, for the report
    chosen_text: str | None = None  # what was chosen for a calibration of source auto, for people

    def stage(self, kind: type[S]) -> S | None:
        """Return the stage of a class, if the job has one."""
        return next((stage for stage in self.stages.all if isinstance(stage, kind)), None)

    @property
    def text(self) -> CalibrationText:
        """What stages are fitted on, and what is held aside from them."""
        return CalibrationText.split(self.calibration, None, self.spec.num_held)

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
        of_dense = "" if method.budget is None else f" of {method.budget.dense:.6g}"
        return f"{method.section.target.allowed:.6g}{of_dense} {method.section.target.unit}"

    @property
    def widths(self) -> str | None:
        """What engines think of the widths that will be left; None if nothing gets narrower."""
        pruning = self.spec.pruning
        if not isinstance(pruning, CoupledSection) or not pruning.has_widths:
            return None
        said = f"feed-forward widths stay multiples of {pruning.multiple} channels"
        liked = KERNEL_COLUMNS * pruning.tensor_parallel
        if pruning.multiple % liked == 0:
            return said
        return f"{said}; to quantise later, set pruning.width_multiple to {liked}"

    @property
    def notes(self) -> list[str]:
        """What to know of a job before it starts, for people, a line each."""
        return [line for line in (self._precision, self.chosen_text) if line is not None]

    @property
    def _precision(self) -> str | None:
        stored = str(getattr(self.layout.config, "dtype", None)).removeprefix("torch.")
        if stored not in ("bfloat16", "float16") or self.spec.model.dtype != "float32":
            return None
        return (
            f"config.json says {stored}, but this job and its exports are in float32, twice as "
            "large; model.dtype: bfloat16 halves it"
        )

    def plan(self, room: Room, device: Device) -> Plan:
        """Return how the job runs.

        Args:
            room: of every worker.
            device: how fast theirs is.

        Raises:
            DoesNotFitError: no way to run it fits.
        """
        work = work_of(self.spec, self.layout, self.method, self.stages)
        return plan_job(self.layout, self.placement, work, self.spec.memory, room, device)


def work_of(spec: JobSpec, layout: ModelLayout, method: Method, stages: Stages) -> Work:
    """Return what a plan depends on beside model, placement and memory."""
    gathered = {shape.name for shape in layout.linears if method.needs(shape) is not None}
    return Work(
        spec.model.dtype,
        spec.calibration.num_sequences,
        spec.calibration.sequence_length,
        "none" if method.curvature is None else method.curvature.gathers,
        frozenset(gathered),
        stages.all,
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
    _check_machine(spec, dry_run=dry_run)
    with as_input_error(f"output.uri: cannot use {spec.output.uri}"):
        RunDirectory(spec.output.uri).is_new()  # raises if it holds something else
    with as_input_error(f"model.source: cannot read {spec.model.source}"):
        source = open_model(spec.model)
        folder = source.small_files_folder()
    layout = ModelLayout.of(load_config(folder, source.origin), source.origin)
    last = stages_after_shots(spec, layout)
    method = method_for(spec.pruning, spec.curvature, layout, spec.model.dtype)
    _check_lengths(spec, layout)
    tokenizer = chosen_text = model_fingerprint = None
    calibration = windows_of(
        nothing(spec.calibration.num_sequences, spec.calibration.sequence_length)
    )
    searched = windows_of(nothing(0, 1))
    texts: dict[str, Windows] = {}
    is_read = source.has_weights or not dry_run
    if is_read:
        model_fingerprint = _check_weights(source, layout)
        tokenizer = _tokenizer(spec, folder, source.origin)
        if spec.calibration.source == "auto":
            section, chosen_text = default_mix(spec.calibration, tokenizer)
            spec = spec.model_copy(update={"calibration": section})
            spec.check_borders()
        calibration, searched, texts = _texts(spec, tokenizer, layout)
    first_text = next(iter(texts.values()), calibration).tokens
    stages = stages_of(spec, layout, method, tokenizer, searched, first_text, last)
    inputs = Inputs(
        spec,
        layout,
        place(layout, spec.cluster.num_shards, spec.cluster.num_replicas),
        method,
        stages,
        source.pinned,
        calibration.tokens,
        {name: windows.tokens for name, windows in texts.items()},
        _fingerprints(spec, stages, model_fingerprint, tokenizer, calibration, texts)
        if is_read
        else {},
        environment(),
        chosen_text,
    )
    if is_read:
        with as_input_error(f"output.uri: cannot use {spec.output.uri}"):
            directory = RunDirectory(spec.output.uri)
            check_folder(directory, inputs.fingerprints, inputs.spec_yaml, resume=resume)
            if not dry_run:
                directory.check_writable()
    return inputs


def _fingerprints(
    spec: JobSpec,
    stages: Stages,
    model: Any,
    tokenizer: Any,
    calibration: Windows,
    texts: Mapping[str, Windows],
) -> dict[str, Any]:
    """Return what must be the same when a run goes on."""
    vocabulary = repr(sorted(tokenizer.get_vocab().items()))
    fingerprints: dict[str, Any] = {
        "code": ray_surgeon.__version__,
        "method": spec.method_fingerprint(),
        "model": model,
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "calibration": calibration.fingerprint,
        "evaluation": {name: windows.fingerprint for name, windows in texts.items()},
        "tasks": None,  # a run may go on without tasks that fail
    }
    for stage in stages.all:
        fingerprints |= stage.fingerprints()
    return fingerprints


def _tokenizer(spec: JobSpec, folder: Path, origin: str) -> Any:
    """Return the tokenizer of a checkpoint, which all exports can take along."""
    tokenizer = load_tokenizer(folder, origin)
    if "gguf" in spec.output.exports:
        tokenizer_names(json.loads(tokenizer.backend_tokenizer.to_str()))
    return tokenizer


def _check_machine(spec: JobSpec, *, dry_run: bool) -> None:
    """Refuse a GPU that is not here, and an output folder that goes with the job.

    Raises:
        ValueError: names the field.
    """
    section = spec.cluster
    wants_gpu = isinstance(section, LocalSection) and section.device == "cuda"
    if not dry_run and wants_gpu and not torch.cuda.is_available():
        raise ValueError(
            "cluster.gpus_per_worker: 1, but torch sees no GPU here; set it to 0, or install torch "
            "with CUDA and a driver"
        )
    if any(part.startswith("_ray_pkg_") for part in Path(spec.output.uri).parts):
        raise ValueError(
            f"output.uri: {spec.output.uri} is in Ray's copy of the working directory, which goes "
            "with the job; give a whole path or a URI"
        )


def _check_weights(source: ModelFiles, layout: ModelLayout) -> Any:
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


def _texts(
    spec: JobSpec, tokenizer: Any, layout: ModelLayout
) -> tuple[Windows, Windows, dict[str, Windows]]:
    """Return the calibration, the windows of a search, and the evaluation texts."""
    pruning = spec.pruning
    search = pruning.search if isinstance(pruning, GroupsSection) else None
    num_searched = 0 if search is None else search.num_sequences
    return read_texts(spec, num_searched, tokenizer, layout.config)


def _check_lengths(spec: JobSpec, layout: ModelLayout) -> None:
    """Refuse timed requests that are longer than the table of positions.

    They would fail after all pruning.

    Raises:
        ValueError: names the field.
    """
    if not layout.family.positions:
        return
    target = getattr(spec.pruning, "target", None)
    requests = {
        "output.speed": spec.output.speed,
        "pruning.target.request": target.request if isinstance(target, LatencyTarget) else None,
    }
    longest = layout.config.max_position_embeddings
    for where, request in requests.items():
        if request is None or request.prompt_length + request.num_new_tokens <= longest:
            continue
        raise ValueError(
            f"{where}: a prompt of {request.prompt_length} tokens and {request.num_new_tokens} new "
            f"ones, but the model takes at most {longest}; give fewer"
        )
