"""Writes exports for serving engines: GGUF for llama.cpp, and quantised copies for vLLM."""

from __future__ import annotations

import importlib.util
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ray_surgeon.config.sections import GgufKind, QuantizeSection
from ray_surgeon.errors import ConfigError
from ray_surgeon.export import folder
from ray_surgeon.export.card import public_name
from ray_surgeon.export.importance import write_mean_squares
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.llama_cpp import architecture_of
from ray_surgeon.models.pruned_config import BlockWidths, WidthLimits, shallower
from ray_surgeon.storage import files


def check_gguf(layout: ModelLayout, shrinking: WidthLimits) -> None:
    """Refuse a model that llama.cpp cannot read, before the run starts.

    Args:
        layout: layout of the dense model.
        shrinking: the widths that pruning may leave.

    Raises:
        ValueError: gives the reason and a remedy.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("output.exports: gguf needs `pip install 'ray-surgeon[gguf]'`")
    known = layout.family.llama_cpp
    if "blocks" in shrinking.layers and known is not None and known.attention_kinds:
        raise ConfigError(
            field="output.exports",
            found=(
                f"gguf: llama.cpp's {known.name} has kinds of attention in turns, so "
                "no block can go"
            ),
            remedy="export uniform",
        )
    heads = shrinking.kv_heads(layout)[0]
    channels = shrinking.channels(layout)[0]
    widths = [BlockWidths(channels, heads)]
    if not shrinking.same_in_all_blocks:
        widths.append(BlockWidths(channels + 1, heads))
    architecture_of(layout, widths)


def check_quantised(
    layout: ModelLayout, shrinking: WidthLimits, section: QuantizeSection
) -> None:
    """Refuse a model that cannot be quantised as requested, before the run starts.

    Args:
        layout: layout of the dense model.
        shrinking: the widths that pruning may leave.
        section: `output.quantize` of the job spec.

    Raises:
        ValueError: gives the reason and a remedy.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ConfigError(
            field="output.quantize",
            found="needs compressed-tensors",
            remedy="run `pip install 'ray-surgeon[quantize]'`",
        )
    if layout.family.transposed:
        raise ConfigError(
            field="output.quantize",
            found=f"the linears of {layout.config.model_type} are Conv1D",
            remedy="remove quantize",
        )
    group_size = section.columns_together
    if group_size is not None:
        _check_groups(layout, shrinking, group_size)


def _check_groups(layout: ModelLayout, shrinking: WidthLimits, group_size: int) -> None:
    """Refuse a group size that would not divide the columns of every linear after pruning."""
    num_devices = shrinking.tensor_parallel
    possible = shrinking.inputs(layout)
    for name, shape in layout.shapes.items():
        columns = shape.num_columns - shape.has_bias
        on_each_device = ""
        if name in possible:
            columns = math.gcd(*possible[name]) // num_devices
            if num_devices > 1:
                on_each_device = f" on each of {num_devices} devices"
        if columns % group_size:
            raise ConfigError(
                field="output.quantize",
                found=(
                    f"group_size {group_size} does not divide the columns of {name}, "
                    f"of which a multiple of {columns}{on_each_device} will stay"
                ),
                remedy=(
                    "raise width_multiple, or give a divisor such as "
                    f"{math.gcd(columns, group_size)}"
                ),
            )


def export_gguf(
    pruned: folder.PrunedModel,
    uri: str,
    widths: Sequence[BlockWidths],
    kinds: Sequence[GgufKind],
) -> dict[str, Any]:
    """Write GGUF files, and an importance matrix with which llama.cpp can round them further.

    The files are made from weights that the workers write into a folder beside them; the folder is
    removed afterwards.

    Args:
        pruned: the model.
        uri: folder to write.
        widths: widths of every block.
        kinds: types of the matrices; each gives one file.

    Returns:
        The export's entry in the report.

    Raises:
        RuntimeError: a file cannot be written, or differs when it is read again.
    """
    weights = files.join(uri, "weights")
    dense = folder.dense_document(pruned.model)
    document = shallower(pruned.layout, dense, pruned.blocks)
    request: dict[str, Any] = {
        "folder": weights,
        "document": document,
        "widths": [asdict(width) for width in widths],
        "name": _gguf_name(pruned),
        "target": uri,
    }
    files.remove_folder(uri)  # an interrupted attempt may have left files
    try:
        folder.write_weights(pruned.cluster, weights, pruned.blocks)
        folder.copy_small_files(pruned.model, weights)
        folder.copy_licences(pruned.model, uri)
        files.write_json(files.join(weights, "config.json"), document)
        written = []
        for kind in kinds:
            written.append(folder.run_for(uri, "gguf_file", {**request, "kind": kind}))
        matrix = _write_importance_matrix(pruned, uri, request)
    finally:
        files.remove_folder(weights)
    first = written[0]["file"]
    path = f"{uri}/{first}" if files.is_local(uri) else first
    architecture = architecture_of(pruned.layout, widths).name
    return {
        "kind": "gguf",
        "uri": uri,
        "size_bytes": written[0]["size_bytes"],
        "imatrix": matrix,
        "loaders": {"llama.cpp": f"as {architecture}", "vLLM, transformers": "no"},
        "load": f"llama-server --model {shlex.quote(path)}",
        "serve": f"llama-server --model {shlex.quote(path)}",
        "files": written,
        "widths": [[width.num_channels, width.num_kv_heads] for width in widths],
    }


