"""Counts launches, syncs, bytes and operations of every step without a GPU.

``python -m benchmarks.launches`` prints the launches and syncs of a tiny model's block for one
sequence in the curvature pass, counted on a simulated accelerator.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from benchmarks.counter import Counter as Counter
from benchmarks.counter import attention_as_one_launch
from benchmarks.shaped_model import write_tokenizer
from ray_surgeon.checkpointing import RunDirectory
from ray_surgeon.config.job import JobSpec
from ray_surgeon.distributed.cluster import LocalCluster
from ray_surgeon.distributed.memory_plan.device_resources import DEVICES, Room
from ray_surgeon.distributed.memory_plan.planned_job import Shapes
from ray_surgeon.distributed.memory_plan.planner import Plan, Planner
from ray_surgeon.job import run_job
from ray_surgeon.preparation.inputs import check, describe_job
from ray_surgeon.report.events import Event, ProgressReport
from ray_surgeon.report.html_report import LivePage

ROOM = Room(80e9, 1e12, 4e12, device_is_host=False)
"""Memory of a worker."""

_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
SEQUENCES = 8


def tiny_llama(num_blocks: int) -> PretrainedConfig:
    """Return the configuration of a tiny dense model."""
    return LlamaConfig(**_TINY, num_hidden_layers=num_blocks)


def tiny_mixture(num_blocks: int, num_experts: int) -> PretrainedConfig:
    """Return the configuration of a tiny mixture with eight experts per token, or half of all."""
    return Qwen3MoeConfig(
        **_TINY,
        num_hidden_layers=num_blocks,
        moe_intermediate_size=32,
        num_experts=num_experts,
        num_experts_per_tok=min(8, num_experts // 2),
        head_dim=16,
        norm_topk_prob=True,
    )


def counted_steps(
    config: PretrainedConfig, folder: Path, device: str, **sections: Any
) -> tuple[dict[str, Counter], Plan]:
    """Run a job on a model with random weights in this thread, and count every step.

    Args:
        config: configuration of the model.
        folder: empty folder for the model and the run.
        device: "cpu", or "sim" in a process with the simulated accelerator.
        sections: sections of the job spec, in addition to those of a small one.

    Returns:
        The counts of each step by name, and the plan with times for an H100.
    """
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    write_tokenizer(folder / "model", config.vocab_size)
    text = {"source": "python-docs", "sequence_length": 64}
    document: dict[str, Any] = {
        "version": 2,
        "name": "counted",
        "model": {"source": str(folder / "model")},
        "calibration": text | {"num_sequences": SEQUENCES, "held_aside": 0.0},
        "evaluation": [text | {"name": "docs", "num_sequences": 2}],
        "pruning": {"structure": "groups", "target_sparsity": 0.2, "num_shots": 1},
        "cluster": {"backend": "local"},
        "output": {"uri": str(folder / "run"), "exports": []},
    }
    inputs = check(JobSpec.model_validate(_merged(document, sections)))
    cluster = LocalCluster(inputs.layout, inputs.placement, 1, device)
    total = Counter(device)
    of_shots: dict[int, dict[str, Counter]] = {0: {}, 1: {}}

    def listen(event: Event | ProgressReport) -> None:
        if isinstance(event, Event) and event.worker_seconds:  # counts of a whole step
            counts = total.taken()
            steps = of_shots[event.shot]
            steps[event.step] = (
                steps[event.step].plus(counts) if event.step in steps else counts
            )

    with total, attention_as_one_launch(), patch.object(LivePage, "draw"):
        run_job(inputs, cluster, RunDirectory(inputs.spec.output.uri), listen)
    job = describe_job(inputs.spec, inputs.layout, inputs.method, inputs.stages)
    planner = Planner(
        Shapes(inputs.layout, job, "cuda"), inputs.spec.memory, DEVICES["h100"]
    )
    return of_shots[0] | of_shots[1], planner.plan(inputs.placement, ROOM, cluster.stores)


def _merged(document: dict[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    for section, fields in sections.items():
        is_mapping = isinstance(fields, Mapping)
        document[section] = document.get(section, {}) | fields if is_mapping else fields
    return document


def of_a_block(name: str, device: str) -> tuple[float, float]:
    """Return launches and syncs of a block for a sequence of 256 tokens in the curvature pass.

    Args:
        name: "dense", "mixture" (128 experts), or "whole" (the mixture, with costs of whole
            experts).
        device: see `counted_steps`.
    """
    groups = {"dense": ["ffn"], "mixture": ["expert_channels"]}
    pruning = {
        "groups": groups.get(name, ["expert_channels", "experts"]),
        "width_multiple": 8,
    }
    found = []
    for num_blocks in (1, 2):
        config = (
            tiny_llama(num_blocks) if name == "dense" else tiny_mixture(num_blocks, 128)
        )
        with tempfile.TemporaryDirectory() as folder:
            calibration = {"sequence_length": 256}
            sections = {"pruning": pruning, "calibration": calibration}
            steps, _ = counted_steps(config, Path(folder), device, **sections)
        found.append((steps["curvature"].launches, steps["curvature"].syncs))
    launches, syncs = (two - one for one, two in zip(*found, strict=True))
    return launches / SEQUENCES, syncs / SEQUENCES


def main(argv: Sequence[str] | None = None) -> int:
    """Count, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launches",
        description="Count launches without a GPU.",
    )
    parser.parse_args(argv)
    # the device is there before the first backward pass, and as long as the process
    from tests import pretend_accelerator

    heading = "| block, sequence of 256 tokens, curvature | launches | syncs |"
    print(f"{heading}\n|---|---|---|")  # noqa: T201
    for name in ("mixture", "whole", "dense"):
        launches, syncs = of_a_block(name, pretend_accelerator.SIM)
        print(f"| {name} | {launches:.0f} | {syncs:.2f} |")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
