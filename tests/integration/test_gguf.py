"""GGUF files: what they hold is what was pruned, and what llama.cpp would misread is refused.
Whether it reads them: tests/serve.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ray_surgeon.export.gguf_file import KINDS, Tensors, write_gguf
from ray_surgeon.export.gguf_tokenizer import local_tokenizer, tokens_of
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.llama_cpp import _pre_tokenizer, architecture_of, tokenizer_names
from ray_surgeon.models.pruned_config import BlockWidths, block_widths
from ray_surgeon.report.html_report import page
from ray_surgeon.spec.sections import GgufKind
from ray_surgeon.storage import tensor_files
from tests.conftest import CONFIGS, LAYOUTS, VOCABULARY
from tests.integration.runs import report_of, run
from tests.models.test_older_readers import LLAMA_3

GROUPS: dict[str, Any] = {
    "pruning__structure": "groups",
    "pruning__width_multiple": 16,
    "pruning__num_shots": 1,
}


def tensors_of(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}


def fields_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_uniform_widths(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """The same tensors as the uniform export, heads rotated in pairs; the eight-bit file is close
    to them.
    """
    options = {
        "pruning__allocation": "uniform",
        "output__exports": ["uniform", "gguf"],
        "output__gguf": ["f32", "q8_0"],
    }
    assert run(tmp_path, model_folders["llama"], **GROUPS, **options, cluster__num_shards=2) == 0
    folder = tmp_path / "run/export/gguf"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "llama-pruned-F32.gguf",
        "llama-pruned-Q8_0.gguf",
    ]
    whole = tensors_of(folder / "llama-pruned-F32.gguf")
    small = tensors_of(folder / "llama-pruned-Q8_0.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/uniform")
    gate = model.get_parameter("model.layers.1.mlp.gate_proj.weight").detach().numpy()
    assert np.array_equal(whole["blk.1.ffn_gate.weight"], gate)
    query = model.get_parameter("model.layers.1.self_attn.q_proj.weight").detach().numpy()
    assert np.array_equal(whole["blk.1.attn_q.weight"][[0, 1, 2, 3]], query[[0, 4, 1, 5]])
    assert "output.weight" not in whole
    assert 0 < np.abs(small["blk.1.ffn_gate.weight"] - gate).max() < 0.005 * np.abs(gate).max()
    fields = fields_of(folder / "llama-pruned-F32.gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["llama.feed_forward_length"] == gate.shape[0] < 48
    assert fields["llama.rope.freq_base"] == 10000.0
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert len(fields["tokenizer.ggml.tokens"]) == VOCABULARY
    assert fields["tokenizer.ggml.eos_token_id"] == 0
    entry = report_of(tmp_path / "run")["exports"][1]
    assert [file["file"] for file in entry["files"]] == [
        "llama-pruned-F32.gguf",
        "llama-pruned-Q8_0.gguf",
    ]
    assert entry["files"][0]["largest_error"] == 0.0
    assert entry["load"] == f"llama-server --model {folder}/llama-pruned-F32.gguf"
    card = (folder / "README.md").read_text()
    assert "llama-server --model llama-pruned-F32.gguf" in card
    assert "library_name: llama.cpp" in card
    assert "llama-pruned-Q8_0.gguf: " in page([report_of(tmp_path / "run")])


def test_widths_that_differ_are_a_deci(model_folders: dict[str, Path], tmp_path: Path) -> None:
    assert (
        run(
            tmp_path,
            model_folders["llama"],
            **GROUPS,
            output__exports=["per_block", "gguf"],
            output__gguf=["bf16"],
        )
        == 0
    )
    config = json.loads((tmp_path / "run/export/per_block/config.json").read_text())[
        "per_layer_config"
    ].values()
    fields = fields_of(tmp_path / "run/export/gguf/llama-pruned-BF16.gguf")
    assert fields["general.architecture"] == "deci"
    assert fields["deci.feed_forward_length"] == [layer["intermediate_size"] for layer in config]
    assert len(set(fields["deci.feed_forward_length"])) > 1
    for name in ("attention.head_count", "attention.head_count_kv"):
        field = {
            "attention.head_count": "num_attention_heads",
            "attention.head_count_kv": "num_key_value_heads",
        }[name]
        counts = [layer[field] for layer in config]
        assert fields[f"deci.{name}"] == (counts if len(set(counts)) > 1 else counts[0])


def test_frequencies_of_llama_3_are_those_of_transformers(tmp_path: Path) -> None:
    config = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "rope_parameters": LLAMA_3})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    layout = ModelLayout.of(AutoConfig.from_pretrained(tmp_path))
    widths = [BlockWidths(48, 2)] * 4
    factors = Tensors(str(tmp_path), layout, architecture_of(layout, widths)).read(
        "rope_freqs.weight"
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](layout.config, torch.device("cpu"))
    plain = LLAMA_3["rope_theta"] ** -(np.arange(0, 8, 2) / 8)
    assert np.allclose(plain / factors, scaled.numpy(), rtol=1e-6)
    assert factors[0] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(8.0)


PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("family", "change", "widths", "expected"),
    [
        ("opt", {}, [BlockWidths(8, 1)], "llama.cpp does not know the family opt"),
        ("mistral", {}, [BlockWidths(8, 1)], "would ignore sliding_window 8"),
        ("qwen2", {}, [BlockWidths(8, 2), BlockWidths(16, 2)], "set pruning.allocation: uniform"),
        ("llama", {}, [BlockWidths(8, 1), BlockWidths(0, 1)], "set pruning.remove_blocks: false"),
        ("qwen2", {}, [BlockWidths(8, 1)], r"set pruning\.groups: \[ffn\]"),
        (
            "llama",
            {"hidden_act": "gelu"},
            [BlockWidths(8, 1)],
            "has the activation silu, the model gelu",
        ),
        ("llama-biases", {}, [BlockWidths(8, 1)], "has no attention_bias"),
        ("qwen3", {"rope_parameters": LLAMA_3}, [BlockWidths(8, 1)], '"rope_type": "llama3"'),
        (
            "qwen3",
            {"rope_parameters": PARTIAL},
            [BlockWidths(8, 1)],
            '"partial_rotary_factor": 0.5',
        ),
        ("gpt2", {"scale_attn_weights": False}, [BlockWidths(8, 1)], "scale_attn_weights false"),
        ("gemma3", {}, [BlockWidths(8, 1)], "every sixth block"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            [BlockWidths(8, 1)],
            '"rope_type": "dynamic"',
        ),
    ],
)
def test_what_llama_cpp_would_misread_is_refused(
    family: str, change: dict[str, Any], widths: list[BlockWidths], expected: str
) -> None:
    layout = LAYOUTS[family]
    if change:
        layout = ModelLayout.of(type(CONFIGS[family])(**{**CONFIGS[family].to_dict(), **change}))
    with pytest.raises(ValueError, match=expected):
        architecture_of(layout, widths)


def test_it_is_refused_before_anything_starts(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(
            tmp_path,
            model_folders["qwen2"],
            **GROUPS,
            pruning__groups=["ffn"],
            output__exports=["gguf"],
        )
        == 2
    )
    assert "set pruning.allocation: uniform" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_gemma_of_the_usual_pattern_is_known() -> None:
    usual = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "num_hidden_layers": 6}
    config = Gemma3TextConfig(**{**CONFIGS["gemma3"].to_dict(), **usual})
    assert architecture_of(ModelLayout.of(config), [BlockWidths(8, 1)] * 6).name == "gemma3"
    config.rope_parameters["sliding_attention"] |= {"rope_type": "linear", "factor": 4.0}
    with pytest.raises(ValueError, match="of sliding blocks have no place"):
        architecture_of(ModelLayout.of(config), [BlockWidths(8, 1)] * 6)


def test_yarn_may_be_called_by_the_older_name_beside_the_newer() -> None:
    yarn = {
        "rope_type": "yarn",
        "type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    layout = ModelLayout.of(
        type(CONFIGS["qwen2"])(**{**CONFIGS["qwen2"].to_dict(), "rope_parameters": yarn})
    )
    assert architecture_of(layout, [BlockWidths(8, 2)]).name == "qwen2"


def test_a_normaliser_that_llama_cpp_would_leave_out_is_refused() -> None:
    cuts = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    document = {
        "model": {"type": "BPE"},
        "decoder": {"type": "ByteLevel"},
        "pre_tokenizer": cuts,
        "normalizer": None,
    }
    nothing = {"type": "Sequence", "normalizers": []}
    for harmless in (None, {"type": "NFC"}, nothing, nothing | {"normalizers": [{"type": "NFC"}]}):
        assert tokenizer_names(document | {"normalizer": harmless}) == ("gpt2", "gpt-2")
    with pytest.raises(ValueError, match="normalizer Lowercase"):
        tokenizer_names(document | {"normalizer": {"type": "Lowercase"}})


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, "gpt-2"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
                ],
            },
            "smollm",
        ),
        ({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}, None),
        ({"type": "Whitespace"}, None),
        (None, None),
    ],
)
def test_names_of_ways_to_cut_text(document: dict[str, Any] | None, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="has no known name"):
            _pre_tokenizer(document)
    else:
        assert _pre_tokenizer(document) == expected


def test_added_runs_of_spaces_are_spaces() -> None:
    """Gemma's; llama.cpp takes U+2581 for a space in pieces only."""
    added = [
        {"id": 1, "content": "\u2581\u2581", "special": False},
        {"id": 2, "content": "<\u2581>", "special": True},
    ]
    document = {"model": {"vocab": {"\u2581a": 0}}, "added_tokens": added}
    names = [
        [token for token, _ in tokens_of(document, 3, has_pieces=has_pieces)]
        for has_pieces in (True, False)
    ]
    assert names == [["\u2581a", "  ", "<\u2581>"], ["\u2581a", "\u2581\u2581", "<\u2581>"]]


