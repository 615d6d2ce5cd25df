"""Compare methods on one model: ``python -m examples.compare_methods``."""

from __future__ import annotations

import tempfile
from typing import Any

import ray_surgeon
from examples.tiny_model import tiny_llama

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
    """Remove half of all elements by each method and print the perplexities.

    A model of random weights shows no difference in quality.
    """
    model, tokenizer = tiny_llama()
    for name, sections in METHODS.items():
        options = dict(sections)
        options["pruning"] = {
            "structure": "element",
            "target_sparsity": 0.5,
            "num_shots": 1,
        } | options["pruning"]
        with tempfile.TemporaryDirectory() as folder:
            text = {"source": "python-docs", "num_sequences": 8, "sequence_length": 64}
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
