"""Look at A and G of a linear, for research: ``python examples/look_at_curvature.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # where ray_surgeon and examples are

import ray_surgeon
from examples.tiny_model import tiny_llama


def main() -> None:
    """Print the share of the largest eigenvalues of A and G in their traces.

    G is computed with the labels of the text and with labels drawn from the model.
    """
    model, tokenizer = tiny_llama()
    texts = [text[:400] for text in list(topics.values())[:8]]
    for name, label_seed in (("empirical", None), ("sampled", 0)):
        linear = "model.layers.1.mlp.down_proj"
        factors = ray_surgeon.curvature(
            model, texts, tokenizer, linears=[linear], label_seed=label_seed
        )[linear]
        for factor, matrix in (("A", factors.A), ("G", factors.G)):
            values = torch.linalg.eigvalsh(matrix / factors.num_tokens).flip(0)
            share = float(values[:4].sum() / values.sum())
            print(
                f"{name} {factor} {tuple(matrix.shape)}: the four largest eigenvalues hold "
                f"{share:.0%} of the trace"
            )


if __name__ == "__main__":
    main()
