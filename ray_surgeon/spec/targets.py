"""Targets for the size or speed of the whole model, and timed requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, Tag

from ray_surgeon.spec.base import Place, Positive, Section, by_tag, tag


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
        """The limited quantity, which is the name of a field."""
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
        """Return the most that the whole model may need in the end.

        Args:
            dense: need of the dense model, in the unit of the budget, e.g. seconds.
        """
        return self.value

    def named(self, need: float, dense: float) -> str:
        """Return a model's need in the target's unit as text, empty if the unit is the same."""
        return ""


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
    table: Place | None = None
    """In place of measuring: a file of seconds that blocks take in vLLM or llama.cpp, for a request
    of its own, as examples/engine_table.py of the repository writes it; a path or an fsspec URI
    """

    @property
    def of_decode(self) -> bool:
        """Whether only the new tokens of the request count, not its prompt."""
        return isinstance(self, DecodeTarget)

    def problems(self) -> Iterator[str]:
        """Yield conflicts of `table` with other fields."""
        if not self.table:
            return
        if self.device != "cpu":
            yield "device: the table was measured with its own; remove it, or table"
        if self.request != SpeedSection():
            yield "request: the table was measured with its own; remove it, or table"


class LatencyTarget(TimedTarget):
    """Seconds of a request."""

    latency_s: float = Field(gt=0)
    """Seconds to answer a request"""


class SpeedupTarget(TimedTarget):
    """Speed of a request."""

    speedup: float = Field(gt=1)
    """How many times as fast as the dense model the model answers a request"""

    def allowed(self, dense: float) -> float:
        """Return the seconds of a request."""
        return dense / self.speedup

    def named(self, need: float, dense: float) -> str:
        """Return the speedup."""
        return f" (speedup {dense / need:.4g})"


class DecodeTarget(TimedTarget):
    """Speed of new tokens."""

    decode_tokens_per_s: float = Field(gt=0)
    """New tokens a second, after the prompt, of all prompts of a batch together"""

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
