"""The kinds of checkpoints of a run, each reloaded in a fresh process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray_surgeon.export import folder
from ray_surgeon.export.for_engines import check_gguf, check_quantised, export_gguf
from ray_surgeon.export.speed import measure
from ray_surgeon.export.tasks import evaluate_tasks
from ray_surgeon.models import pruned_config
from ray_surgeon.models.attention import for_older_readers
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import BlockWidths
from ray_surgeon.models.width_limits import WidthLimits
from ray_surgeon.spec.evaluation import TasksSection
from ray_surgeon.spec.sections import OutputSection, QuantizeSection
from ray_surgeon.storage import files

_RELOADED = "reloaded and compared"


def check_exports(output: OutputSection, layout: ModelLayout, shrinking: WidthLimits) -> None:
    """Refuse exports that a model cannot have, before anything starts.

    Args:
        output: of the job spec.
        layout: of the dense model.
        shrinking: what pruning may leave.

    Raises:
        ValueError: says why, and what to export instead.
    """
    if "uniform" in output.exports:
        pruned_config.check_uniform(layout, tuple(shrinking.fewest))
    if "masked" in output.exports and "experts" in shrinking.fewest:
        problem = "masked keeps all shapes, and routers would go on to choose zeroed experts"
        raise ValueError(f"output.exports: {problem}; export uniform")
    if "gguf" in output.exports:
        check_gguf(layout, shrinking)
    if output.quantize is not None:
        _check_quantised_experts(layout, output.quantize)
        check_quantised(layout, shrinking, output.quantize)


def _check_quantised_experts(layout: ModelLayout, section: QuantizeSection) -> None:
    if not layout.is_mixture:
        return
    problem, remedy = "", ""
    if not section.is_by_text:
        problem = "transformers loads no quantised mixture, and workers measure what they round"
        remedy = "give scheme w4a16 or w8a16, and rounding both_sides or gptq"
    if layout.family.sparse.stacked:
        problem = f"{layout.config.model_type}'s checkpoints keep experts together, without scales"
        remedy = "remove quantize, or export gguf"
    if problem:
        raise ValueError(f"output.quantize: {problem}; {remedy}")


def export(
    kind: str, pruned: folder.Pruned, uri: str, output: OutputSection, tasks: TasksSection | None
) -> dict[str, Any]:
    """Write a Hugging Face folder, reload it in a fresh process, compare and measure.

    Args:
        kind: one of `output.exports`.
        pruned: the model.
        uri: folder to write.
        output: `output` of the job spec.
        tasks: downstream tasks; None for none.

    Returns:
        The export's entry in the report.

    Raises:
        RuntimeError: the fresh process cannot load it, or computes something else.
    """
    layout = pruned.layout
    is_masked = kind == "masked"
    widths = [] if is_masked else pruned_config.block_widths(layout, pruned.rows_kept)
    blocks = list(range(layout.num_blocks)) if is_masked else pruned.blocks
    if kind == "gguf":
        return export_gguf(pruned, uri, widths, output.gguf or ("bf16",))
    dense = folder.dense_document(pruned.model)
    has_code = kind == "per_block"
    narrowed = pruned_config.per_block_document if has_code else pruned_config.uniform_document
    whole = pruned_config.shallower(layout, dense, blocks)
    document = narrowed(layout, whole, widths) if widths else dense
    left_out = pruned_config.left_out(layout, dict(zip(blocks, widths, strict=False)))
    size = folder.write_weights(pruned.cluster, uri, blocks, kind, left_out)
    is_of_family = document["model_type"] == dense["model_type"]
    folder.copy_small_files(pruned.model, uri, another_type=not is_of_family)
    files.write_json(files.join(uri, "config.json"), for_older_readers(document))
    if has_code:
        files.write_text(files.join(uri, folder.SHIPPED), folder.shipped_source(layout.config))
    trusts = ", trust_remote_code=True" if has_code else ""
    entry: dict[str, Any] = {"kind": kind, "uri": uri, "size_bytes": size}
    entry["loaders"] = _loaders(kind, layout, widths)
    entry["load"] = f'AutoModelForCausalLM.from_pretrained("{uri}"{trusts})'
    entry["reload_max_logit_difference"] = folder.reload_difference(pruned, uri)
    if widths:
        entry["widths"] = [[width.num_channels, width.num_kv_heads] for width in widths]
    if len(blocks) < layout.num_blocks:
        entry["blocks"] = blocks
    if layout.num_experts and widths:
        entry["experts"] = [list(width.experts) for width in widths]
    if output.speed is not None and widths:
        entry["speed"] = measure(pruned.cluster, uri, dense, output.speed)
    if tasks is not None:
        entry["tasks"] = evaluate_tasks(pruned.cluster, uri, tasks)
    return entry


def _loaders(kind: str, layout: ModelLayout, widths: Sequence[BlockWidths]) -> dict[str, str]:
    """Return what is known of programs: program -> how it loads an export."""
    if kind == "masked":
        return {"transformers": _RELOADED, "others": "whatever loads the dense model; not run"}
    if kind == "uniform":
        if widths[0].num_kv_heads == layout.heads.num_kv or layout.family.has_free_heads_in_vllm:
            return {"transformers": _RELOADED, "vLLM": "an ordinary configuration of the family"}
        vllm = "its own class wants heads that fill the hidden size"
        return {"transformers": _RELOADED, "vLLM": f"with --model-impl transformers; {vllm}"}
    loaders = {"transformers with trust_remote_code": f"{_RELOADED}, generates with a cache"}
    if layout.num_experts:
        return loaders | {"vLLM": "not run"}
    vllm = "by its transformers backend, if every block has an attention; not GPT-2"
    return loaders | {"vLLM with --trust-remote-code": vllm}
