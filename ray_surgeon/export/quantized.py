"""Quantised checkpoints in the format compressed-tensors, which vLLM loads.

They are made from an export's files, a tensor at a time.

Weights are rounded to the nearest number, or come rounded, with their scales.
Activations, where a scheme rounds them too, are scaled token by token when the model runs, so
nothing is calibrated here. Embeddings, norms and the head stay as they are. Runs as a module of its
own, see `fresh_process`.
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

    `group_size` columns share a scale, or a row does if it is not given.
    """
    scheme = preset_name_to_scheme(PRESETS[name], ["Linear"])
    if group_size is not None:
        scheme.weights.strategy = QuantizationStrategy.GROUP
        scheme.weights.group_size = group_size
    scheme.format = infer_module_format(torch.nn.Linear, scheme).value
    return scheme


def quantised(weight: Tensor, scheme: Scheme, scale: Tensor | None = None) -> dict[str, Tensor]:
    """Return what is stored of a weight [R, C], by compressed-tensors' names.

    Args:
        weight: to be rounded to the nearest number.
        scheme: how.
        scale: [R, groups]; with which the largest number just fits, if not given.
    """
    weight = weight.float()
    size = scheme.weights.group_size or weight.shape[1]
    if scale is None:
        groups = weight.view(len(weight), -1, size)
        scale, _ = calculate_qparams(groups.amin(dim=2), groups.amax(dim=2), scheme.weights)
    if scale.dtype == torch.float32:
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return dict(compressor.compress({"weight": weight, "weight_scale": scale}, scheme))


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Write the quantised copy of an export; see `fresh_process.run_module`.

    Returns its size.
    """
    source = request["source"]
    target = request["target"]  # which has the export's configuration already
    scheme = scheme_of(request["scheme"], request["group_size"])
    rounded = set(request["weights"])
    reader = tensor_files.Reader()
    scales = tensor_files.read_folder(files.join(source, "scales"))  # of rounded weights
    plain = {"lm_head"}
    weight_map = dict[str, str]()
    total = 0
    for file in files.list_names(source):
        if not file.endswith(".safetensors"):
            continue
        tensors = {}
        for key in reader.names(files.join(source, file)):
            tensor = reader.read(files.join(source, file), key)
            name = key.removesuffix(".weight")
            if key not in rounded:
                tensors[key] = tensor
                plain |= {name} if tensor.ndim == 2 else set()
                continue
            stored = quantised(tensor, scheme, scales[key] if scales else None)
            tensors |= {f"{name}.{part}": value for part, value in stored.items()}
        total += tensor_files.write(files.join(target, file), tensors)
        weight_map |= dict.fromkeys(tensors, file)
    write_index(target, weight_map, total)
    document = files.read_json(files.join(target, "config.json"))
    about = {"config_groups": {"group_0": scheme}, "format": scheme.format, "ignore": sorted(plain)}
    quantised_so = QuantizationConfig(quantization_status="compressed", **about)
    document["quantization_config"] = quantised_so.to_dict()
    files.write_json(files.join(target, "config.json"), document)
    return {"size_bytes": total}
