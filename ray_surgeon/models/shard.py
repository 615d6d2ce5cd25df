"""A shard: a contiguous run of decoder blocks, with hooks that gather curvature."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import ray_surgeon.maths.experts as of_experts
from ray_surgeon.maths.kronecker import PackedFactors, Term
from ray_surgeon.maths.packed import PackedSymmetric
from ray_surgeon.memory.stores import Scratch, Stores, TensorStore
from ray_surgeon.memory.weights import Read, Slot, WeightStore
from ray_surgeon.models import build
from ray_surgeon.models.checkpoint import check_finite
from ray_surgeon.models.experts import Mixture
from ray_surgeon.models.hooks import LayerInputs, SharedInput, sum_removals
from ray_surgeon.models.layout import ModelLayout, Roles


class ModelShard:
    """Blocks of a causal LM, with sums A of the forward and G of the backward pass."""

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
            layout: of the whole model.
            blocks: that it holds.
            dtype: of weights and activations; factors are float32 whatever it is.
            device: where it computes.
            stores: where weights and factors are; all on the device if not given.
            scratch: for what is on disk.
        """
        self.layout = layout
        self.blocks = blocks
        self.dtype = dtype
        self.device = device
        self.stores = stores or Stores()
        self.model = build.build_blocks(layout.config, blocks, dtype)
        self.base = self.model.get_submodule(layout.family.base)
        self.block_modules = list(self.base.get_submodule(layout.family.blocks).children())
        scratch = scratch or Scratch(None, "none", "none", "none")
        slots = defaultdict[int | None, dict[str, Slot]](dict)
        for name in layout.parameters_of(blocks):
            slots[layout.block_of(name)][name] = self._slot(name)
        self._ends = WeightStore("device", [slots.pop(None, {})], device, scratch)
        self.weights = WeightStore(self.stores.weights, list(slots.values()), device, scratch)
        # global names of the tensors that `load` reads, in its order
        self.wanted = [*self._ends.slot_of, *self.weights.slot_of]
        # packed sums; those of a block are on the device while it runs
        self.factor_store = TensorStore(self.stores.factors, device, scratch, ".factor")
        own = (shape for shape in layout.linears if shape.block in blocks)
        groups = itertools.groupby(own, key=lambda shape: shape.shared_input)
        self.shared_inputs = [SharedInput(self, list(shapes)) for _, shapes in groups]
        self.linears = {n: m for group in self.shared_inputs for n, m in group.linears.items()}
        self._group_of = {name: group for group in self.shared_inputs for name in group.names}
        sparse = layout.family.sparse
        blocks_by_place = enumerate(self.block_modules)
        self.expert_sets = [experts for experts in layout.expert_sets if experts.block in blocks]
        self.mixtures = {i: Mixture(b, sparse) for i, b in blocks_by_place if sparse.is_in(b)}
        self.expert_sums: dict[int, of_experts.ExpertSums] = {}
        # what the present pass keeps of its layers' inputs, if anything
        self.layer_inputs: LayerInputs | None = None
        if device.type == "cpu" and dtype == torch.float32:
            for module in self.linears.values():
                build.use_fast_products(module)
        self.blocks_gone: frozenset[int] = frozenset()  # places of blocks that are removed whole
        self.gathering: list[SharedInput] = []
        self.terms: dict[str, list[Term]] = {}
        self._kind: str | None = None
        self._layer_means: dict[tuple[int, str], of_experts.LayerMean] = {}

    def _slot(self, name: str) -> Slot:
        """Return where a tensor belongs, by its name in the whole model."""
        family = self.layout.family
        if (block := self.layout.block_of(name)) is not None:
            inside = name.removeprefix(family.block_prefix(block))
            name = family.block_prefix(block - self.blocks.first) + inside
        owner, _, leaf = name.rpartition(".")
        dtype = torch.float32 if name.endswith(family.float32) else self.dtype
        return Slot(self.model.get_submodule(owner), leaf, dtype)

    def load(self, read_tensor: Read, *, stays: bool = True) -> None:
        """Load this shard's tensors, and only these.

        Args:
            read_tensor: global parameter name -> tensor, of any float dtype.
            stays: see `WeightStore.fill`.

        Raises:
            BadWeightsError: a weight is not finite.
        """
        self._ends.fill(read_tensor, check_finite, stays=stays)
        if self.blocks.is_first and self.blocks.is_last:
            for embedding in self.layout.tied.values():
                head = self.model.get_submodule(self.layout.family.head)
                head.register_parameter("weight", self.model.get_parameter(embedding))
        # buffers that no checkpoint has
        self.model._apply(lambda x: x if x.is_meta else x.to(self.device))  # type: ignore[no-untyped-call]
        self.model.requires_grad_(False)
        self.weights.fill(read_tensor, check_finite, stays=stays)

    def weight(self, name: str) -> Tensor:
        """Return a copy of W [R, C] of a linear, float32, its bias as the last column."""
        module = self.linears[name]
        matrix = self.weights.on_device(f"{name}.weight")
        matrix = matrix.T if isinstance(module, Conv1D) else matrix
        if module.bias is None:
            return matrix.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        bias = self.weights.on_device(f"{name}.bias")
        return torch.cat([matrix.float(), bias.float()[:, None]], dim=1)

    def set_weight(self, name: str, W: Tensor) -> None:
        """Write W [R, C], bias in the last column, into a linear."""
        module = self.linears[name]
        matrix = W[:, : build.num_inputs(module)]
        self.weights.set(f"{name}.weight", matrix.T if isinstance(module, Conv1D) else matrix)
        if module.bias is not None:
            self.weights.set(f"{name}.bias", W[:, -1])

    @functools.cached_property
    def changed(self) -> dict[str, None]:
        """Names of tensors that shots have: the linears', and others once they were trained."""
        linears = self.linears.items()
        return dict.fromkeys(f"{n}.{p}" for n, m in linears for p, _ in m.named_parameters())

    def saved(self, *, changed_only: bool) -> list[str]:
        """Return the names of the tensors in `changed`, or of all that this shard exports.

        Not of a tied head: its embedding is saved once.
        """
        if changed_only:
            return list(self.changed)
        return [n for n in self.layout.parameters_of(self.blocks) if n not in self.layout.tied]

    def tensor(self, name: str) -> Tensor:
        """Return a saved tensor by its global name, where it lies."""
        return (self._ends if self.layout.block_of(name) is None else self.weights).get(name)

    def start_curvature(
        self, kind: str = "kfac", *, only: Roles = None, experts: bool = False, anew: bool = True
    ) -> None:
        """Start to gather, with empty sums.

        Args:
            kind: ``activations`` sums A in a forward pass alone and takes G = I; ``identity`` takes
                A = G = I (times the number of tokens, as sums are); all others sum A and G.
            only: roles of the linears that are wanted, see `LinearShape`; those that share an input
                with one come along.
            experts: whether to sum, too, what `ExpertSums` has.
            anew: whether what an earlier pass has summed is freed.
        """
        assert self._kind is None
        if anew:
            self.drop_curvature()
        self.gathering = [g for g in self.shared_inputs if only is None or g.roles & only]
        # the linears for which the curvature pass gathers factors, by name
        self.gathered = {n: m for group in self.gathering for n, m in group.linears.items()}
        for place, mixture in self.mixtures.items() if experts else ():
            self.expert_sums[place] = of_experts.ExpertSums(len(mixture.experts), self.device)
        for group in self.gathering:
            group.num_tokens = int(kind == "identity")
        self._kind = kind
        # factors are sums over tokens, of which an expert may have few
        self._has_tokens = kind != "identity"

    @contextlib.contextmanager
    def gathering_in(self, place: int, *, wide: bool = False) -> Iterator[None]:
        """Add what passes a block meanwhile to its sums, and keep inputs of layers, if wanted.

        Args:
            place: of the block in the shard.
            wide: whether products are of float32 whatever the inputs are, because other threads of
                this process make products, too.
        """
        hooks = [] if self.layer_inputs is None else self.layer_inputs.watch(place)
        gathers = self._kind not in (None, "identity")
        sums = dict[str, PackedSymmetric]()
        if gathers and place in self.expert_sums:
            hooks += sum_removals(self.expert_sums[place], self.mixtures[place])
        sums_G = self._kind != "activations" and torch.is_grad_enabled()
        ahead = list[str]()
        for group in self.gathering if gathers else ():
            keys = [*group.sizes] if sums_G else [group.key_of_A]
            if group.place == place:
                factors = {key: self._sum(group, key) for key in keys}
                hooks += group.add_to(factors, wide=wide)
                sums |= factors
            elif group.place == self.weights.then:
                ahead += keys
        self.factor_store.expect(ahead)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            stays = self.factor_store.place == "device"
            for key, total in sums.items():
                if not (stays and key in self.factor_store):  # what is there is the sum itself
                    self.factor_store.put(key, total.flat)

    @property
    def is_watched(self) -> bool:
        """Whether sums or inputs of layers are gathered at present."""
        return self._kind is not None or self.layer_inputs is not None

    def _sum(self, group: SharedInput, key: str) -> PackedSymmetric:
        """Return a sum that may be added to, zeros if there is none."""
        n = group.sizes[key]
        if key not in self.factor_store:
            return PackedSymmetric.zeros(n, self.device)
        return PackedSymmetric(n, self.factor_store.on_device(key))

    def stop_gathering(self) -> None:
        """Stop to gather; what was summed stays."""
        self._kind = None

    def stop_curvature(self) -> None:
        """Stop to gather, and set the factors that the kind does not sum."""
        assert self._kind is not None, "no curvature pass has been made"
        for group in self.gathering:
            for key in (key for key in group.sizes if key not in self.factor_store):
                total = self._sum(group, key)
                total.fill_diagonal(group.num_tokens)
                self.factor_store.put(key, total.flat)
        self.stop_gathering()

    def drop_curvature(self) -> None:
        """Free the sums."""
        self.factor_store.clear()
        self.terms.clear()
        self.expert_sums.clear()
        self._layer_means.clear()

    def factors(self, name: str) -> PackedFactors:
        """Return the factors of a linear, those of an expert shrunk; see `shrunk_factors`."""
        own = self.own_factors(name)
        shape = self.layout.shapes[name]
        if shape.sees_all_tokens or not self._has_tokens:
            return own
        return of_experts.shrunk_factors(own, self.layer_mean(shape.block, shape.role))

    def own_factors(self, name: str) -> PackedFactors:
        """Return the sums of a linear where they lie; A is that of its shared input."""
        group = self._group_of[name]
        keys = (group.key_of_A, group.keys_of_G[name])
        A, G = (PackedSymmetric(group.sizes[key], self.factor_store.get(key)) for key in keys)
        return PackedFactors(A, G, group.num_tokens, tuple(self.terms.get(name, ())))

    def own_divisor(self, name: str, num_tokens: int) -> float:
        """Return by what a linear's own sum of g g^T (x) a a^T is divided; see `own_divisor`."""
        shape = self.layout.shapes[name]
        if shape.sees_all_tokens:
            return num_tokens
        return of_experts.own_divisor(num_tokens, self.layer_mean(shape.block, shape.role))

    def layer_mean(self, block: int, role: str) -> of_experts.LayerMean:
        """Return the mean factors of the linears of a role over all experts of a block."""
        # blocks have their turns: means of other blocks are free before one is made
        means = {key: mean for key, mean in self._layer_means.items() if key[0] == block}
        self._layer_means = means
        if (block, role) not in means:
            shapes = [s for s in self.layout.linears if s.block == block and s.role == role]
            own = [self.own_factors(shape.name) for shape in shapes]
            is_consumer = role.endswith(self.layout.family.sparse.linears.consumer)
            As = ((factors.A, factors.num_tokens) for factors in own)
            Gs = ((factors.G, factors.num_tokens) for factors in own)
            num_tokens: float = sum(factors.num_tokens for factors in own)
            mean = functools.partial(of_experts.mean_factor, device=self.device)
            A = mean(As, has_basis=not is_consumer, has_bias=shapes[0].has_bias)
            G = mean(Gs, has_basis=is_consumer)
            num_tokens /= self.mixtures[block - self.blocks.first].num_chosen
            means[block, role] = of_experts.LayerMean(A, G, num_tokens)
        return means[block, role]

    @property
    def head_weight(self) -> Tensor:
        """The weight [vocabulary, d] of the last shard's head."""
        return self.model.get_parameter(f"{self.layout.family.head}.weight")

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the last shard's logits [n, T, vocabulary] float32."""
        logits: Tensor = self.model.get_submodule(self.layout.family.head)(hidden)
        return logits.float()
