"""Targets for the size or speed of the whole model, and the shots in which it gets there."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field, Tag, model_validator

from ray_surgeon.config.base import (
    Count,
    Fraction,
    Location,
    NumBytes,
    Positive,
    Section,
    Size,
    by_tag,
    tag,
)
from ray_surgeon.config.curvature import AnyCurvature
from ray_surgeon.errors import ConfigError


class SpeedSection(Section):
    """A timed request: a batch of prompts (prefill), then new tokens (decode)."""

    batch_size: Positive = 1
    """Number of prompts in a batch"""
    prompt_length: int = Field(512, gt=1)
    """Tokens of each prompt"""
    num_new_tokens: int = Field(32, gt=1)
    """Number of tokens to generate after each prompt"""
    num_repeats: Positive = 5
    """Number of measurements per model; the models alternate"""
    num_threads: Positive = 1
    """Number of torch threads on a CPU"""


class _Target(Section):
    @property
    def unit(self) -> str:
        """The name of the field of the limited quantity."""
        return next(unit for unit in UNITS if hasattr(self, unit))

    @property
    def value(self) -> float:
        """The value of that field."""
        return float(getattr(self, self.unit))

    def of(self, value: float) -> _Target:
        """Return the target with another value.

        Raises:
            ValueError: the value is not valid for the target.
        """
        fields = self.model_dump()
        fields[self.unit] = value
        return type(self).model_validate(fields)

    def allowed(self, dense: float) -> float:
        """Return the maximum for the final model, in the unit of the budget.

        Args:
            dense: need of the dense model, in the unit of the budget, e.g. seconds.
        """
        return self.value

    def named(self, need: float, dense: float) -> str:
        """Return a model's need in the target's unit; empty if the budget has this unit."""
        return ""


class ParametersTarget(_Target):
    """Parameters of the whole model."""

    parameters: Count
    """Maximum number of parameters of the whole model, including embeddings; tied ones count once;
    a number, or for example 6M
    """


class BytesTarget(_Target):
    """Bytes of the weights."""

    bytes: NumBytes
    """Maximum size of the weights of the whole model in the dtype of the job, in bytes, or for
    example 2GB or 1.5GiB
    """


class FlopsTarget(_Target):
    """Floating-point operations per token."""

    flops: Count
    """Maximum number of floating-point operations per token, averaged over a prompt; a number, or
    for example 1.5G
    """
    prompt_length: int = Field(512, gt=1)
    """Number of tokens in the prompt"""


class TimedTarget(_Target):
    """Seconds of a request: the sum of the times of all blocks and of the rest of the model."""

    table: Location
    """File with the seconds per block in the serving engine (transformers, vLLM or llama.cpp) for
    the table's own request, a path or an fsspec URI; `python -m examples.engine_table MODEL TABLE
    --engine transformers` in the repository measures one
    """

    @model_validator(mode="before")
    @classmethod
    def _check_table(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("table") is None:
            raise ValueError(
                "table is missing: a target of speed needs the seconds that blocks take in the "
                "engine that will serve; measure them by `python -m examples.engine_table MODEL "
                "TABLE --engine transformers` (or vllm, llamacpp) and give the file"
            )
        return given

    @property
    def of_decode(self) -> bool:
        """Whether only the new tokens of the request count, and not its prompt."""
        return isinstance(self, DecodeTarget)


class LatencyTarget(TimedTarget):
    """Seconds of a request."""

    latency_s: float = Field(gt=0)
    """Maximum number of seconds for a request"""


class SpeedupTarget(TimedTarget):
    """Speed of a request."""

    speedup: float = Field(gt=1)
    """Ratio of the dense model's time for a request to the pruned model's"""

    def allowed(self, dense: float) -> float:
        """Return the seconds of a request."""
        return dense / self.speedup

    def named(self, need: float, dense: float) -> str:
        """Return the speedup."""
        return f" (speedup {dense / need:.4g})"


class DecodeTarget(TimedTarget):
    """Speed of new tokens."""

    decode_tokens_per_s: float = Field(gt=0)
    """New tokens per second after the prompt, summed over the prompts of a batch"""

    def allowed(self, dense: float) -> float:
        """Return the seconds of a new token."""
        return 1 / self.decode_tokens_per_s

    def named(self, need: float, dense: float) -> str:
        """Return the rate."""
        return f" (decode_tokens_per_s {1 / need:.4g})"


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


