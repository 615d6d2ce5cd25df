"""Quantised checkpoints in the format compressed-tensors, which vLLM loads.

They are made from an export's files, a tensor at a time.

Weights of eight bits are rounded to the nearest number; those of four come rounded, with their
scales. Activations, where a scheme rounds them too, are scaled token by token when the model runs,
so nothing is calibrated here. Embeddings, norms and the head stay as they are. Runs as a module of
its own, see `fresh_process`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from numpy.typing import NDArray
from torch import Tensor

from ray_surgeon.export.folder import write_index, write_weights
from ray_surgeon.maths.columns import round_columns, upper_inverse
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.models.linears import num_inputs
from ray_surgeon.runtime.block_pass import BlockPass
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.worker import Worker
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


NUM_BITS = 4
_DAMPING = 0.01
"""Of A, relative to the mean of its diagonal; the published value."""
_MAX_DAMPING = 1.0


class _Scales(dict[str, Tensor]):
    """What an owner keeps of its linears: name -> [R, groups] of what is left of the linear."""


@dataclass(frozen=True)
class Rounding(BlockPass):
    """Rounds the linears of all blocks, each on the inputs that rounded blocks give."""

    group_size: int  # columns that share a scale

    def change(self, worker: Worker, name: str, A: Tensor) -> None:
        """Round what is left of a linear; its bias stays."""
        mask = worker.mask(name, StructuredMask)
        W = worker.shard.weight(name)
        num_columns = num_inputs(worker.shard.linears[name])
        rows = mask.rows.to(W.device).nonzero()[:, 0]
        columns = mask.columns[:num_columns].to(W.device).nonzero()[:, 0]
        U, _ = upper_inverse(A[columns][:, columns], _DAMPING, _MAX_DAMPING, name)
        kept = W[rows][:, columns]
        W[rows[:, None], columns], scales = round_columns(kept, U, self.group_size, NUM_BITS)
        worker.shard.set_weight(name, W)
        worker.keeping(_Scales)[name] = scales.cpu()


def write_scales(worker: Worker, folder: str) -> str | None:
    """Write the scales of the linears that a worker owns, and return the file's URI.

    None if it owns none.
    """
    if not worker.has(_Scales):
        return None
    uri = files.join(folder, f"scales-{worker.index.shard}-{worker.index.replica}.safetensors")
    tensor_files.write(uri, worker.drop(_Scales))
    return uri


def round_weights(
    cluster: Cluster, sequences: NDArray[np.int64], group_size: int, folder: str
) -> list[str]:
    """Round the weights on the workers, for good, and write what is left of the model.

    Args:
        cluster: with the pruned weights.
        sequences: [num_sequences, sequence_length] tokens of the calibration.
        group_size: columns that share a scale.
        folder: where the weights go, and the scales.

    Returns:
        URIs of the files of scales.
    """
    Rounding(group_size).pass_all(cluster, sequences)
    write_weights(cluster, folder)
    uris = cluster.run_all(write_scales, files.join(folder, "scales"))
    return [uri for uri in uris if uri is not None]
