"""Prune a model that is in memory: ``python examples/prune_in_memory.py [--ray]``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where ray_surgeon and examples are

import ray_surgeon
from examples.tiny_model import tiny_llama


def main() -> None:
    """Remove a quarter of the channels of every feed-forward layer and compare the models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--ray", action="store_true", help="on two Ray workers instead of in this process"
    )
    on_ray = parser.parse_args().ray
    cluster: dict[str, Any] = {"backend": "local"}
    if on_ray:
        cluster = {"backend": "ray", "num_shards": 2}
    model, tokenizer = tiny_llama()
    with tempfile.TemporaryDirectory() as folder:
        result = ray_surgeon.prune(
            model,
            tokenizer,
            calibration={
                "source": "python-docs",
                "num_sequences": 8,
                "sequence_length": 64,
            },
            pruning={
                "structure": "groups",
                "groups": ["ffn"],
                "allocation": "uniform",
                "width_multiple": 16,
                "target_sparsity": 0.15,
                "num_shots": 1,
            },
            cluster=cluster,
            output=folder,
        )
        pruned = result.load()
    before, after = result.perplexity["test"]
    print(
        f"{model.num_parameters()} -> {pruned.num_parameters()} parameters, perplexity "
        f"{before:.2f} -> {after:.2f}"
    )
    print(
        f"feed-forward width {model.config.intermediate_size} -> {pruned.config.intermediate_size}"
    )


if __name__ == "__main__":
    main()
