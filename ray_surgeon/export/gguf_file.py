"""Writes GGUF files for llama.cpp from an export's files, a tensor at a time.

Blocks of one width have the family's own architecture in llama.cpp. A Llama or Mistral whose blocks
differ in width is written as ``deci``, which has widths for every block. The module uses the
package gguf and runs in a fresh process, see `processes.run_module`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter, TokenType
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ray_surgeon.config.sections import ModelSection
from ray_surgeon.data.texts import first_token
from ray_surgeon.export.folder import local_folder
from ray_surgeon.export.gguf_names import Names
from ray_surgeon.models.attention import rope_kind, rope_of
from ray_surgeon.models.checkpoint import tensor_reader
from ray_surgeon.models.families import LlamaCpp
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.llama_cpp import architecture_of, tokenizer_names
from ray_surgeon.models.pruned_config import BlockWidths, Widths, in_llama_cpp
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import open_model

KINDS = {
    "f32": 1e-6,
    "f16": 1e-3,
    "bf16": 4e-3,
    "q8_0": 5e-3,
    "q5_1": 0.04,
    "q5_0": 0.07,
    "q4_1": 0.07,
    "q4_0": 0.14,
}
"""Type of the matrices -> largest error, relative to the matrix's largest entry."""


def write_gguf(
    folder: str,
    config: PretrainedConfig,
    widths: Widths,
    kind: str,
    name: str,
    target: Path,
) -> float:
    """Write one file and compare its content with the tensors that it was made from.

    Args:
        folder: URI with the tokenizer and the safetensors files of a model, from which pruned
            groups are removed.
        config: configuration of the dense model.
        widths: widths of every block.
        kind: one of `KINDS`.
        name: name of the model.
        target: the file.

    Returns:
        The largest error of any entry, relative to the largest entry of its tensor.

    Raises:
        ValueError: the tokenizer is of an unknown kind; or the file differs when it is read again.
    """
    layout = ModelLayout.of(config)
    architecture = architecture_of(layout, widths)
    writer = GGUFWriter(target, architecture.name)
    writer.add_name(name)
    all_or_mostly = "ALL" if kind == "f32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{all_or_mostly}_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, layout, widths)
    _add_constants(writer, layout)
    _add_tokenizer(writer, folder, int(config.vocab_size))
    tensors = Tensors(folder, layout, architecture)
    storage = {}
    for key, shape in tensors.shapes.items():
        storage[key] = _storage(key, shape, kind)
        num_bytes = math.prod(gguf.quants.quant_shape_to_byte_shape(shape, storage[key]))
        writer.add_tensor_info(key, shape, np.dtype(np.float32), num_bytes, storage[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key in tensors.shapes:
        writer.write_tensor_data(gguf.quantize(tensors.read(key), storage[key]))
    writer.close()
    return _largest_error(target, tensors, kind)


def _add_sizes(writer: GGUFWriter, layout: ModelLayout, widths: Widths) -> None:
    """Write the sizes of the model's parts."""
    config = layout.config
    heads = layout.heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layout.num_blocks)
    writer.add_vocab_size(config.vocab_size)
    channels = [width.of_a_token for width in widths]
    writer.add_feed_forward_length(_one_or_all(channels))
    for name, size in in_llama_cpp(layout, widths).items():
        writer.add_uint32(f"{writer.arch}.{name}", size)
    kv_heads = [width.num_kv_heads for width in widths]
    query_heads = [num_kv_heads * heads.n_rep for num_kv_heads in kv_heads]
    writer.add_head_count(_one_or_all(query_heads))
    writer.add_head_count_kv(_one_or_all(kv_heads))
    writer.add_key_length(heads.head_dim)
    writer.add_value_length(heads.head_dim)


def _add_constants(writer: GGUFWriter, layout: ModelLayout) -> None:
    """Write the constants of norms, of the attention's window and of rotary embeddings."""
    config = layout.config
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        writer.add_sliding_window(window)
    if layout.family.has_multipliers:
        writer.add_embedding_scale(float(config.embedding_multiplier))
        writer.add_attention_scale(float(config.attention_multiplier))
        writer.add_residual_scale(layout.residual_multiplier)
        writer.add_logit_scale(layout.logits_divisor)
    parameters = rope_of(config)
    if not parameters:
        return
    sliding = config.rope_parameters.get("sliding_attention")
    if sliding:
        writer.add_rope_freq_base_swa(float(sliding["rope_theta"]))
    num_rotated = layout.heads.head_dim * parameters.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(num_rotated))
    writer.add_rope_freq_base(float(parameters["rope_theta"]))
    kind = rope_kind(config)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(parameters["factor"]))
    if kind == "yarn":
        original_length = int(parameters["original_max_position_embeddings"])
        writer.add_rope_scaling_orig_ctx_len(original_length)


