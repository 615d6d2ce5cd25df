"""One worker: a shard of blocks, its curvature, its masks. A plain class; Ray or a local cluster calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_surgeon import storage
from ray_surgeon.cluster.alone import run_alone
from ray_surgeon.cluster.correction_steps import CorrectionSteps
from ray_surgeon.cluster.group_steps import GroupSteps
from ray_surgeon.cluster.layerwise_steps import LayerwiseSteps
from ray_surgeon.cluster.messages import (
    ClippingEvent,
    CostOptions,
    CostsReply,
    CurvatureOptions,
    DampingEvent,
    LinearCosts,
    LinearSummary,
    PruneOptions,
    SavedFile,
    Usage,
    Wire,
    WorkerIndex,
)
from ray_surgeon.cluster.placement import Placement
from ray_surgeon.cluster.power_steps import PowerSteps
from ray_surgeon.cluster.transport import decode, encode
from ray_surgeon.cluster.usage import counts_busy_time, process_usage
from ray_surgeon.models.dead import without_dead
from ray_surgeon.models.linears import cut, num_inputs
from ray_surgeon.surgery.element_surgery import ElementCandidates, ElementSurgery
from ray_surgeon.surgery.linear import Candidates, LinearSurgery
from ray_surgeon.surgery.masks import ElementMask, StructuredMask
from ray_surgeon.surgery.threshold import bit_histogram


@counts_busy_time
class ShardWorker(PowerSteps, GroupSteps, LayerwiseSteps, CorrectionSteps):
    """Holds one shard of one replica. Every method is one step of a shot, called in the order of `cluster.steps`."""

    def __init__(self, placement: Placement, index: WorkerIndex, num_threads: int, device: str) -> None:
        """Prepare an empty worker; see `ShardState`."""
        super().__init__(placement, index, num_threads, device)
        self._candidates: dict[str, Candidates] = {}
        self._element_candidates: dict[str, ElementCandidates] = {}

    # Curvature: forward and backward over micro-batches

    def start_curvature(self, kind: str, with_gradient: bool, readers_only: bool) -> None:
        """Zero the factors and start gathering; see `ModelShard.start_curvature`."""
        self.shard.start_curvature(kind, with_gradient=with_gradient, readers_only=readers_only)

    def forward(self, micro_batch: int, inputs: Wire) -> Wire:
        """Run a micro-batch forward: tokens or hidden states in, hidden states out."""
        return encode(self.shard.forward(micro_batch, decode(inputs, self.device)))

    def forward_backward(self, micro_batch: int, inputs: Wire, tokens: Wire, sample_seed: int | None) -> tuple[Wire | None, float]:
        """Run a micro-batch through the last shard and back.

        Args:
            micro_batch: its number.
            inputs: tokens, if this is the only shard, or hidden states.
            tokens: [n, T] the labels.
            sample_seed: seed of labels drawn from the model; None takes the data's (empirical Fisher).

        Returns:
            The gradient at the inputs, None if this is the only shard, and the summed NLL of the data in nats.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        labels = decode(tokens, self.device)
        generator = None if sample_seed is None else torch.Generator(self.device).manual_seed(sample_seed + micro_batch)
        hidden = self.shard.forward(micro_batch, decode(inputs, self.device))
        nll, gradient = self.shard.loss(hidden, labels, with_gradient=True, generator=generator)
        total = float(nll.sum())
        if not np.isfinite(total):
            raise FloatingPointError(f"the loss of calibration micro-batch {micro_batch} is {total}; check the weights and the dtype")
        assert gradient is not None
        return self._gradient_below(self.shard.backward(micro_batch, gradient)), total

    def first_not_finite(self) -> str | None:
        """Return the first linear of this shard whose inputs were not finite; see `ModelShard.first_not_finite`."""
        return self.shard.first_not_finite()

    def backward(self, micro_batch: int, gradient: Wire) -> Wire | None:
        """Run a micro-batch backward: gradient at the outputs in, gradient at the inputs out; the first shard keeps its own."""
        return self._gradient_below(self.shard.backward(micro_batch, decode(gradient, self.device)))

    def _gradient_below(self, gradient: Tensor) -> Wire | None:
        return None if self.index.shard == 0 else encode(gradient)

    def finish_curvature(self, kind: str) -> None:
        """Stop gathering and sum the factors over the replicas, each site to its owner; the others free theirs."""
        assert self.shard.gathering, "no curvature pass has been made"
        self.shard.stop_curvature(kind)
        for site in self.shard.gathering:
            owner = self.placement.owners[self.site_of[site.names[0]]]
            assert site.A is not None
            num_tokens = torch.tensor(site.num_tokens, device=self.device)
            for total in (site.A, *site.G, *site.gradients, num_tokens):
                self.replicas.reduce(total, owner)
            site.num_tokens = int(num_tokens)
            if owner != self.replicas.rank:
                site.A, site.G, site.gradients = None, (), ()

    # Costs and updates, on owned linears only

    def _surgery(self, name: str, options: CurvatureOptions) -> LinearSurgery:
        mask = self.masks[name]
        assert isinstance(mask, StructuredMask)
        return LinearSurgery(name, self.shard.weight(name), self.shard.factors(name), mask, **self._linear_options(name, options))

    def _element_surgery(self, name: str, options: CostOptions) -> ElementSurgery:
        mask = self.masks[name]
        assert isinstance(mask, ElementMask)
        arguments = self._linear_options(name, options.curvature)
        return ElementSurgery(name, self.shard.weight(name), self.shard.factors(name), mask, units=options.units, **arguments)

    def _linear_options(self, name: str, options: CurvatureOptions) -> dict[str, Any]:
        return {
            "has_bias": self.shard.linears[name].bias is not None,
            "damping_a": options.damping_a,
            "damping_g": options.damping_g,
            "max_damping": options.max_damping,
        }

    def costs(self, options: CostOptions) -> CostsReply:
        """Take the costs of the owned linears, keep them for `prune`, and return those of rows and columns.

        Raises:
            FloatingPointError: a factor or a cost is not usable; names the linear.
        """
        replies, events, clipped = [], [], []
        for name in self.owned():
            found: Candidates | ElementCandidates
            if options.by_element:
                found = self._element_candidates[name] = self._element_surgery(name, options).candidates(options.costs)
            else:
                surgery = self._surgery(name, options.curvature)
                found = surgery.candidates(options.structure, options.rank_by, options.costs, options.greedy_limit)
                self._candidates[name] = found
                replies.append(_linear_costs(name, surgery.mask, found))
            events += _damping_events(name, options.curvature, found)
            clipped += [ClippingEvent(name, term, change) for term, change in enumerate(found.clipping, 1) if change]
        masks = [self.masks[name] for name in self.owned()]
        sizes = sum(m.num_parameters for m in masks), sum(m.num_kept for m in masks)
        return CostsReply(tuple(replies), *sizes, tuple(events), tuple(clipped))

    def cost_histogram(self, options: CostOptions, high: int | None) -> NDArray[np.int64]:
        """Count the costs of the owned linears' elements or groups by their bits; see `bit_histogram`."""
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for name in self.owned():
            costs = self._element_surgery(name, options).unit_costs(self._element_candidates[name])
            counts += bit_histogram(costs, high).cpu()
        return counts.numpy()

    def num_kept_at(self, threshold: float) -> int:
        """Return the parameters that this shard's linears keep at a threshold, when what is dead then goes too."""
        masks = {name: self.structured(name) for name in self.shard.linears}
        for name in self.owned():
            masks[name] = masks[name].without(*self._candidates[name].gone(masks[name], threshold))
        masks = {name: self.share_mask(name, mask) for name, mask in masks.items()}
        masks |= without_dead(self.shard.config, masks, self.group_sets)
        return sum(mask.num_kept for mask in masks.values())

    def prune(self, threshold: float, how: PruneOptions, options: CostOptions) -> tuple[LinearSummary, ...]:
        """Remove everything whose cost is at most the threshold, update what stays, and send it to the replicas."""
        found: dict[str, tuple[float, float]] = {}
        for name in self.owned():
            if options.by_element:
                elements, candidates = self._element_surgery(name, options), self._element_candidates.pop(name)
                W, self.masks[name], *found_here = elements.prune(candidates, threshold, how.update)
            else:
                surgery, full = self._surgery(name, options.curvature), how.update
                structures = self._candidates.pop(name)
                W, self.masks[name], *found_here = surgery.prune(structures, threshold, how.joint, full.correlations, full.step)
            found[name] = found_here[0], found_here[1]
            self.shard.set_weight(name, W)
        self.shard.drop_curvature()
        self.share_linears(self.shard.linears)
        if not options.by_element:
            self.remove_dead()
        return tuple(self.summary(name, *found[name]) for name in self.owned())

    # Evaluation

    def infer(self, inputs: Wire) -> Wire:
        """Run the shard without gradients: tokens or hidden states in, hidden states out."""
        return encode(self.shard.infer(decode(inputs, self.device)))

    def infer_loss(self, inputs: Wire, tokens: Wire) -> list[float]:
        """Return the summed NLL in nats of each sequence, at the last shard."""
        nll, _ = self.shard.loss(self.shard.infer(decode(inputs, self.device)), decode(tokens, self.device))
        return [float(value) for value in nll]

    def infer_logits(self, inputs: Wire) -> Wire:
        """Return the logits [n, T, vocabulary], at the last shard."""
        return encode(self.shard.logits(self.shard.infer(decode(inputs, self.device))))

    # Saving and reporting

    def save(
        self, folder: str, name: str, *, linears_only: bool, masks: str | None, cut_out: bool = False, left_out: tuple[str, ...] = ()
    ) -> tuple[SavedFile, ...]:
        """Write this shard's weights, and its masks if wanted; replica 0 writes for all.

        Args:
            folder: URI.
            name: file name with ``{shard}`` in it, which becomes the shard's number from 1.
            linears_only: only what the method changes, or all of the model.
            masks: file name of the masks, likewise; None writes none.
            cut_out: whether removed rows and columns are left out, and tensors of which nothing is left are left out.
            left_out: names of other tensors to leave out.
        """
        if self.index.replica != 0:
            return ()
        contents = {name: self._cut(left_out) if cut_out else self.shard.tensors(linears_only=linears_only)}
        if masks is not None:
            contents[masks] = {f"{n}.{part}": v for n, m in self.masks.items() for part, v in m.tensors().items()}
        saved = []
        for template, tensors in contents.items():
            uri = storage.join(folder, template.format(shard=self.index.shard + 1))
            saved.append(SavedFile(uri, storage.write_tensors(uri, tensors), tuple(tensors)))
        return tuple(saved)

    def _cut(self, left_out: tuple[str, ...]) -> dict[str, Tensor]:
        tensors = {name: tensor for name, tensor in self.shard.tensors(linears_only=False).items() if name not in left_out}
        for name, module in self.shard.linears.items():
            mask = self.masks[name]
            assert isinstance(mask, StructuredMask)
            parts = cut(module, mask.rows, mask.columns[: num_inputs(module)])
            tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
        return {name: tensor for name, tensor in tensors.items() if tensor.numel()}

    def ping(self) -> None:
        """Show that this process lives."""

    def run_alone(self, module: str, request: Mapping[str, Any], offline: bool = True) -> dict[str, Any]:
        """Run a module in a fresh process that sees what this worker sees; see `alone.run_alone`."""
        return run_alone(module, request, offline)

    def usage(self) -> Usage:
        """Return what this process has used so far."""
        return process_usage(self.device, self.busy_s)


def _linear_costs(name: str, mask: StructuredMask, found: Candidates) -> LinearCosts:
    rows, columns = found.row_costs.float().cpu().numpy(), found.column_costs.float().cpu().numpy()
    return LinearCosts(name, mask.num_parameters, int(mask.rows.sum()), int(mask.columns.sum()), rows, columns)


def _damping_events(name: str, options: CurvatureOptions, found: Candidates | ElementCandidates) -> list[DampingEvent]:
    asked_used = ((options.damping_a, found.damping_a), (options.damping_g, found.damping_g))
    return [
        DampingEvent(name, factor, asked, used, retried)
        for factor, (asked, used), retried in zip("AG", asked_used, found.float64_retry, strict=True)
        if used != asked or retried
    ]
