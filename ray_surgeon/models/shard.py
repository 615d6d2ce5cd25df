"""A shard: a contiguous run of decoder blocks, with hooks that gather curvature.

`ExportedTensors` gives its tensors in the form in which checkpoints hold them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

import ray_surgeon.maths.experts as of_experts
from ray_surgeon.maths.kronecker import PackedFactors
from ray_surgeon.maths.masks import Mask, StructuredMask
from ray_surgeon.maths.products import PackedSymmetric
from ray_surgeon.memory.stores import (
    Read,
    Scratch,
    Slot,
    Stores,
    TensorStore,
    WeightStore,
)
from ray_surgeon.models import build
from ray_surgeon.models.build import cut, num_inputs
from ray_surgeon.models.checkpoint import Stored, check_finite
from ray_surgeon.models.experts import Mixture
from ray_surgeon.models.hooks import LayerInputs, SharedInput
from ray_surgeon.models.layout import GroupSet, ModelLayout, Roles


class ModelShard:
    """Blocks of a causal LM; sums A in the forward pass and G in the backward pass."""

    def __init__(
        self,
        layout: ModelLayout,
        blocks: build.BlockRange,
        dtype: torch.dtype,
        device: torch.device,
        stores: Stores | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        """Build the shard without weights.

        Args:
            layout: layout of the whole model.
            blocks: the blocks of this shard.
            dtype: dtype of weights and activations; factors are always float32.
            device: device on which the shard computes.
            stores: where weights and factors are kept; by default all on the device.
            scratch: files of the stores that are on disk.
        """
        self.layout = layout
        self.blocks = blocks
        self.dtype = dtype
        self.device = device
        self.stores = stores or Stores()
        self.model = build.build_blocks(layout.config, layout.family, blocks, dtype)
        self.base = self.model.get_submodule(layout.family.base)
        block_list = self.base.get_submodule(layout.family.blocks)
        self.block_modules = list(block_list.children())
        scratch = scratch or Scratch(None, "none", "none", "none")
        slots = defaultdict[int | None, dict[str, Slot]](dict)
        for name in layout.parameters_of(blocks):
            slots[layout.block_of(name)][name] = self._slot(name)
        self._ends = WeightStore("device", [slots.pop(None, {})], device, scratch)
        in_blocks = list(slots.values())
        self.weights = WeightStore(self.stores.weights, in_blocks, device, scratch)
        # global names of the tensors that `load` reads, in this order
        self.wanted = [*self._ends.slot_of, *self.weights.slot_of]
        # packed sums; those of a block are on the device while it runs
        self.factor_store = TensorStore(self.stores.factors, device, scratch, ".factor")
        self.shared_inputs = self._find_shared_inputs()
        self.linears = _linears_of(self.shared_inputs)
        self._group_of: dict[str, SharedInput] = {}
        for group in self.shared_inputs:
            self._group_of.update(dict.fromkeys(group.names, group))
        self.expert_sets = [each for each in layout.expert_sets if each.block in blocks]
        self.mixtures = self._find_mixtures()
        self.expert_sums: dict[int, of_experts.ExpertSums] = {}
        # inputs of layers that the current pass keeps, if any
        self.layer_inputs: LayerInputs | None = None
        if device.type == "cpu" and dtype == torch.float32:
            for module in self.linears.values():
                build.use_fast_products(module)
        # places of blocks that are removed whole
        self.blocks_gone: frozenset[int] = frozenset()
        self.gathering: list[SharedInput] = []
        self._kind: str | None = None
        self._layer_means: dict[tuple[int, str], of_experts.LayerMean] = {}

    def _find_shared_inputs(self) -> list[SharedInput]:
        own = [shape for shape in self.layout.linears if shape.block in self.blocks]
        shared_inputs = []
        for _, shapes in itertools.groupby(own, key=lambda shape: shape.shared_input):
            linears = []
            for shape in shapes:
                slot = self.weights.slot_of[f"{shape.name}.weight"]
                linears.append((shape, slot.module))
            first, _ = linears[0]
            shared_inputs.append(SharedInput(first.block - self.blocks.first, linears))
        return shared_inputs

    def _find_mixtures(self) -> dict[int, Mixture]:
        """Return the place of a block in this shard -> its mixture of experts, if it has one."""
        sparse = self.layout.family.sparse
        mixtures = {}
        for place, block in enumerate(self.block_modules):
            if sparse.is_in(block):
                mixtures[place] = Mixture(block, sparse)
        return mixtures

    def _slot(self, name: str) -> Slot:
        """Return the place of a tensor in this shard, by its name in the whole model."""
        family = self.layout.family
        block = self.layout.block_of(name)
        if block is not None:
            inside = name.removeprefix(family.block_prefix(block))
            name = family.block_prefix(block - self.blocks.first) + inside
        owner, _, leaf = name.rpartition(".")
        dtype = self.dtype
        if name.endswith(family.float32):
            dtype = torch.float32
        return Slot(self.model.get_submodule(owner), leaf, dtype)

    def load(self, read_tensor: Read, *, stays: bool = True) -> None:
        """Load the tensors of this shard, and no others.

        Args:
            read_tensor: global parameter name -> tensor of any float dtype.
            stays: see `WeightStore.fill`.

        Raises:
            BadWeightsError: a weight is not finite.
        """
        self._ends.fill(read_tensor, check_finite, stays=stays)
        if self.blocks.is_first and self.blocks.is_last:
            for embedding in self.layout.tied.values():
                head = self.model.get_submodule(self.layout.family.head)
                head.register_parameter("weight", self.model.get_parameter(embedding))
        # moves buffers that are in no checkpoint
        self.model._apply(self._to_device)  # type: ignore[no-untyped-call]
        self.model.requires_grad_(False)
        self.weights.fill(read_tensor, check_finite, stays=stays)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        return tensor.to(self.device)

    def weight(self, name: str) -> Tensor:
        """Return a float32 copy of the W [R, C] of a linear, with its bias as the last column."""
        module = self.linears[name]
        matrix = self.weights.on_device(f"{name}.weight")
        if isinstance(module, Conv1D):
            matrix = matrix.T
        if module.bias is None:
            return matrix.to(
                torch.float32, memory_format=torch.contiguous_format, copy=True
            )
        bias = self.weights.on_device(f"{name}.bias")
        return torch.cat([matrix.float(), bias.float()[:, None]], dim=1)

    def set_weight(self, name: str, W: Tensor) -> None:
        """Write W [R, C], with the bias as the last column, into a linear."""
        module = self.linears[name]
        matrix = W[:, : build.num_inputs(module)]
        if isinstance(module, Conv1D):
            matrix = matrix.T
        self.weights.set(f"{name}.weight", matrix)
        if module.bias is not None:
            self.weights.set(f"{name}.bias", W[:, -1])

    @functools.cached_property
    def changed(self) -> dict[str, None]:
        """Names of the tensors that shots save.

        These are the tensors of the linears, and others once they were trained.
        """
        names: dict[str, None] = {}
        for linear, module in self.linears.items():
            for part, _ in module.named_parameters():
                names[f"{linear}.{part}"] = None
        return names

    def saved(self, *, changed_only: bool) -> list[str]:
        """Return the names of the tensors in `changed`, or of all tensors that this shard exports.

        A tied head is not exported, because its embedding is.
        """
        if changed_only:
            return list(self.changed)
        names = self.layout.parameters_of(self.blocks)
        return [name for name in names if name not in self.layout.tied]

    def tensor(self, name: str) -> Tensor:
        """Return a saved tensor by its global name, where it is stored."""
        if self.layout.block_of(name) is None:
            return self._ends.get(name)
        return self.weights.get(name)

    def start_curvature(
        self,
        kind: str = "kfac",
        *,
        only: Roles = None,
        experts: bool = False,
        anew: bool = True,
    ) -> None:
        """Start to sum curvature.

        Args:
            kind: ``activations`` sums A in a forward pass alone and takes G = I; ``identity`` takes
                A = G = I (times the number of tokens, as sums are); all others sum A and G.
            only: roles of the linears whose curvature is summed, see `LinearShape`; linears that
                share an input with one of these are included.
            experts: whether to also sum the values in `ExpertSums`.
            anew: whether to free the sums of an earlier pass first.
        """
        assert self._kind is None
        if anew:
            self.drop_curvature()
        self.gathering = list(self.shared_inputs)
        if only is not None:
            self.gathering = [group for group in self.shared_inputs if group.roles & only]
        # the linears whose factors this pass sums, by name
        self.gathered = _linears_of(self.gathering)
        if experts:
            for place, mixture in self.mixtures.items():
                num_experts = len(mixture.experts)
                self.expert_sums[place] = of_experts.ExpertSums(num_experts, self.device)
        for group in self.gathering:
            group.num_tokens = 1 if kind == "identity" else 0
        self._kind = kind
        # factors are sums over tokens; an expert may see few of them
        self._has_tokens = kind != "identity"

    @contextlib.contextmanager
    def gathering_in(self, place: int, *, wide: bool = False) -> Iterator[None]:
        """Sum the curvature of a block, and keep inputs of layers if wanted, in this context.

        Args:
            place: place of the block in the shard.
            wide: whether to compute products in float32 whatever the inputs' dtype is, because
                other threads of this process also compute products.
        """
        hooks: list[RemovableHandle] = []
        sums: dict[str, PackedSymmetric] = {}
        if self.layer_inputs is not None:
            hooks.extend(self.layer_inputs.watch(place))
        if self._kind not in (None, "identity"):
            hooks.extend(self._watch(place, sums, wide=wide))
        else:
            self.factor_store.expect([])
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            is_on_device = self.factor_store.place == "device"
            for key, total in sums.items():
                # on the device, a stored tensor is the sum itself
                if not is_on_device or key not in self.factor_store:
                    self.factor_store.put(key, total.flat)

    def _watch(
        self, place: int, sums: dict[str, PackedSymmetric], *, wide: bool
    ) -> list[RemovableHandle]:
        """Return hooks that add a block's curvature to its factors, which are put into `sums`.

        Starts to fetch the factors of the next block.
        """
        hooks: list[RemovableHandle] = []
        if place in self.expert_sums:
            from ray_surgeon.models.expert_removals import sum_removals

            hooks.extend(sum_removals(self.expert_sums[place], self.mixtures[place]))
        sums_G = self._kind != "activations" and torch.is_grad_enabled()
        next_keys: list[str] = []
        for group in self.gathering:
            keys = list(group.sizes) if sums_G else [group.key_of_A]
            if group.place == place:
                factors = {key: self._sum(group, key) for key in keys}
                hooks.extend(group.add_to(factors, wide=wide))
                sums.update(factors)
            elif group.place == self.weights.then:
                next_keys.extend(keys)
        self.factor_store.expect(next_keys)
        return hooks

    @property
    def is_watched(self) -> bool:
        """Whether this pass sums curvature or keeps inputs of layers."""
        return self._kind is not None or self.layer_inputs is not None

    def _sum(self, group: SharedInput, key: str) -> PackedSymmetric:
        """Return a sum to add to; zeros if there is none yet."""
        n = group.sizes[key]
        if key not in self.factor_store:
            return PackedSymmetric.zeros(n, self.device)
        return PackedSymmetric(n, self.factor_store.on_device(key))

    def stop_gathering(self) -> None:
        """Stop summing; the sums stay."""
        self._kind = None

    def stop_curvature(self) -> None:
        """Stop summing, and set the factors that this kind of curvature does not sum."""
        assert self._kind is not None, "no curvature pass has been made"
        for group in self.gathering:
            for key in group.sizes:
                if key in self.factor_store:
                    continue
                total = self._sum(group, key)
                total.fill_diagonal(group.num_tokens)
                self.factor_store.put(key, total.flat)
        self.stop_gathering()

    def drop_curvature(self) -> None:
        """Free the sums."""
        self.factor_store.clear()
        self.expert_sums.clear()
        self._layer_means.clear()

    def factors(self, name: str) -> PackedFactors:
        """Return the factors of a linear; those of an expert are shrunk, see `shrunk_factors`."""
        own = self.own_factors(name)
        shape = self.layout.shapes[name]
        if shape.sees_all_tokens or not self._has_tokens:
            return own
        return of_experts.shrunk_factors(own, self.layer_mean(shape.block, shape.role))

    def own_factors(self, name: str) -> PackedFactors:
        """Return the sums of a linear where they are stored; A is that of its shared input."""
        group = self._group_of[name]
        return PackedFactors(
            self._stored_sum(group, group.key_of_A),
            self._stored_sum(group, group.keys_of_G[name]),
            group.num_tokens,
        )

    def _stored_sum(self, group: SharedInput, key: str) -> PackedSymmetric:
        return PackedSymmetric(group.sizes[key], self.factor_store.get(key))

    def own_divisor(self, name: str, num_tokens: int) -> float:
        """Return the divisor of a linear's own sum of g g^T (x) a a^T; see `own_divisor`."""
        shape = self.layout.shapes[name]
        if shape.sees_all_tokens:
            return num_tokens
        mean = self.layer_mean(shape.block, shape.role)
        return of_experts.own_divisor(num_tokens, mean)

    def layer_mean(self, block: int, role: str) -> of_experts.LayerMean:
        """Return the mean factors of the linears with a role over all experts of a block."""
        # blocks are visited one after the other, so means of other blocks are freed first
        means = {key: mean for key, mean in self._layer_means.items() if key[0] == block}
        self._layer_means = means
        if (block, role) not in means:
            means[block, role] = self._new_layer_mean(block, role)
        return means[block, role]

    def _new_layer_mean(self, block: int, role: str) -> of_experts.LayerMean:
        shapes = []
        for shape in self.layout.linears:
            if shape.block == block and shape.role == role:
                shapes.append(shape)
        own = [self.own_factors(shape.name) for shape in shapes]
        is_consumer = role.endswith(self.layout.family.sparse.linears.consumer)
        A = of_experts.mean_factor(
            ((factors.A, factors.num_tokens) for factors in own),
            device=self.device,
            has_basis=not is_consumer,
            has_bias=shapes[0].has_bias,
        )
        G = of_experts.mean_factor(
            ((factors.G, factors.num_tokens) for factors in own),
            device=self.device,
            has_basis=is_consumer,
        )
        num_tokens: float = sum(factors.num_tokens for factors in own)
        num_tokens /= self.mixtures[block - self.blocks.first].num_chosen
        return of_experts.LayerMean(A, G, num_tokens)

    @property
    def head_weight(self) -> Tensor:
        """The weight [vocabulary, d] of the last shard's head."""
        return self.model.get_parameter(f"{self.layout.family.head}.weight")

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the last shard's logits [n, T, vocabulary] float32."""
        logits: Tensor = self.model.get_submodule(self.layout.family.head)(hidden)
        return logits.float()