def _add_tokenizer(writer: GGUFWriter, uri: str, vocab_size: int) -> None:
    """Write tokens, merges, special tokens and the chat template of an export."""
    with local_folder(uri, weights=False) as (folder, _):
        # some families' classes build a tokenizer that differs from the file
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        model, pre_tokenizer = tokenizer_names(document)
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(pre_tokenizer)
        tokens = tokens_of(document, vocab_size, has_pieces=model == "llama")
        writer.add_token_list([token.encode() for token, _ in tokens])
        writer.add_token_types([kind for _, kind in tokens])
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
        if model == "llama":
            piece = tokenizer.convert_ids_to_tokens(plain[0])
            writer.add_add_space_prefix(piece.startswith("\u2581"))
            # tokens are numbered in the order of their merges
            writer.add_token_scores([-float(number) for number in range(len(tokens))])
        has_special = len(with_special) > len(plain)
        has_last = has_special and with_special[-1] == tokenizer.eos_token_id
        has_merges = model == "gpt2"
        special = gguf.SpecialVocab(folder, load_merges=has_merges, n_vocab=vocab_size)
        special.add_special_token["bos"] = first_token(tokenizer) is not None
        special.add_special_token["eos"] = has_last
        special.add_to_gguf(writer, quiet=True)


def tokens_of(
    document: Mapping[str, Any], vocab_size: int, *, has_pieces: bool
) -> list[tuple[str, TokenType]]:
    """Return every token and its type, in the order of their numbers.

    A number without a token is that of an unused embedding, and becomes a padding token.

    llama.cpp reads U+2581 as a space in the tokens of a tokenizer of pieces, except in added tokens
    that are not special.

    Args:
        document: content of tokenizer.json.
        vocab_size: number of embeddings.
        has_pieces: whether the tokenizer is one of pieces.
    """
    by_number = {}
    for token, number in document["model"]["vocab"].items():
        kind = TokenType.NORMAL
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            kind = TokenType.BYTE
        by_number[number] = (token, kind)
    for added in document.get("added_tokens", []):
        token = added["content"]
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if token == document["model"].get("unk_token"):
            kind = TokenType.UNKNOWN
        if has_pieces and not added["special"]:
            token = token.replace("\u2581", " ")
        by_number[added["id"]] = (token, kind)
    tokens = []
    for number in range(vocab_size):
        padding = (f"[PAD{number}]", TokenType.UNUSED)
        tokens.append(by_number.get(number, padding))
    return tokens


