"""The weights of a run: loaded once, and committed after every shot.

A commit also contains masks and a record, so that a run can resume from it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from ray_surgeon.checkpointing import CommittedPart, Record, Save
from ray_surgeon.distributed.dense_states import read_states, write_states
from ray_surgeon.distributed.weights import (
    ModelRecipe,
    SavedFile,
    continue_from_shot,
    load,
    save_shot,
)
from ray_surgeon.run_state import Facts, RunState
from ray_surgeon.storage import files


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
        last = run.report.add_shot(record, run.linears, run.steps)
        directory.commit_shot(shot, written, last)
        cluster.run_all(continue_from_shot, written)
        directory.remove_part(shot)
        run.part = None
        directory.write_report(run.report.as_record())
        run.page.draw(run.report.as_record(), final=False)
        if self.keep_shots:
            directory.drop_tensors(shot - self.keep_shots, self.kept)
        facts["uri"] = folder
        facts["parameters"] = last["num_nonzero"]
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
