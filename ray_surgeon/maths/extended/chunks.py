"""The paper's update of elements: chunk by chunk, on the weights updated so far.

Source: docs/method.md, section 4; The LLM Surgeon, section 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def update_in_chunks(
    W: Tensor, A_inverse: Tensor, G_inverse: Tensor, to_prune: Tensor, max_correlate: int
) -> Tensor:
    """Remove elements chunk by chunk and update everything else; removed elements end at zero.

    A chunk S is at most `max_correlate` removed elements in row-major order. Its multipliers solve
    C x = w_S with C_ij = [G^-1]_{r_i r_j} [A^-1]_{c_i c_j}, and the weights change by -G^-1 X A^-1,
    where X has x in the places of S. X is zero outside the rows that the chunk touches, so only
    those rows are multiplied.

    Args:
        W: [R, C].
        A_inverse: [C, C].
        G_inverse: [R, R].
        to_prune: [R, C] bool.
        max_correlate: largest chunk; one that holds all elements gives the exact solution.

    Returns:
        [R, C] new weights, zero in `to_prune`.
    """
    W = W.clone()
    for chunk in torch.split(to_prune.nonzero(), max_correlate):
        rows, columns = chunk.unbind(dim=1)
        system = G_inverse[rows][:, rows] * A_inverse[columns][:, columns]
        multipliers = torch.linalg.solve(system, W[rows, columns])
        touched, place = torch.unique(rows, return_inverse=True)
        X = torch.zeros(len(touched), W.shape[1], dtype=W.dtype, device=W.device)
        X[place, columns] = multipliers
        W -= G_inverse[:, touched] @ (X @ A_inverse)
    W[to_prune] = 0
    return W
