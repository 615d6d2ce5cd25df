"""SparseGPT and Wanda, as baselines: block after block to the same sparsity.

The inputs of a block are the outputs of the pruned blocks before it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ray_surgeon.config.pruning import SparseGPTSection, WandaSection
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.microbatch import Tokens
from ray_surgeon.distributed.passes import BlockPass
from ray_surgeon.distributed.worker import LinearSummary, Worker, summaries
from ray_surgeon.maths.columns import sparsegpt, upper_inverse, wanda
from ray_surgeon.maths.kronecker import RaisedDamping
from ray_surgeon.maths.masks import ElementMask
from ray_surgeon.pruning.method import Applied, Choice, Method


@dataclass(frozen=True)
class Layerwise(Method, BlockPass):
    """SparseGPT or Wanda."""

    by_element: ClassVar[bool] = True
    section: SparseGPTSection | WandaSection
    sparsity: float = 0.0  # sparsity of every linear after the current shot

    # On the coordinator

    def apply(
        self,
        cluster: Cluster,
        tokens: Tokens,
        choice: Choice,
        shot: int,
    ) -> Applied:
        """Prune shard after shard, block after block, while the calibration sequences pass once.

        The report gets the linears that needed more damping than requested.
        """
        replace(self, sparsity=self.section.targets[shot - 1]).pass_all(cluster, tokens)
        linears = list[LinearSummary]()
        raised = list[dict[str, Any]]()
        for of_worker, events in cluster.run_all(_done):
            linears.extend(of_worker)
            raised.extend(asdict(event) for event in events)
        return linears, {"damping_used": raised}

    # On a worker

    def change(self, worker: Worker, name: str, A: Tensor) -> None:
        """Prune a linear; see `BlockPass`."""
        section = self.section
        W = worker.shard.weight(name)
        shape = worker.layout.shapes[name]
        num_inputs = shape.num_columns - shape.has_bias
        fraction = self.sparsity * W.numel() / (len(W) * num_inputs)
        units = section.units
        before = worker.mask(name, ElementMask).kept[:, :num_inputs].to(W.device)
        weights = W[:, :num_inputs]
        A = A[:num_inputs, :num_inputs]
        if isinstance(section, SparseGPTSection):
            U, raised = upper_inverse(A, section.damping, section.max_damping, name)
            worker.state.raised_damping.extend(raised)
            live = weights.masked_fill(A.diagonal() == 0, 0.0)
            W[:, :num_inputs], kept = sparsegpt(
                live,
                U,
                sparsity=fraction,
                n=units.n,
                m=units.m,
                before=before,
            )
        else:
            kept = wanda(
                weights,
                A.diagonal(),
                sparsity=fraction,
                n=units.n,
                m=units.m,
                before=before,
            )
            W[:, :num_inputs] = weights * kept
        whole = torch.ones_like(W, dtype=torch.bool)
        whole[:, :num_inputs] = kept
        worker.masks[name] = ElementMask(whole.cpu())
        worker.shard.set_weight(name, W)


def _done(worker: Worker) -> tuple[list[LinearSummary], list[RaisedDamping]]:
    """Return the summaries of the owned linears, and the dampings that had to be raised."""
    raised = worker.state.raised_damping
    worker.state.raised_damping = []
    return list(summaries(worker)), raised
