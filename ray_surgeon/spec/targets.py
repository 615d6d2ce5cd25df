"""How much a run removes, and in how many shots."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, Tag

from ray_surgeon.spec.base import Positive, Section, by_tag, tag

if TYPE_CHECKING:
    from ray_surgeon.stages.curvature.section import AnyCurvature


class ScheduleSection(Section):
    """Shots and how the removal is spread over them."""

    num_shots: int = Field(5, ge=1, le=1000)
    """Shots, each with a curvature of its own, which remove (or save) the same amount"""
    sparsities: tuple[float, ...] | None = None
    """Sparsity at the end of every shot, in place of num_shots; the last one is target_sparsity"""

    @property
    def takes_curvature(self) -> bool:
        """Whether a job with this section has a section `curvature`."""
        return True

    @property
    def shots(self) -> int:
        """Number of shots."""
        return self.num_shots if self.sparsities is None else len(self.sparsities)

    @property
    def size_shots(self) -> tuple[int, ...]:
        """Numbers of the shots after which the model has a size that is asked for."""
        return (self.shots,)

    @property
    def last_sparsity(self) -> float | None:
        """The target, if it is a sparsity."""
        return getattr(self, "target_sparsity", None)

    @property
    def num_further_windows(self) -> int:
        """Windows that a stage reads beside the calibration's, from the same texts."""
        return 0

    @property
    def checks_itself(self) -> bool:
        """Whether a stage measures itself on windows held aside, as its section says."""
        sections = (part for part in vars(self).values() if isinstance(part, Section))
        return any(section.is_checked for section in sections)

    def problem_with(self, curvature: AnyCurvature) -> str | None:
        """Return why this section and a curvature do not go together, if so."""
        return None

    @property
    def targets(self) -> tuple[float, ...]:
        """Sparsity at the end of every shot; none if the target is no sparsity."""
        return () if self.last_sparsity is None else self.fractions(self.last_sparsity)

    def removed_in(self, shot: int) -> float:
        """Return about which share of what is left goes in a shot.

        Of a target that is no sparsity it is a fifth over all shots.
        """
        last = 0.2 if self.last_sparsity is None else self.last_sparsity
        before, after = (0.0, *self.fractions(last))[shot - 1 : shot + 1]
        return (after - before) / (1 - before)

    def fractions(self, last: float) -> tuple[float, ...]:
        """Return the fraction removed at the end of every shot; `last` is the last one."""
        return self.sparsities or self._spread(0.0, last)

    def _spread(self, first: float, last: float) -> tuple[float, ...]:
        """Return the fraction removed after each of num_shots shots that begin at `first`."""
        each = (last - first) / self.num_shots
        return tuple(first + each * shot for shot in range(1, self.num_shots + 1))

    def problems(self) -> Iterator[str]:
        """Yield what `sparsities` does not go with."""
        if self.sparsities is None:
            return
        last = self.last_sparsity
        steps = [0.0, *self.sparsities]
        if steps != sorted(set(steps)) or steps[-1] != last:
            yield f"sparsities: must rise to target_sparsity {last}, or use num_shots"
        if self.num_shots != 5:
            yield "sparsities: takes the place of num_shots; remove that"


class _NoPruning(ScheduleSection):
    @property
    def takes_curvature(self) -> bool:
        """Nothing is ranked."""
        return False


NO_PRUNING = _NoPruning(num_shots=1)
"""Stands for `pruning` where it is null: one shot, which removes nothing."""


class SparsitySection(ScheduleSection):
    """Shots of a method that removes a fraction of the linears' parameters."""

    target_sparsity: float = Field(gt=0, lt=1)
    """Fraction of the parameters of the blocks' linears to remove, biases included"""


class FamilySection(ScheduleSection):
    """Shots that pass through several sizes of a model."""

    sizes: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = None
    """A family of sizes from one run, in place of target_sparsity: sparsities that rise. Each takes
    num_shots shots from the one before and the recovery of a last shot, and has exports of its own
    """

    @property
    def shots(self) -> int:
        """Number of shots."""
        return super().shots * len(self.sizes or (None,))

    @property
    def size_shots(self) -> tuple[int, ...]:
        """Numbers of the shots that end at a size."""
        first = super().shots
        return tuple(range(first, self.shots + 1, first))

    @property
    def last_sparsity(self) -> float | None:
        """The last size, or the target, if it is a sparsity."""
        return self.sizes[-1] if self.sizes else super().last_sparsity

    def fractions(self, last: float) -> tuple[float, ...]:
        """Return the fraction removed at the end of every shot; `last` is the last one."""
        if not self.sizes:
            return super().fractions(last)
        pairs = itertools.pairwise((0.0, *self.sizes))
        return tuple(itertools.chain.from_iterable(self._spread(*pair) for pair in pairs))

    def problems(self) -> Iterator[str]:
        """Yield what `sizes` does not go with."""
        if self.sizes is None:
            return
        if not self.sizes or list(self.sizes) != sorted(set(self.sizes)):
            yield f"sizes: got {list(self.sizes)}; give sparsities that rise, such as [0.1, 0.2]"
        if self.sparsities is not None:
            yield "sizes: takes the place of sparsities; remove one of them"


