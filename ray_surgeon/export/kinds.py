"""The kinds of checkpoints of a run, each reloaded in a fresh process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig

from ray_surgeon.export.card import model_card
from ray_surgeon.export.folder import (
    copy_small_files,
    dense_document,
    reload_difference,
    write_weights,
)
from ray_surgeon.export.for_engines import Shrinking, check_gguf, export_gguf
from ray_surgeon.export.speed import measure
from ray_surgeon.export.tasks import evaluate_tasks
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import (
    BlockWidths,
    Document,
    block_widths,
    check_deci,
    check_uniform,
    deci_document,
    for_older_readers,
    per_block_document,
    uniform_document,
)
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.spec.evaluation import TasksSection
from ray_surgeon.spec.model import ModelSection
from ray_surgeon.spec.output import OutputSection
from ray_surgeon.storage import files

SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True)
class Kind:
    """What there is to say of a kind."""

    summary: str  # one sentence for the model card
    loaders: Mapping[str, str]  # program -> what is known of it
    modules: tuple[str, ...] = ()  # files of `SHIPPED` that go along

    @property
    def load(self) -> str:
        """The line of Python that loads a folder; ``{uri}`` is to be filled in."""
        trusts = ", trust_remote_code=True" if self.modules else ""
        return f'AutoModelForCausalLM.from_pretrained("{{uri}}"{trusts})'


KINDS = {
    "masked": Kind(
        "The tensors keep their shapes, with zeros: **no gain in size or speed**. "
        "`masks*.safetensors` says what was kept (1 = kept).",
        {
            "transformers": "reloaded and compared",
            "others": "whatever loads the dense model; not run",
        },
    ),
    "uniform": Kind(
        "Every block has the same, smaller widths, in a plain class of transformers.",
        {
            "transformers": "reloaded and compared",
            "vLLM": "an ordinary configuration of the family",
        },
    ),
    "per_block": Kind(
        "Every block has widths of its own, `per_layer_config` in config.json; the modeling code "
        "lies beside the weights.",
        {
            "transformers with trust_remote_code": "reloaded and compared, generates with a cache",
            "vLLM with --trust-remote-code": "by its transformers backend, if every block has an "
            "attention; not GPT-2",
        },
        ("modeling_pruned.py",),
    ),
    "deci": Kind(
        "A DeciLM (Nemotron-NAS): every block has a feed-forward layer of its own width, "
        "`block_configs` in config.json.",
        {
            "transformers with trust_remote_code": "reloaded and compared, generates with a cache",
            "vLLM": "as its own DeciLM",
        },
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
        check_uniform(layout, shrinking.kinds)
    if kind == "masked" and "experts" in shrinking.kinds:
        raise ValueError(
            "output.exports: masked keeps all shapes, and routers would go on to choose experts "
            "that are zero; export uniform"
        )
    if kind == "deci":
        check_deci(layout)
    if kind == "gguf":
        check_gguf(layout, shrinking)


def export(
    kind: str,
    cluster: Cluster,
    layout: ModelLayout,
    model: ModelSection,
    uri: str,
    tokens: NDArray[np.int64],
    facts: Mapping[str, Any],
    linears: Sequence[Mapping[str, Any]],
    *,
    output: OutputSection,
    tasks: TasksSection | None,
) -> dict[str, Any]:
    """Write a Hugging Face folder, reload it in a fresh process, compare and measure.

    Args:
        kind: one of `KINDS`, or gguf.
        cluster: with the pruned weights.
        layout: of the dense model.
        model: the dense model, whose tokenizer and configuration go along.
        uri: folder to write.
        tokens: [T] a sequence to compare on.
        facts: for the model card; see `RunReport.model_card_facts`.
        linears: the report's records of the linears.
        output: `output` of the job spec.
        tasks: downstream tasks; None for none.

    Returns:
        The export's entry in the report.

    Raises:
        RuntimeError: the fresh process cannot load it, or computes something else.
    """
    widths = (
        []
        if kind == "masked"
        else block_widths(layout, {linear["name"]: linear["rows_kept"] for linear in linears})
    )
    left_out = _left_out(kind, layout, widths)
    if kind == "gguf":
        return export_gguf(cluster, layout, model, uri, widths, left_out, facts, output.gguf)
    dense = dense_document(model)
    modules = KINDS[kind].modules
    size_bytes = write_weights(
        cluster,
        uri,
        cut_out=kind != "masked",
        masks=kind == "masked",
        left_out=left_out,
        stored=not modules,
    )
    document = dense if kind == "masked" else _narrow(kind, layout, dense, widths)
    copy_small_files(model, uri, another_type=document["model_type"] != dense["model_type"])
    files.write_json(files.join(uri, "config.json"), for_older_readers(document))
    for module in modules:
        files.write_text(files.join(uri, module), shipped_source(module, layout.config))
    entry: dict[str, Any] = {
        "kind": kind,
        "uri": uri,
        "size_bytes": size_bytes,
        "loaders": dict(KINDS[kind].loaders),
        "load": KINDS[kind].load.format(uri=uri),
        "reload_max_logit_difference": reload_difference(
            cluster,
            uri,
            tokens,
            model.dtype,
            shipped_code=bool(modules),
            has_experts=bool(layout.num_experts),
        ),
    }
    if (
        kind == "uniform"
        and not layout.family.has_free_heads_in_vllm
        and widths[0].num_kv_heads < layout.heads.num_kv
    ):
        entry["loaders"]["vLLM"] = (
            "with --model-impl transformers; its own class wants heads that fill the hidden size"
        )
    if kind == "per_block" and layout.num_experts:
        entry["loaders"] = {
            name: known for name, known in entry["loaders"].items() if "vLLM" not in name
        } | {"vLLM": "not run"}
    if widths:
        entry["widths"] = [[width.num_channels, width.num_kv_heads] for width in widths]
    if layout.num_experts and widths:
        entry["experts"] = [list(width.experts) for width in widths]
    if output.speed is not None and kind != "masked":
        entry["speed"] = measure(cluster, uri, dense, output.speed, shipped_code=bool(modules))
    if tasks is not None:
        entry["tasks"] = evaluate_tasks(cluster, uri, tasks, shipped_code=bool(modules))
    files.write_text(
        files.join(uri, "README.md"), model_card(KINDS[kind].summary, entry, model.source, facts)
    )
    return entry


def _narrow(
    kind: str, layout: ModelLayout, document: Document, widths: Sequence[BlockWidths]
) -> Document:
    if kind == "uniform":
        return uniform_document(layout, document, widths)
    if kind == "deci":
        return deci_document(layout, document, widths, "modeling_decilm")
    return per_block_document(layout, document, widths, "modeling_pruned")


def _left_out(kind: str, layout: ModelLayout, widths: Sequence[BlockWidths]) -> tuple[str, ...]:
    """Return the norms inside an attention that is removed.

    For DeciLM, also those in front of what a block does not have.
    """
    names = []
    for block, width in enumerate(widths):
        prefix = layout.family.block_prefix(block)
        if not width.num_kv_heads:
            names += [f"{prefix}self_attn.q_norm.weight", f"{prefix}self_attn.k_norm.weight"]
            names += [f"{prefix}input_layernorm.weight"] if kind in ("deci", "gguf") else []
        if not width.num_channels and kind in ("deci", "gguf"):
            names.append(f"{prefix}post_attention_layernorm.weight")
    return tuple(names)


def shipped_source(module: str, config: PretrainedConfig) -> str:
    """Return the source of a shipped module, its base classes those of the dense model's family."""
    text = (SHIPPED / module).read_text(encoding="utf-8")
    if module != "modeling_pruned.py":
        return text
    for dense, kind in (
        ("LlamaConfig", type(config)),
        ("LlamaForCausalLM", AutoModelForCausalLM._model_mapping[type(config)]),
        ("LlamaModel", AutoModel._model_mapping[type(config)]),
    ):
        text = text.replace(f"{dense} as", f"{kind.__name__} as")
    return text.replace("pruned_llama", f"pruned_{config.model_type}")