def _gguf_name(pruned: folder.PrunedModel) -> str:
    """Return the name of the model in its GGUF files."""
    spec = pruned.facts["spec"]
    source = pruned.model.source
    name = source.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    if source == files.join(spec["output"]["uri"], "source"):  # the model was in memory
        name = spec["name"]
    if spec["pruning"] or spec["recovery"]:
        name += "-pruned"
    return name


def _write_importance_matrix(
    pruned: folder.PrunedModel, uri: str, request: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the importance matrix of a GGUF export.

    Args:
        pruned: the model.
        uri: folder of the export.
        request: entries that the GGUF files and the matrix share.

    Returns:
        The name of the file and its size in bytes.
    """
    mean_squares = files.join(request["folder"], "mean_squares")
    write_mean_squares(pruned.cluster, pruned.calibration, mean_squares, pruned.blocks)
    calibration = pruned.facts["spec"]["calibration"]
    texts = [public_name(calibration["source"])]
    for text in calibration.get("mix", ()):
        texts.append(public_name(text["source"]))
    matrix_request = {
        **request,
        "mean_squares": mean_squares,
        "shape": pruned.calibration.shape,
        "texts": texts,
    }
    return folder.run_for(uri, "imatrix_file", matrix_request)


def write_quantised(
    pruned: folder.PrunedModel,
    uniform: Mapping[str, Any],
    target: str,
    section: QuantizeSection,
    source: str,
    perplexity: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Write a quantised copy of the export uniform, and evaluate it in a fresh process.

    Args:
        pruned: the model.
        uniform: entry of the export.
        target: folder of the copy.
        section: `output.quantize` of the job spec.
        source: folder of the weights: the export's, or rounded ones with their scales.
        perplexity: text -> perplexity, if transformers cannot load the copy to measure it.

    Returns:
        The copy's entry in the report, with its size and its perplexities.

    Raises:
        RuntimeError: it cannot be quantised or loaded.
    """
    files.remove_folder(target)  # an interrupted attempt may have left files
    with folder.local_folder(uniform["uri"], weights=False) as (small, _):
        for name in files.list_files(str(small)):
            if not name.endswith(".index.json") and name != "README.md":
                files.put_file(files.join(target, name), small / name)
    family = pruned.layout.family
    names = [f"{linear}.weight" for linear in pruned.layout.shapes]
    request: dict[str, Any] = {
        "source": source,
        "target": target,
        "scheme": section.scheme,
        "group_size": section.columns_together,
        "weights": [family.stored_name(name) for name in names],
    }
    copy = folder.run_for(target, "quantized", request)
    loaders = {"vLLM": "by compressed-tensors"}
    if perplexity is None:
        texts = {name: tokens.tolist() for name, tokens in pruned.texts.items()}
        evaluation = {"texts": texts, "num_threads": torch.get_num_threads()}
        perplexity = folder.run_reload(target, evaluation)
        loaders["transformers with compressed-tensors"] = "loaded and evaluated"
        load = f'AutoModelForCausalLM.from_pretrained("{target}")'
    else:
        loaders["transformers"] = "loads no quantised mixture"
        load = f"vllm serve {shlex.quote(target)}"
    return {
        "kind": f"uniform-{section.scheme}",
        "uri": target,
        "loaders": loaders,
        "load": load,
        "serve": f"vllm serve {shlex.quote(target)}",
        "widths": uniform["widths"],
        **copy,
        "perplexity": perplexity,
    }
