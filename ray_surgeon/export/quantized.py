"""Writes quantised checkpoints in the format compressed-tensors, which vLLM loads.

They are made from an export's files, a tensor at a time.

Weights are rounded to the nearest number, or are read already rounded, together with their scales.
Where a scheme rounds activations, too, they are scaled token by token when the model runs, so they
need no calibration. Embeddings, norms and the head are not quantised. The module runs in a fresh
process, see `processes.run_module`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStrategy,
    preset_name_to_scheme,
)
from compressed_tensors.quantization import QuantizationScheme as Scheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from ray_surgeon.export.folder import write_index
from ray_surgeon.storage import files, tensor_files

PRESETS = {"fp8": "FP8_DYNAMIC", "int8": "W8A8", "w4a16": "W4A16", "w8a16": "W8A16"}
"""Names of the schemes in compressed-tensors."""


def scheme_of(name: str, group_size: int | None = None) -> Scheme:
    """Return a scheme for all linears.

    Args:
        name: one of `PRESETS`.
        group_size: number of columns that share a scale; None for one scale for each row.
    """
    scheme = preset_name_to_scheme(PRESETS[name], ["Linear"])
    if group_size is not None:
        scheme.weights.strategy = QuantizationStrategy.GROUP
        scheme.weights.group_size = group_size
    scheme.format = infer_module_format(torch.nn.Linear, scheme).value
    return scheme


def quantised(
    weight: Tensor, scheme: Scheme, scale: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the tensors that store a weight [R, C], by compressed-tensors' names.

    Args:
        weight: to be rounded to the nearest number.
        scheme: scheme of the quantisation.
        scale: [R, groups]; if not given, the largest number of each group just fits.
    """
    weight = weight.float()
    size = scheme.weights.group_size or weight.shape[1]
    if scale is None:
        groups = weight.view(len(weight), -1, size)
        lowest = groups.amin(dim=2)
        highest = groups.amax(dim=2)
        scale, _ = calculate_qparams(lowest, highest, scheme.weights)
    if scale.dtype == torch.float32:
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return dict(compressor.compress({"weight": weight, "weight_scale": scale}, scheme))


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Write the quantised copy of an export; see `processes.run_module`.

    Returns:
        The size of its files of weights in bytes.
    """
    source = request["source"]
    target = request["target"]  # has the export's configuration already
    scheme = scheme_of(request["scheme"], request["group_size"])
    to_quantise = set(request["weights"])
    reader = tensor_files.Reader()
    # weights that are already rounded have their scales beside them
    scales = tensor_files.read_folder(files.join(source, "scales"))
    not_quantised = {"lm_head"}
    file_of = dict[str, str]()
    total_bytes = 0
    for file in files.list_names(source):
        if not file.endswith(".safetensors"):
            continue
        uri = files.join(source, file)
        tensors = dict[str, Tensor]()
        for key in reader.names(uri):
            tensor = reader.read(uri, key)
            name = key.removesuffix(".weight")
            if key in to_quantise:
                scale = scales[key] if scales else None
                for part, value in quantised(tensor, scheme, scale).items():
                    tensors[f"{name}.{part}"] = value
                continue
            tensors[key] = tensor
            if tensor.ndim == 2:
                not_quantised.add(name)
        total_bytes += tensor_files.write(files.join(target, file), tensors)
        file_of.update(dict.fromkeys(tensors, file))
    write_index(target, file_of, total_bytes)
    _write_config(target, scheme, sorted(not_quantised))
    return {"size_bytes": total_bytes}


def _write_config(target: str, scheme: Scheme, not_quantised: list[str]) -> None:
    """Add the scheme to the config.json of a copy."""
    uri = files.join(target, "config.json")
    document = files.read_json(uri)
    config = QuantizationConfig(
        quantization_status="compressed",
        config_groups={"group_0": scheme},
        format=scheme.format,
        ignore=not_quantised,
    )
    document["quantization_config"] = config.to_dict()
    files.write_json(uri, document)
