"""Reads and checks all inputs before a worker starts, so that an impossible job fails early."""

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

from ray_surgeon.checkpointing.run_directory import RunDirectory
from ray_surgeon.config.groups import CHANNELS, CoupledSection
from ray_surgeon.config.job import JobSpec
from ray_surgeon.config.sections import KERNEL_COLUMNS, ModelSection, RaySection
from ray_surgeon.data.default_text import default_mix
from ray_surgeon.data.texts import load_tokenizer
from ray_surgeon.distributed.memory_plan.device_resources import Device, Room
from ray_surgeon.distributed.memory_plan.planner import Plan, Planner
from ray_surgeon.distributed.memory_plan.shapes import Shapes
from ray_surgeon.distributed.placement import Placement, place
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.llama_cpp import tokenizer_names
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
from ray_surgeon.version import __version__


@dataclass(frozen=True)
class Inputs:
    """A checked job spec and everything that was read for it."""

    spec: JobSpec
    layout: ModelLayout  # of the model
    placement: Placement  # of its blocks on workers
    method: Method  # of pruning
    stages: Stages
    model: ModelSection  # where the weights are, pinned to the files that were checked
    # [num_sequences, sequence_length] tokens; 0 where the model will write them
    calibration: NDArray[np.int64] = field(repr=False)
    # evaluation text -> windows
    texts: Mapping[str, NDArray[np.int64]] = field(repr=False)
    # of model, tokenizer, texts and stages; empty for a plan from config.json alone
    fingerprints: Mapping[str, Any]
    # description of the text chosen for a calibration of source auto
    chosen_text: str | None

    @property
    def ray(self) -> RaySection:
        """The section `cluster` of a job that runs on Ray."""
        assert isinstance(self.spec.cluster, RaySection)
        return self.spec.cluster

    @property
    def text(self) -> CalibrationText:
        """The windows for fitting, and those held aside."""
        return CalibrationText.split(
            self.calibration,
            counts=None,
            num_held=self.spec.num_held,
        )

    @property
    def spec_yaml(self) -> str:
        """The resolved spec, as written into the run directory."""
        return yaml.safe_dump(self.spec.model_dump(mode="json"), sort_keys=False)

    @property
    def goal(self) -> str:
        """Description of the run's goal for the user."""
        pruning = self.spec.pruning
        if pruning is None:
            if self.spec.recovery is None:
                return "write another format"
            return "train towards another model"
        if pruning.last_sparsity is not None:
            return f"{pruning.last_sparsity:.1%}"
        method = self.method
        assert isinstance(method, Groups)
        target = method.section.target
        assert target is not None
        dense = method.budget.dense
        return f"{target.allowed(dense):.6g} of {dense:.6g} {method.budget.unit}"

    @property
    def notes(self) -> list[str]:
        """Lines for the user: the goal, and hints on the settings."""
        lines = [self._summary()]
        if self.chosen_text:
            lines.append(self.chosen_text)
        stored = str(getattr(self.layout.config, "dtype", None)).removeprefix("torch.")
        if stored in ("bfloat16", "float16") and self.spec.model.dtype == "float32":
            lines.append(
                f"config.json says {stored}, but this job and its exports are in "
                "float32, twice as large; model.dtype: bfloat16 halves it"
            )
        pruning = self.spec.pruning
        if isinstance(pruning, CoupledSection) and not CHANNELS.isdisjoint(
            pruning.groups
        ):
            lines.append(self._note_on_widths(pruning))
        return lines

    def _summary(self) -> str:
        about = f"{self.goal}, {self.calibration.size} calibration tokens"
        if self.spec.pruning is None:
            return about
        shots = self.spec.schedule.shots
        if shots == 1:
            return f"{shots} shot to {about} each"
        return f"{shots} shots to {about} each"

    def _note_on_widths(self, pruning: CoupledSection) -> str:
        widths = []
        for groups in self.layout.group_sets:
            if groups.kind in CHANNELS:
                widths.append(len(groups.columns))
        note = f"feed-forward widths, {min(widths)} channels, stay multiples of {pruning.multiple}"
        preferred = KERNEL_COLUMNS * pruning.tensor_parallel
        if pruning.multiple % preferred > 0:
            note += f"; to quantise later, set pruning.width_multiple to {preferred}"
        return note

    def plan(self, room: Room, device: Device) -> Plan:
        """Return the best plan for the job.

        Args:
            room: memory and disk of every worker.
            device: speeds of every worker's device.

        Raises:
            DoesNotFitError: no plan fits.
        """
        job = describe_job(self.spec, self.layout, self.method, self.stages)
        shapes = Shapes(self.layout, job, "cpu" if room.device_is_host else "cuda")
        return Planner(shapes, self.spec.memory, device).best(self.placement, room)


