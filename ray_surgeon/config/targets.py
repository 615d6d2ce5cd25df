"""Targets for the size or speed of the whole model, and timed requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, Tag, model_validator

from ray_surgeon.config.base import Location, Positive, Section, by_tag, tag


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

    parameters: Positive
    """Maximum number of parameters of the whole model, including embeddings; tied ones count once
    """


class BytesTarget(_Target):
    """Bytes of the weights."""

    bytes: Positive
    """Maximum size of the weights of the whole model in bytes, in the dtype of the job"""


class FlopsTarget(_Target):
    """Floating-point operations per token."""

    flops: Positive
    """Maximum number of floating-point operations per token, averaged over a prompt"""
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
