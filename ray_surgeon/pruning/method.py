"""What every pruning method has: curvature, costs, a choice, an update.

A method is one frozen object. It travels to the workers with every step, so the methods that take a
`Worker` run there and find all options in `self`; the methods that take a `Cluster` run on the
coordinator.
"""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar, Generic, TypeVar

from ray_surgeon.curvature.collector import NOTHING_BESIDE, SumsBeside
from ray_surgeon.maths.curvature import Clipping, Linear
from ray_surgeon.maths.factorised import RaisedDamping
from ray_surgeon.run_state import CalibrationText
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.wave import Tokens
from ray_surgeon.runtime.worker import LinearSummary, Worker, collective, sizes
from ray_surgeon.spec.curvature import AnyCurvature
from ray_surgeon.spec.schedule import ScheduleSection

C = TypeVar("C")

Applied = tuple[list[LinearSummary], dict[str, Any]]
"""What an update left of every linear, and what the report says beside."""


@dataclass(frozen=True)
class Scores(Generic[C]):
    """Costs of the linears that a worker owns, or of all linears."""

    costs: tuple[C, ...]  # whatever the method ranks; nothing where the costs stay on the workers
    num_parameters: int  # entries of the linears
    num_kept: int  # of them, what earlier shots kept
    # factorisations that needed more damping than asked for
    raised_damping: tuple[RaisedDamping, ...] = ()
    clipping: tuple[Clipping, ...] = ()  # further Kronecker terms that were clipped

    @staticmethod
    def merged(parts: Sequence[Scores[C]]) -> Scores[C]:
        """Return the scores of all workers: numbers and tuples are added up."""
        of_fields = zip(*(vars(part).values() for part in parts), strict=True)
        return Scores(*(functools.reduce(operator.add, of_field) for of_field in of_fields))


@dataclass(frozen=True)
class Choice:
    """What to prune in a shot."""

    threshold: float | None  # everything up to this cost; None if the method has none
    facts: Mapping[str, float | int | str]  # for the event of the step
    removed: Any = None  # what else the method's `apply` takes
    record: Mapping[str, Any] = field(default_factory=dict)  # more for the report


@dataclass(frozen=True)
class Method(ABC):
    """One way to prune, with its options."""

    by_element: ClassVar[bool] = False
    """Whether masks are of elements, or of rows and columns."""
    section: ScheduleSection  # `pruning` of the job spec
    # the section of that name; None for methods that gather their own
    curvature: AnyCurvature | None

    @property
    def has_costs(self) -> bool:
        """Whether a shot has curvature, costs and a threshold.

        Methods that prune block by block have an update alone.
        """
        return False

    @property
    def gathers(self) -> frozenset[str] | None:
        """Roles of the linears whose curvature is needed, see `LinearShape`; None for all."""
        return None

    @property
    def beside(self) -> SumsBeside:
        """What the curvature pass sums beside A and G."""
        return NOTHING_BESIDE

    @property
    def used_curvature(self) -> AnyCurvature:
        """The curvature of a method that has one."""
        assert self.curvature is not None
        return self.curvature

    def around_pass(self, cluster: Cluster, text: CalibrationText) -> AbstractContextManager[None]:
        """Do what comes before and after the pass over the calibration text.

        The weights are those from before the shot.
        """
        return nullcontext()

    def after_resuming(self, cluster: Cluster) -> None:
        """Prepare workers whose weights and masks are those of a committed shot."""
        return

    @abstractmethod
    def apply(self, cluster: Cluster, tokens: Tokens, choice: Choice, shot: int) -> Applied:
        """Prune, and update what stays.

        Args:
            cluster: after the costs, if the method has any.
            tokens: [num_sequences, sequence_length] of the calibration.
            choice: of the shot.
            shot: its number.

        Returns:
            What is left of every linear, and what the report says beside.
        """

    def of_loss(self, linears: Sequence[LinearSummary]) -> list[LinearSummary]:
        """Return what `apply` says, without predictions if the curvature is not of the loss.

        Costs are not in nats then.
        """
        if self.curvature is not None and self.curvature.is_of_loss:
            return list(linears)
        return [replace(linear, predicted=None) for linear in linears]

    def linear(self, worker: Worker, name: str) -> Linear:
        """Return a linear of a worker as the mathematics takes it."""
        W = worker.shard.weight(name)
        factors = worker.shard.factors(name)
        has_bias = worker.layout.shapes[name].has_bias
        return Linear(name, W, factors, has_bias, self.used_curvature.as_damping)


class Ranking(Method):
    """A method that ranks what it may remove by costs, over the whole model."""

    costs: ClassVar[Callable[..., Scores[Any]]]
    """What a worker does for `score`."""

    @property
    def has_costs(self) -> bool:
        """Whether a shot has curvature, costs and a threshold."""
        return True

    def score(self, cluster: Cluster, shot: int) -> Scores[Any]:
        """Take the costs of everything that may be pruned.

        Whatever is kept for `apply` stays on the workers.
        """
        return self.taken(cluster)

    @abstractmethod
    def choose(self, cluster: Cluster, scores: Scores[Any], shot: int) -> Choice:
        """Choose what to prune; may ask the workers again."""

    def taken(self, cluster: Cluster, *arguments: Any) -> Scores[Any]:
        """Let all workers take the `costs` of their linears, and return all of them."""
        cluster.progress.begin(unit="linears")
        return Scores.merged(cluster.run_all(self.costs, *arguments))


class ByThreshold(Ranking):
    """A method that ranks what it may remove from every linear on the linear's own."""

    update: Any
    """How kept weights make up for pruned ones, as its candidates take it."""

    # On a worker

    def scores(self, worker: Worker, candidates: dict[str, Any], costs: Any = ()) -> Scores[Any]:
        """Keep candidates, by linear, for the update, and return what the coordinator gets."""
        worker.state.candidates = candidates
        raised = tuple(event for c in candidates.values() for event in c.basis.raised_damping)
        clipped = tuple(event for c in candidates.values() for event in c.basis.clipping)
        return Scores(tuple(costs), *sizes(worker), raised, clipped)

    def share(self, worker: Worker) -> None:
        """Send all linears from their owners to the other replicas."""
        worker.share_linears(worker.shard.linears)

    @collective
    def prune(self, worker: Worker, threshold: float) -> tuple[LinearSummary, ...]:
        """Remove what costs at most the threshold, update the rest, and send it to replicas."""
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
        self.share(worker)
        return tuple(worker.summary(name, *removal) for name, removal in removals.items())

    # On the coordinator

    def apply(self, cluster: Cluster, tokens: Tokens, choice: Choice, shot: int) -> Applied:
        """Prune and update."""
        assert choice.threshold is not None
        cluster.progress.begin(unit="linears")
        return list(chain.from_iterable(cluster.run_all(self.prune, choice.threshold))), {}
