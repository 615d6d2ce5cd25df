"""Reads and checks all inputs before a worker starts, so that an impossible job fails early.

It also describes the job for its plan.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from ray_surgeon.checkpointing import RunDirectory
from ray_surgeon.config.groups import CHANNELS, CoupledSection
from ray_surgeon.config.job import JobSpec
from ray_surgeon.config.sections import (
    KERNEL_COLUMNS,
    ModelSection,
    OutputSection,
    RaySection,
    RecoverySection,
)
from ray_surgeon.config.texts import CalibrationSection
from ray_surgeon.data.texts import load_tokenizer
from ray_surgeon.distributed.memory_plan.device_resources import Device, Room
from ray_surgeon.distributed.memory_plan.planned_job import (
    PlannedCurvature,
    PlannedDepth,
    PlannedExports,
    PlannedGroups,
    PlannedJob,
    PlannedReconstruction,
    PlannedRecovery,
    PlannedTeacher,
    Shapes,
)
from ray_surgeon.distributed.memory_plan.planner import Plan, Planner
from ray_surgeon.distributed.placement import Placement, place
from ray_surgeon.export.exports import Export, check_whole
from ray_surgeon.factors.collector import kind_of
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.proof import prove
from ray_surgeon.preparation import reading
from ray_surgeon.preparation.reading import Texts
from ray_surgeon.preparation.resolve import Machines, resolve
from ray_surgeon.preparation.stages import (
    ExportStep,
    Stages,
    stages_after_shots,
    stages_of,
)
from ray_surgeon.pruning.coupled_groups import Groups
from ray_surgeon.pruning.method import Method
from ray_surgeon.pruning.methods import method_for
from ray_surgeon.recovery.reconstruction import RATES, TRIAL_PART
from ray_surgeon.recovery.recovery import LoadTeacher
from ray_surgeon.recovery.training import steps_ahead, steps_between_checks, trial_steps
from ray_surgeon.report.record import check_folder
from ray_surgeon.run_state import CalibrationText
from ray_surgeon.storage.sources import ModelFiles
from ray_surgeon.version import __version__

if TYPE_CHECKING:
    from ray_surgeon.pruning.depth import Depth


_GLOBAL_MARGIN = 1.25
"""Times as many groups as are removed are on the paths that are followed."""


def describe_job(
    spec: JobSpec, layout: ModelLayout, method: Method, stages: Stages
) -> PlannedJob:
    """Return the inputs of a plan beside model, placement and memory.

    Args:
        spec: of the job.
        layout: of its model.
        method: of pruning.
        stages: steps of the job.
    """
    calibration = spec.calibration
    texts = [(text.num_sequences, text.sequence_length) for text in spec.evaluation.texts]
    if spec.num_held > 0:
        texts.append((spec.num_held, calibration.sequence_length))
    teacher = None
    if stages.teacher is not None:
        teacher = PlannedTeacher(stages.teacher.layout, stages.teacher.placement)
    return PlannedJob(
        dtype=spec.model.dtype,
        num_sequences=calibration.num_sequences,
        sequence_length=calibration.sequence_length,
        num_held=spec.num_held,
        factors="none" if method.curvature is None else method.curvature.gathers,
        gathered=_gathered(spec, layout, method),
        by_element=method.by_element,
        pruning=spec.pruning,
        groups=_groups(method),
        depth=None if stages.depth is None else _depth(stages.depth),
        curvature=_curvature(layout, method) if method.has_costs else None,
        reconstruction=_reconstruction(stages),
        recovery=_recovery(spec.recovery, calibration.sequence_length),
        teacher=teacher,
        written_texts=_written_texts(stages),
        answers=None if stages.answers is None else stages.answers.prompt_set.section,
        measured_texts=tuple(texts),
        exports=_exports(spec.output, stages.exports),
    )


def _gathered(spec: JobSpec, layout: ModelLayout, method: Method) -> frozenset[str]:
    """Return the linears that are ranked, or updated by their factors."""
    if spec.pruning is None:
        return frozenset()
    roles = method.gathers
    return frozenset(
        linear.name for linear in layout.linears if roles is None or linear.role in roles
    )


def _groups(method: Method) -> PlannedGroups | None:
    if not isinstance(method, Groups):
        return None
    section = method.section
    budget = method.budget
    most = max(budget.dense - budget.least(method.fewest), 1e-9 * budget.dense)
    # in the first shot, where all consumers lose the same fraction
    share = min(1.0, (budget.dense - method.goal(1)) / most)
    if not section.uniform:
        share *= _GLOBAL_MARGIN
    reach = min(1.0, 2 * (section.last_sparsity or 0.5))
    return PlannedGroups(reach=reach, share=share)


def _depth(depth: Depth) -> PlannedDepth:
    from ray_surgeon.pruning.depth import TOKENS_EACH

    pruning = depth.method.section
    section = depth.section
    num_layers = len(depth.layers)
    in_all_shots = section.num_removed or num_layers * (pruning.last_sparsity or 0.2)
    return PlannedDepth(
        section=section,
        num_layers=num_layers,
        num_removed=max(1, round(in_all_shots / pruning.shots)),
        tokens_per_input=TOKENS_EACH,
    )


def _curvature(layout: ModelLayout, method: Method) -> PlannedCurvature:
    section = method.used_curvature
    kind = kind_of(section)
    return PlannedCurvature(
        section=section,
        num_changes=method.beside.num_changes(layout),
        num_passes=kind.num_passes,
        num_copies=kind.num_copies,
    )


def _reconstruction(stages: Stages) -> PlannedReconstruction | None:
    reconstruction = stages.reconstruction
    if reconstruction is None:
        return None
    return PlannedReconstruction(
        section=reconstruction.section,
        kinds=reconstruction.kinds,
        num_backward=reconstruction.num_backward,
        num_rates=len(RATES),
        trial_epochs=TRIAL_PART,
    )


def _recovery(
    section: RecoverySection | None, sequence_length: int
) -> PlannedRecovery | None:
    if section is None:
        return None
    num_steps = section.num_steps(sequence_length)
    return PlannedRecovery(
        section=section,
        num_steps=num_steps,
        num_trial_steps=trial_steps(num_steps),
        steps_between_checks=steps_between_checks(num_steps),
        steps_ahead=steps_ahead(section.sequences_per_step),
    )


def _written_texts(stages: Stages) -> tuple[tuple[int, int], ...]:
    if stages.self_text is None:
        return ()
    section: CalibrationSection = stages.self_text.section
    sizes = []
    for text, count in section.shares:
        if text.is_written:
            sizes.append(text.sizes(count, section.sequence_length))
    return tuple(sizes)


def _exports(output: OutputSection, steps: Sequence[ExportStep]) -> PlannedExports:
    kinds = tuple(step.kind for step in steps if isinstance(step, Export))
    num_processes = 1
    if output.speed is not None:  # the dense model and the pruned one are timed
        num_processes += 2
    num_quantized = 0
    num_backward = 0
    if output.quantize is not None:
        from ray_surgeon.export.rounding import NUM_BACKWARD

        num_quantized = sum(step.name == "quantise" for step in steps)
        num_backward = NUM_BACKWARD
    return PlannedExports(
        kinds=kinds,
        num_processes=num_processes,
        quantize=output.quantize,
        num_quantized=num_quantized,
        num_backward=num_backward,
    )


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
    # what was chosen for a spec of version 3, and how to change it
    choices: tuple[str, ...] = ()
    deadline_s: float | None = None  # time.time() by which the job should end
    source_bytes: int = 0  # of the weight files that were given; 0 if they were not read
    proof: str = (
        ""  # what was proved of the model; empty for a plan from config.json alone
    )

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
        lines = [self._summary(), *self.choices]
        if self.proof:
            lines.append(self.proof)
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
            return f"1 pruning round (a shot of the paper) to {about}"
        return f"{shots} pruning rounds (shots of the paper) to {about} each"

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
        return _plan_of(self.spec, self.layout, self.method, self.stages, room, device)


def check(
    spec: JobSpec,
    *,
    resume: bool = False,
    dry_run: bool = False,
    machines: Machines | None = None,
) -> Inputs:
    """Read the model's configuration, headers, tokenizer and texts, and check them.

    Args:
        spec: parsed.
        resume: whether the run directory may already hold this run.
        dry_run: whether to leave the run directory untouched. The model may lack weights then.
        machines: the hardware for a spec of version 3; this machine's if not given.

    Raises:
        ValueError: an input is not valid; names the field, the problem, and the remedy.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    reading.check_machine(spec, dry_run=dry_run)
    directory = RunDirectory(spec.output.uri)
    with reading.as_input_error(f"output.uri: cannot use {spec.output.uri}"):
        directory.is_new()  # raises if it holds something else
    source, folder, layout = reading.opened(spec.model)
    is_read = source.has_weights or not dry_run
    tokenizer = load_tokenizer(folder, source.origin) if is_read else None
    resolved = resolve(spec, layout, machines, partial(_planned, layout, tokenizer))
    spec = resolved.spec
    check_whole(spec.output, source)
    last = stages_after_shots(spec, layout)
    method = method_for(spec.pruning, spec.curvature, layout, spec.model.dtype)
    reading.check_requests(spec, layout)
    model_fingerprint = None
    source_bytes = 0
    if is_read:
        model_fingerprint = reading.check_weights(source, layout)
        given = source
        if source.whole is not None and not spec.output.text_only:
            given = source.whole
        source_bytes = given.given_bytes
    spec, texts, chosen = _read(spec, tokenizer, layout)
    texts = texts._replace(teacher=_teacher(spec, tokenizer, layout))
    stages = stages_of(spec, layout, method, texts, last, resolved.deadline_s)
    fingerprints: dict[str, Any] = {}
    proof = ""
    if is_read:
        fingerprints = _fingerprints(spec, model_fingerprint, texts, stages)
        proof = str(prove(layout.config, layout.family, _kinds(spec)))
    inputs = Inputs(
        spec=spec,
        layout=layout,
        placement=place(layout, spec.cluster.num_shards, spec.cluster.num_replicas),
        method=method,
        stages=stages,
        model=source.pinned.model_copy(update={"dtype": spec.model.dtype}),
        calibration=texts.calibration.tokens,
        texts={name: windows.tokens for name, windows in texts.measured.items()},
        fingerprints=fingerprints,
        chosen_text=chosen,
        choices=resolved.notes + _note_on_language_model(source),
        deadline_s=resolved.deadline_s,
        source_bytes=source_bytes,
        proof=proof,
    )
    if is_read:
        with reading.as_input_error(f"output.uri: cannot use {spec.output.uri}"):
            check_folder(directory, fingerprints, inputs.spec_yaml, resume=resume)
            if not dry_run:
                directory.check_writable()
    return inputs


