"""The stages that export a run's checkpoints, of every size that the run passes through."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ray_surgeon.export.folder import Pruned
from ray_surgeon.export.importance import needs_of_mean_squares
from ray_surgeon.export.kinds import export
from ray_surgeon.plan.counts import Counted, StepPlan
from ray_surgeon.plan.estimate import WorkerView
from ray_surgeon.pruning.method import Method
from ray_surgeon.report.html_report import rendered
from ray_surgeon.run_state import Facts, RunState, Stage
from ray_surgeon.runtime.weights import FILE_BYTES
from ray_surgeon.shot_weights import load_weights
from ray_surgeon.spec.evaluation import TasksSection
from ray_surgeon.spec.sections import OutputSection
from ray_surgeon.storage import files

_PROCESS_S = 8.0
"""Seconds that a fresh process takes to import torch and transformers."""


@dataclass(frozen=True)
class Size:
    """One of the sizes that a run passes through."""

    shot: int  # the shot after which the model has this size
    value: float | None = None  # as in pruning.sizes; None if there is only one
    is_last: bool = True  # whether it is the size after the last shot

    @property
    def suffix(self) -> str:
        """Suffix of the names of the folders of exports."""
        if self.is_last or self.value is None:
            return ""
        return f"-{self.value:.12g}"


def pruned_of(run: RunState, shot: int) -> Pruned:
    """Return the model of a run after a shot, as exports take it."""
    return Pruned(
        cluster=run.cluster,
        layout=run.layout,
        model=run.model,
        facts=run.report.model_card_facts(shot),
        calibration=run.calibration,
        texts=run.texts,
    )


def tell_of(entry: dict[str, Any], run: RunState, facts: Facts, size: Size) -> None:
    """Write an export's model card, and add its entry to the report and to the step's facts."""
    if size.value is not None:
        entry["size"] = size.value
    about = run.report.model_card_facts(size.shot)
    source = run.model.source
    card = rendered("card.md.jinja", entry=entry, source=source, facts=about)
    files.write_text(files.join(entry["uri"], "README.md"), card)
    run.report.exports.append(entry)
    for name in ("kind", "uri", "size_bytes", "reload_max_logit_difference"):
        if name in entry:
            facts[name] = entry[name]


@dataclass(frozen=True)
class LoadSize(Stage):
    """Loads the weights of a smaller size from the commit of its shot."""

    name = "load"
    method: Method
    size: Size

    def load(self, run: RunState, facts: Facts) -> None:
        """Load the weights."""
        committed = run.directory.read_shot(self.size.shot).files
        load_weights(run, committed, by_element=self.method.by_element)
        self.method.after_resuming(run.cluster)
        facts["size"] = self.size.value or 0.0


@dataclass(frozen=True)
class Export(Stage):
    """Writes one checkpoint, reloads it and measures it."""

    name = "export"
    size: Size
    kind: str
    output: OutputSection
    tasks: TasksSection | None

    def write(self, run: RunState, facts: Facts) -> None:
        """Write the checkpoint, reload it in a fresh process, and take the requested measures."""
        run.directory.check_attempt()
        folder = run.directory.path("export", f"{self.kind}{self.size.suffix}")
        entry = export(
            self.kind,
            pruned_of(run, self.size.shot),
            folder,
            output=self.output,
            tasks=self.tasks,
        )
        tell_of(entry, run, facts, self.size)

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the writing, and the reading in a process of its own, which the workers outlast.

        Tasks are not planned.
        """
        if self.kind == "gguf":
            yield needs_of_mean_squares(worker, self.name)
        size = worker.all_blocks + worker.outside
        host = worker.host + max(min(FILE_BYTES, size), worker.shapes.largest_stored)
        moved = size * (not worker.device_is_host)
        # one process reads what all shards have written
        whole = worker.shapes.width * worker.shapes.layout.num_parameters
        processes = 1 + 2 * (self.output.speed is not None)
        counts = Counted(waiting_s=processes * _PROCESS_S)
        on_disk = size + processes * whole
        yield StepPlan(self.name, worker.idle, host, 0.0, 0.0, moved, on_disk, counts=counts)
