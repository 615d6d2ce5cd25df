"""Launches, syncs, bytes and operations by step, counted and planned where there is no GPU.

``python -m benchmarks.launches`` prints two tables. The first has what the curvature pass of a tiny
model's block starts for a sequence, counted on a pretend accelerator. The second has the plans of
jobs on large models: their configurations alone are used, and times are those of an H100.
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
    GptOssConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from benchmarks.counter import Counter as Counter
from benchmarks.counter import attention_as_one_launch
from benchmarks.shaped_model import shaped_config, write_tokenizer
from ray_surgeon.checkpointing.run_directory import RunDirectory
from ray_surgeon.job import run_job
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.plan.device_resources import DEVICES, Room
from ray_surgeon.plan.plan import Plan, Planner
from ray_surgeon.plan.work import Shapes
from ray_surgeon.preparation.inputs import check, work_of
from ray_surgeon.preparation.reading import unread_texts
from ray_surgeon.preparation.stages import stages_after_shots, stages_of
from ray_surgeon.pruning.methods import method_for
from ray_surgeon.report.events import Event, Moment
from ray_surgeon.report.html_report import LivePage
from ray_surgeon.runtime.cluster import LocalCluster
from ray_surgeon.runtime.placement import place
from ray_surgeon.spec.job import JobSpec

H100 = DEVICES["h100"]
ROOM = Room(80e9, 1e12, 4e12, device_is_host=False)
"""Of a worker; eight of them share a host of 2 TB and more."""

# Counted

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
    """Return the configuration of a tiny mixture with eight experts a token, or half of all."""
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
        config: of the model.
        folder: an empty one, for the model and the run.
        device: "cpu", or "sim" in a process that has it.
        sections: of the job spec, beside those of a small one.

    Returns:
        Step -> what it came to, and the plan, with times of an H100.
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

    def listen(event: Event | Moment) -> None:
        if isinstance(event, Event) and event.worker_seconds:  # of a whole step
            counts = total.taken()
            steps = of_shots[event.shot]
            steps[event.step] = steps[event.step].plus(counts) if event.step in steps else counts

    with total, attention_as_one_launch(), patch.object(LivePage, "draw"):
        run_job(inputs, cluster, RunDirectory(inputs.spec.output.uri), listen)
    work = work_of(inputs.spec, inputs.layout, inputs.method, inputs.stages)
    planner = Planner(Shapes(inputs.layout, work, "cuda"), inputs.spec.memory, H100)
    return of_shots[0] | of_shots[1], planner.plan(inputs.placement, ROOM, cluster.stores)


def _merged(document: dict[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    for section, fields in sections.items():
        is_mapping = isinstance(fields, Mapping)
        document[section] = document.get(section, {}) | fields if is_mapping else fields
    return document


def of_a_block(name: str, device: str) -> tuple[float, float]:
    """Return launches and syncs of a block for a sequence of 256 tokens in the curvature pass.

    Args:
        name: "dense", "mixture" (128 experts), or "whole" (that with whole experts ranked).
        device: see `counted_steps`.
    """
    groups = {"dense": ["ffn"], "mixture": ["expert_channels"]}
    pruning = {"groups": groups.get(name, ["expert_channels", "experts"]), "width_multiple": 8}
    found = []
    for num_blocks in (1, 2):
        config = tiny_llama(num_blocks) if name == "dense" else tiny_mixture(num_blocks, 128)
        with tempfile.TemporaryDirectory() as folder:
            calibration = {"sequence_length": 256}
            sections = {"pruning": pruning, "calibration": calibration}
            steps, _ = counted_steps(config, Path(folder), device, **sections)
        found.append((steps["curvature"].launches, steps["curvature"].syncs))
    launches, syncs = (two - one for one, two in zip(*found, strict=True))
    return launches / SEQUENCES, syncs / SEQUENCES


# Planned

_TRAINED: dict[str, Any] = {"reconstruction": {}}
_PRESET: dict[str, Any] = {
    "pruning": {"reconstruction": {"num_epochs": 1}},
    "curvature": {"fisher": "sampled", "num_backward": 32},
}
_MIXTURE: dict[str, Any] = {
    "pruning": {"groups": ["expert_channels", "experts"]},
    "output": {"exports": ["per_block"]},
}
GPT_OSS_120B = {
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
}
JOBS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "Llama-2-7B, reconstruction": ("llama-2-7b", 1, {"pruning": _TRAINED}),
    "Llama-2-7B, reconstruction as in presets": ("llama-2-7b", 1, _PRESET),
    "Llama-3-70B": ("llama-3-70b", 8, {}),
    "Qwen3-30B-A3B": ("qwen3-30b-a3b", 1, _MIXTURE),
    "gpt-oss-120b": ("gpt-oss-120b", 8, _MIXTURE),
}
"""Name -> model, number of GPUs, and sections of the spec."""


def planned(model: str, num_gpus: int, sections: Mapping[str, Any]) -> Plan:
    """Return the plan of a job with 128 sequences of 2,048 tokens, from configurations alone."""
    text = {"source": "python-docs", "sequence_length": 2048}
    document: dict[str, Any] = {
        "version": 2,
        "name": "planned",
        "model": {"source": "x", "dtype": "bfloat16"},
        "calibration": text | {"num_sequences": 128},
        "evaluation": [text | {"name": "docs", "num_sequences": 24}],
        "pruning": {"structure": "groups", "target_sparsity": 0.2, "num_shots": 1},
        "cluster": {"num_shards": num_gpus, "gpus_per_worker": 1},
        "output": {"uri": "x"},
    }
    spec = JobSpec.model_validate(_merged(document, sections))
    is_shaped = model != "gpt-oss-120b"
    layout = ModelLayout.of(shaped_config(model) if is_shaped else GptOssConfig(**GPT_OSS_120B))
    method = method_for(spec.pruning, spec.curvature, layout, spec.model.dtype)
    last = stages_after_shots(spec, layout)
    work = work_of(spec, layout, method, stages_of(spec, layout, method, unread_texts(spec), last))
    planner = Planner(Shapes(layout, work, "cuda"), spec.memory, H100)
    room = Room(ROOM.device, 2e12 / num_gpus, ROOM.disk, device_is_host=False)
    return planner.best(place(layout, num_gpus, 1), room)


def rows_of(plan: Plan) -> list[tuple[str, ...]]:
    """Return the rows of a plan: its steps, and the seconds of a shot.

    Counts are of the worker with most launches.
    """
    rows = []
    in_shot = 0.0
    for name, shards in plan.steps.items():
        step = max(shards, key=lambda own: own.counts.launches)
        counts = step.counts
        seconds = plan.seconds[name]
        in_shot += seconds * (name not in {"load", "sampling", "export", "quantise"})
        numbers = (counts.launches, counts.syncs, counts.memory_bytes / 1e9)
        flops = (step.flops + step.float32_flops) / 1e12
        rows.append((name, *(f"{number:,.0f}" for number in numbers), f"{flops:,.0f}"))
        rows[-1] += (f"{seconds:.1f}",)
    return [*rows, ("of a shot", "", "", "", "", f"{in_shot:.1f}")]


def main(argv: Sequence[str] | None = None) -> int:
    """Count and plan, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launches", description="Count launches where there is no GPU."
    )
    parser.add_argument("--jobs", nargs="*", choices=JOBS, default=list(JOBS), help="planned ones")
    parser.add_argument("--planned", action="store_true", help="count nothing")
    arguments = parser.parse_args(argv)
    if not arguments.planned:
        # the device is there before the first backward pass, and as long as the process
        from tests import pretend_accelerator

        print("| block, sequence of 256 tokens, curvature | launches | syncs |\n|---|---|---|")  # noqa: T201
        for name in ("mixture", "whole", "dense"):
            launches, syncs = of_a_block(name, pretend_accelerator.SIM)
            print(f"| {name} | {launches:.0f} | {syncs:.2f} |")  # noqa: T201
    print(  # noqa: T201
        f"\n{H100.name}: {H100.flops['bfloat16']:.1e} FLOP/s in bfloat16, {H100.float32_flops:.1e} "
        f"in float32, {H100.memory_bytes_per_s:.1e} B/s of its memory, {H100.host_bytes_per_s:.1e} "
        f"of the host's, {H100.launch_s:.1e} s a launch, {H100.sync_s:.1e} a sync\n"
    )
    for job in arguments.jobs:
        model, num_gpus, sections = JOBS[job]
        plan = planned(model, num_gpus, sections)
        stores = f"weights on the {plan.stores.weights}, factors on the {plan.stores.factors}"
        print(f"{job} on {num_gpus}: {stores}, {plan.stores.together} sequences a call")  # noqa: T201
        print("| step | launches | syncs | GB | TFLOP | seconds |\n|---|---|---|---|---|---|")  # noqa: T201
        for row in rows_of(plan):
            print(f"| {' | '.join(row)} |")  # noqa: T201
        print()  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
