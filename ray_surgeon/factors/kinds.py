"""The kinds of curvature of a job, some of which need more than A and G of every linear."""

from __future__ import annotations

import importlib
from typing import Any

from ray_surgeon.config.curvature import AnyCurvature
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.microbatch import Tokens
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.maths.curvature import Linear

_EXPERIMENTAL = {"extended_kfac": "ray_surgeon.experimental.extended_kfac.kind"}
"""`curvature.kind` of the job spec -> module with its `Kind`, a subclass of `CurvatureKind`."""


class CurvatureKind:
    """A kind of curvature that needs one pass over the text and A and G of every linear.

    Subclasses are in `ray_surgeon.experimental` and may need more.
    """

    @property
    def num_passes(self) -> int:
        """Number of passes over the calibration text."""
        return 1

    @property
    def num_copies(self) -> float:
        """Copies of A and G as whole float32 matrices that stay on the device until the update.

        They are in addition to the packed sums.
        """
        return 0.0

    def gather_further(
        self,
        cluster: Cluster,
        sequences: Tokens,
        label_seed: int | None,
    ) -> dict[str, Any]:
        """Make the further passes after that for A and G.

        Args:
            cluster: with A and G.
            sequences: the sequences that A and G were gathered from.
            label_seed: as for G, so that the labels are the same.

        Returns:
            Entries for the report.
        """
        return {}

    def linear(self, worker: Worker, linear: Linear) -> Linear:
        """Return a linear of a worker with what the further passes found."""
        return linear


def kind_of(section: AnyCurvature) -> CurvatureKind:
    """Return the kind of curvature that a section of the job spec asks for."""
    if section.kind not in _EXPERIMENTAL:
        return CurvatureKind()
    # loaded by name: no module of the core may depend on an experiment
    module = importlib.import_module(_EXPERIMENTAL[section.kind])
    kind: CurvatureKind = module.Kind(section)
    return kind
