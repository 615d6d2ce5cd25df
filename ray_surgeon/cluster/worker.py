"""One worker: a shard of blocks, its curvature, its masks. A plain class; Ray or a local cluster calls it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import torch
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
from ray_surgeon.surgery.linear import Candidates, LinearSurgery
from ray_surgeon.surgery.masks import StructuredMask


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
        self.masks: dict[str, StructuredMask] = {}
        self._candidates: dict[str, Candidates] = {}

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

    def load(self, recipe: ModelRecipe) -> None:
        """Load this shard's weights and, when a run is resumed, its masks.

        Raises:
            ValueError: the checkpoint cannot be read.
        """
        files = open_model(recipe.source, convert_gguf)
        config = AutoConfig.from_pretrained(files.small_files_folder())
        self.shard = ModelShard(config, self.placement.blocks[self.index.shard], getattr(torch, recipe.dtype), self.device)
        reader, tied = files.reader(), tied_names(config, self.shard.adapter)
        pruned_in = {key: file.uri for file in recipe.shot_files for key in file.keys}

        def read(name: str) -> Tensor:
            if name in pruned_in:
                return storage.read_tensors(pruned_in[name], (name,))[name]
            key = checkpoint_key(name, reader.file_of, tied)
            if key is None:
                raise ValueError(f"model.source: {files.origin} has no tensor {name}")
            return reader.read(key)

        self.shard.load(read)
        shapes = {s.name: s for s in linear_shapes(config)}
        self._site_of = {name: shapes[name].site for name in self.shard.linears}
        self.masks = {name: StructuredMask.full(shapes[name].num_rows, shapes[name].num_columns) for name in self.shard.linears}
        for name in self.masks if recipe.shot_files else ():
            rows, columns = read(f"{name}.rows"), read(f"{name}.columns")
            self.masks[name] = StructuredMask(rows.bool(), columns.bool())

    # Curvature: forward and backward over micro-batches

    def start_curvature(self) -> None:
        """Zero the factors and start gathering."""
        self.shard.start_curvature()

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

    def finish_curvature(self) -> None:
        """Stop gathering and sum the factors over the replicas, each site to its owner; the others free theirs."""
        self.shard.stop_curvature()
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
        return LinearSurgery(
            name,
            self.shard.weight(name),
            self.shard.factors(name),
            self.masks[name],
            has_bias=self.shard.linears[name].bias is not None,
            damping_a=options.damping_a,
            damping_g=options.damping_g,
            max_damping=options.max_damping,
        )

    def costs(self, options: CostOptions) -> CostsReply:
        """Return the costs of the owned linears' rows and columns, and keep them for `prune`.

        Raises:
            FloatingPointError: a factor or a cost is not usable; names the linear.
        """
        replies, events = [], []
        for name in self._owned():
            surgery = self._surgery(name, options.curvature)
            found = surgery.candidates(options.structure, options.rank_by)
            self._candidates[name] = found
            mask = self.masks[name]
            rows, columns = found.row_costs.float().cpu().numpy(), found.column_costs.float().cpu().numpy()
            alive = int(mask.rows.sum()), int(mask.columns.sum())
            replies.append(LinearCosts(name, mask.num_parameters, *alive, rows, columns))
            asked_used = ((options.curvature.damping_a, found.damping_a), (options.curvature.damping_g, found.damping_g))
            for factor, (asked, used), retried in zip("AG", asked_used, found.float64_retry, strict=True):
                if used != asked or retried:
                    events.append(DampingEvent(name, factor, asked, used, retried))
        return CostsReply(tuple(replies), tuple(events))

    def prune(self, threshold: float, joint: str, options: CurvatureOptions) -> tuple[LinearSummary, ...]:
        """Remove every structure whose cost is at most the threshold, update what stays, and send it to the replicas."""
        predicted = {}
        for name in self._owned():
            surgery = self._surgery(name, options)
            W, self.masks[name], predicted[name] = surgery.prune(self._candidates.pop(name), threshold, joint)
            self.shard.set_weight(name, W)
        self.shard.drop_curvature()
        self._share_linears()
        return tuple(self._summary(name, predicted[name]) for name in self._owned())

    def _share_linears(self) -> None:
        """Send every linear and its mask from its owner to the other replicas, after all of them have done their own."""
        for name in self.shard.linears:
            owner = self.placement.owners[self._site_of[name]]
            W, mask = self.shard.weight(name), self.masks[name]
            rows, columns = mask.rows.to(self.device), mask.columns.to(self.device)
            for tensor in (W, rows, columns):
                self.replicas.broadcast(tensor, owner)
            if owner != self.replicas.rank:
                self.shard.set_weight(name, W)
                self.masks[name] = StructuredMask(rows.cpu(), columns.cpu())

    def _summary(self, name: str, predicted: float) -> LinearSummary:
        mask, W = self.masks[name], self.shard.weight(name)
        kept = int(mask.rows.sum()), int(mask.columns.sum())
        return LinearSummary(name, len(mask.rows), len(mask.columns), *kept, int(W.count_nonzero()), predicted)

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
            contents[masks] = {f"{n}.{s}": v for n, m in self.masks.items() for s, v in (("rows", m.rows), ("columns", m.columns))}
        saved = []
        for template, tensors in contents.items():
            uri = storage.join(folder, template.format(shard=self.index.shard + 1))
            saved.append(SavedFile(uri, storage.write_tensors(uri, tensors), tuple(tensors)))
        return tuple(saved)

    def usage(self) -> Usage:
        """Return what this process has used so far."""
        return process_usage(self.device)