def _note_on_language_model(source: ModelFiles) -> tuple[str, ...]:
    """Return the lines on a checkpoint that also reads images or sound."""
    if source.whole is None:
        return ()
    return (
        f"{source.origin} is more than a language model: that is pruned, and its other parts stay "
        "as they are (--set output.text_only=true exports the language model alone)",
    )


def _kinds(spec: JobSpec) -> tuple[str, ...]:
    """Return the kinds of coupled groups that a job prunes."""
    if isinstance(spec.pruning, CoupledSection):
        return spec.pruning.narrow_kinds
    return ()


def _planned(
    layout: ModelLayout, tokenizer: Any, spec: JobSpec, room: Room, device: Device
) -> Plan:
    """Return the plan of a spec, without reading its texts.

    Raises:
        DoesNotFitError: no plan fits.
    """
    # tasks are not planned, and each check of them starts a process
    evaluation = spec.evaluation.model_copy(update={"tasks": None})
    spec = spec.model_copy(update={"evaluation": evaluation})
    if spec.calibration.source == "auto" and tokenizer is not None:
        from ray_surgeon.data.default_text import default_mix

        section, _ = default_mix(spec.calibration, tokenizer)
        spec = spec.model_copy(update={"calibration": section})
    method = method_for(spec.pruning, spec.curvature, layout, spec.model.dtype)
    texts = reading.unread_texts(spec)._replace(tokenizer=tokenizer)
    stages = stages_of(spec, layout, method, texts, stages_after_shots(spec, layout))
    return _plan_of(spec, layout, method, stages, room, device)


def _plan_of(
    spec: JobSpec,
    layout: ModelLayout,
    method: Method,
    stages: Stages,
    room: Room,
    device: Device,
) -> Plan:
    """Return the best plan; see `Inputs.plan`."""
    job = describe_job(spec, layout, method, stages)
    shapes = Shapes(layout, job, "cpu" if room.device_is_host else "cuda")
    placement = place(layout, spec.cluster.num_shards, spec.cluster.num_replicas)
    return Planner(shapes, spec.memory, device).best(placement, room)


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
        from ray_surgeon.models.llama_cpp import tokenizer_names

        tokenizer_names(json.loads(tokenizer.backend_tokenizer.to_str()))
    chosen = None
    if spec.calibration.source == "auto":
        from ray_surgeon.data.default_text import default_mix

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
