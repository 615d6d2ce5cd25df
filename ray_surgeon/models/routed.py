"""Tokens sorted by where a router sends them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


class Routed:
    """Pairs of a token and one of the k places it goes to.

    Those of a place lie together, their tokens ascending.

    Attributes:
        places: [n] ascending.
        tokens: [n].
        order: [n] where the pairs are in a flattened [num_tokens, k].
        counts: how many every place has. Only these are read by the host.
    """

    def __init__(self, chosen: Tensor, num_places: int) -> None:
        """Sort the places [num_tokens, k] of all tokens."""
        self.places, self.order = chosen.flatten().sort(stable=True)
        self.tokens = self.order // chosen.shape[1]
        every = torch.arange(num_places, device=chosen.device)
        ends = torch.searchsorted(self.places, every, right=True).tolist()
        self.counts = [end - start for start, end in itertools.pairwise([0, *ends])]

    def of(self, values: Tensor) -> Tensor:
        """Return what a [num_tokens, k] says of the pairs, [n]."""
        return values.flatten().index_select(0, self.order)
