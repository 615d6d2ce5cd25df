"""The kinds of checkpoints of a run, each reloaded in a fresh process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig

from ray_surgeon.export import folder
from ray_surgeon.export.for_engines import Shrinking, check_gguf, export_gguf
from ray_surgeon.export.speed import measure
from ray_surgeon.export.tasks import evaluate_tasks
from ray_surgeon.models import pruned_config
from ray_surgeon.models.attention import for_older_readers
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import BlockWidths, Document
from ray_surgeon.spec.evaluation import TasksSection
from ray_surgeon.spec.sections import OutputSection
from ray_surgeon.storage import files


@dataclass(frozen=True)
class Kind:
    """What there is to say of a kind."""

    loaders: Mapping[str, str]  # program -> what is known of it
    # layout, config.json of the dense model, and widths of every block -> its config.json
    document: Callable[[ModelLayout, Document, Sequence[BlockWidths]], Document]
    modules: tuple[str, ...] = ()  # files of the folder shipped that go along


_RELOADED = "reloaded and compared"
_BY_SHIPPED_CODE = {"transformers with trust_remote_code": f"{_RELOADED}, generates with a cache"}
_BY_BACKEND = "by its transformers backend, if every block has an attention; not GPT-2"
KINDS = {
    "masked": Kind(
        {"transformers": _RELOADED, "others": "whatever loads the dense model; not run"},
        lambda layout, dense, widths: dense,
    ),
    "uniform": Kind(
        {"transformers": _RELOADED, "vLLM": "an ordinary configuration of the family"},
        pruned_config.uniform_document,
    ),
    "per_block": Kind(
        _BY_SHIPPED_CODE | {"vLLM with --trust-remote-code": _BY_BACKEND},
        pruned_config.per_block_document,
        ("modeling_pruned.py",),
    ),
    "deci": Kind(
        _BY_SHIPPED_CODE | {"vLLM": "as its own DeciLM"},
        pruned_config.deci_document,
        ("modeling_decilm.py", "modeling_pruned.py"),
    ),
}


def check_export(kind: str, layout: ModelLayout, shrinking: Shrinking) -> None:
    """Refuse an export that a model cannot have, before anything starts.

    Args:
        kind: one of `KINDS`, or gguf.
        layout: of the dense model.
        shrinking: what pruning may leave.

    Raises:
        ValueError: says why, and what to export instead.
    """
    if kind == "uniform":
        pruned_config.check_uniform(layout, tuple(shrinking.fewest))
    if kind == "masked" and "experts" in shrinking.fewest:
        raise ValueError(
            "output.exports: masked keeps all shapes, and routers would go on to choose experts "
            "that are zero; export uniform"
        )
    if kind == "deci":
        pruned_config.check_deci(layout)
    if kind == "gguf":
        check_gguf(layout, shrinking)


def export(
    kind: str, pruned: folder.Pruned, uri: str, output: OutputSection, tasks: TasksSection | None
) -> dict[str, Any]:
    """Write a Hugging Face folder, reload it in a fresh process, compare and measure.

    Args:
        kind: one of `KINDS`, or gguf.
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
    rows_kept = {linear["name"]: linear["rows_kept"] for linear in pruned.facts["last"]["linears"]}
    widths = [] if kind == "masked" else pruned_config.block_widths(layout, rows_kept)
    if kind == "gguf":
        return export_gguf(pruned, uri, widths, output.gguf or ("bf16",))
    left_out = folder.norms_left_out(kind, layout, widths)
    dense = folder.dense_document(pruned.model)
    modules = KINDS[kind].modules
    size = folder.write_weights(
        pruned.cluster, uri, masked=kind == "masked", left_out=left_out, stored=not modules
    )
    document = KINDS[kind].document(layout, dense, widths)
    is_of_family = document["model_type"] == dense["model_type"]
    folder.copy_small_files(pruned.model, uri, another_type=not is_of_family)
    files.write_json(files.join(uri, "config.json"), for_older_readers(document))
    for module in modules:
        files.write_text(files.join(uri, module), shipped_source(module, layout.config))
    trusts = ", trust_remote_code=True" if modules else ""
    entry: dict[str, Any] = {"kind": kind, "uri": uri, "size_bytes": size}
    entry["loaders"] = _loaders(kind, layout, widths)
    entry["load"] = f'AutoModelForCausalLM.from_pretrained("{uri}"{trusts})'
    entry["reload_max_logit_difference"] = folder.reload_difference(pruned, uri)
    if widths:
        entry["widths"] = [[width.num_channels, width.num_kv_heads] for width in widths]
    if layout.num_experts and widths:
        entry["experts"] = [list(width.experts) for width in widths]
    if output.speed is not None and kind != "masked":
        entry["speed"] = measure(pruned.cluster, uri, dense, output.speed)
    if tasks is not None:
        entry["tasks"] = evaluate_tasks(pruned.cluster, uri, tasks)
    pruned.write_card(entry)
    return entry


def _loaders(kind: str, layout: ModelLayout, widths: Sequence[BlockWidths]) -> dict[str, str]:
    """Return what is known of programs: program -> how it loads an export."""
    loaders = dict(KINDS[kind].loaders)
    has_fewer_heads = kind == "uniform" and widths[0].num_kv_heads < layout.heads.num_kv
    if has_fewer_heads and not layout.family.has_free_heads_in_vllm:
        loaders["vLLM"] = (
            "with --model-impl transformers; its own class wants heads that fill the hidden size"
        )
    if kind == "per_block" and layout.num_experts:
        del loaders["vLLM with --trust-remote-code"]
        loaders["vLLM"] = "not run"
    return loaders


def shipped_source(module: str, config: PretrainedConfig) -> str:
    """Return the source of a shipped module, its base classes those of the dense model's family."""
    text = (Path(__file__).parent / "shipped" / module).read_text(encoding="utf-8")
    of_family = {
        "LlamaConfig": type(config),
        "LlamaForCausalLM": AutoModelForCausalLM._model_mapping[type(config)],
        "LlamaModel": AutoModel._model_mapping[type(config)],
    }
    for dense, kind in of_family.items():
        text = text.replace(f"{dense} as", f"{kind.__name__} as")
    return text.replace("pruned_llama", f"pruned_{config.model_type}")