def test_a_damaged_file_is_noticed(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read again is compared with what it was made from."""
    config = AutoConfig.from_pretrained(model_folders["llama"])
    read = Tensors.read
    written = list[str]()

    def once_otherwise(self: Tensors, name: str) -> np.ndarray[Any, Any]:
        tensor = read(self, name)
        if name == "blk.0.attn_k.weight" and name not in written:
            tensor = tensor + 1
        written.append(name)
        return tensor

    monkeypatch.setattr(Tensors, "read", once_otherwise)
    with pytest.raises(ValueError, match=r"blk.0.attn_k.weight read again differs"):
        write_gguf(
            str(model_folders["llama"]),
            config,
            [BlockWidths(48, 2)] * 4,
            "f32",
            "x",
            tmp_path / "x.gguf",
        )


def test_the_spec_names_every_type_of_matrices() -> None:
    assert get_args(GgufKind) == tuple(KINDS)


def test_gpt2_linears_are_transposed(model_folders: dict[str, Path], tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(model_folders["gpt2"])
    folder = model_folders["gpt2"]
    assert (
        write_gguf(str(folder), config, [BlockWidths(48, 4)] * 4, "f32", "x", tmp_path / "x.gguf")
        == 0.0
    )
    there = tensors_of(tmp_path / "x.gguf")["blk.0.ffn_up.weight"]
    assert np.array_equal(
        there.T,
        tensor_files.read(str(folder / "model.safetensors"))[
            "transformer.h.0.mlp.c_fc.weight"
        ].numpy(),
    )


def test_only_small_files_are_fetched(model_folders: dict[str, Path], tmp_path: Path) -> None:
    names = {path.name for path in local_tokenizer(str(model_folders["llama"]), tmp_path).iterdir()}
    assert "tokenizer.json" in names
    assert not any(name.endswith(".safetensors") for name in names)
    assert block_widths(
        LAYOUTS["llama"], {n: s.num_rows for n, s in LAYOUTS["llama"].shapes.items()}
    )[0] == BlockWidths(48, 2)
