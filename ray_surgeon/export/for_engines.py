"""Exports for serving engines: GGUF for llama.cpp, and quantised copies for vLLM."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_surgeon.export.card import model_card
from ray_surgeon.export.folder import dense_document, quantised_copy, write_gguf_files
from ray_surgeon.export.rounding import round_weights
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.llama_cpp import architecture_of
from ray_surgeon.models.pruned_config import BlockWidths, kv_heads_left
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.spec.model import ModelSection
from ray_surgeon.spec.output import GgufKind, QuantizeSection
from ray_surgeon.storage import files


@dataclass(frozen=True)
class Shrinking:
    """What pruning may leave of the blocks."""

    kinds: Sequence[str]  # of groups that are pruned
    fewest: Mapping[str, int]  # kind -> groups that stay in every block
    multiple: int  # feed-forward widths are multiples of this in the end
    uniform: bool  # whether all blocks have the same widths
    tensor_parallel: int  # devices over which engines will split heads and channels


def check_gguf(layout: ModelLayout, shrinking: Shrinking) -> None:
    """Refuse a model that llama.cpp could not read, before anything starts.

    Raises:
        ValueError: says why, and what to do.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "output.exports: gguf needs the package gguf; run `pip install 'ray-surgeon[gguf]'`"
        )
    heads = layout.heads.num_kv
    if "attention" in shrinking.kinds:
        heads = min(
            k
            for k in kv_heads_left(layout, 1, uniform=shrinking.uniform)
            if k >= shrinking.fewest["attention"]
        )
    channels = shrinking.fewest["ffn"] if "ffn" in shrinking.kinds else layout.num_channels
    least = BlockWidths(channels, heads)
    architecture_of(
        layout, [least] if shrinking.uniform else [least, BlockWidths(channels + 1, heads)]
    )


def check_quantised(layout: ModelLayout, shrinking: Shrinking, section: QuantizeSection) -> None:
    """Refuse a model that cannot be quantised as asked, before anything starts.

    Raises:
        ValueError: says why, and what to do.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ValueError(
            "output.quantize: needs the package compressed-tensors; run `pip install "
            "'ray-surgeon[quantize]'`"
        )
    if layout.family.transposed:
        raise ValueError(
            f"output.quantize: quantises nn.Linear, the linears of {layout.config.model_type} are "
            "Conv1D; remove quantize"
        )
    if layout.num_experts:
        raise ValueError(
            "output.quantize: mixtures of experts are not quantised here; remove quantize, and "
            "quantise the export with other tools"
        )
    if section.scheme != "w4a16":
        return
    heads = layout.heads
    size = section.columns_together
    devices = shrinking.tensor_parallel
    ffn = layout.family.ffn.consumer
    attention = "" if layout.family.attention is None else layout.family.attention.consumer
    left = (
        kv_heads_left(layout, devices, uniform=shrinking.uniform)
        if "attention" in shrinking.kinds
        else (heads.num_kv,)
    )
    columns_of_attention = math.gcd(*(k * heads.n_rep * heads.head_dim // devices for k in left))
    for name, shape in layout.shapes.items():
        columns = shape.num_columns - shape.has_bias
        remedy = ""
        if shape.role == ffn:
            if "ffn" in shrinking.kinds:
                columns = math.gcd(columns, shrinking.multiple)
                remedy = "raise pruning.width_multiple, or "
            columns //= devices
        elif shape.role == attention:
            columns = columns_of_attention
        if columns % size:
            each = (
                f" on each of {devices} devices"
                if devices > 1 and shape.role in (ffn, attention)
                else ""
            )
            raise ValueError(
                f"output.quantize: groups of group_size {size} do not fill the rows of {name}, "
                f"whose columns will be a multiple of {columns}{each}; {remedy}set group_size to a "
                f"divisor, such as {math.gcd(columns, size)}"
            )


def export_gguf(
    cluster: Cluster,
    layout: ModelLayout,
    model: ModelSection,
    uri: str,
    widths: Sequence[BlockWidths],
    left_out: tuple[str, ...],
    facts: Mapping[str, Any],
    kinds: Sequence[GgufKind] | None,
) -> dict[str, Any]:
    """Write GGUF files and a model card.

    Args:
        cluster: with the pruned weights.
        layout: of the dense model.
        model: the dense model.
        uri: folder to write.
        widths: of every block.
        left_out: names of tensors that the blocks do not have any more.
        facts: for the model card; see `RunReport.model_card_facts`.
        kinds: types of the matrices, a file each.

    Returns:
        The export's entry in the report.

    Raises:
        RuntimeError: a file cannot be written, or holds something else when it is read again.
    """
    written = write_gguf_files(
        cluster, model, uri, dense_document(model), widths, kinds or ("bf16",), left_out
    )
    first = written[0]["file"]
    entry = {
        "kind": "gguf",
        "uri": uri,
        "size_bytes": written[0]["size_bytes"],
        "loaders": {
            "llama.cpp": f"as {architecture_of(layout, widths).name}",
            "vLLM, transformers": "no",
        },
        "load": f"llama-server --model {f'{uri}/{first}' if files.is_local(uri) else first}",
        "files": written,
        "widths": [[width.num_channels, width.num_kv_heads] for width in widths],
    }
    summary = (
        "GGUF for llama.cpp, tokenizer and chat template included. Perplexities are those before "
        "the weights were quantised."
    )
    files.write_text(files.join(uri, "README.md"), model_card(summary, entry, model.source, facts))
    return entry


def export_quantised(
    cluster: Cluster,
    layout: ModelLayout,
    model: ModelSection,
    uniform: Mapping[str, Any],
    calibration: NDArray[np.int64],
    texts: Mapping[str, NDArray[np.int64]],
    facts: Mapping[str, Any],
    section: QuantizeSection,
) -> dict[str, Any]:
    """Write the quantised copy of the export uniform, and evaluate it.

    Weights of four bits are rounded on the workers, for good.

    Args:
        cluster: with the pruned weights.
        layout: of the dense model.
        model: the dense model.
        uniform: entry of the export.
        calibration: [num_sequences, sequence_length] tokens by which four bits are rounded.
        texts: name -> [num_windows, T] tokens to evaluate on.
        facts: for the model card.
        section: how.

    Returns:
        The copy's entry in the report.

    Raises:
        RuntimeError: it cannot be quantised or loaded.
    """
    target = f"{uniform['uri']}-{section.scheme}"
    rounded = None
    folder = f"{target}-rounded"
    try:
        if section.scheme == "w4a16":
            rounded = folder, round_weights(cluster, calibration, section.columns_together, folder)
        copy = quantised_copy(uniform["uri"], target, list(layout.shapes), section, texts, rounded)
    finally:
        files.remove_folder(folder)
    entry = {
        "kind": f"uniform-{section.scheme}",
        "uri": target,
        "loaders": {
            "transformers with compressed-tensors": "loaded and evaluated",
            "vLLM": "by compressed-tensors",
        },
        "load": f'AutoModelForCausalLM.from_pretrained("{target}")',
        "widths": uniform["widths"],
    } | copy
    summary = (
        f"Every block has the same, smaller widths; linears are quantised to {section.scheme}, in "
        "the format compressed-tensors."
    )
    pairs = {
        name: (before, copy["perplexity"][name])
        for name, (before, _) in facts["perplexity"].items()
    }
    files.write_text(
        files.join(target, "README.md"),
        model_card(summary, entry, model.source, dict(facts) | {"perplexity": pairs}),
    )
    return entry
