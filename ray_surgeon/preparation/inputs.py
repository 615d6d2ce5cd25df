"""Everything that is read and checked before a worker starts.

So a job which cannot work fails in seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

import ray_surgeon
from ray_surgeon.checkpointing.run_directory import RunDirectory
from ray_surgeon.data.default_text import default_mix
from ray_surgeon.data.texts import load_tokenizer
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.llama_cpp import tokenizer_names
from ray_surgeon.plan.device_resources import Device, Room
from ray_surgeon.plan.plan import Plan, Planner
from ray_surgeon.plan.shapes import Shapes
from ray_surgeon.preparation import reading
from ray_surgeon.preparation.planning import describe_job
from ray_surgeon.preparation.reading import Texts
from ray_surgeon.preparation.stages import Stages, stages_after_shots, stages_of
from ray_surgeon.pruning.coupled_groups import Groups
from ray_surgeon.pruning.method import Method
from ray_surgeon.pruning.methods import method_for
from ray_surgeon.recovery.teacher import LoadTeacher
from ray_surgeon.report.record import check_folder
from ray_surgeon.run_state import CalibrationText
from ray_surgeon.runtime.placement import Placement, place
from ray_surgeon.spec.groups import CHANNELS, CoupledSection
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.sections import KERNEL_COLUMNS, ModelSection, RaySection


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
    chosen_text: str | None  # what was chosen for a calibration of source auto, for people

    @property
    def ray(self) -> RaySection:
        """The section on the cluster, of a job that runs on Ray."""
        assert isinstance(self.spec.cluster, RaySection)
        return self.spec.cluster

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
        if pruning is None:
            return "train towards another model" if self.spec.recovery else "write another format"
        if pruning.last_sparsity is not None:
            return f"{pruning.last_sparsity:.1%}"
        assert isinstance(method, Groups)
        target = method.section.target
        assert target is not None
        dense = method.budget.dense
        return f"{target.allowed(dense):.6g} of {dense:.6g} {method.budget.unit}"

    @property
    def notes(self) -> list[str]:
        """What is to be done, and what to know of it, for people, a line each."""
        shots = self.spec.schedule.shots
        about = f"{self.goal}, {self.calibration.size} calibration tokens"
        if self.spec.pruning is not None:
            about = f"{shots} shot{'s' * (shots > 1)} to {about} each"
        lines = [about, *filter(None, [self.chosen_text])]
        stored = str(getattr(self.layout.config, "dtype", None)).removeprefix("torch.")
        if stored in ("bfloat16", "float16") and self.spec.model.dtype == "float32":
            twice = f"config.json says {stored}, but this job and its exports are in float32"
            lines.append(f"{twice}, twice as large; model.dtype: bfloat16 halves it")
        pruning = self.spec.pruning
        if isinstance(pruning, CoupledSection) and not CHANNELS.isdisjoint(pruning.groups):
            liked = KERNEL_COLUMNS * pruning.tensor_parallel
            remedy = f"; to quantise later, set pruning.width_multiple to {liked}"
            own = min(len(s.columns) for s in self.layout.group_sets if s.kind in CHANNELS)
            widths = f"feed-forward widths, {own} channels, stay multiples of {pruning.multiple}"
            lines.append(widths + remedy * (pruning.multiple % liked > 0))
        return lines

    def plan(self, room: Room, device: Device) -> Plan:
        """Return how the job runs.

        Args:
            room: of every worker.
            device: how fast theirs is.

        Raises:
            DoesNotFitError: no way to run it fits.
        """
        job = describe_job(self.spec, self.layout, self.method, self.stages)
        shapes = Shapes(self.layout, job, "cpu" if room.device_is_host else "cuda")
        return Planner(shapes, self.spec.memory, device).best(self.placement, room)


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
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    reading.check_machine(spec, dry_run=dry_run)
    directory = RunDirectory(spec.output.uri)
    with reading.as_input_error(f"output.uri: cannot use {spec.output.uri}"):
        directory.is_new()  # raises if it holds something else
    source, folder, layout = reading.opened(spec.model)
    last = stages_after_shots(spec, layout)
    method = method_for(spec.pruning, spec.curvature, layout, spec.model.dtype)
    reading.check_requests(spec, layout)
    is_read = source.has_weights or not dry_run
    model_fingerprint = reading.check_weights(source, layout) if is_read else None
    tokenizer = load_tokenizer(folder, source.origin) if is_read else None
    spec, texts, chosen = _read(spec, tokenizer, layout)
    texts = texts._replace(teacher=_teacher(spec, tokenizer, layout))
    stages = stages_of(spec, layout, method, texts, last)
    placement = place(layout, spec.cluster.num_shards, spec.cluster.num_replicas)
    job = (spec, layout, placement, method, stages, source.pinned)
    measured = {name: windows.tokens for name, windows in texts.measured.items()}
    fingerprints = _fingerprints(spec, model_fingerprint, texts, stages) if is_read else {}
    inputs = Inputs(*job, texts.calibration.tokens, measured, fingerprints, chosen)
    if is_read:
        with reading.as_input_error(f"output.uri: cannot use {spec.output.uri}"):
            check_folder(directory, fingerprints, inputs.spec_yaml, resume=resume)
            if not dry_run:
                directory.check_writable()
    return inputs


def _read(spec: JobSpec, tokenizer: Any, layout: ModelLayout) -> tuple[JobSpec, Texts, str | None]:
    """Return a spec with its texts all named, these texts, and what was chosen of them.

    Without a tokenizer nothing is read.
    """
    if tokenizer is None:
        return spec, reading.unread_texts(spec), None
    if "gguf" in spec.output.exports:
        tokenizer_names(json.loads(tokenizer.backend_tokenizer.to_str()))
    chosen = None
    if spec.calibration.source == "auto":
        section, chosen = default_mix(spec.calibration, tokenizer)
        spec = spec.model_copy(update={"calibration": section})
        spec.check_borders()
    return spec, reading.read_texts(spec, tokenizer, layout.config), chosen


def _teacher(spec: JobSpec, tokenizer: Any, layout: ModelLayout) -> LoadTeacher | None:
    """Return what loads the model to train towards, if there is one beside the job's own.

    Without the tokenizer of that one, its configuration alone is read.

    Raises:
        ValueError: it cannot be used; names the field.
    """
    section = None if spec.recovery is None else spec.recovery.teacher
    if section is None:
        return None
    try:
        source, folder, own = reading.opened(section)
        tokenizers = [tokenizer, load_tokenizer(folder, source.origin)] if tokenizer else []
        reading.check_vocabularies(tokenizers, (layout.config.vocab_size, own.config.vocab_size))
        fingerprint = reading.check_weights(source, own) if tokenizers else None
        placement = place(own, spec.cluster.num_shards, spec.cluster.num_replicas)
        lengths = (text.sequence_length for text in (spec.calibration, *spec.evaluation.texts))
        reading.check_length(max(lengths), own.config, "sequence_length")
    except ValueError as error:
        raise ValueError(f"recovery.teacher: {section.source}: {error}") from error
    return LoadTeacher(source.pinned, own, placement, fingerprint)


def _fingerprints(spec: JobSpec, model: Any, texts: Texts, stages: Stages) -> dict[str, Any]:
    """Return what must be the same when a run goes on."""
    vocabulary = repr(sorted(texts.tokenizer.get_vocab().items()))
    fingerprints: dict[str, Any] = {"code": ray_surgeon.__version__}
    fingerprints |= {"method": spec.method_fingerprint(), "model": model}
    fingerprints["tokenizer"] = hashlib.sha256(vocabulary.encode()).hexdigest()
    fingerprints["calibration"] = texts.calibration.fingerprint
    measured = {name: windows.fingerprint for name, windows in texts.measured.items()}
    fingerprints |= {"evaluation": measured, "tasks": None}  # which a run may go on without
    if stages.teacher is not None:
        fingerprints["teacher"] = stages.teacher.fingerprint
    if stages.dense_answers is not None:
        fingerprints["generation"] = stages.dense_answers.prompt_set.fingerprint
    if stages.tasks is not None:
        fingerprints["tasks"] = stages.tasks.fingerprint
    return fingerprints