def _linears_of(groups: Sequence[SharedInput]) -> dict[str, build.LinearModule]:
    linears: dict[str, build.LinearModule] = {}
    for group in groups:
        linears.update(group.linears)
    return linears


class ExportedTensors:
    """Cuts pruned rows, columns, heads and experts out of the tensors of a shard."""

    def __init__(
        self,
        shard: ModelShard,
        masks: Mapping[str, Mask],
        group_sets: Sequence[GroupSet],
        *,
        blocks: Sequence[int],
        left_out: Collection[str],
        stored: bool,
    ) -> None:
        """Find the remaining heads and experts.

        Args:
            shard: with its weights.
            masks: of its linears; if empty, nothing is cut out.
            group_sets: coupled groups of its blocks.
            blocks: numbers of the model's blocks to write, which are renumbered in this order.
            left_out: names of other tensors that are not written.
            stored: whether tensors have the names of the family's checkpoints, or those used here.
        """
        self._blocks = blocks
        self._left_out = left_out
        self._shard = shard
        self._masks = masks
        layout = shard.layout
        self._stored = Stored(layout, shard.blocks, masks, stored=stored)
        # name of a tensor or module with one entry per head or expert -> which entries remain
        self._entries = dict(self._stored.entries)
        if masks and layout.family.per_head:
            self._entries.update(_heads_left(layout, masks, group_sets))

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors without the parts that are cut out; see `Stored.whole`.

        Tensors that become empty are left out.
        """
        layout = self._shard.layout
        written = {None, *self._blocks}
        for name in names:
            if name not in self._left_out and layout.block_of(name) in written:
                stored = layout.renumbered(self._stored.name(name), self._blocks)
                tensor = self._stored.whole(name, self._cut(name))
                if tensor.numel():
                    yield stored, tensor

    def _cut(self, name: str) -> Tensor:
        tensor = self._shard.tensor(name)
        linear, _, part = name.rpartition(".")
        entries = self._entries.get(name, self._entries.get(linear))
        if entries is not None:
            return tensor[entries.to(tensor.device)]
        mask = self._masks.get(linear)
        if mask is None:
            return tensor
        assert isinstance(mask, StructuredMask)
        module = self._shard.linears[linear]
        return cut(module, part, tensor, mask.rows, mask.columns[: num_inputs(module)])


def _heads_left(
    layout: ModelLayout, masks: Mapping[str, Mask], group_sets: Sequence[GroupSet]
) -> dict[str, Tensor]:
    """Return name of a tensor with one entry per query head -> which entries remain."""
    entries: dict[str, Tensor] = {}
    for groups in group_sets:
        if groups.kind != "attention":
            continue
        mask = masks[groups.consumer]
        assert isinstance(mask, StructuredMask)
        columns = mask.columns[groups.columns.flatten()].view(-1, layout.heads.head_dim)
        remaining = columns.any(dim=1)
        prefix = layout.family.block_prefix(groups.block)
        for name in layout.family.per_head:
            entries[prefix + name] = remaining
    return entries
