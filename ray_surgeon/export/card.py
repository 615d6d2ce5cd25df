"""The model card of an export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CARD = """---
library_name: {library}
base_model: {source}
tags: [pruning, {tag}]
---
# {name}

{source}, pruned by {method}: {sparsity:.2%} of the parameters of the decoder blocks' linears were
removed ({structure}). {summary}
{generation}
| text | perplexity before | after |
|---|---|---|
{texts}

Calibrated on {num_sequences} x {sequence_length} tokens of {calibration}. Weights: {size} MB.
{tasks}{speed}
## Load

{load}

| program | |
|---|---|
{loaders}
"""

_METHODS = {
    "llm_surgeon": "The LLM Surgeon (arXiv 2312.17244)",
    "sparsegpt": "SparseGPT",
    "wanda": "Wanda",
}

_GENERATION = """
| beside the dense model's answers to prompts | |
|---|---|
| acceptance rate | {acceptance:.1%} |
| same most likely token | {agreement:.1%} |
| divergence, nats per token | {divergence:.3f} |
| own answer is the same for, tokens (mean) | {until:.1f} |

The acceptance rate is how often speculative decoding of the dense model would accept a token that
this model proposes: 1 minus the total variation between both distributions of the next token, in
the mean over the answers' tokens.
"""

_SPEED = """
| tokens per second, median ({device}, {dtype}, batch {batch_size}) | dense | this model | ratio |
|---|---|---|---|
| prefill of {prompt_length} tokens | {prefill_dense:.1f} | {prefill:.1f} | {prefill_ratio:.3f} |
| decode | {decode_dense:.1f} | {decode:.1f} | {decode_ratio:.3f} |
| peak memory of a process, MB | {memory_dense:.0f} | {memory:.0f} | {memory_ratio:.3f} |
"""


def model_card(
    summary: str, entry: Mapping[str, Any], source: str, facts: Mapping[str, Any]
) -> str:
    """Return the text of README.md.

    Args:
        summary: of the kind of export.
        entry: the export's entry in the report.
        source: the dense model.
        facts: see `RunReport.model_card_facts`.
    """
    calibration = facts["calibration"]
    return _CARD.format(
        source=source,
        summary=summary,
        name=facts["name"],
        sparsity=facts["sparsity"],
        structure=facts["structure"],
        tag=facts["method"].replace("_", "-"),
        method=_METHODS[facts["method"]],
        texts="\n".join(
            f"| {text} | {before:.3f} | {after:.3f} |"
            for text, (before, after) in facts["perplexity"].items()
        ),
        calibration=calibration["source"],
        num_sequences=calibration["num_sequences"],
        sequence_length=calibration["sequence_length"],
        size=f"{entry['size_bytes'] / 1e6:.1f}",
        generation=_generation(facts.get("generation")),
        tasks=_tasks(facts["tasks"], entry["tasks"]) if "tasks" in entry else "",
        speed=_speed(entry["speed"]) if "speed" in entry else "",
        library="transformers" if "from_pretrained" in entry["load"] else "llama.cpp",
        load=_load(entry),
        loaders="\n".join(
            f"| {program} | {known} |" for program, known in entry["loaders"].items()
        ),
    )


def _generation(generation: Mapping[str, Any] | None) -> str:
    if not generation:
        return ""
    numbers = {name: generation[name] for name in ("acceptance", "agreement", "divergence")}
    return _GENERATION.format(**numbers, until=generation["tokens_until_departure"]["mean"])


def _load(entry: Mapping[str, Any]) -> str:
    if "from_pretrained" in entry["load"]:
        line = entry["load"].replace(str(entry["uri"]), "folder").replace('"folder"', "folder")
        return f"```python\nfrom transformers import AutoModelForCausalLM\nmodel = {line}\n```"
    lines = [
        f"| {file['file']} | {file['size_bytes'] / 1e6:.1f} | {file['largest_error']:.2g} |"
        for file in entry["files"]
    ]
    table = "\n".join(
        [
            "| file | MB | largest error of a weight, of its matrix's largest |",
            "|---|---|---|",
            *lines,
        ]
    )
    return f"    llama-server --model {entry['files'][0]['file']}\n\n{table}"


def _tasks(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]
) -> str:
    lines = [
        f"| {task} | {metric} | {before[task][metric]:.4f} | {value:.4f} |"
        for task, metrics in after.items()
        for metric, value in metrics.items()
        if not metric.endswith("_stderr")
    ]
    return "\n".join(["", "| task | metric | before | after |", "|---|---|---|---|", *lines, ""])


def _speed(speed: Mapping[str, Any]) -> str:
    dense = speed["dense"]
    pruned = speed["pruned"]
    memory = "peak_gpu_bytes" if dense["peak_gpu_bytes"] else "peak_rss_bytes"
    return _SPEED.format(
        **{name: speed[name] for name in ("device", "dtype", "batch_size", "prompt_length")},
        prefill_dense=dense["prefill_tokens_per_s"]["median"],
        prefill=pruned["prefill_tokens_per_s"]["median"],
        prefill_ratio=speed["prefill_ratio"],
        decode_dense=dense["decode_tokens_per_s"]["median"],
        decode=pruned["decode_tokens_per_s"]["median"],
        decode_ratio=speed["decode_ratio"],
        memory_dense=dense[memory] / 1e6,
        memory=pruned[memory] / 1e6,
        memory_ratio=pruned[memory] / dense[memory],
    )