class SpeedSection(Section):
    """A request that is timed: a batch of prompts (prefill), then new tokens (decode)."""

    batch_size: Positive = 1
    """Prompts at once"""
    prompt_length: int = Field(512, gt=1)
    """Tokens of each prompt"""
    num_new_tokens: int = Field(32, gt=1)
    """Tokens to generate after it"""
    num_repeats: Positive = 5
    """Measurements of each model, or each width, taken in turns"""
    num_threads: Positive = 1
    """torch threads, on the CPU"""


class _Target(Section):
    @property
    def unit(self) -> str:
        """What is limited; a field has its name."""
        return next(unit for unit in UNITS if hasattr(self, unit))

    @property
    def value(self) -> float:
        """What is asked for."""
        return float(getattr(self, self.unit))

    def allowed(self, dense: float) -> float:
        """Return what the whole model may need in the end, of which the dense model needs so much.

        `dense` is of the budget, e.g. in seconds.
        """
        return self.value


class ParametersTarget(_Target):
    """Parameters of the whole model."""

    parameters: Positive
    """Parameters of the whole model, embeddings included, tied ones once"""


class BytesTarget(_Target):
    """Bytes of the weights."""

    bytes: Positive
    """Bytes of the weights of the whole model, in the dtype of the job"""


class FlopsTarget(_Target):
    """Floating-point operations of a token."""

    flops: Positive
    """Floating-point operations per token of a prompt, on average over the prompt"""
    prompt_length: int = Field(512, gt=1)
    """Tokens of that prompt"""


class TimedTarget(_Target):
    """Of the seconds of a request: the sum of the times of all blocks and of what is outside."""

    device: Literal["cpu", "cuda"] = "cpu"
    """cpu: measured on the first worker's machine; cuda: on its GPU"""
    request: SpeedSection = SpeedSection()
    """The request. Every width is measured request.num_repeats times at the start, and the median
    counts
    """
    table: str | None = None
    """In place of measuring: a file that `python -m examples.engine_table` wrote, with the seconds
    that blocks take in vLLM or llama.cpp, for a request of its own; a path or an fsspec URI
    """

    @property
    def of_decode(self) -> bool:
        """Whether only the new tokens of the request count, not its prompt."""
        return isinstance(self, DecodeTarget)

    def problems(self) -> Iterator[str]:
        """Yield what `table` does not go with."""
        own = {"device": self.device != "cpu", "request": self.request != SpeedSection()}
        for name in (name for name, is_given in own.items() if is_given and self.table):
            yield f"{name}: the table was measured with its own; remove it, or table"


class LatencyTarget(TimedTarget):
    """Seconds of a request."""

    latency_s: float = Field(gt=0)
    """Seconds to answer a request"""


class SpeedupTarget(TimedTarget):
    """Speed of a request."""

    speedup: float = Field(gt=1)
    """How many times as fast as by the dense model a request is answered"""

    def allowed(self, dense: float) -> float:
        """Return the seconds of a request."""
        return dense / self.speedup


class DecodeTarget(TimedTarget):
    """Speed of new tokens."""

    decode_tokens_per_s: float = Field(gt=0)
    """New tokens a second, after the prompt, of all prompts of a batch together"""

    def allowed(self, dense: float) -> float:
        """Return the seconds of a new token."""
        return 1 / self.decode_tokens_per_s


UNITS = ("parameters", "bytes", "flops", "latency_s", "speedup", "decode_tokens_per_s")

TargetSection = Annotated[
    Annotated[ParametersTarget, Tag(tag("parameters"))]
    | Annotated[BytesTarget, Tag(tag("bytes"))]
    | Annotated[FlopsTarget, Tag(tag("flops"))]
    | Annotated[LatencyTarget, Tag(tag("latency_s"))]
    | Annotated[SpeedupTarget, Tag(tag("speedup"))]
    | Annotated[DecodeTarget, Tag(tag("decode_tokens_per_s"))],
    by_tag(
        lambda get: next((unit for unit in UNITS if get(unit, None) is not None), None),
        f"one of {', '.join(UNITS[:-1])} and {UNITS[-1]}",
    ),
]
