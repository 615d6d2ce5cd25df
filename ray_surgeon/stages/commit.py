"""Commits a shot: its weights, masks and record, from which a run can go on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ray_surgeon.plan.needs import StepPlan, WorkerView
from ray_surgeon.report.html_report import LivePage
from ray_surgeon.runtime.dense_model import write_states
from ray_surgeon.runtime.saving import FILE_BYTES, continue_from_shot, save_shot
from ray_surgeon.stages.evaluation import Measures
from ray_surgeon.stages.prune.method import Choice
from ray_surgeon.stages.stage import Facts, RunState, Stage
from ray_surgeon.storage import files


@dataclass(frozen=True)
class Commit(Stage):
    """The last stage of a shot."""

    name = "commit"
    targets: Sequence[float]  # sparsity at the end of every shot; none if the target is no sparsity
    keep_shots: int  # shots whose tensors are kept; 0 for all

    def run(self, run: RunState, facts: Facts) -> None:
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
        choice = run.find(Choice)
        about = {
            "index": shot,
            "target_sparsity": self.targets[shot - 1] if self.targets else None,
            "sparsity": run.sparsity,
            "threshold": None if choice is None else choice.threshold,
        }
        run.report.add_shot(about, run.kept(Measures), run.linears, run.record, run.steps)
        last = run.report.shots[-1]
        directory.commit_shot(shot, written, last)
        cluster.run_all(continue_from_shot, written)
        directory.write_report(run.report.as_record())
        run.kept(LivePage).draw(run.report.as_record(), final=False)
        if self.keep_shots:
            directory.drop_tensors(shot - self.keep_shots)
        facts |= {"uri": folder, "parameters": last["num_nonzero"]}
        facts["peak_rss_bytes"] = last["peak_rss_bytes"]

    def ended(self, run: RunState) -> None:
        """Write the events, with the commit's own."""
        run.directory.write_events()

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the writing, a file at a time."""
        of_file = min(FILE_BYTES, worker.all_blocks + worker.outside)
        host = worker.host + max(of_file, worker.shapes.largest_stored)
        yield StepPlan(self.name, worker.idle, host, disk_bytes=worker.all_blocks)
