"""Compare methods on one model: ``python examples/compare_methods.py``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where ray_surgeon and examples are

import ray_surgeon
from examples.tiny_model import trained_llama

METHODS: dict[str, dict[str, Any]] = {
    "The LLM Surgeon": {"pruning": {}},
    "K-OBD": {"pruning": {"costs": "obd", "update": {"solver": "none"}}},
    "magnitude": {
        "pruning": {"costs": "obd", "update": {"solver": "none"}},
        "curvature": {"kind": "identity"},
    },
    "SparseGPT": {"pruning": {"method": "sparsegpt"}},
    "Wanda": {"pruning": {"method": "wanda"}},
}


def main() -> None:
    """Remove half of all elements by each method and print the perplexities."""
    print("training a model of 47 thousand weights for some seconds")
    model, tokenizer = trained_llama()
    for name, sections in METHODS.items():
        options = dict(sections)
        options["pruning"] = {
            "structure": "element",
            "target_sparsity": 0.5,
            "num_shots": 1,
        } | options["pruning"]
        with tempfile.TemporaryDirectory() as folder:
            text = {"source": "python-docs", "num_sequences": 32, "sequence_length": 64}
            result = ray_surgeon.prune(
                model,
                tokenizer,
                calibration=text,
                output={"uri": folder, "exports": []},
                progress=False,
                **options,
            )
        before, after = result.perplexity["test"]
        print(
            f"{name:<16} sparsity {result.sparsity:.1%}  perplexity {before:.2f} -> {after:.2f}"
        )


if __name__ == "__main__":
    main()
