"""The weights of a run: loaded once, and committed after every shot.

A commit has masks and a record, too, from which a run can go on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from ray_surgeon.checkpointing.committed import CommittedPart, Save
from ray_surgeon.checkpointing.run_directory import Record
from ray_surgeon.run_state import Facts, RunState
from ray_surgeon.runtime.dense_states import read_states, write_states
from ray_surgeon.runtime.weights import (
    ModelRecipe,
    SavedFile,
    continue_from_shot,
    load,
    save_shot,
)
from ray_surgeon.storage import files


def load_weights(run: RunState, committed: Sequence[SavedFile], *, by_element: bool) -> None:
    """Load the dense model's weights, and in their place those of a commit, if there is one.

    Args:
        run: before its steps.
        committed: files of the commit.
        by_element: whether masks are of elements, or of rows and columns.
    """
    shot_files = tuple((key, file.uri) for file in committed for key in file.keys)
    recipe = ModelRecipe(run.model, shot_files, run.scratch)
    run.cluster.run_all(load, recipe, by_element, run.cluster.stores)


def load_model(run: RunState, facts: Facts, *, by_element: bool) -> None:
    """Load weights, masks, and what the dense model said of texts.

    The weights are those of the last commit of the run, if there is one.

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
    """Writes a shot, so that it exists and a run can go on from it."""

    targets: Sequence[float]  # sparsity at the end of every shot; none if the target is no sparsity
    keep_shots: int  # shots whose tensors are kept; 0 for all
    kept: Sequence[int] = ()  # shots whose tensors are always kept

    def write(self, run: RunState, facts: Facts) -> None:
        """Write everything; the manifest comes last."""
        directory = run.directory
        cluster = run.cluster
        shot = run.shot
        folder = directory.shot_folder(shot)
        directory.check_attempt()  # what follows takes files that another try may have written
        if shot == 1:  # what a run that goes on reads
            cluster.run_all(write_states, directory.dense_states)
        files.remove_files(folder, ["*.safetensors"])  # of a try that was interrupted
        written = [file for worker in cluster.run_all(save_shot, folder) for file in worker]
        target = self.targets[shot - 1] if self.targets else None
        record = {
            "index": shot,
            "target_sparsity": target,
            "sparsity": run.sparsity,
            # what the steps of this shot may leave out
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
    """Commit the present shot as far as a stage has come, so that a run goes on in its middle.

    The first commit must come before the stage changes weights.

    Args:
        run: in this stage.
        stage: its name.
        after: how far it has come, e.g. "after 12 steps of recovery".
        state: what it goes on from on the coordinator; nothing if it has not begun.
        save: writes what workers go on from, under names that no commit before has used.

    Raises:
        WorkerFailureError: a machine is about to be taken away; the run goes on elsewhere.
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
    run.part = CommittedPart(files, tuple(save(folder)), record)
    directory.commit_part(run.shot, run.part)
    run.committed_s = time.monotonic()
    run.cluster.leave_if_told()
