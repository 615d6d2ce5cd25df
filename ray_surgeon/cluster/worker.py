"""One worker: a shard of blocks, its curvature, its masks. A plain class; Ray or a local cluster calls it."""

from __future__ import annotations

import functools
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig

from ray_surgeon import storage
from ray_surgeon.cluster.messages import (
    CostOptions,
    CostsReply,
    CurvatureOptions,
    DampingEvent,
    LinearCosts,
    LinearSummary,
    ModelRecipe,
    PruneOptions,
    SavedFile,
    Usage,
    Wire,
    WorkerIndex,
)
from ray_surgeon.cluster.placement import Placement
from ray_surgeon.cluster.replicas import ProcessReplica, ReplicaGroup, SingleReplica
from ray_surgeon.cluster.transport import decode, encode
from ray_surgeon.cluster.usage import process_usage
from ray_surgeon.models.gguf import convert_gguf
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.models.skeleton import checkpoint_key, linear_shapes, tied_names
from ray_surgeon.sources import open_model
from ray_surgeon.surgery.element_surgery import ElementCandidates, ElementSurgery
from ray_surgeon.surgery.linear import Candidates, LinearSurgery
from ray_surgeon.surgery.masks import ElementMask, Mask, StructuredMask
from ray_surgeon.surgery.threshold import bit_histogram


