"""What llama.cpp computes from a GGUF file, against transformers on the export with the same weights, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve import environments
from tests.serve.compare import NUM_NEW_TOKENS, TOLERANCE, compare
from tests.serve.models import PROMPTS, VOCABULARY, exported

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(not environments.python_of("llamacpp").exists(), reason="python -m tests.serve.environments llamacpp"),
]
SCORED = [1, 4, 18, 33, 69]
ROUNDED_GELU = 5e-3
"""llama.cpp looks GELU up in a table of float16 numbers."""


def in_llamacpp(folder: Path, tolerance: float = TOLERANCE) -> None:
    (file,) = (folder.parent / "gguf").glob("*-F32.gguf")
    request = {"file": str(file), "prompts": PROMPTS, "num_new_tokens": NUM_NEW_TOKENS, "chunk": 32, "max_length": 200}
    found = environments.run("llamacpp", request | {"vocabulary": VOCABULARY, "scored": SCORED})
    compare(found, folder, "llama.cpp", SCORED, without_end=True, tolerance=tolerance)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2"])
def test_uniform(family: str, tmp_path: Path) -> None:
    tolerance = ROUNDED_GELU if family in ("gemma3", "gpt2") else TOLERANCE
    in_llamacpp(exported(family, "uniform", "gguf", folder=tmp_path, output__gguf=["f32"]), tolerance)


@pytest.mark.parametrize("kind", ["per_block", "deci"])
def test_widths_that_differ(kind: str, tmp_path: Path) -> None:
    """Written as DeciLM; numbers of heads differ, too."""
    family = "llama-wide" if kind == "deci" else "llama"
    in_llamacpp(exported(family, kind, "gguf", folder=tmp_path, output__gguf=["f32"]))
