"""The state of a run: its weights, the windows that are held aside, and what a shot commits.

A commit contains weights, masks and a record, so that a run can resume from it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_surgeon.checkpointing import CommittedPart, Record, RunDirectory, Save
from ray_surgeon.config.sections import ModelSection
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.dense_states import read_states, write_states
from ray_surgeon.distributed.microbatch import Counts, Tokens
from ray_surgeon.distributed.passes import compared, num_counted, sequence_losses
from ray_surgeon.distributed.weights import (
    ModelRecipe,
    SavedFile,
    continue_from_shot,
    load,
    save_shot,
)
from ray_surgeon.distributed.worker import LinearSummary
from ray_surgeon.memory.stores import ScratchNames
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import num_parameters_left
from ray_surgeon.report.events import Fact, Steps
from ray_surgeon.report.html_report import LivePage
from ray_surgeon.report.record import RunReport
from ray_surgeon.storage import files

HELD = "(held aside)"
"""Name of the windows held aside among the texts with states of the dense model.

No evaluation text can have this name.
"""

Facts = dict[str, Fact]
"""Facts that a step shows, by name."""


Text = tuple[Tokens, Counts]
"""Windows for comparisons with the dense model, and which of their tokens count."""


@dataclass(frozen=True, repr=False)
class CalibrationText:
    """Windows of the calibration, and which of their tokens count as predicted ones."""

    tokens: Tokens  # [num_sequences, sequence_length] on which stages are fitted
    # [num_sequences, sequence_length] whether a token counts; None if all do
    counts: Counts = None
    # [num_windows, sequence_length] on which no stage is fitted
    held: Tokens = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    # [num_windows, sequence_length] whether a token counts; None if all do
    held_counts: Counts = None

    @staticmethod
    def split(tokens: Tokens, counts: Counts, num_held: int) -> CalibrationText:
        """Hold some windows aside, spread evenly, so that every text gives its share.

        Args:
            tokens: [num_sequences, sequence_length].
            counts: [num_sequences, sequence_length], whether a token counts; None if all do.
            num_held: number of windows that are held aside.
        """
        is_held = np.zeros(len(tokens), dtype=bool)
        is_held[held_places(len(tokens), num_held)] = True
        text = CalibrationText(tokens=tokens[~is_held], held=tokens[is_held])
        if counts is None:
            return text
        return replace(text, counts=counts[~is_held], held_counts=counts[is_held])


def held_places(num_sequences: int, num_held: int) -> NDArray[np.int64]:
    """Return the indices of evenly spread windows: the middles of `num_held` equal parts."""
    middles = (np.arange(num_held) + 0.5) * num_sequences / max(1, num_held)
    return middles.astype(np.int64)


def held_aside(
    cluster: Cluster, text: CalibrationText, loss: str = "kl"
) -> tuple[float, float | None]:
    """Measure the current weights on the windows held aside.

    Returns:
        The divergence (kl) or the loss, in nats per counted token, infinite if it is not finite, as
        after a training that diverged; and with kl the acceptance, that is, the share of the dense
        model's tokens that would be accepted, else None.
    """
    tokens = text.held
    counts = text.held_counts
    num_tokens = max(1, num_counted(tokens, counts))
    acceptance = None
    if loss == "kl":
        comparisons = compared(cluster, HELD, tokens, counts, acceptance=True)
        mean = sum(each["divergence"] for each in comparisons) / num_tokens
        acceptance = sum(each["acceptance"] for each in comparisons) / num_tokens
    else:
        mean = sum(sequence_losses(cluster, tokens, counts)) / num_tokens
    if not math.isfinite(mean):
        mean = math.inf
    return mean, acceptance


def held_measure(cluster: Cluster, text: CalibrationText, loss: str = "kl") -> float:
    """Return the divergence or the loss alone; see `held_aside`."""
    measure, _ = held_aside(cluster, text, loss)
    return measure


@dataclass
class RunState:
    """The state of a run on the coordinator."""

    cluster: Cluster
    directory: RunDirectory
    report: RunReport
    steps: Steps
    layout: ModelLayout
    model: ModelSection  # the dense model, pinned to the files that were checked
    calibration: Tokens  # [num_sequences, sequence_length] tokens, all windows
    text: CalibrationText  # the same windows: those for fitting and those held aside
    texts: Mapping[str, Tokens]  # evaluation text -> windows
    scratch: ScratchNames  # folders of workers on their disks
    page: LivePage  # page with the report, updated during the run
    num_shots: int
    num_done: int  # shots that an earlier try has committed
    # committed part of the current shot; before the first one, of the shot in which the run resumes
    part: CommittedPart | None
    shot: int = 0  # number of the current shot; 0 before the first
    # entries of the report for the current shot
    record: dict[str, Any] = field(default_factory=dict)
    # linears after the update of the current shot
    linears: list[LinearSummary] = field(default_factory=list)
    committed_s: float = 0.0  # clock at the last commit, or at the beginning of the shot

    @property
    def resumes(self) -> bool:
        """Whether the workers' weights come from a commit, not from the dense model."""
        return self.num_done > 0 or self.part is not None

    @property
    def sparsity(self) -> float:
        """Removed fraction of the linears' parameters after the update of the shot."""
        kept = sum(linear.num_kept for linear in self.linears)
        return 1 - kept / sum(linear.size for linear in self.linears)

    @property
    def num_parameters_left(self) -> int | None:
        """Parameters of the smaller model after the update; None if pruned ones become zeros."""
        pruning = self.report.spec["pruning"]
        if pruning and pruning["structure"] != "groups":
            return None
        kept = {}
        for linear in self.linears:
            kept[linear.name] = (linear.rows_kept, linear.columns_kept)
        return num_parameters_left(self.layout, kept)

    def begin_shot(self, shot: int) -> None:
        """Reset the state for a new shot, or restore it from the shot's committed part."""
        earlier = {}
        if self.part is not None:
            earlier = self.part.record
        self.shot = shot
        self.record = earlier.get("shot", {})
        self.linears = [LinearSummary(**linear) for linear in earlier.get("linears", ())]
        self.steps.new_shot(earlier.get("steps", {}))
        self.committed_s = time.monotonic()


