"""Perplexity of the model that the workers hold."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ray_surgeon.cluster.protocol import Cluster
from ray_surgeon.cluster.steps import sequence_losses


def perplexity(cluster: Cluster, windows: NDArray[np.int64]) -> float:
    """Return exp of the mean over windows of the mean NLL of their predicted tokens.

    Args:
        cluster: with loaded workers.
        windows: [num_sequences, sequence_length] tokens; ``sequence_length - 1`` are predicted in each.

    Raises:
        FloatingPointError: the loss is not a number.
    """
    mean = sum(sequence_losses(cluster, windows)) / (windows.shape[0] * (windows.shape[1] - 1))
    if math.isnan(mean):
        raise FloatingPointError("the loss on the evaluation text is not a number; the weights are damaged")
    return math.exp(mean) if mean < 700 else math.inf
