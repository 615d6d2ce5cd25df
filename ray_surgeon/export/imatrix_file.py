"""Importance matrices for llama.cpp's quantisation to K- and I-quants, by the package gguf.

Runs as a module of its own, see `fresh_process`.
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
    """Of a file that is no model, and has no architecture."""

    def add_architecture(self) -> None:
        self.add_type(gguf.GGUFType.IMATRIX)


def write_imatrix(
    mean_squares: Mapping[str, Tensor], texts: Sequence[str], shape: Sequence[int], target: Path
) -> None:
    """Write one file.

    Args:
        mean_squares: llama.cpp's name of a weight -> [C], of its inputs; [n, C] of a stack.
        texts: names of the texts that they were taken on.
        shape: number of sequences, and of the tokens of each.
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
        has_seen = sums.any(dim=-1, keepdim=True)  # without tokens: 0 to llama.cpp
        writer.add_tensor(f"{name}.counts", (num_tokens * has_seen).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Write the matrix beside the files of an export; see `fresh_process.run_module`."""
    layout = ModelLayout.of(AutoConfig.for_model(**request["document"]))
    widths = [BlockWidths.of(width) for width in request["widths"]]
    own = tensor_files.read_folder(request["mean_squares"])
    squares = dict[str, Tensor]()
    for name, place in Names(layout, architecture_of(layout, widths)).places(own).items():
        values = [own[part] for part in place.names]
        squares[name] = torch.stack(values) if place.is_stack else values[0]
    file = f"{request['name']}-imatrix.gguf"
    uri = files.join(request["target"], file)
    with files.replacing(uri) as path:
        write_imatrix(squares, request["texts"], request["shape"], path)
    return {"file": file, "size_bytes": files.size_bytes(uri)}
