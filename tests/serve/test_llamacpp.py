"""GGUF files computed by llama.cpp, against transformers on the export with the same weights.

All in float32.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks import importance
from examples import engine_table
from ray_surgeon.export.gguf_file import write_gguf
from ray_surgeon.models.pruned_config import BlockWidths
from tests.integration.runs import run
from tests.serve import environments
from tests.serve.compare import NUM_NEW_TOKENS, TOLERANCE, compare
from tests.serve.models import (
    BLOCKS,
    FAMILIES,
    MIXTURES,
    PROMPTS,
    VOCABULARY,
    exported,
    of_pieces,
    tokenizer,
)

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(
        not environments.is_there("llamacpp"),
        reason="python -m tests.serve.environments llamacpp",
    ),
]
SCORED = [1, 4, 18, 33, 69]
TEXTS = [
    "The with statement  is used (in 1999) to wrap   the execution of a block\n"
    "with methods:\n"
    "\n"
    "    def f(x): return x",
    "a",
    "it's",
]
ROUNDED_GELU = 5e-3
"""llama.cpp looks GELU up in a table of float16 numbers."""


REQUEST: dict[str, Any] = {
    "num_new_tokens": NUM_NEW_TOKENS,
    "chunk": 32,
    "max_length": 200,
}
REQUEST |= {"vocabulary": VOCABULARY, "scored": SCORED}


def in_llamacpp(folder: Path, tolerance: float = TOLERANCE) -> None:
    (file,) = (folder.parent / "gguf").glob("*-F32.gguf")
    request = REQUEST | {"file": str(file), "prompts": PROMPTS, "texts": TEXTS}
    found = environments.run("llamacpp", request)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert found["tokenized"] == expected
    compare(found, folder, "llama.cpp", SCORED, without_end=True, tolerance=tolerance)


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "granite"],
)
def test_uniform_export(family: str, tmp_path: Path) -> None:
    tolerance = ROUNDED_GELU if family in ("gemma3", "gpt2") else TOLERANCE
    options = {"output__gguf": ["f32"]}
    if family == "qwen2":
        options["pruning__groups"] = ["ffn"]
    in_llamacpp(
        exported(family, "uniform", "gguf", folder=tmp_path, **options), tolerance
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_uniform_export_with_fewer_heads(family: str, tmp_path: Path) -> None:
    options = {"pruning__groups": ["attention"], "pruning__target_sparsity": 0.1}
    folder = exported(
        family, "uniform", "gguf", folder=tmp_path, output__gguf=["f32"], **options
    )
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == 1
    in_llamacpp(folder)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_mixture_of_experts(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole experts are removed, and channels of the others."""
    # llama.cpp rounds the borders of frequencies, as `truncate` does
    if family == "gpt_oss":
        config = copy.deepcopy(MIXTURES[family])
        config.rope_parameters["truncate"] = True
        monkeypatch.setitem(MIXTURES, family, config)
    options = {"pruning__groups": ["experts", "expert_channels"], "output__gguf": ["f32"]}
    folder = exported(family, "uniform", "gguf", folder=tmp_path, **options)
    document = json.loads((folder / "config.json").read_text())
    assert document["num_local_experts"] < 8
    in_llamacpp(folder)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_export_with_fewer_blocks(family: str, tmp_path: Path) -> None:
    tolerance = ROUNDED_GELU if family == "gpt2" else TOLERANCE
    options = BLOCKS | {"output__gguf": ["f32"]}
    in_llamacpp(
        exported(family, "uniform", "gguf", folder=tmp_path, **options), tolerance
    )


def test_export_with_widths_that_differ_by_block(tmp_path: Path) -> None:
    """Written as DeciLM; the numbers of heads differ too."""
    in_llamacpp(
        exported("llama", "per_block", "gguf", folder=tmp_path, output__gguf=["f32"])
    )


@pytest.mark.skipif(
    not environments.tools_are_there(), reason="python -m tests.serve.environments tools"
)
def test_importance_matrix_improves_quantisation(tmp_path: Path) -> None:
    """With it llama.cpp rounds a pruned real model more accurately on every text."""
    settings = (
        "evaluation.generation=null; calibration.num_sequences=16; calibration.mix=[]"
    )
    settings += "; cluster={backend: local}; pruning.reconstruction=null"
    export, texts = importance.exported(tmp_path, settings.split("; "), dense=False)
    tools = importance.Tools(environments.tools_folder())
    rows = importance.measured(tmp_path, export, texts, tools, ["Q4_K_M"])
    without, ours = (row["divergence"] for row in rows)
    assert all(0 < ours[text] < without[text] for text in texts), rows
    request = REQUEST | {"prompts": PROMPTS[:1], "scored": [], "texts": []}
    request["file"] = str(tmp_path / "Q4_K_M-imatrix.gguf")
    (found,) = environments.run("llamacpp", request)["results"]
    assert len(found["tokens"]) == NUM_NEW_TOKENS


def test_measured_latency_table(tmp_path: Path) -> None:
    """Measured on a small model with many blocks, so that half of them are faster; a
    job reads it.
    """
    model = tmp_path / "model"
    config = copy.deepcopy(FAMILIES["llama"])
    config.num_hidden_layers = 24
    config.intermediate_size = 1024
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tokenizer().save_pretrained(model)
    file = tmp_path / "table.json"
    engine = ["--engine", "llamacpp", "--python", str(environments.python_of("llamacpp"))]
    request = ["--rounds", "1", "--prompt-length", "256", "--num-new-tokens", "64"]
    assert engine_table.main([str(model), str(file), *engine, *request]) == 0
    table = json.loads(file.read_text())
    assert list(table["channels"]) == ["256", "512", "768", "1024"]
    assert list(table["kv_heads"]) == ["1", "2"]
    assert table["channels"]["1024"] == table["kv_heads"]["2"]
    assert min(table["channels"]["1024"]) > 0
    # made to fall, so that there is something to save
    table["channels"] = {width: [0.0, 1e-5 * int(width)] for width in table["channels"]}
    file.write_text(json.dumps(table | {"rest": [0.0, 1e-6]}))
    pruning = {"structure": "groups", "num_shots": 1, "groups": ["ffn"]}
    pruning["target"] = {"decode_tokens_per_s": 300, "table": str(file)}
    assert run(tmp_path, model, pruning=pruning) == 0
    (shot,) = json.loads((tmp_path / "run" / "report.json").read_text())["shots"]
    assert 0 < shot["budget"]["need"] <= 1 / 300 < shot["budget"]["dense"]


def test_sentencepiece_tokenizer(tmp_path: Path) -> None:
    """SentencePiece's BPE as in Llama 2, with text that needs the byte fallback."""
    cuts = of_pieces()
    config = copy.deepcopy(FAMILIES["llama"])
    config.vocab_size = 1000
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    cuts.save_pretrained(tmp_path)
    file = tmp_path / "x.gguf"
    config = AutoConfig.from_pretrained(tmp_path)
    write_gguf(str(tmp_path), config, [BlockWidths(256, 2)] * 4, "f32", "pieces", file)
    texts = [text.replace("\n", " ") for text in TEXTS] + ["na\u00efve \u20ac 5"]
    found = environments.run(
        "llamacpp", REQUEST | {"file": str(file), "prompts": [], "texts": texts}
    )
    expected = [cuts(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert found["tokenized"] == expected
