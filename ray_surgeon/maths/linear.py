"""One linear in one shot, and the restriction of everything about it to some rows and columns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ray_surgeon.maths.kronecker import Damping, PackedFactors

Pair = tuple[Tensor, Tensor]
"""Two tensors that belong together, such as one of rows and one of columns."""


@dataclass(frozen=True)
class Part:
    """Rows and columns of one linear on which factors are inverted.

    A pruned row makes G singular.
    """

    rows: Tensor  # [R] bool
    columns: Tensor  # [C] bool

    def of(self, whole: Tensor) -> Tensor:
        """Return this part of a matrix [R, C], itself if this is all of it."""
        is_all = self.rows.all() and self.columns.all()
        return whole if is_all else whole[self.rows][:, self.columns]

    def put(self, part: Tensor, into: Tensor) -> Tensor:
        """Return a copy of a matrix [R, C] in which this part is replaced."""
        result = into.clone()
        result[self.rows.nonzero(), self.columns.nonzero()[:, 0]] = part
        return result


@dataclass(frozen=True)
class Linear:
    """One linear in one shot."""

    name: str  # for errors
    W: Tensor  # [R, C] float32 or float64, the bias as the last column
    factors: PackedFactors  # sums over the calibration tokens
    has_bias: bool  # whether the last column is a bias
    damping: Damping  # of the factors

    @property
    def num_inputs(self) -> int:
        """C without the bias."""
        return self.W.shape[1] - self.has_bias

    @property
    def live(self) -> Part:
        """Rows with a gradient and columns with an input that is not always zero."""
        factors = self.factors
        G, A = (factor.diagonal().to(self.W.device) for factor in (factors.G, factors.A))
        return Part(G > 0, A > 0)

    @property
    def nonzero(self) -> Part:
        """Those of the live rows and columns in which a weight is not zero, as in pruned ones."""
        live = self.live
        nonzero = self.W != 0
        return Part(live.rows & nonzero.any(dim=1), live.columns & nonzero.any(dim=0))


@dataclass(frozen=True)
class Removal:
    """What became of one linear."""

    W: Tensor  # [R, C] new weights, zero in everything removed
    predicted: float  # loss increase by the quadratic model, in nats per token
    residual: float  # of the update's equations, relative; 0 where they are solved directly