class Tensors:
    """Tensors of a model by llama.cpp's names, each read and rearranged when it is used."""

    def __init__(self, folder: str, layout: ModelLayout, architecture: LlamaCpp) -> None:
        """Read the headers of a folder's files."""
        self._layout = layout
        self._architecture = architecture
        source = open_model(ModelSection(source=folder))
        self._computed = _rope_factors(layout)
        stored = source.shapes_and_fingerprint()[0]
        self._read = tensor_reader(layout, stored, source.read, folder)
        self._places = Names(layout, architecture).stored(stored)
        shapes = {name: tensor.shape for name, tensor in self._computed.items()}
        for name, (_, shape) in self._places.items():
            shapes[name] = shape[::-1] if self._is_transposed(name) else shape
        self.shapes = dict(sorted(shapes.items()))

    def _is_transposed(self, name: str) -> bool:
        place, shape = self._places[name]
        is_in_block = self._layout.block_of(place.names[0]) is not None
        return self._layout.family.transposed and is_in_block and len(shape) == 2

    def read(self, name: str) -> NDArray[np.float32]:
        """Return a tensor in float32."""
        if name in self._computed:
            return self._computed[name]
        place, shape = self._places[name]
        if place.is_stack:
            # filled in place, because a stack may take gigabytes
            tensor = torch.empty(shape)
            for number, parameter in enumerate(place.names):
                tensor[number] = self._read(parameter)
        else:
            tensor = self._read(place.names[0]).float()
        if self._is_transposed(name):
            tensor = tensor.T
        if self._architecture.pairs_rotary and re.search(r"\.attn_[qk]\.", name):
            tensor = _paired(tensor, self._layout.heads.head_dim)
        if self._architecture.adds_one_to_norms and "norm" in name:
            tensor = tensor + 1
        return np.ascontiguousarray(tensor.numpy())


def _one_or_all(values: list[int]) -> int | list[int]:
    """Return the value of all blocks if they share it, or else the list."""
    if len(set(values)) == 1:
        return values[0]
    return values


def _rope_factors(layout: ModelLayout) -> dict[str, NDArray[np.float32]]:
    """Return the factors [head_dim / 2] by which llama3's scaling divides each frequency.

    There are none for models that have another scaling, or no scaling.
    """
    config = layout.config
    if rope_kind(config) != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    n = layout.heads.head_dim
    exponents = torch.arange(0, n, 2, dtype=torch.float64) / n
    plain = float(config.rope_parameters["rope_theta"]) ** -exponents
    return {"rope_freqs.weight": (plain / scaled.double()).float().numpy()}


def _paired(tensor: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of queries or keys so that neighbouring rows rotate together.

    In transformers, row i of a head rotates together with row i + head_dim / 2.
    """
    halves = tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _storage(name: str, shape: Sequence[int], kind: str) -> Kind:
    """Return the type of a tensor: `kind` for matrices whose rows fill whole blocks of it."""
    if len(shape) < 2 or re.search(r"^position_embd|\.ffn_gate_inp\.|\.bias$", name):
        return Kind.F32
    wanted = Kind[kind.upper()]
    block_size, _ = gguf.GGML_QUANT_SIZES[wanted]
    if shape[-1] % block_size:
        return Kind.F16
    return wanted


def _largest_error(file: Path, tensors: Tensors, kind: str) -> float:
    """Read a file again; return the largest error, relative to the largest entry of a tensor.

    Raises:
        ValueError: a tensor is missing, or its error is larger than its type explains.
    """
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    different = sorted(stored.keys() ^ tensors.shapes.keys())
    if different:
        raise ValueError(
            f"{file.name}: holds other tensors than were written: {different}"
        )
    largest = 0.0
    for name in tensors.shapes:
        expected = tensors.read(name)
        values = gguf.dequantize(stored[name].data, stored[name].tensor_type)
        largest_value = max(expected.max(), -expected.min(), 1e-30)
        difference = values.reshape(expected.shape) - expected
        error = float(max(difference.max(), -difference.min()) / largest_value)
        # an error that is not a number is refused, too
        if not error <= KINDS[kind]:
            raise ValueError(
                f"{file.name}: {name} read again differs by {error:g}; do not use it"
            )
        largest = max(largest, error)
    return largest


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Write the file of a request, and return a record of it; see `run_module`."""
    config = AutoConfig.for_model(**request["document"])
    widths = [BlockWidths.of(width) for width in request["widths"]]
    kind = request["kind"]
    file = f"{request['name']}-{kind.upper()}.gguf"
    with files.replacing(files.join(request["target"], file)) as path:
        error = write_gguf(request["folder"], config, widths, kind, request["name"], path)
        size = path.stat().st_size
    return {"kind": kind, "file": file, "size_bytes": size, "largest_error": error}
