"""Exports: checkpoints of every size that a run passes through, reloaded and measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ray_surgeon.export.folder import Pruned
from ray_surgeon.export.kinds import export
from ray_surgeon.pruning.method import Method
from ray_surgeon.report.html_report import rendered
from ray_surgeon.run_state import Facts, RunState
from ray_surgeon.shot_weights import load_weights
from ray_surgeon.spec.evaluation import TasksSection
from ray_surgeon.spec.sections import OutputSection
from ray_surgeon.storage import files


@dataclass(frozen=True)
class Size:
    """One of the sizes that a run passes through."""

    shot: int  # after which the model has it
    value: float | None = None  # as in pruning.sizes; None where there is only one
    is_last: bool = True  # whether no shot comes after it

    @property
    def suffix(self) -> str:
        """Return what names of folders of exports end with."""
        return "" if self.is_last or self.value is None else f"-{self.value:.12g}"


def pruned_of(run: RunState, shot: int) -> Pruned:
    """Return the model of the run as exports take it, after a shot."""
    facts = run.report.model_card_facts(shot)
    return Pruned(run.cluster, run.layout, run.model, facts, run.calibration, run.texts)


def tell_of(entry: dict[str, Any], run: RunState, facts: Facts, size: Size) -> None:
    """Put an export's entry into its card, the report, and the line of its step."""
    if size.value is not None:
        entry["size"] = size.value
    about = run.report.model_card_facts(size.shot)
    card = rendered("card.md.jinja", entry=entry, source=run.model.source, facts=about)
    files.write_text(files.join(entry["uri"], "README.md"), card)
    run.report.exports.append(entry)
    for name in ("kind", "uri", "size_bytes", "reload_max_logit_difference"):
        if name in entry:
            facts[name] = entry[name]


@dataclass(frozen=True)
class LoadSize:
    """Loads the weights of a smaller size again, from its commit."""

    name: ClassVar[str] = "load"  # of its step
    method: Method
    size: Size

    def load(self, run: RunState, facts: Facts) -> None:
        """Load them."""
        committed = run.directory.read_shot(self.size.shot).files
        load_weights(run, committed, by_element=self.method.by_element)
        self.method.after_resuming(run.cluster)
        facts["size"] = self.size.value or 0.0


@dataclass(frozen=True)
class Export:
    """One checkpoint, reloaded and measured."""

    name: ClassVar[str] = "export"  # of its step
    size: Size
    kind: str
    output: OutputSection
    tasks: TasksSection | None

    def write(self, run: RunState, facts: Facts) -> None:
        """Write it, reload it in a process of its own, and measure what is wanted."""
        run.directory.check_attempt()
        folder = run.directory.path("export", f"{self.kind}{self.size.suffix}")
        entry = export(self.kind, pruned_of(run, self.size.shot), folder, self.output, self.tasks)
        tell_of(entry, run, facts, self.size)
