"""GGUF files for llama.cpp, by the package gguf.

Tensors are read from an export's files one at a time.

Blocks of one width are the family's own architecture there. Where widths differ, a Llama or Mistral
is written as ``deci``, whose blocks have widths of their own. Runs as a module of its own, see
`fresh_process`.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ray_surgeon.models.families import LlamaCpp
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.llama_cpp import architecture_of, rope_kind, tokenizer_names
from ray_surgeon.models.pruned_config import BlockWidths
from ray_surgeon.storage import files, tensor_files
from ray_surgeon.storage.texts import first_token

KINDS = {
    "f32": (Kind.F32, gguf.LlamaFileType.ALL_F32, 1e-6),
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16, 1e-3),
    "bf16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16, 4e-3),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0, 5e-3),
    "q5_1": (Kind.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1, 0.04),
    "q5_0": (Kind.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0, 0.07),
    "q4_1": (Kind.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1, 0.07),
    "q4_0": (Kind.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0, 0.14),
}
"""Type of the matrices -> type of storage, llama.cpp's name, and largest error.

The error is relative to the matrix's largest entry.
"""


def write_gguf(
    folder: str,
    config: PretrainedConfig,
    widths: Sequence[BlockWidths],
    kind: str,
    name: str,
    target: Path,
) -> float:
    """Write one file and compare what it holds with what it was made from.

    Args:
        folder: URI with the safetensors files, and the tokenizer, of a model whose groups are cut
            out.
        config: of the dense model.
        widths: of every block.
        kind: one of `KINDS`.
        name: of the model.
        target: the file.

    Returns:
        The largest error of a matrix's entry, of the matrix's largest entry.

    Raises:
        ValueError: the tokenizer is of a kind that is not known; or what is read again is not what
            was written.
    """
    layout = ModelLayout.of(config)
    architecture = architecture_of(layout, widths)
    writer = GGUFWriter(target, architecture.name)
    writer.add_name(name)
    writer.add_file_type(KINDS[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _describe(writer, layout, widths)
    with tempfile.TemporaryDirectory() as scratch:
        _add_tokenizer(writer, _local_tokenizer(folder, Path(scratch)), int(config.vocab_size))
    tensors = Tensors(folder, layout, architecture, widths)
    for key in tensors.names:
        shape = tensors.shapes[key]
        how = _how(key, tensors.shapes[key], kind)
        size = (
            gguf.quant_shape_to_byte_shape(shape, how) if how not in (Kind.F32, Kind.F16) else shape
        )
        dtype = np.dtype({Kind.F32: np.float32, Kind.F16: np.float16}.get(how, np.uint8))
        writer.add_tensor_info(key, size, dtype, int(np.prod(size)) * dtype.itemsize, raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key in tensors.names:
        writer.write_tensor_data(
            gguf.quantize(tensors.read(key), _how(key, tensors.shapes[key], kind))
        )
    writer.close()
    return _largest_error(target, tensors, kind)


def _describe(writer: GGUFWriter, layout: ModelLayout, widths: Sequence[BlockWidths]) -> None:
    """Write what llama.cpp has to know of the shapes."""
    config = layout.config
    heads = layout.heads

    def one_or_all(values: list[int]) -> int | list[int]:
        return values[0] if len(set(values)) == 1 else values

    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layout.num_blocks)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(one_or_all([width.num_channels for width in widths]))
    writer.add_head_count(one_or_all([width.num_kv_heads * heads.n_rep for width in widths]))
    writer.add_head_count_kv(one_or_all([width.num_kv_heads for width in widths]))
    writer.add_key_length(heads.head_dim)
    writer.add_value_length(heads.head_dim)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    window = getattr(config, "sliding_window", None)
    if window is not None and (
        config.model_type not in ("qwen2", "qwen3") or config.use_sliding_window
    ):
        writer.add_sliding_window(window)
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        return
    if "sliding_attention" in parameters:
        writer.add_rope_freq_base_swa(float(parameters["sliding_attention"]["rope_theta"]))
        parameters = parameters["full_attention"]
    writer.add_rope_dimension_count(
        int(heads.head_dim * parameters.get("partial_rotary_factor", 1.0))
    )
    writer.add_rope_freq_base(float(parameters["rope_theta"]))
    if parameters["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(parameters["rope_type"]))
        writer.add_rope_scaling_factor(float(parameters["factor"]))
    if parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(parameters["original_max_position_embeddings"]))


def _local_tokenizer(folder: str, scratch: Path) -> Path:
    """Return a local folder with everything of an export that is not weights.

    Its tokenizer.json is what transformers makes of it.
    """
    for name in files.list_names(folder):
        if not name.endswith((".safetensors", ".gguf")):
            files.download(files.join(folder, name), scratch / name)
    # for some families it is not what the file says
    AutoTokenizer.from_pretrained(scratch).save_pretrained(scratch)
    return scratch


def _add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Write tokens, merges, special tokens and the chat template.

    Raises:
        ValueError: see `tokenizer_names`.
    """
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model, cut = tokenizer_names(document)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(cut)
    tokens = _tokens(document, vocab_size, has_pieces=model == "llama")
    writer.add_token_list([token.encode() for token, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    if model == "llama":
        writer.add_add_space_prefix(_has_space_prefix(document))
        # they are numbered in the order of their merges
        writer.add_token_scores([-float(number) for number in range(len(tokens))])
    special = gguf.SpecialVocab(folder, load_merges=model == "gpt2", n_vocab=vocab_size)
    special.add_special_token |= _added_tokens(folder)
    special.add_to_gguf(writer, quiet=True)


def _added_tokens(folder: Path) -> dict[str, bool]:
    """Return whether a tokenizer puts its first and its last special token around a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain, whole = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True)
    )
    return {
        "bos": first_token(tokenizer) is not None,
        "eos": len(whole) > len(plain) and whole[-1] == tokenizer.eos_token_id,
    }


def _has_space_prefix(document: Mapping[str, Any]) -> bool:
    """Whether a tokenizer puts a space in front of a text."""
    steps = [document.get("normalizer"), document.get("pre_tokenizer")]
    parts = [
        part
        for step in steps
        if step
        for part in step.get("normalizers", step.get("pretokenizers", [step]))
    ]
    return any(
        part["type"] == "Prepend" or part.get("prepend_scheme", "never") != "never"
        for part in parts
    )


def _tokens(
    document: Mapping[str, Any], vocab_size: int, *, has_pieces: bool
) -> list[tuple[str, gguf.TokenType]]:
    """Return every token by its number; numbers that no token has are embeddings that nothing uses.

    Of a tokenizer of pieces, llama.cpp takes U+2581 for a space, but not in tokens that were added
    and are not special.
    """
    unknown = document["model"].get("unk_token")
    by_number = {}
    for token, number in document["model"]["vocab"].items():
        kind = (
            gguf.TokenType.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else gguf.TokenType.NORMAL
        )
        by_number[number] = token, kind
    for added in document.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        content = (
            added["content"].replace("\u2581", " ")
            if has_pieces and not added["special"]
            else added["content"]
        )
        by_number[added["id"]] = (
            content,
            gguf.TokenType.UNKNOWN if added["content"] == unknown else kind,
        )
    return [
        by_number.get(number, (f"[PAD{number}]", gguf.TokenType.UNUSED))
        for number in range(vocab_size)
    ]


class Tensors:
    """Tensors of a model by llama.cpp's names, each read and rearranged when asked for."""

    def __init__(
        self,
        folder: str,
        layout: ModelLayout,
        architecture: LlamaCpp,
        widths: Sequence[BlockWidths],
    ) -> None:
        """Read the headers of a folder's files."""
        self._layout = layout
        self._architecture = architecture
        self._widths = widths
        self._reader = tensor_files.Reader()
        number = next(
            number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name
        )
        name_map = gguf.get_tensor_name_map(number, layout.num_blocks)
        self._source: dict[str, tuple[str, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files.list_names(folder):
            if not file.endswith(".safetensors"):
                continue
            uri = files.join(folder, file)
            for key, shape in self._reader.shapes(uri).items():
                name = name_map.get_name(key, try_suffixes=(".weight", ".bias"))
                if name is None:
                    raise ValueError(
                        f"output.exports: gguf: llama.cpp's {architecture.name} has no place for "
                        f"{key}; export uniform or per_block instead"
                    )
                self._source[name] = uri, key
                self.shapes[name] = (
                    tuple(reversed(shape)) if self._is_transposed(key, shape) else tuple(shape)
                )
        factors = self._rope_factors()
        if factors is not None:
            self.shapes["rope_freqs.weight"] = factors.shape
        self.names = sorted(self.shapes)

    def _is_transposed(self, key: str, shape: Sequence[int]) -> bool:
        return (
            self._layout.family.transposed
            and len(shape) == 2
            and self._layout.block_of(key) is not None
        )

    def read(self, name: str) -> NDArray[np.float32]:
        """Return a tensor in float32."""
        if name == "rope_freqs.weight":
            factors = self._rope_factors()
            assert factors is not None
            return factors
        uri, key = self._source[name]
        tensor = self._reader.read(uri, key).float()
        architecture = self._architecture
        if self._is_transposed(key, tensor.shape):
            tensor = tensor.T
        if architecture.pairs_rotary and re.search(r"\.attn_[qk]\.", name):
            tensor = _paired(tensor, self._layout.heads.head_dim)
        if architecture.adds_one_to_norms and "norm" in name:
            tensor = tensor + 1
        return np.ascontiguousarray(tensor.numpy())

    def _rope_factors(self) -> NDArray[np.float32] | None:
        """Return by what llama3's scaling divides each frequency, [head_dim / 2]."""
        config = self._layout.config
        if getattr(config, "rope_parameters", None) is None or rope_kind(config) != "llama3":
            return None
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        n = self._layout.heads.head_dim
        plain = float(config.rope_parameters["rope_theta"]) ** -(
            torch.arange(0, n, 2, dtype=torch.float64) / n
        )
        factors: NDArray[np.float32] = (plain / scaled.double()).float().numpy()
        return factors


def _paired(tensor: Tensor, head_dim: int) -> Tensor:
    """Return rows of queries or keys in the order in which neighbours rotate together.

    In transformers the halves of a head do.
    """
    halves = tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _how(name: str, shape: Sequence[int], kind: str) -> Kind:
    """Return how a tensor is stored.

    Matrices are stored as asked, or in float16 if their rows are no whole blocks of that. All else
    is in float32.
    """
    if len(shape) < 2 or name.startswith("position_embd"):
        return Kind.F32
    block_size, _ = gguf.GGML_QUANT_SIZES[KINDS[kind][0]]
    return KINDS[kind][0] if shape[-1] % block_size == 0 else Kind.F16


def _largest_error(file: Path, tensors: Tensors, kind: str) -> float:
    """Read a file again and return the largest error of an entry.

    It is relative to the largest entry of its tensor.

    Raises:
        ValueError: a tensor is missing, or further from what it was made of than its type explains.
    """
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    largest = 0.0
    if sorted(stored) != tensors.names:
        raise ValueError(
            f"{file.name}: holds other tensors than were written: "
            f"{sorted(set(stored) ^ set(tensors.names))}"
        )
    for name in tensors.names:
        expected = tensors.read(name)
        values = gguf.dequantize(stored[name].data, stored[name].tensor_type)
        error = float(
            np.abs(values.reshape(expected.shape) - expected).max()
            / max(float(np.abs(expected).max()), 1e-30)
        )
        if not error <= KINDS[kind][2]:
            raise ValueError(
                f"{file.name}: {name} read again differs by {error:g} of its largest entry; do not "
                "use the file"
            )
        largest = max(largest, error)
    return largest


def _written(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    document = dict(request["document"])
    config = AutoConfig.for_model(document.pop("model_type"), **document)
    widths = [
        BlockWidths(width["num_channels"], width["num_kv_heads"]) for width in request["widths"]
    ]
    for kind in request["kinds"]:
        file = f"{request['name']}-{kind.upper()}.gguf"
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / file
            error = write_gguf(request["folder"], config, widths, kind, request["name"], path)
            size = path.stat().st_size
            files.put_file(files.join(request["target"], file), path)
        yield {"file": file, "size_bytes": size, "largest_error": error}


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Write the files of a request, and return what was written; see `run_module`."""
    return {"files": list(_written(request))}