class ScheduleSection(Section):
    """Shots and the distribution of the removal over them."""

    num_shots: int = Field(5, ge=1, le=1000)
    """Number of shots; each collects its own curvature and removes (or saves) the same amount"""
    sparsities: tuple[Fraction, ...] | None = None
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
        """Numbers of the shots after which the model has a requested size."""
        return (self.shots,)

    @property
    def last_sparsity(self) -> float | None:
        """The target, if it is a sparsity."""
        return getattr(self, "target_sparsity", None)

    @property
    def checks_itself(self) -> bool:
        """Whether a stage is measured on windows held aside."""
        sections = [part for part in vars(self).values() if isinstance(part, Section)]
        return any(section.is_checked for section in sections)

    def problem_with(self, curvature: AnyCurvature) -> ConfigError | None:
        """Return the conflict between this section and a curvature, if there is one."""
        return None

    @property
    def targets(self) -> tuple[float, ...]:
        """Sparsity at the end of every shot; empty if the target is not a sparsity."""
        if self.last_sparsity is None:
            return ()
        return self.fractions(self.last_sparsity)

    def removed_in(self, shot: int) -> float:
        """Return the estimated fraction of the remaining parameters removed in a shot.

        It assumes a final sparsity of 0.2 if the target is not a sparsity.
        """
        last = 0.2 if self.last_sparsity is None else self.last_sparsity
        fractions = (0.0, *self.fractions(last))
        before = fractions[shot - 1]
        after = fractions[shot]
        return (after - before) / (1 - before)

    def fractions(self, last: float) -> tuple[float, ...]:
        """Return the fraction removed at the end of every shot; `last` is the last one."""
        return self.sparsities or self._spread(0.0, last)

    def _spread(self, first: float, last: float) -> tuple[float, ...]:
        """Return the fraction removed after each of num_shots shots that begin at `first`."""
        fractions = []
        for shot in range(1, self.num_shots + 1):
            part = shot / self.num_shots
            fractions.append(first + (last - first) * part)
        return tuple(fractions)

    def problems(self) -> Iterator[ConfigError]:
        """Yield conflicts of `sparsities` with other fields."""
        if self.sparsities is None:
            return
        last = self.last_sparsity
        steps = [0.0, *self.sparsities]
        if last is None:
            yield ConfigError(
                field="sparsities",
                found="do not go with target",
                remedy="remove them, or use num_shots",
            )
        elif steps != sorted(set(steps)) or steps[-1] != last:
            yield ConfigError(
                field="sparsities",
                found=f"must rise to target_sparsity {last}",
                remedy="correct them, or use num_shots",
            )
        if self.num_shots != 5:
            yield ConfigError(
                field="sparsities",
                found="takes the place of num_shots",
                remedy="remove that",
            )


class _NoPruning(ScheduleSection):
    @property
    def takes_curvature(self) -> bool:
        """Nothing is ranked."""
        return False


NO_PRUNING = _NoPruning(num_shots=1)
"""Schedule for `pruning: null`: one shot without removals."""


class SparsitySection(ScheduleSection):
    """Shots of a method that removes a fraction of the linears' parameters."""

    target_sparsity: Fraction
    """Fraction of the parameters of the blocks' linears to remove, biases included: 0.3 or 30%"""


class FamilySection(ScheduleSection):
    """Shots of a family of sizes."""

    sizes: tuple[Size, ...] | None = None
    """A family of sizes from one run: rising sparsities, in place of target_sparsity, or values in
    the target's unit, ending at the target. Each size takes num_shots shots from the previous one
    and a final recovery, and has its own exports
    """
    target: TargetSection | None = None
    """In place of target_sparsity: maximum size or time of the final model"""

    @property
    def shots(self) -> int:
        """Number of shots."""
        return super().shots * max(1, len(self.sizes or ()))

    @property
    def size_shots(self) -> tuple[int, ...]:
        """Numbers of the shots after which the model has one of the sizes."""
        first = super().shots
        return tuple(range(first, self.shots + 1, first))

    @property
    def last_sparsity(self) -> float | None:
        """The last size, or the target, if it is a sparsity."""
        if self.target is not None:
            return None
        if self.sizes:
            return self.sizes[-1]
        return super().last_sparsity

    def fractions(self, last: float) -> tuple[float, ...]:
        """Return the fraction removed at the end of every shot; `last` is the last one."""
        if self.sparsities or not self.sizes:
            return super().fractions(last)
        if self.target is None:
            return self.through(self.sizes)
        number = len(self.sizes)
        return self.through([last * (place + 1) / number for place in range(number)])

    def through(self, ends: Iterable[float]) -> tuple[float, ...]:
        """Return the fraction removed at the end of every shot, given those of the sizes."""
        fractions: list[float] = []
        for first, last in itertools.pairwise((0.0, *ends)):
            fractions.extend(self._spread(first, last))
        return tuple(fractions)

    def problems(self) -> Iterator[ConfigError]:
        """Yield conflicts of `sizes` with other fields."""
        if self.sizes is None:
            return
        sizes = list(self.sizes)
        if self.target is not None:
            needs = [self.target.of(size).allowed(1.0) for size in sizes]
            ends_at_target = needs[-1:] == [self.target.allowed(1.0)]
            falls = needs == sorted(set(needs), reverse=True)
            if not ends_at_target or not falls:
                yield ConfigError(
                    field="sizes",
                    found=f"got {sizes}",
                    remedy="with target, give smaller and smaller models that end at it",
                )
        elif sizes != sorted(set(sizes)) or not 0 < max(sizes, default=0) < 1:
            yield ConfigError(
                field="sizes",
                found=f"got {sizes}",
                remedy="give sparsities that rise, such as [0.1, 0.2]",
            )
        if self.sparsities is not None:
            yield ConfigError(
                field="sizes",
                found="takes the place of sparsities",
                remedy="remove one of them",
            )
