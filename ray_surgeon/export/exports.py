"""The stages that export a run's checkpoints, of every size that the run passes through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ray_surgeon.config.evaluation import TasksSection
from ray_surgeon.config.sections import OutputSection
from ray_surgeon.export.folder import PrunedModel
from ray_surgeon.export.kinds import export
from ray_surgeon.pruning.method import Method
from ray_surgeon.report.html_report import rendered
from ray_surgeon.run_state import Facts, RunState
from ray_surgeon.shot_weights import load_weights
from ray_surgeon.storage import files


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


def pruned_of(run: RunState, shot: int) -> PrunedModel:
    """Return the model of a run after a shot, as exports take it."""
    return PrunedModel(
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
class LoadSize:
    """Loads the weights of a smaller size from the commit of its shot."""

    name: ClassVar[str] = "load"  # of its step
    method: Method
    size: Size

    def load(self, run: RunState, facts: Facts) -> None:
        """Load the weights."""
        committed = run.directory.read_shot(self.size.shot).files
        load_weights(run, committed, by_element=self.method.by_element)
        self.method.after_resuming(run.cluster)
        facts["size"] = self.size.value or 0.0


@dataclass(frozen=True)
class Export:
    """Writes one checkpoint, reloads it and measures it."""

    name: ClassVar[str] = "export"  # of its step
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
