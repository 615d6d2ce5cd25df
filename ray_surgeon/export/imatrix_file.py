"""Writes the importance matrix that llama.cpp uses to quantise to K- and I-quants.

The file is written with the package gguf. The module runs in a fresh process, see
`processes.run_module`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoConfig

from ray_surgeon.export.gguf_names import Names
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.llama_cpp import architecture_of
from ray_surgeon.models.pruned_config import BlockWidths
from ray_surgeon.storage import files, tensor_files


class _Writer(gguf.GGUFWriter):
    """Writes a GGUF file without a model, and therefore without an architecture."""

    def add_architecture(self) -> None:
        self.add_type(gguf.GGUFType.IMATRIX)


def write_imatrix(
    mean_squares: Mapping[str, Tensor],
    texts: Sequence[str],
    shape: Sequence[int],
    target: Path,
) -> None:
    """Write one file.

    Args:
        mean_squares: llama.cpp's name of each weight -> mean squares of its inputs, [C], or [n, C]
            for a stack of n experts.
        texts: names of the texts on which they were measured.
        shape: number of sequences, and number of tokens of each.
        target: the file.
    """
    num_sequences, sequence_length = shape
    writer = _Writer(target, "")
    writer.add_array(gguf.Keys.IMatrix.DATASETS, list(texts))
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, num_sequences)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, sequence_length)
    num_tokens = float(num_sequences * sequence_length)
    for name, values in sorted(mean_squares.items()):
        sums = num_tokens * values.float()
        writer.add_tensor(f"{name}.in_sum2", sums.numpy())
        # llama.cpp takes a count of 0 for an expert that saw no tokens
        has_seen = sums.any(dim=-1, keepdim=True)
        writer.add_tensor(f"{name}.counts", (num_tokens * has_seen.float()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Write the matrix beside the GGUF files of an export; see `processes.run_module`.

    Returns:
        The name of the file and its size in bytes.
    """
    layout = ModelLayout.of(AutoConfig.for_model(**request["document"]))
    widths = [BlockWidths.of(width) for width in request["widths"]]
    of_parameters = tensor_files.read_folder(request["mean_squares"])
    names = Names(layout, architecture_of(layout, widths))
    mean_squares = dict[str, Tensor]()
    for name, place in names.places(of_parameters).items():
        values = [of_parameters[parameter] for parameter in place.names]
        if place.is_stack:
            mean_squares[name] = torch.stack(values)
        else:
            mean_squares[name] = values[0]
    file = f"{request['name']}-imatrix.gguf"
    uri = files.join(request["target"], file)
    with files.replacing(uri) as path:
        write_imatrix(mean_squares, request["texts"], request["shape"], path)
    return {"file": file, "size_bytes": files.size_bytes(uri)}
