"""The checkpoints in which a run ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ray_surgeon.export.folder import Pruned
from ray_surgeon.export.for_engines import Shrinking, check_quantised, export_quantised
from ray_surgeon.export.kinds import check_export, export
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.plan.needs import StepPlan, WorkerView
from ray_surgeon.spec.evaluation import TasksSection
from ray_surgeon.spec.sections import OutputSection, QuantizeSection
from ray_surgeon.stages.stage import Facts, RunState, Stage


def _pruned(run: RunState) -> Pruned:
    facts = run.report.model_card_facts()
    return Pruned(run.cluster, run.layout, run.model, facts, run.calibration[0])


@dataclass(frozen=True)
class Export(Stage):
    """One checkpoint, reloaded and measured."""

    name = "export"
    kind: str
    output: OutputSection
    tasks: TasksSection | None

    @staticmethod
    def of(
        output: OutputSection,
        tasks: TasksSection | None,
        layout: ModelLayout,
        shrinking: Shrinking | None,
    ) -> list[Export]:
        """Return a stage for every export.

        Args:
            output: of the job spec.
            tasks: to measure; None for none.
            layout: of the dense model.
            shrinking: what pruning may leave; None if it leaves the shapes as they are.

        Raises:
            ValueError: the model cannot have one of them; says why, and what to export instead.
        """
        if shrinking is not None:
            for kind in output.exports:
                check_export(kind, layout, shrinking)
        return [Export(kind, output, tasks) for kind in output.exports]

    def run(self, run: RunState, facts: Facts) -> None:
        """Write it, reload it in a process of its own, and measure what is wanted."""
        run.directory.check_attempt()
        uri = run.directory.path("export", self.kind)
        exported = export(self.kind, _pruned(run), uri, self.output, self.tasks)
        run.report.exports.append(exported)
        names = ("kind", "uri", "size_bytes", "reload_max_logit_difference")
        facts |= {name: exported[name] for name in names if name in exported}


@dataclass(frozen=True)
class Quantise(Stage):
    """The quantised copy of the export uniform; it may round the workers' weights, for good."""

    name = "quantise"
    section: QuantizeSection

    @staticmethod
    def of(
        section: QuantizeSection | None, layout: ModelLayout, shrinking: Shrinking | None
    ) -> Quantise | None:
        """Return the stage if a copy is wanted; see `Export.of`."""
        if section is None:
            return None
        assert shrinking is not None, "uniform exports are of coupled groups"
        check_quantised(layout, shrinking, section)
        return Quantise(section)

    def run(self, run: RunState, facts: Facts) -> None:
        """Write and evaluate the copy."""
        (uniform,) = (entry for entry in run.report.exports if entry["kind"] == "uniform")
        pruned = _pruned(run)
        texts = run.calibration, run.texts
        target = f"{uniform['uri']}-{self.section.scheme}"
        copy = export_quantised(pruned, uniform, target, *texts, self.section)
        pruned.write_card(copy)
        run.report.exports.append(copy)
        facts |= {name: copy[name] for name in ("kind", "uri", "size_bytes")}

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the rounding by the calibration text; other schemes need none."""
        if self.section.scheme != "w4a16":
            return
        shapes = [(linear.num_rows, linear.num_columns) for linear in worker.linears]
        of_linears = [(16.0 * (C**2 + R * C), 2 / 3 * C**3 + 2.0 * R * C**2) for R, C in shapes]
        yield worker.block_by_block(self.name, of_linears)
