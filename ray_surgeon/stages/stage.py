"""What a stage is: one step of a run, with everything that belongs to it.

A stage lies at one address: its section of the job spec, its checks, what runs on the coordinator
and on workers, what it needs of memory and time, and what it reports. A run is a list of stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.plan.needs import Beside, StepPlan, WorkerView
from ray_surgeon.report.directory import RunDirectory
from ray_surgeon.report.events import Fact, Steps
from ray_surgeon.report.record import RunReport
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.worker import LinearSummary
from ray_surgeon.spec.sections import ModelSection
from ray_surgeon.stages.calibration import CalibrationText

T = TypeVar("T")

Facts = dict[str, Fact]
"""What the line of a step says, by name."""


class Text(NamedTuple):
    """Windows on which later weights are compared with the dense model."""

    windows: NDArray[np.int64]  # [num_windows, sequence_length] tokens
    counts: NDArray[np.bool_] | None = None  # likewise, whether a token counts; None if all do


@dataclass
class RunState:
    """What the stages of a run share.

    What one stage leaves for another is an object of a class of its own, see `keep`.
    """

    cluster: Cluster
    directory: RunDirectory
    report: RunReport
    steps: Steps
    layout: ModelLayout
    model: ModelSection  # the dense model, pinned to what was checked
    calibration: NDArray[np.int64]  # [num_sequences, sequence_length] tokens, all windows
    text: CalibrationText  # the same in two parts
    texts: Mapping[str, NDArray[np.int64]]  # evaluation text -> windows
    stages: tuple[Stage, ...]  # all of the run
    num_shots: int
    num_done: int  # shots that an earlier try has committed
    shot: int = 0  # number of the present one; 0 before the first
    record: dict[str, Any] = field(default_factory=dict)  # of the present shot, for the report
    linears: list[LinearSummary] = field(default_factory=list)  # what the update of the shot left
    _kept: dict[type, Any] = field(default_factory=dict)
    _of_shot: dict[type, Any] = field(default_factory=dict)

    @property
    def resumes(self) -> bool:
        """Whether the workers' weights are those of a committed shot, not the dense model's."""
        return self.num_done > 0

    @property
    def sparsity(self) -> float:
        """Removed fraction of the linears' parameters after the update of the shot."""
        kept = sum(linear.num_kept for linear in self.linears)
        return 1 - kept / sum(linear.size for linear in self.linears)

    def begin_shot(self, shot: int) -> None:
        """Forget what belongs to the shot before."""
        self.shot = shot
        self.record = {}
        self.linears = []
        self._of_shot.clear()
        self.steps.new_shot()

    def keep(self, thing: object, *, of_shot: bool = False) -> None:
        """Keep an object for later stages, in place of one of the same class.

        Args:
            thing: to keep.
            of_shot: whether it is forgotten when the next shot begins.
        """
        (self._of_shot if of_shot else self._kept)[type(thing)] = thing

    def find(self, kind: type[T]) -> T | None:
        """Return the object of a class that is kept, if there is one."""
        thing: T | None = self._of_shot.get(kind, self._kept.get(kind))
        return thing

    def kept(self, kind: type[T]) -> T:
        """Return the object of a class that is kept."""
        thing = self.find(kind)
        assert thing is not None, f"no stage has left a {kind.__name__}"
        return thing


class Stage(ABC):
    """One stage. All methods but `run` may stay as they are here."""

    name: ClassVar[str]
    """Of its step, as in events and in the plan."""

    # On the coordinator

    def is_due(self, run: RunState) -> bool:
        """Whether there is anything to do now."""
        return True

    @abstractmethod
    def run(self, run: RunState, facts: Facts) -> None:
        """Do the work, and say in `facts` what the line of the step says."""

    def ended(self, run: RunState) -> None:
        """Do what comes after the step's event."""
        return

    def texts_to_remember(self, run: RunState) -> Mapping[str, Text]:
        """Return texts on which later weights are compared with the dense model, by name."""
        return {}

    # Before the run

    def fingerprints(self) -> Mapping[str, Any]:
        """Return what must be the same when a run goes on; None for what may be anything."""
        return {}

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return its steps with what they need."""
        return ()

    def beside(self, worker: WorkerView) -> Mapping[str, Beside]:
        """Return step -> what this stage needs in the steps of others of that name."""
        return {}

    def on_host(self, worker: WorkerView) -> float:
        """Return the bytes of the host's memory that this stage needs in all steps."""
        return 0.0
