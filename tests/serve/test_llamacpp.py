"""What llama.cpp computes from a GGUF file, against transformers on the export with the same
weights, in float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ray_surgeon.export.gguf_file import write_gguf
from ray_surgeon.models.pruned_config import BlockWidths
from tests.serve import environments
from tests.serve.compare import NUM_NEW_TOKENS, TOLERANCE, compare
from tests.serve.models import FAMILIES, PROMPTS, VOCABULARY, exported, of_pieces

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(
        not environments.is_there("llamacpp"), reason="python -m tests.serve.environments llamacpp"
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


def in_llamacpp(folder: Path, tolerance: float = TOLERANCE) -> None:
    (file,) = (folder.parent / "gguf").glob("*-F32.gguf")
    request = {
        "file": str(file),
        "prompts": PROMPTS,
        "num_new_tokens": NUM_NEW_TOKENS,
        "chunk": 32,
        "max_length": 200,
    }
    found = environments.run(
        "llamacpp", request | {"vocabulary": VOCABULARY, "scored": SCORED, "texts": TEXTS}
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert found["tokenized"] == [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS
    ]
    compare(found, folder, "llama.cpp", SCORED, without_end=True, tolerance=tolerance)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2"])
def test_uniform(family: str, tmp_path: Path) -> None:
    tolerance = ROUNDED_GELU if family in ("gemma3", "gpt2") else TOLERANCE
    options = {"output__gguf": ["f32"]}
    if family == "qwen2":
        options["pruning__groups"] = ["ffn"]
    in_llamacpp(exported(family, "uniform", "gguf", folder=tmp_path, **options), tolerance)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_uniform_with_fewer_heads(family: str, tmp_path: Path) -> None:
    options = {
        "pruning__groups": ["attention"],
        "pruning__target_sparsity": 0.1,
        "output__gguf": ["f32"],
    }
    folder = exported(family, "uniform", "gguf", folder=tmp_path, **options)
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == 1
    in_llamacpp(folder)


@pytest.mark.parametrize("kind", ["per_block", "deci"])
def test_widths_that_differ(kind: str, tmp_path: Path) -> None:
    """Written as DeciLM; numbers of heads differ, too."""
    family = "llama-wide" if kind == "deci" else "llama"
    in_llamacpp(exported(family, kind, "gguf", folder=tmp_path, output__gguf=["f32"]))


def test_a_tokenizer_of_pieces(tmp_path: Path) -> None:
    """SentencePiece's BPE as Llama 2 has it, with text that needs bytes."""
    tokenizer = of_pieces()
    config = LlamaConfig(**{**FAMILIES["llama"].config.to_dict(), "vocab_size": 1000})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write_gguf(
        str(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        [BlockWidths(256, 2)] * 4,
        "f32",
        "pieces",
        tmp_path / "x.gguf",
    )
    texts = [text.replace("\n", " ") for text in TEXTS] + ["na\u00efve \u20ac 5"]
    request = {
        "file": str(tmp_path / "x.gguf"),
        "prompts": [],
        "num_new_tokens": 0,
        "chunk": 32,
        "max_length": 200,
        "texts": texts,
    }
    found = environments.run("llamacpp", request)
    assert found["tokenized"] == [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts
    ]