def load_weights(
    run: RunState,
    committed: Sequence[SavedFile],
    *,
    by_element: bool,
) -> None:
    """Load the dense model's weights, or those of a commit in their place, if there is one.

    Args:
        run: before its steps.
        committed: files of the commit; empty if there is none.
        by_element: whether masks are of elements, or of rows and columns.
    """
    shot_files = []
    for file in committed:
        for key in file.keys:
            shot_files.append((key, file.uri))
    recipe = ModelRecipe(run.model, tuple(shot_files), run.scratch)
    run.cluster.run_all(load, recipe, by_element, run.cluster.stores)


def load_model(run: RunState, facts: Facts, *, by_element: bool) -> None:
    """Load weights, masks, and the dense model's states of texts.

    Everything is taken from the last commit of the run, if there is one.

    Args:
        run: before its steps.
        facts: of the step.
        by_element: see `load_weights`.
    """
    committed: Sequence[SavedFile] = ()
    if run.part is not None:
        committed = run.part.files
    elif run.num_done:
        committed = run.directory.read_shot(run.num_done).files
    load_weights(run, committed, by_element=by_element)
    if run.resumes:
        run.cluster.run_all(read_states, run.directory.dense_states)
    facts["workers"] = len(run.cluster.placement.workers)
    facts["resumed_after_shot"] = run.num_done
    if run.part is not None:
        facts["resumed_in_shot"] = f"{run.num_done + 1}, {run.part.record['after']}"


@dataclass(frozen=True)
class Commit:
    """Writes a shot, so that it exists and a run can resume from it."""

    # sparsity at the end of every shot; empty if the target is not a sparsity
    targets: Sequence[float]
    keep_shots: int  # shots whose tensors are kept; 0 for all
    kept: Sequence[int] = ()  # shots whose tensors are always kept

    def write(self, run: RunState, facts: Facts) -> None:
        """Write everything; the manifest comes last."""
        directory = run.directory
        cluster = run.cluster
        shot = run.shot
        folder = directory.shot_folder(shot)
        directory.check_attempt()  # because another try's files would be replaced
        if shot == 1:  # a run that resumes reads them
            cluster.run_all(write_states, directory.dense_states)
        files.remove_files(folder, ["*.safetensors"])  # from an interrupted try
        written = list(chain.from_iterable(cluster.run_all(save_shot, folder)))
        target = None
        if self.targets:
            target = self.targets[shot - 1]
        record = {
            "index": shot,
            "target_sparsity": target,
            "sparsity": run.sparsity,
            # defaults for stages that this shot may leave out
            "threshold": None,
            "calibration_loss": None,
            "recovery_losses": [],
            "recovery_absorbed": None,
            "damping_used": [],
            **run.record,
        }
        last = run.report.add_shot(
            record, run.linears, run.steps, run.num_parameters_left
        )
        directory.commit_shot(shot, written, last)
        cluster.run_all(continue_from_shot, written)
        directory.remove_part(shot)
        run.part = None
        directory.write_report(run.report.as_record())
        run.page.draw(run.report.as_record(), final=False)
        if self.keep_shots:
            directory.drop_tensors(shot - self.keep_shots, self.kept)
        facts["uri"] = folder
        facts["parameters"] = last["num_parameters"]
        facts["peak_rss_bytes"] = last["peak_rss_bytes"]


def commit_part(run: RunState, stage: str, after: str, state: Record, save: Save) -> None:
    """Commit the current shot in the middle of a stage, so that a run can resume there.

    The first commit must come before the stage changes weights.

    Args:
        run: in this stage.
        stage: name of the stage.
        after: progress of the stage, e.g. "after 12 steps of recovery".
        state: state of the stage on the coordinator; empty if it has not begun.
        save: writes the state of the stage on the workers, under names that no earlier commit has
            used.

    Raises:
        WorkerFailureError: a machine is about to be taken away; the run continues elsewhere.
    """
    directory = run.directory
    directory.check_attempt()  # as in `Commit`
    folder = directory.part_folder(run.shot)
    if run.part is not None:
        files = run.part.files
    else:
        if run.shot == 1:
            run.cluster.run_all(write_states, directory.dense_states)
        files = tuple(chain.from_iterable(run.cluster.run_all(save_shot, folder)))
    record: dict[str, Any] = {
        "stage": stage,
        "after": after,
        "state": state,
        "shot": run.record,
        "linears": [asdict(linear) for linear in run.linears],
        "steps": run.steps.record_so_far(),
        "dense": run.report.dense,
    }
    run.part = CommittedPart(files=files, of_stage=tuple(save(folder)), record=record)
    directory.commit_part(run.shot, run.part)
    run.committed_s = time.monotonic()
    run.cluster.leave_if_told()
