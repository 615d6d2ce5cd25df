"""Quantised checkpoints in the format compressed-tensors, which vLLM loads.

They are made from an export's files, a tensor at a time.

Weights of eight bits are rounded to the nearest number; those of four come rounded, with their
scales. Activations, where a scheme rounds them too, are scaled token by token when the model runs,
so nothing is calibrated here. Embeddings, norms and the head stay as they are. Runs as a module of
its own, see `fresh_process`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from ray_surgeon.export.folder import write_index
from ray_surgeon.storage import files, tensor_files

PRESETS = {"fp8": "FP8_DYNAMIC", "int8": "W8A8", "w4a16": "W4A16"}
"""Names of the schemes in compressed-tensors."""


def scheme_of(name: str, group_size: int) -> QuantizationScheme:
    """Return a scheme for all linears.

    `group_size` columns share a scale where the scheme has groups.
    """
    scheme = preset_name_to_scheme(PRESETS[name], ["Linear"])
    if scheme.weights.group_size is not None:
        scheme.weights.group_size = group_size
    scheme.format = infer_module_format(torch.nn.Linear, scheme).value
    return scheme


def quantised(
    weight: Tensor, scheme: QuantizationScheme, scale: Tensor | None = None
) -> dict[str, Tensor]:
    """Return what is stored of a weight [R, C], by compressed-tensors' names.

    Args:
        weight: to be rounded to the nearest number.
        scheme: how.
        scale: [R, groups]; with which the largest number just fits, if not given.

    Raises:
        ValueError: groups do not fill the rows.
    """
    weight = weight.float()
    size = scheme.weights.group_size or weight.shape[1]
    if weight.shape[1] % size:
        raise ValueError(
            f"{weight.shape[1]} columns are no multiple of group_size {size}; lower it, or raise "
            "pruning.width_multiple"
        )
    if scale is None:
        groups = weight.view(len(weight), -1, size)
        scale, _ = calculate_qparams(groups.amin(dim=2), groups.amax(dim=2), scheme.weights)
    if scale.dtype == torch.float32:
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return dict(compressor.compress({"weight": weight, "weight_scale": scale}, scheme))


def restored(stored: Mapping[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    """Return the weight that a program computes with."""
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    weight: Tensor = compressor.decompress(dict(stored), scheme)["weight"]
    return weight


def _weight_files(folder: str) -> list[str]:
    names = files.list_names(folder)
    return [files.join(folder, name) for name in names if name.endswith(".safetensors")]


def _config(scheme: QuantizationScheme, plain: Collection[str]) -> dict[str, Any]:
    """Return what config.json says of a scheme; `plain` names what is not quantised."""
    config: dict[str, Any] = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=scheme.format,
        ignore=sorted(plain),
        quantization_status="compressed",
    ).to_dict()
    return config


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Write the quantised copy of an export; see `fresh_process.run_module`.

    Returns its size and the error of its weights.

    Raises:
        ValueError: see `quantised`.
    """
    export = request["export"]  # with the weights as they were, and the configuration
    target = request["target"]
    scheme = scheme_of(request["scheme"], request["group_size"])
    reader = tensor_files.Reader()
    uri_of = {key: uri for uri in _weight_files(export) for key in reader.names(uri)}
    scales = dict[str, Tensor]()
    for uri in request["scales"]:
        scales |= tensor_files.read(uri)
    plain = {"lm_head"}
    weight_map = dict[str, str]()
    total = 0
    difference = norm = 0.0
    for uri in _weight_files(request["source"]):
        tensors = {}
        for key in reader.names(uri):
            tensor = reader.read(uri, key)
            name = key.removesuffix(".weight")
            if name not in request["linears"] or name == key:
                tensors[key] = tensor
                plain |= {name} if tensor.ndim == 2 else set()
                continue
            before = reader.read(uri_of[key], key).float()
            try:
                stored = quantised(tensor, scheme, scales.get(name))
            except ValueError as error:
                raise ValueError(f"output.quantize: {name}: {error}") from error
            difference += float((restored(stored, scheme).float() - before).square().sum())
            norm += float(before.square().sum())
            tensors |= {f"{name}.{part}": value for part, value in stored.items()}
        file = uri.rpartition("/")[2]
        total += tensor_files.write(files.join(target, file), tensors)
        weight_map |= dict.fromkeys(tensors, file)
    write_index(target, weight_map, total)
    document = files.read_json(files.join(export, "config.json"))
    document["quantization_config"] = _config(scheme, plain)
    files.write_json(files.join(target, "config.json"), document)
    return {"size_bytes": total, "relative_error": (difference / max(norm, 1e-30)) ** 0.5}
