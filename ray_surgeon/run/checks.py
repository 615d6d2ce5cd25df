"""Refuses a machine, a checkpoint or timed requests that a job cannot work with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ray_surgeon.models.checkpoint import check_checkpoint, check_tied
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.run.reading import as_input_error
from ray_surgeon.spec.cluster import LocalSection
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.targets import LatencyTarget
from ray_surgeon.storage.sources import ModelFiles


def check_machine(spec: JobSpec, *, dry_run: bool) -> None:
    """Refuse a GPU that is not here, and an output folder that goes with the job.

    Raises:
        ValueError: names the field.
    """
    section = spec.cluster
    wants_gpu = isinstance(section, LocalSection) and section.device == "cuda"
    if not dry_run and wants_gpu and not torch.cuda.is_available():
        raise ValueError(
            "cluster.gpus_per_worker: 1, but torch sees no GPU here; set it to 0, or install torch "
            "with CUDA and a driver"
        )
    if any(part.startswith("_ray_pkg_") for part in Path(spec.output.uri).parts):
        raise ValueError(
            f"output.uri: {spec.output.uri} is in Ray's copy of the working directory, which goes "
            "with the job; give a whole path or a URI"
        )


def check_weights(source: ModelFiles, layout: ModelLayout) -> Any:
    """Check the headers of a checkpoint, and return its fingerprint.

    Raises:
        ValueError: it lacks tensors, or has other shapes.
    """
    with as_input_error(f"model.source: cannot read {source.origin}"):
        shapes, fingerprint = source.shapes_and_fingerprint()
        check_checkpoint(layout, shapes, source.origin)
        if layout.tied.keys() & shapes.keys():
            check_tied(layout, shapes, source.read, source.origin)
    return fingerprint


def check_requests(spec: JobSpec, layout: ModelLayout) -> None:
    """Refuse timed requests that are longer than the table of positions.

    They would fail after all pruning.

    Raises:
        ValueError: names the field.
    """
    if not layout.family.positions:
        return
    target = getattr(spec.pruning, "target", None)
    requests = {
        "output.speed": spec.output.speed,
        "pruning.target.request": target.request if isinstance(target, LatencyTarget) else None,
    }
    longest = layout.config.max_position_embeddings
    for where, request in requests.items():
        if request is None or request.prompt_length + request.num_new_tokens <= longest:
            continue
        raise ValueError(
            f"{where}: a prompt of {request.prompt_length} tokens and {request.num_new_tokens} new "
            f"ones, but the model takes at most {longest}; give fewer"
        )
