"""Exports for serving engines: GGUF for llama.cpp, and quantised copies for vLLM."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ray_surgeon.export import folder
from ray_surgeon.export.importance import write_mean_squares
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.llama_cpp import architecture_of
from ray_surgeon.models.pruned_config import BlockWidths, shallower
from ray_surgeon.models.width_limits import WidthLimits
from ray_surgeon.spec.sections import GgufKind, QuantizeSection
from ray_surgeon.storage import files


def check_gguf(layout: ModelLayout, shrinking: WidthLimits) -> None:
    """Refuse a model that llama.cpp could not read, before anything starts.

    Raises:
        ValueError: says why, and what to do.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("output.exports: gguf needs `pip install 'ray-surgeon[gguf]'`")
    known = layout.family.llama_cpp
    if "blocks" in shrinking.layers and known is not None and known.attention_kinds:
        problem = f"llama.cpp's {known.name} has kinds of attention in turns"
        raise ValueError(f"output.exports: gguf: {problem}, so no block can go; export uniform")
    heads = shrinking.kv_heads(layout)[0]
    channels = shrinking.channels(layout)[0]
    widths = [BlockWidths(channels, heads), BlockWidths(channels + 1, heads)]
    architecture_of(layout, widths[:1] if shrinking.uniform else widths)


def check_quantised(layout: ModelLayout, shrinking: WidthLimits, section: QuantizeSection) -> None:
    """Refuse a model that cannot be quantised as asked, before anything starts.

    Raises:
        ValueError: says why, and what to do.
    """
    kind = layout.config.model_type
    absent = importlib.util.find_spec("compressed_tensors") is None
    problems = {
        "needs compressed-tensors; run `pip install 'ray-surgeon[quantize]'`": absent,
        f"the linears of {kind} are Conv1D; remove quantize": layout.family.transposed,
    }
    for problem, applies in problems.items():
        if applies:
            raise ValueError(f"output.quantize: {problem}")
    if (size := section.columns_together) is not None:
        _check_groups(layout, shrinking, size)


def _check_groups(layout: ModelLayout, shrinking: WidthLimits, size: int) -> None:
    """Refuse groups of columns that share a scale if they will not fill the rows of a linear."""
    devices = shrinking.tensor_parallel
    possible = shrinking.inputs(layout)
    for name, shape in layout.shapes.items():
        is_split = name in possible
        columns = shape.num_columns - shape.has_bias
        if is_split:
            columns = math.gcd(*possible[name]) // devices
        if columns % size:
            each = f" on each of {devices} devices" if is_split and devices > 1 else ""
            problem = f"group_size {size} does not divide the columns of {name}, of which"
            stay = f"a multiple of {columns}{each} will stay"
            remedy = f"raise width_multiple, or give a divisor such as {math.gcd(columns, size)}"
            raise ValueError(f"output.quantize: {problem} {stay}; {remedy}")


def export_gguf(
    pruned: folder.Pruned, uri: str, widths: Sequence[BlockWidths], kinds: Sequence[GgufKind]
) -> dict[str, Any]:
    """Write GGUF files, and an importance matrix by which llama.cpp can round them further.

    The files are made from weights that the workers write beside them, and that are removed then.

    Args:
        pruned: the model.
        uri: folder to write.
        widths: of every block.
        kinds: types of the matrices, a file each.

    Returns:
        The export's entry in the report.

    Raises:
        RuntimeError: a file cannot be written, or holds something else when it is read again.
    """
    model = pruned.model
    weights = files.join(uri, "weights")
    document = shallower(pruned.layout, folder.dense_document(model), pruned.blocks)
    pairs = [[width.num_channels, width.num_kv_heads] for width in widths]
    name = model.source.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    spec = pruned.facts["spec"]
    name += "-pruned" if spec["pruning"] or spec["recovery"] else ""
    request: dict[str, Any] = {"folder": weights, "document": document}
    request["widths"] = [asdict(width) for width in widths]
    request |= {"name": name, "target": uri}
    files.remove_folder(uri)  # of a try that was interrupted
    try:
        folder.write_weights(pruned.cluster, weights, pruned.blocks)
        folder.copy_small_files(model, weights)
        files.write_json(files.join(weights, "config.json"), document)
        written = [folder.run_for(uri, "gguf_file", request | {"kind": kind}) for kind in kinds]
        squares = files.join(weights, "mean_squares")
        write_mean_squares(pruned.cluster, pruned.calibration, squares, pruned.blocks)
        of_matrix = {"mean_squares": squares, "shape": pruned.calibration.shape}
        texts = (spec["calibration"], *spec["calibration"].get("mix", ()))
        of_matrix["texts"] = [text["source"] for text in texts]
        matrix = folder.run_for(uri, "imatrix_file", request | of_matrix)
    finally:
        files.remove_folder(weights)
    first = written[0]["file"]
    architecture = architecture_of(pruned.layout, widths).name
    loaders = {"llama.cpp": f"as {architecture}", "vLLM, transformers": "no"}
    load = f"llama-server --model {f'{uri}/{first}' if files.is_local(uri) else first}"
    entry = {"kind": "gguf", "uri": uri, "size_bytes": written[0]["size_bytes"]}
    entry["imatrix"] = matrix
    return entry | {"loaders": loaders, "load": load, "files": written, "widths": pairs}


def write_quantised(
    pruned: folder.Pruned,
    uniform: Mapping[str, Any],
    target: str,
    section: QuantizeSection,
    source: str,
    perplexity: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Write a quantised copy of the export uniform, and evaluate it in a process of its own.

    Args:
        pruned: the model.
        uniform: entry of the export.
        target: folder of the copy.
        section: how.
        source: folder of the weights: the export's, or rounded ones with their scales.
        perplexity: on every text, if it is known, and transformers cannot load the copy.

    Returns:
        The copy's entry in the report, with its size and its perplexities.

    Raises:
        RuntimeError: it cannot be quantised or loaded.
    """
    files.remove_folder(target)  # of a try that was interrupted
    with folder.local_folder(uniform["uri"], weights=False) as (small, _):
        for name in files.list_files(str(small)):
            if not name.endswith((".index.json", ".md")):
                files.put_file(files.join(target, name), small / name)
    request: dict[str, Any] = {"source": source, "target": target, "scheme": section.scheme}
    weights = [pruned.layout.family.stored_name(f"{name}.weight") for name in pruned.layout.shapes]
    request |= {"group_size": section.columns_together, "weights": weights}
    copy = folder.run_for(target, "quantized", request)
    loaders = {"vLLM": "by compressed-tensors"}
    if perplexity is None:
        texts = {name: tokens.tolist() for name, tokens in pruned.texts.items()}
        request = {"texts": texts, "num_threads": torch.get_num_threads()}
        perplexity = folder.run_reload(target, request)
        loaders["transformers with compressed-tensors"] = "loaded and evaluated"
        load = f'AutoModelForCausalLM.from_pretrained("{target}")'
    else:
        loaders["transformers"] = "loads no quantised mixture"
        load = f"vllm serve {target}"
    copy["perplexity"] = perplexity
    entry = {"kind": f"uniform-{section.scheme}", "uri": target, "loaders": loaders, "load": load}
    return entry | {"widths": uniform["widths"]} | copy
