"""Extended KFAC as a kind of curvature of a job."""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_surgeon.config.curvature import ExtendedKfacSection
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.microbatch import Tokens
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.experimental.extended_kfac.collector import further_terms, gather_terms
from ray_surgeon.experimental.extended_kfac.curvature import ExtendedLinear
from ray_surgeon.factors.collector import CurvatureKind
from ray_surgeon.maths.curvature import Linear


class Kind(CurvatureKind):
    """KFAC with further Kronecker terms."""

    def __init__(self, section: ExtendedKfacSection) -> None:
        """Take the options of a job spec."""
        self._num_terms = section.num_kronecker_terms - 1
        self._num_iterations = section.num_power_iterations

    @property
    def num_passes(self) -> int:
        """Number of passes over the calibration text."""
        return 1 + self._num_terms * self._num_iterations

    @property
    def num_copies(self) -> float:
        """The finished terms, and the term that is being computed with its packed moments."""
        return self._num_terms + 1.5

    def gather_further(
        self,
        cluster: Cluster,
        sequences: Tokens,
        label_seed: int | None,
    ) -> dict[str, Any]:
        """Find the further terms; the entry for the report is the median size of each."""
        sizes = gather_terms(
            cluster,
            sequences,
            num_terms=self._num_terms,
            num_iterations=self._num_iterations,
            label_seed=label_seed,
        )
        medians = [float(np.median(list(term.values()))) for term in sizes]
        return {"median_size_of_terms": medians}

    def linear(self, worker: Worker, linear: Linear) -> Linear:
        """Return the linear with its further terms.

        The damping is chosen by KFAC alone, before these are computed.
        """
        further = further_terms(worker, linear.name)
        if not further:
            return linear
        return ExtendedLinear(
            name=linear.name,
            W=linear.W,
            factors=linear.factors,
            has_bias=linear.has_bias,
            damping=linear.damping,
            further=further,
        )
