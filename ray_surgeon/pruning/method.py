"""The parts of every pruning method: curvature, costs, a choice, an update.

A method is one frozen object. It travels to the workers with every step: its methods that take a
`Worker` run there and find all options in `self`, and those that take a `Cluster` run on the
coordinator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar, Generic, TypeVar

from ray_surgeon.config.curvature import AnyCurvature
from ray_surgeon.config.schedule import NO_PRUNING, ScheduleSection
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.microbatch import Tokens
from ray_surgeon.distributed.worker import (
    LinearSummary,
    Worker,
    collective,
    sizes,
    summaries,
)
from ray_surgeon.factors.collector import NOTHING_BESIDE, SumsBeside, kind_of
from ray_surgeon.maths.curvature import Clipping, Linear
from ray_surgeon.maths.kronecker import RaisedDamping
from ray_surgeon.run_state import CalibrationText

C = TypeVar("C")

Applied = tuple[list[LinearSummary], dict[str, Any]]
"""Summaries of the linears after an update, and further entries for the report."""


@dataclass(frozen=True)
class Scores(Generic[C]):
    """Costs of the linears that a worker owns, or of all linears."""

    costs: tuple[C, ...]  # costs that the method ranks; empty if they stay on the workers
    num_parameters: int  # entries of the linears
    num_kept: int  # entries that earlier shots kept
    # factorisations that needed more damping than requested
    raised_damping: tuple[RaisedDamping, ...] = ()
    clipping: tuple[Clipping, ...] = ()  # further Kronecker terms that were clipped

    @staticmethod
    def merged(parts: Sequence[Scores[C]]) -> Scores[C]:
        """Return the scores of all workers together."""
        costs = list[C]()
        raised_damping = list[RaisedDamping]()
        clipping = list[Clipping]()
        for part in parts:
            costs.extend(part.costs)
            raised_damping.extend(part.raised_damping)
            clipping.extend(part.clipping)
        return Scores(
            costs=tuple(costs),
            num_parameters=sum(part.num_parameters for part in parts),
            num_kept=sum(part.num_kept for part in parts),
            raised_damping=tuple(raised_damping),
            clipping=tuple(clipping),
        )


@dataclass(frozen=True)
class Choice:
    """The selection of a shot."""

    # largest cost that is pruned; None if the method has no threshold
    threshold: float | None
    facts: Mapping[str, float | int | str]  # for the event of the step
    removed: Any = None  # further choices, in the form that the method's `apply` takes
    # further entries for the report
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method(ABC):
    """One way to prune, with its options."""

    by_element: ClassVar[bool] = False
    """Whether masks are of elements; otherwise they are of rows and columns."""
    section: ScheduleSection  # `pruning` of the job spec
    # `curvature` of the job spec; None for methods that gather their own
    curvature: AnyCurvature | None

    @property
    def has_costs(self) -> bool:
        """Whether a shot has curvature, costs and a threshold.

        Methods that prune block by block have only an update.
        """
        return False

    @property
    def gathers(self) -> frozenset[str] | None:
        """Roles of the linears whose curvature is needed (see `LinearShape`); None for all."""
        return None

    @property
    def beside(self) -> SumsBeside:
        """Sums of the curvature pass beside A and G."""
        return NOTHING_BESIDE

    @property
    def used_curvature(self) -> AnyCurvature:
        """The `curvature` section of a method that has one."""
        assert self.curvature is not None
        return self.curvature

    def around_pass(
        self,
        cluster: Cluster,
        text: CalibrationText,
    ) -> AbstractContextManager[None]:
        """Return a context in which the pass over the calibration text runs.

        The weights are still those from before the shot.
        """
        return nullcontext()

    def after_resuming(self, cluster: Cluster) -> None:
        """Prepare workers that have loaded the weights and masks of a committed shot."""
        return

    @abstractmethod
    def apply(
        self,
        cluster: Cluster,
        tokens: Tokens,
        choice: Choice,
        shot: int,
    ) -> Applied:
        """Prune, and update the weights that stay.

        Args:
            cluster: cluster after the costs, if the method has any.
            tokens: [num_sequences, sequence_length] of the calibration.
            choice: the choice of the shot.
            shot: number of the shot.

        Returns:
            Summaries of all linears, and further entries for the report.
        """

    def of_loss(self, linears: Sequence[LinearSummary]) -> list[LinearSummary]:
        """Return the summaries of `apply`, without predictions if the curvature is not of the loss.

        In that case costs are not in nats.
        """
        if self.curvature is not None and self.curvature.is_of_loss:
            return list(linears)
        return [replace(linear, predicted=None) for linear in linears]

    def linear(self, worker: Worker, name: str) -> Linear:
        """Return a linear of a worker in the form that `ray_surgeon.maths` takes."""
        section = self.used_curvature
        linear = Linear(
            name=name,
            W=worker.shard.weight(name),
            factors=worker.shard.factors(name),
            has_bias=worker.layout.shapes[name].has_bias,
            damping=section.as_damping,
        )
        return kind_of(section).linear(worker, linear)


class Ranking(Method):
    """A method that ranks all candidates of the model by cost."""

    costs: ClassVar[Callable[..., Scores[Any]]]
    """The step of `score` that runs on a worker."""

    @property
    def has_costs(self) -> bool:
        """Whether a shot has curvature, costs and a threshold."""
        return True

    def score(self, cluster: Cluster, shot: int) -> Scores[Any]:
        """Compute the costs of everything that may be pruned.

        Intermediate results for `apply` stay on the workers.
        """
        return self.taken(cluster)

    @abstractmethod
    def choose(self, cluster: Cluster, scores: Scores[Any], shot: int) -> Choice:
        """Return the choice of a shot; may run further steps on the workers."""

    def taken(self, cluster: Cluster, *arguments: Any) -> Scores[Any]:
        """Let all workers compute the `costs` of their linears, and return all of them."""
        cluster.progress.begin(unit="linears")
        return Scores.merged(cluster.run_all(self.costs, *arguments))


class ByThreshold(Ranking):
    """A method that ranks parts of linears on their own and prunes up to one threshold."""

    update: Any
    """Options of the update of the kept weights, in the form that the candidates take."""

    # On a worker

    def scores(
        self,
        worker: Worker,
        candidates: dict[str, Any],
        costs: Any = (),
    ) -> Scores[Any]:
        """Keep the candidates for the update, and return the scores for the coordinator.

        Args:
            worker: worker with curvature.
            candidates: linear -> its candidates.
            costs: costs that the method ranks on the coordinator, if it does.
        """
        worker.state.candidates = candidates
        raised = list[RaisedDamping]()
        clipped = list[Clipping]()
        for of_linear in candidates.values():
            raised.extend(of_linear.basis.raised_damping)
            clipped.extend(of_linear.basis.clipping)
        num_parameters, num_kept = sizes(worker)
        return Scores(
            costs=tuple(costs),
            num_parameters=num_parameters,
            num_kept=num_kept,
            raised_damping=tuple(raised),
            clipping=tuple(clipped),
        )

    def share(self, worker: Worker) -> None:
        """Send all linears from their owners to the other replicas."""
        worker.share_linears(worker.shard.linears)

    @collective
    def prune(self, worker: Worker, threshold: float) -> tuple[LinearSummary, ...]:
        """Prune every candidate up to the threshold, update the rest, and send it to replicas."""
        candidates = worker.state.candidates
        worker.state.candidates = {}
        removals = dict[str, tuple[float, float]]()
        for name in worker.each(list(candidates)):
            removal, worker.masks[name] = candidates.pop(name).prune(
                self.linear(worker, name), worker.masks[name], threshold, self.update
            )
            worker.shard.set_weight(name, removal.W)
            removals[name] = removal.predicted, removal.residual
        worker.shard.drop_curvature()
        worker.state.further_terms = None
        self.share(worker)
        return tuple(
            worker.summary(name, predicted, residual)
            for name, (predicted, residual) in removals.items()
        )

    # On the coordinator

    def apply(
        self,
        cluster: Cluster,
        tokens: Tokens,
        choice: Choice,
        shot: int,
    ) -> Applied:
        """Prune and update."""
        assert choice.threshold is not None
        cluster.progress.begin(unit="linears")
        pruned = cluster.run_all(self.prune, choice.threshold)
        return list(chain.from_iterable(pruned)), {}


@dataclass(frozen=True)
class NoPruning(Method):
    """The method of a job without pruning, which only trains or exports its model."""

    section: ScheduleSection = NO_PRUNING
    curvature: None = None

    def apply(
        self,
        cluster: Cluster,
        tokens: Tokens,
        choice: Choice,
        shot: int,
    ) -> Applied:
        """Return the summaries of all linears, unchanged."""
        linears = cluster.run_all(summaries)
        return list(chain.from_iterable(linears)), {}
