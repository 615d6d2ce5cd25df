"""GGUF files hold the pruned tensors, and models that llama.cpp would misread are refused.
tests/serve loads such files in llama.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ray_surgeon.config.sections import GgufKind
from ray_surgeon.export.gguf_file import KINDS, Tensors, tokens_of, write_gguf
from ray_surgeon.export.imatrix_file import write_imatrix
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.llama_cpp import architecture_of, tokenizer_names
from ray_surgeon.models.pruned_config import BlockWidths
from ray_surgeon.report.html_report import page
from ray_surgeon.storage import tensor_files
from tests.conftest import LAYOUTS, VOCABULARY
from tests.integration import runs
from tests.integration.runs import Jobs, config_like
from tests.models.test_older_readers import LLAMA_3

GROUPS = runs.GROUPS | runs.ONE | {"pruning__width_multiple": 16}


def tensors_of(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {
        t.name: gguf.dequantize(t.data, t.tensor_type)
        for t in gguf.GGUFReader(file).tensors
    }


def fields_of(file: Path) -> dict[str, Any]:
    return {
        name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()
    }


def test_gguf_has_the_tensors_of_the_uniform_export(job: Jobs) -> None:
    """Heads are permuted to rotate in pairs. The eight-bit file is close to the float32 file."""
    options = GROUPS | {
        "pruning__allocation": "uniform",
        "output__exports": ["uniform", "gguf"],
    }
    done = job(options, output__gguf=["f32", "q8_0"], cluster__num_shards=2)
    folder = done.export("gguf")
    files = ["llama-pruned-F32.gguf", "llama-pruned-Q8_0.gguf"]
    others = ["llama-pruned-imatrix.gguf", "README.md"]
    assert {path.name for path in folder.iterdir()} == {*others, *files}
    whole, small = (tensors_of(folder / name) for name in files)
    layer = AutoModelForCausalLM.from_pretrained(done.export("uniform")).model.layers[1]
    gate = layer.mlp.gate_proj.weight.detach().numpy()
    query = layer.self_attn.q_proj.weight.detach().numpy()
    assert np.array_equal(whole["blk.1.ffn_gate.weight"], gate)
    assert np.array_equal(whole["blk.1.attn_q.weight"][[0, 1, 2, 3]], query[[0, 4, 1, 5]])
    assert "output.weight" not in whole
    assert (
        0
        < np.abs(small["blk.1.ffn_gate.weight"] - gate).max()
        < 0.005 * np.abs(gate).max()
    )
    fields = fields_of(folder / files[0])
    assert fields["general.architecture"] == "llama"
    assert fields["llama.feed_forward_length"] == gate.shape[0] < 48
    assert fields["llama.rope.freq_base"] == 10000.0
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == (
        "gpt2",
        "gpt-2",
    )
    assert len(fields["tokenizer.ggml.tokens"]) == VOCABULARY
    assert fields["tokenizer.ggml.eos_token_id"] == 0
    entry = done.exports[1]
    assert [file["file"] for file in entry["files"]] == files
    assert entry["files"][0]["largest_error"] == 0.0
    assert entry["load"] == f"llama-server --model {folder}/{files[0]}"
    card = (folder / "README.md").read_text()
    assert f"llama-server --model {files[0]}" in card
    assert f"llama-quantize --imatrix {others[0]} {files[0]}" in card
    assert "library_name: llama.cpp" in card
    assert f"{files[1]}: " in page([done.report])


DEEP = {"pruning__groups": ["blocks", "ffn"], "pruning__depth__num_removed": 1}


@pytest.mark.parametrize("options", [runs.FOUR, DEEP])
def test_importance_matrix_sums_squared_inputs(
    options: dict[str, Any], job: Jobs
) -> None:
    """The matrix holds the sums of squared inputs of the exported linears over the calibration
    text.
    """
    options = options | {
        "pruning__allocation": "uniform",
        "output__exports": ["uniform", "gguf"],
    }
    done = job(GROUPS | options)
    file = done.export("gguf") / "llama-pruned-imatrix.gguf"
    fields = fields_of(file)
    calibration = job.inputs(GROUPS | options, "again").calibration
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["text.txt"]
    assert (
        fields["imatrix.chunk_count"],
        fields["imatrix.chunk_size"],
    ) == calibration.shape
    found = tensors_of(file)
    model = AutoModelForCausalLM.from_pretrained(done.export("uniform"))
    seen = dict[str, torch.Tensor]()
    for number, layer in enumerate(model.model.layers):
        names = {"attn_q": layer.self_attn.q_proj, "attn_output": layer.self_attn.o_proj}
        names |= {"ffn_gate": layer.mlp.gate_proj, "ffn_down": layer.mlp.down_proj}
        for name, linear in names.items():
            linear.register_forward_pre_hook(
                lambda _, given, key=f"blk.{number}.{name}": seen.update({key: given[0]})
            )
    with torch.no_grad():
        model(torch.from_numpy(calibration))
    assert len(found) == 2 * 7 * len(model.model.layers)
    for name, inputs in seen.items():
        assert found[f"{name}.weight.counts"].tolist() == [calibration.size]
        expected = inputs.double().square().sum(dim=(0, 1)).numpy()
        np.testing.assert_allclose(found[f"{name}.weight.in_sum2"], expected, rtol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_gguf_joins_the_experts_of_a_layer(family: str, job: Jobs) -> None:
    """The tensors equal those of the uniform export, whatever the layout of the checkpoint."""
    options = {
        "pruning__allocation": "uniform",
        "output__exports": ["uniform", "gguf"],
        "pruning__groups": ["experts", "expert_channels"],
        "output__gguf": ["f32"],
    }
    done = job(GROUPS | options, model=family)
    model = AutoModelForCausalLM.from_pretrained(done.export("uniform"))
    state = model.state_dict()
    both = state["model.layers.1.mlp.experts.gate_up_proj"]
    down = state["model.layers.1.mlp.experts.down_proj"]
    if family == "gpt_oss":
        gate, up, down = both[..., ::2].mT, both[..., 1::2].mT, down.mT
    else:
        gate, up = both.chunk(2, dim=1)
    (file,) = done.export("gguf").glob("*-F32.gguf")
    found = tensors_of(file)
    for name, expected in {"gate": gate, "up": up, "down": down}.items():
        assert np.array_equal(found[f"blk.1.ffn_{name}_exps.weight"], expected.numpy())
    fields = fields_of(file)
    architecture = fields["general.architecture"]
    assert (
        fields[f"{architecture}.expert_count"] == len(down) < LAYOUTS[family].num_experts
    )
    assert fields[f"{architecture}.expert_feed_forward_length"] == down.shape[2]
    (file,) = done.export("gguf").glob("*-imatrix.gguf")
    matrix = tensors_of(file)
    assert matrix["blk.1.ffn_down_exps.weight.in_sum2"].shape == (
        len(down),
        down.shape[2],
    )
    routed: list[Any] = []
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda _, given: routed.extend(given))
    calibration = job.inputs(GROUPS | options, "again", model=family).calibration
    with torch.no_grad():
        model(torch.from_numpy(calibration))
    inputs, chosen, *_ = routed
    of_experts = [inputs[(chosen == e).any(dim=-1)].double() for e in range(len(down))]
    for expert, own in enumerate(of_experts):
        expected = own.square().mean(dim=0).numpy() * calibration.size
        sums = matrix["blk.1.ffn_gate_exps.weight.in_sum2"][expert]
        np.testing.assert_allclose(sums, expected, rtol=1e-4)


def test_experts_without_tokens_have_equal_importance(tmp_path: Path) -> None:
    """llama.cpp uses ones where a count is zero, and divides by the count elsewhere."""
    squares = torch.tensor([[1.0, 4.0], [0.0, 0.0]])
    write_imatrix(
        {"blk.0.ffn_up_exps.weight": squares}, ["text"], (2, 8), tmp_path / "m.gguf"
    )
    found = tensors_of(tmp_path / "m.gguf")
    assert found["blk.0.ffn_up_exps.weight.counts"].tolist() == [[16.0], [0.0]]
    assert found["blk.0.ffn_up_exps.weight.in_sum2"].tolist() == [
        [16.0, 64.0],
        [0.0, 0.0],
    ]


def test_widths_that_differ_by_block_use_the_deci_architecture(job: Jobs) -> None:
    options = {"output__exports": ["per_block", "gguf"], "output__gguf": ["bf16"]}
    done = job(GROUPS | options)
    config = json.loads((done.export("per_block") / "config.json").read_text())
    layers = config["per_layer_config"].values()
    fields = fields_of(done.export("gguf") / "llama-pruned-BF16.gguf")
    assert fields["general.architecture"] == "deci"
    assert len(set(fields["deci.feed_forward_length"])) > 1
    for name, of_layer in {
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
    }.items():
        counts = [layer[of_layer] for layer in layers]
        assert fields[f"deci.{name}"] == (counts if len(set(counts)) > 1 else counts[0])


def test_rope_frequencies_of_llama_3_match_transformers(tmp_path: Path) -> None:
    config = config_like("llama", rope_parameters=LLAMA_3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    layout = ModelLayout.of(AutoConfig.from_pretrained(tmp_path))
    widths = [BlockWidths(48, 2)] * 4
    tensors = Tensors(str(tmp_path), layout, architecture_of(layout, widths))
    factors = tensors.read("rope_freqs.weight")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](layout.config, torch.device("cpu"))
    plain = LLAMA_3["rope_theta"] ** -(np.arange(0, 8, 2) / 8)
    assert np.allclose(plain / factors, scaled.numpy(), rtol=1e-6)
    assert factors[0] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(8.0)


PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
ONE_HEAD = [(8, 1)]


@pytest.mark.parametrize(
    ("family", "change", "widths", "expected"),
    [
        ("opt", {}, ONE_HEAD, "llama.cpp does not know the family opt"),
        ("mistral", {}, ONE_HEAD, "would ignore sliding_window 8"),
        ("qwen2", {}, [(8, 2), (16, 2)], "set pruning.allocation: uniform"),
        ("llama", {}, [(8, 1), (0, 1)], r"set pruning\.groups: \[blocks\]"),
        ("qwen2", {}, ONE_HEAD, r"set pruning\.groups: \[ffn\]"),
        (
            "llama",
            {"hidden_act": "gelu"},
            ONE_HEAD,
            "has the activation silu, the model gelu",
        ),
        ("llama-biases", {}, ONE_HEAD, "has no attention_bias"),
        ("qwen3", {"rope_parameters": PARTIAL}, ONE_HEAD, "'partial_rotary_factor': 0.5"),
        ("gpt2", {"scale_attn_weights": False}, ONE_HEAD, "scale_attn_weights false"),
        ("gemma3", {}, ONE_HEAD, "full_attention in turns, the model"),
        ("llama", {"rope_parameters": DYNAMIC}, ONE_HEAD, "'rope_type': 'dynamic'"),
        ("qwen3_moe", {"norm_topk_prob": False}, ONE_HEAD, "experts sum to 1"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, ONE_HEAD, "has experts in every block"),
        ("mixtral", {}, [(0, 2, (8, 16))], "has experts of one width"),
        ("mixtral", {}, [(0, 2, (8, 8)), (0, 2, (8,))], "has experts of one width"),
        ("gpt_oss", {"swiglu_limit": 5.0}, ONE_HEAD, "swiglu_limit 7"),
    ],
)
def test_models_that_llama_cpp_would_misread_are_refused(
    family: str, change: dict[str, Any], widths: list[tuple[Any, ...]], expected: str
) -> None:
    layout = ModelLayout.of(config_like(family, **change))
    with pytest.raises(ValueError, match=expected):
        architecture_of(layout, [BlockWidths(*pair) for pair in widths])


def test_unsupported_model_is_refused_before_a_run_starts(job: Jobs) -> None:
    options = GROUPS | {"pruning__groups": ["ffn"], "output__exports": ["gguf"]}
    assert "set pruning.allocation: uniform" in job.refused(model="qwen2", **options)
    assert not (job.folder / "run").exists()


def test_gemma3_with_the_usual_layer_pattern_is_supported() -> None:
    usual = ["sliding_attention"] * 5 + ["full_attention"]
    config = config_like("gemma3", layer_types=usual, num_hidden_layers=6)
    widths = [BlockWidths(8, 1)] * 6
    assert architecture_of(ModelLayout.of(config), widths).name == "gemma3"
    config.rope_parameters["sliding_attention"] |= {"rope_type": "linear", "factor": 4.0}
    with pytest.raises(ValueError, match="of sliding blocks have no place"):
        architecture_of(ModelLayout.of(config), widths)


def test_yarn_may_have_both_its_old_and_its_new_name() -> None:
    yarn = {"rope_type": "yarn", "type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    yarn |= {"original_max_position_embeddings": 32}
    layout = ModelLayout.of(config_like("qwen2", rope_parameters=yarn))
    assert architecture_of(layout, [BlockWidths(8, 2)]).name == "qwen2"


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("pre_tokenizer", "normalizer", "expected"),
    [
        (BYTES, None, "gpt-2"),
        (BYTES, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}, None, "smollm"),
        (BYTES, {"type": "Lowercase"}, ValueError("normalizer Lowercase")),
        (BYTES | {"add_prefix_space": True}, None, ValueError("has no known name")),
    ],
)
def test_pre_tokenizers_are_identified(
    pre_tokenizer: Any, normalizer: Any, expected: str | ValueError
) -> None:
    """A normaliser that llama.cpp would ignore is refused."""
    document = {"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}
    document |= {"pre_tokenizer": pre_tokenizer, "normalizer": normalizer}
    if isinstance(expected, ValueError):
        with pytest.raises(ValueError, match=str(expected)):
            tokenizer_names(document)
    else:
        assert tokenizer_names(document) == ("gpt2", expected)


def test_added_tokens_of_spaces_are_converted() -> None:
    """Gemma has such tokens; llama.cpp reads U+2581 as a space in pieces only."""
    added = [
        {"id": 1, "content": "\u2581\u2581", "special": False},
        {"id": 2, "content": "<\u2581>", "special": True},
    ]
    document = {"model": {"vocab": {"\u2581a": 0}}, "added_tokens": added}
    names = [
        [token for token, _ in tokens_of(document, 3, has_pieces=has_pieces)]
        for has_pieces in (True, False)
    ]
    assert names == [
        ["\u2581a", "  ", "<\u2581>"],
        ["\u2581a", "\u2581\u2581", "<\u2581>"],
    ]


def write_whole(model: Path, num_heads: int, file: Path) -> float:
    config = AutoConfig.from_pretrained(model)
    return write_gguf(
        str(model), config, [BlockWidths(48, num_heads)] * 4, "f32", "x", file
    )


def test_damaged_tensor_in_the_file_is_an_error(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The written file is read again and compared with its source."""
    read = Tensors.read
    written = list[str]()

    def once_otherwise(self: Tensors, name: str) -> np.ndarray[Any, Any]:
        is_first = name == "blk.0.attn_k.weight" and name not in written
        written.append(name)
        return read(self, name) + is_first

    monkeypatch.setattr(Tensors, "read", once_otherwise)
    with pytest.raises(ValueError, match=r"blk.0.attn_k.weight read again differs"):
        write_whole(llama, 2, tmp_path / "x.gguf")


def test_gpt2_linears_are_transposed(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "x.gguf"
    assert write_whole(model_folders["gpt2"], 4, file) == 0.0
    up = tensor_files.read(str(model_folders["gpt2"] / "model.safetensors"))[
        "transformer.h.0.mlp.c_fc.weight"
    ]
    assert np.array_equal(tensors_of(file)["blk.0.ffn_up.weight"].T, up.numpy())


def test_spec_accepts_every_supported_gguf_type() -> None:
    assert get_args(GgufKind) == tuple(KINDS)
