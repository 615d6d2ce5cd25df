"""Where results go, and which checkpoints a run ends in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from ray_surgeon.spec.base import Address, Positive, Section
from ray_surgeon.spec.targets import SpeedSection

KERNEL_COLUMNS = 128
"""Kernels for quantised weights take multiples of so many columns on each device.

Blocks of FP8 have so many, and vLLM's kernel for four bits takes no fewer at a time.
"""
DECI_MULTIPLE = 256
"""DeciLM rounds the width of a feed-forward layer up to a multiple of this."""
GgufKind = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


class QuantizeSection(Section):
    """A quantised copy of the export uniform."""

    scheme: Literal["fp8", "int8", "w4a16"]
    """fp8 and int8: weights with a scale for each row, activations with one for each token; w4a16:
    weights of four bits, with a scale for each group of columns, rounded by the calibration text
    (GPTQ)
    """
    group_size: Positive | None = None
    """For scheme w4a16: number of columns that share a scale; null: 128"""

    @property
    def columns_together(self) -> int:
        """Columns that share a scale, where a scheme has groups."""
        return self.group_size or 128

    def problems(self) -> Iterator[str]:
        """Yield what the scheme does not have."""
        if self.group_size is not None and self.scheme != "w4a16":
            yield (
                f"group_size: is not an option of {self.scheme}, whose rows have one scale; remove "
                "it"
            )


class OutputSection(Section):
    """Where results go."""

    uri: Address = Field(min_length=1)
    """Run directory: a local path or an fsspec URI such as s3://bucket/runs/name"""
    keep_shots: int = Field(2, ge=0)
    """Keep the tensors of the last N shots, each of the size of the dense blocks, and one more
    while a shot is written; 0 keeps all. The record of a shot is always kept
    """
    exports: tuple[Literal["masked", "uniform", "per_block", "deci", "gguf"], ...] = ("masked",)
    """Checkpoints to write at the end. masked: dense shapes with zeros, refused for whole experts.
    With structure groups also: uniform: really smaller, for plain classes; per_block: really
    smaller, widths differ by block, with modeling code beside the weights; deci: likewise, as
    DeciLM; gguf: files for llama.cpp, where widths that differ need a Llama or Mistral
    """
    gguf: tuple[GgufKind, ...] | None = Field(None, min_length=1)
    """For the export gguf: types of the matrices, one file for each; null: bf16 alone"""
    quantize: QuantizeSection | None = None
    """Also write the export uniform quantised, in the format compressed-tensors, which vLLM loads;
    null: do not
    """
    speed: SpeedSection | None = None
    """Measure how fast the exports uniform, per_block and deci are beside the dense model; null: do
    not
    """

    def problems(self) -> Iterator[str]:
        """Yield what exports do not go with."""
        for name, kinds in (("exports", self.exports), ("gguf", self.gguf or ())):
            if len(set(kinds)) < len(kinds):
                yield f"{name}: {list(kinds)} names one twice; remove it"
        if self.gguf is not None and "gguf" not in self.exports:
            yield "gguf: exports has no gguf; add it, or remove the field gguf"
        if self.quantize is not None and "uniform" not in self.exports:
            yield "quantize: is a copy of the export uniform; add it to exports, or remove quantize"
        if self.speed is not None and not set(self.exports) - {"masked", "gguf"}:
            yield (
                "speed: exports has no smaller model to measure; add uniform, per_block or deci, "
                "or remove speed"
            )