class ShardWorker:
    """Holds one shard of one replica. Every method is one step of a shot, called in the order of `cluster.steps`."""

    def __init__(self, placement: Placement, index: WorkerIndex, num_threads: int, device: str) -> None:
        """Prepare an empty worker.

        Args:
            placement: where every block is.
            index: which worker this is.
            num_threads: torch threads on the CPU.
            device: "cpu" or "cuda".
        """
        torch.set_num_threads(num_threads)
        self.placement, self.index, self.device = placement, index, torch.device(device)
        self.replicas: ReplicaGroup = SingleReplica()
        self.masks: dict[str, Mask] = {}
        self._candidates: dict[str, Candidates] = {}
        self._element_candidates: dict[str, ElementCandidates] = {}

    # Setting up

    def meeting_address(self, host: str) -> str:
        """Return an address on this machine with a free port, for `join_replicas`; `host` is its name to the others."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind(("", 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def join_replicas(self, address: str, timeout_s: float) -> None:
        """Join the process group of all workers; see `ProcessReplica`."""
        world_size = len(self.placement.workers)
        rank = self.placement.rank(self.index)
        self.replicas = ProcessReplica(address, rank, world_size, self.placement.num_shards, self.device, timeout_s)

    def load(self, recipe: ModelRecipe, by_element: bool) -> None:
        """Load this shard's weights and, when a run is resumed, its masks.

        Args:
            recipe: where everything is.
            by_element: whether masks are of elements, or of rows and columns.

        Raises:
            ValueError: the checkpoint cannot be read.
        """
        files = open_model(recipe.source, convert_gguf)
        config = AutoConfig.from_pretrained(files.small_files_folder())
        self.shard = ModelShard(config, self.placement.blocks[self.index.shard], getattr(torch, recipe.dtype), self.device)
        reader, tied = files.reader(), tied_names(config, self.shard.adapter)
        local_copy = functools.cache(storage.local_copy)  # asking an object store once a file, not once a tensor
        pruned_in = {key: file.uri for file in recipe.shot_files for key in file.keys}

        def read(name: str) -> Tensor:
            if name in pruned_in:
                return storage.read_tensors(str(local_copy(pruned_in[name])), (name,))[name]
            key = checkpoint_key(name, reader.file_of, tied)
            if key is None:
                raise ValueError(f"model.source: {files.origin} has no tensor {name}")
            return reader.read(key)

        self.shard.load(read)
        shapes = {s.name: s for s in linear_shapes(config)}
        self._site_of = {name: shapes[name].site for name in self.shard.linears}
        kind: type[StructuredMask] | type[ElementMask] = ElementMask if by_element else StructuredMask
        for name in self.shard.linears:
            mask: Mask = kind.full(shapes[name].num_rows, shapes[name].num_columns)
            if recipe.shot_files:
                mask = type(mask)(**{part: read(f"{name}.{part}").bool() for part in mask.tensors()})
            self.masks[name] = mask

    # Curvature: forward and backward over micro-batches

    def start_curvature(self, kind: str) -> None:
        """Zero the factors and start gathering; see `ModelShard.start_curvature`."""
        self.shard.start_curvature(kind)

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

    def backward(self, micro_batch: int, gradient: Wire) -> Wire | None:
        """Run a micro-batch backward: gradient at the outputs in, gradient at the inputs out; the first shard keeps its own."""
        return self._gradient_below(self.shard.backward(micro_batch, decode(gradient, self.device)))

    def _gradient_below(self, gradient: Tensor) -> Wire | None:
        return None if self.index.shard == 0 else encode(gradient)

    def finish_curvature(self, kind: str) -> None:
        """Stop gathering and sum the factors over the replicas, each site to its owner; the others free theirs."""
        self.shard.stop_curvature(kind)
        for site in self.shard.sites:
            owner = self.placement.owners[self._site_of[site.names[0]]]
            assert site.A is not None
            num_tokens = torch.tensor(site.num_tokens, device=self.device)
            for total in (site.A, *site.G, num_tokens):
                self.replicas.reduce(total, owner)
            site.num_tokens = int(num_tokens)
            if owner != self.replicas.rank:
                site.A, site.G = None, ()

    # Costs and updates, on owned linears only

    def _owned(self) -> Iterator[str]:
        for name in self.shard.linears:
            if self.placement.owners[self._site_of[name]] == self.replicas.rank:
                yield name

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
        replies, events = [], []
        for name in self._owned():
            found: Candidates | ElementCandidates
            if options.by_element:
                found = self._element_candidates[name] = self._element_surgery(name, options).candidates(options.costs)
            else:
                surgery = self._surgery(name, options.curvature)
                found = self._candidates[name] = surgery.candidates(options.structure, options.rank_by, options.costs)
                replies.append(_linear_costs(name, surgery.mask, found))
            events += _damping_events(name, options.curvature, found)
        masks = [self.masks[name] for name in self._owned()]
        return CostsReply(tuple(replies), sum(m.num_parameters for m in masks), sum(m.num_kept for m in masks), tuple(events))

    def cost_histogram(self, options: CostOptions, high: int | None) -> NDArray[np.int64]:
        """Count the costs of the owned linears' elements or groups by their bits; see `bit_histogram`."""
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for name in self._owned():
            costs = self._element_surgery(name, options).unit_costs(self._element_candidates[name])
            counts += bit_histogram(costs, high).cpu()
        return counts.numpy()

    def prune(self, threshold: float, how: PruneOptions, options: CostOptions) -> tuple[LinearSummary, ...]:
        """Remove everything whose cost is at most the threshold, update what stays, and send it to the replicas."""
        found: dict[str, tuple[float, float]] = {}
        for name in self._owned():
            if options.by_element:
                elements, candidates = self._element_surgery(name, options), self._element_candidates.pop(name)
                W, self.masks[name], predicted, residual = elements.prune(candidates, threshold, how.update)
            else:
                surgery = self._surgery(name, options.curvature)
                W, self.masks[name], predicted = surgery.prune(self._candidates.pop(name), threshold, how.joint, how.update.correlations)
                residual = 0.0
            found[name] = predicted, residual
            self.shard.set_weight(name, W)
        self.shard.drop_curvature()
        self._share_linears()
        return tuple(self._summary(name, *found[name]) for name in self._owned())

    def _share_linears(self) -> None:
        """Send every linear and its mask from its owner to the other replicas, after all of them have done their own."""
        for name in self.shard.linears:
            owner = self.placement.owners[self._site_of[name]]
            W, mask = self.shard.weight(name), self.masks[name]
            parts = {part: tensor.to(self.device) for part, tensor in mask.tensors().items()}
            for tensor in (W, *parts.values()):
                self.replicas.broadcast(tensor, owner)
            if owner != self.replicas.rank:
                self.shard.set_weight(name, W)
                self.masks[name] = type(mask)(**{part: tensor.cpu() for part, tensor in parts.items()})

    def _summary(self, name: str, predicted: float, residual: float) -> LinearSummary:
        mask, W = self.masks[name], self.shard.weight(name)
        rows, columns = (mask.rows, mask.columns) if isinstance(mask, StructuredMask) else (mask.kept.any(1), mask.kept.any(0))
        kept = int(rows.sum()), int(columns.sum()), mask.num_kept
        return LinearSummary(name, len(rows), len(columns), *kept, int(W.count_nonzero()), predicted, residual)

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

    def save(self, folder: str, name: str, *, linears_only: bool, masks: str | None) -> tuple[SavedFile, ...]:
        """Write this shard's weights, and its masks if wanted; replica 0 writes for all.

        Args:
            folder: URI.
            name: file name with ``{shard}`` in it, which becomes the shard's number from 1.
            linears_only: only what the method changes, or all of the model.
            masks: file name of the masks, likewise; None writes none.
        """
        if self.index.replica != 0:
            return ()
        contents = {name: self.shard.tensors(linears_only=linears_only)}
        if masks is not None:
            contents[masks] = {f"{n}.{part}": v for n, m in self.masks.items() for part, v in m.tensors().items()}
        saved = []
        for template, tensors in contents.items():
            uri = storage.join(folder, template.format(shard=self.index.shard + 1))
            saved.append(SavedFile(uri, storage.write_tensors(uri, tensors), tuple(tensors)))
        return tuple(saved)

    def usage(self) -> Usage:
        """Return what this process has used so far."""
        return process_usage(self.device)


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