def check(spec: JobSpec, *, resume: bool = False, dry_run: bool = False) -> Inputs:
    """Read the model's configuration, headers, tokenizer and texts, and check them.

    Args:
        spec: parsed.
        resume: whether the run directory may already hold this run.
        dry_run: whether to leave the run directory untouched. The model may lack weights then.

    Raises:
        ValueError: an input is not valid; names the field, the problem, and the remedy.
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
    model_fingerprint = None
    tokenizer = None
    if is_read:
        model_fingerprint = reading.check_weights(source, layout)
        tokenizer = load_tokenizer(folder, source.origin)
    spec, texts, chosen = _read(spec, tokenizer, layout)
    texts = texts._replace(teacher=_teacher(spec, tokenizer, layout))
    stages = stages_of(spec, layout, method, texts, last)
    fingerprints: dict[str, Any] = {}
    if is_read:
        fingerprints = _fingerprints(spec, model_fingerprint, texts, stages)
    inputs = Inputs(
        spec=spec,
        layout=layout,
        placement=place(layout, spec.cluster.num_shards, spec.cluster.num_replicas),
        method=method,
        stages=stages,
        model=source.pinned,
        calibration=texts.calibration.tokens,
        texts={name: windows.tokens for name, windows in texts.measured.items()},
        fingerprints=fingerprints,
        chosen_text=chosen,
    )
    if is_read:
        with reading.as_input_error(f"output.uri: cannot use {spec.output.uri}"):
            check_folder(directory, fingerprints, inputs.spec_yaml, resume=resume)
            if not dry_run:
                directory.check_writable()
    return inputs


def _read(
    spec: JobSpec,
    tokenizer: Any,
    layout: ModelLayout,
) -> tuple[JobSpec, Texts, str | None]:
    """Read the texts; without a tokenizer nothing is read.

    Returns:
        The spec with all texts named, the texts, and a description of those that were chosen for
        source auto.
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
    """Return the stage that loads the model to train towards, if it is not the job's own.

    Without a tokenizer, only the configuration of that model is read.

    Raises:
        ValueError: the model cannot be used; names the field.
    """
    section = None if spec.recovery is None else spec.recovery.teacher
    if section is None:
        return None
    try:
        source, folder, own = reading.opened(section)
        tokenizers = []
        if tokenizer:
            tokenizers = [tokenizer, load_tokenizer(folder, source.origin)]
        sizes = (layout.config.vocab_size, own.config.vocab_size)
        reading.check_vocabularies(tokenizers, sizes)
        fingerprint = None
        if tokenizers:
            fingerprint = reading.check_weights(source, own)
        placement = place(own, spec.cluster.num_shards, spec.cluster.num_replicas)
        texts = (spec.calibration, *spec.evaluation.texts)
        longest = max(text.sequence_length for text in texts)
        reading.check_length(longest, own.config, "sequence_length")
    except ValueError as error:
        raise ValueError(f"recovery.teacher: {section.source}: {error}") from error
    return LoadTeacher(
        model=source.pinned, layout=own, placement=placement, fingerprint=fingerprint
    )


def _fingerprints(
    spec: JobSpec,
    model: Any,
    texts: Texts,
    stages: Stages,
) -> dict[str, Any]:
    """Return the fingerprints that must not change when a run resumes."""
    vocabulary = repr(sorted(texts.tokenizer.get_vocab().items()))
    measured = {name: windows.fingerprint for name, windows in texts.measured.items()}
    fingerprints: dict[str, Any] = {
        "code": __version__,
        "method": spec.method_fingerprint(),
        "model": model,
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "calibration": texts.calibration.fingerprint,
        "evaluation": measured,
        "tasks": None,  # a run may resume without its tasks
    }
    if stages.teacher is not None:
        fingerprints["teacher"] = stages.teacher.fingerprint
    if stages.dense_answers is not None:
        fingerprints["generation"] = stages.dense_answers.prompt_set.fingerprint
    if stages.tasks is not None:
        fingerprints["tasks"] = stages.tasks.fingerprint
    return fingerprints
