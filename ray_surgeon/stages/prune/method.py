"""What every pruning method has: curvature, costs, a choice, an update.

A method is one frozen object. It travels to the workers with every step, so the methods that take a
`Worker` run there and find all options in `self`; the methods that take a `Cluster` run on the
coordinator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Concatenate, Generic, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from ray_surgeon.maths.curvature import Clipping, RaisedDamping
from ray_surgeon.maths.linear import Linear
from ray_surgeon.models.layout import LinearShape, ModelLayout
from ray_surgeon.plan.work import LinearNeeds
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.worker import LinearSummary, Worker
from ray_surgeon.spec.targets import ScheduleSection
from ray_surgeon.stages.calibration import CalibrationText
from ray_surgeon.stages.curvature.section import AnyCurvature

C = TypeVar("C")
P = ParamSpec("P")

Tokens = NDArray[np.int64]
"""[num_sequences, sequence_length] of a text."""
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
        """Return the scores of all workers."""
        return Scores(
            tuple(cost for part in parts for cost in part.costs),
            sum(part.num_parameters for part in parts),
            sum(part.num_kept for part in parts),
            tuple(event for part in parts for event in part.raised_damping),
            tuple(event for part in parts for event in part.clipping),
        )


@dataclass(frozen=True)
class Choice:
    """What to prune in a shot."""

    threshold: float | None  # everything up to this cost; None if the method has none
    facts: Mapping[str, float | int | str]  # for the event of the step
    # consumer -> number of its groups, for coupled groups
    counts: Mapping[str, int] = field(default_factory=dict)
    # consumer of each expert that goes whole -> what that costs
    experts: Mapping[str, float] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)  # more for the report


@dataclass(frozen=True)
class Method(ABC):
    """One way to prune, with its options."""

    by_element: ClassVar[bool] = False
    """Whether masks are of elements, or of rows and columns."""
    has_costs: ClassVar[bool] = True
    """Whether a shot has curvature, costs and a threshold.

    Methods that prune block by block have an update alone.
    """

    section: ScheduleSection  # `pruning` of the job spec
    # the section of that name; None for methods that gather their own
    curvature: AnyCurvature | None

    @property
    def gathers(self) -> frozenset[str] | None:
        """Roles of the linears whose curvature is needed, see `LinearShape`; None for all."""
        return None

    @property
    def ranks_experts(self) -> bool:
        """Whether whole experts may be removed."""
        return False

    def reach(self, layout: ModelLayout) -> float:
        """Return the largest target that a model's shapes allow."""
        return 1.0

    @property
    def used_curvature(self) -> AnyCurvature:
        """The curvature of a method that has one."""
        assert self.curvature is not None
        return self.curvature

    def before_pass(self, cluster: Cluster, text: CalibrationText) -> None:
        """Prepare workers for the pass over the calibration text.

        The weights are those from before the shot.
        """
        return

    def after_pass(self, cluster: Cluster, text: CalibrationText) -> None:
        """Do what comes after the pass, with the same weights."""
        return

    def after_resuming(self, cluster: Cluster) -> None:
        """Prepare workers whose weights and masks are those of a committed shot."""
        return

    @abstractmethod
    def needs(self, shape: LinearShape) -> LinearNeeds | None:
        """Return what the costs and the update of a linear need.

        None if it is neither ranked nor updated by its factors.
        """

    def score(self, cluster: Cluster, shot: int) -> Scores[Any]:
        """Take the costs of everything that may be pruned, where a method has costs.

        Whatever is kept for `apply` stays on the workers.
        """
        raise NotImplementedError

    def choose(self, cluster: Cluster, scores: Scores[Any], shot: int) -> Choice:
        """Choose what to prune, where a method has costs; may ask the workers again."""
        raise NotImplementedError

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


def taken(
    cluster: Cluster,
    costs: Callable[Concatenate[Worker, P], Scores[C]],
    *args: P.args,
    **kwargs: P.kwargs,
) -> Scores[C]:
    """Let all workers take the costs of their linears, and return all of them."""
    cluster.progress.begin(unit="linears")
    return Scores.merged(cluster.run_all(costs, *args, **kwargs))
