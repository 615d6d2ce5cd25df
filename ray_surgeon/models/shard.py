"""A shard: a contiguous run of decoder blocks, with hooks that gather curvature."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ray_surgeon.maths.experts import (
    ExpertSums,
    LayerMean,
    mean_factor,
    own_divisor,
    shrunk_factors,
)
from ray_surgeon.maths.kronecker import PackedFactors, PackedSymmetric, Term
from ray_surgeon.memory.stores import FactorStore, Scratch, Stores
from ray_surgeon.memory.weights import Read, weight_store
from ray_surgeon.models.build import BlockRange, build_blocks, global_name
from ray_surgeon.models.checkpoint import check_finite
from ray_surgeon.models.experts import Mixture, mixture_of
from ray_surgeon.models.hooks import LayerInputs, SharedInput, linears_of, shared_inputs_in
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.linears import LinearModule, num_inputs, use_fast_products
from ray_surgeon.models.removals import sum_removals
from ray_surgeon.models.tensors import load_ends, names_of_ends, slots_of


class ModelShard:
    """Blocks of a causal LM, with sums A of the forward and G of the backward pass.

    Weights need no gradient, and nothing is kept for both passes.
    """

    def __init__(
        self,
        layout: ModelLayout,
        blocks: BlockRange,
        dtype: torch.dtype,
        device: torch.device,
        stores: Stores | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        """Build the shard without weights.

        Args:
            layout: of the whole model.
            blocks: the blocks this shard holds.
            dtype: dtype of weights and activations; factors are float32 whatever it is.
            device: where it computes.
            stores: where weights and factors are; all on the device if not given.
            scratch: for what is on disk.
        """
        self.layout = layout
        self.blocks = blocks
        self.dtype = dtype
        self.device = device
        self.stores = stores or Stores()
        self.model = build_blocks(layout.config, blocks, dtype)
        self.base = self.model.get_submodule(layout.family.base)
        self.block_modules = list(self.base.get_submodule(layout.family.blocks).children())
        scratch = scratch or Scratch(None, "none", "none", "none")
        self.weights = weight_store(self.stores.weights, slots_of(self), device, scratch)
        self.factor_store = FactorStore(self.stores.factors, device, scratch)
        self.shared_inputs = list(shared_inputs_in(self))
        self.linears = linears_of(self.shared_inputs)
        self._group_of = {name: group for group in self.shared_inputs for name in group.names}
        self.mixtures: dict[int, Mixture] = {}
        for place, block in enumerate(self.block_modules):
            if (mixture := mixture_of(block, layout.family.sparse)) is not None:
                self.mixtures[place] = mixture
        self.expert_sums: dict[int, ExpertSums] = {}
        # what the present pass keeps of its layers' inputs, if anything
        self.layer_inputs: LayerInputs | None = None
        if device.type == "cpu" and dtype == torch.float32:
            for module in self.linears.values():
                use_fast_products(module)
        self.gathering: list[SharedInput] = []
        self.terms: dict[str, list[Term]] = {}
        self._kind: str | None = None
        self._has_tokens = True  # factors are sums over tokens, of which an expert may have few
        self._layer_means: dict[tuple[int, str], LayerMean] = {}

    @property
    def wanted(self) -> list[str]:
        """Global names of the tensors that `load` reads, in its order."""
        return [*names_of_ends(self), *self.weights.names]

    def load(self, read_tensor: Read, *, stays: bool = True) -> None:
        """Load this shard's tensors, and only these.

        Args:
            read_tensor: global parameter name -> tensor, of any float dtype.
            stays: see `WeightStore.fill`.

        Raises:
            BadWeightsError: a weight is not finite.
        """
        load_ends(self, read_tensor)
        self.model.requires_grad_(False)
        self.weights.fill(read_tensor, check_finite, stays=stays)

    def weight(self, name: str) -> Tensor:
        """Return a copy of W [R, C] of a linear, float32, its bias as the last column."""
        module = self.linears[name]
        matrix = self.weights.get(f"{name}.weight").to(self.device)
        matrix = matrix.T if isinstance(module, Conv1D) else matrix
        if module.bias is None:
            return matrix.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        bias = self.weights.get(f"{name}.bias").to(self.device)
        return torch.cat([matrix.float(), bias.float()[:, None]], dim=1)

    def set_weight(self, name: str, W: Tensor) -> None:
        """Write W [R, C], bias in the last column, into a linear."""
        module = self.linears[name]
        matrix = W[:, : num_inputs(module)]
        self.weights.set(f"{name}.weight", matrix.T if isinstance(module, Conv1D) else matrix)
        if module.bias is not None:
            self.weights.set(f"{name}.bias", W[:, -1])

    def saved(self, *, linears_only: bool) -> list[str]:
        """Return the names of the linears' tensors, or of all that this shard exports.

        A tied head is left out: the embedding is saved once, by the first shard.
        """
        if linears_only:
            return [f"{n}.{p}" for n, m in self.linears.items() for p, _ in m.named_parameters()]
        names = (
            global_name(self.layout.family, name, self.blocks.first)
            for name in self.model.state_dict()
        )
        return [name for name in names if name not in self.layout.tied]

    def tensor(self, name: str) -> Tensor:
        """Return a saved tensor by its global name, where it lies."""
        if self.layout.block_of(name) is not None:
            return self.weights.get(name)
        tensor: Tensor = self.model.state_dict()[name]
        return tensor

    def start_curvature(
        self, kind: str = "kfac", *, only: frozenset[str] | None = None, experts: bool = False
    ) -> None:
        """Start to gather, with empty sums.

        Args:
            kind: ``activations`` sums A in a forward pass alone and takes G = I; ``identity`` takes
                A = G = I and keeps nothing of a pass (both times the number of tokens, as sums over
                tokens are); all others sum A and G.
            only: roles of the linears that are wanted, see `LinearShape`; those that share an input
                with one come along. None for all.
            experts: whether to sum, too, what `ExpertSums` has.
        """
        assert self._kind is None
        self.drop_curvature()
        roles = {name: shape.role for name, shape in self.layout.shapes.items()}
        wanted = frozenset(roles.values()) if only is None else only
        self.gathering = [g for g in self.shared_inputs if any(roles[n] in wanted for n in g.names)]
        if experts:
            self.expert_sums = {
                place: ExpertSums(len(m.experts), self.device) for place, m in self.mixtures.items()
            }
        for group in self.gathering:
            group.num_tokens = int(kind == "identity")
        self._kind = kind
        self._has_tokens = kind != "identity"

    @contextlib.contextmanager
    def gathering_in(self, place: int, *, wide: bool = False) -> Iterator[None]:
        """Add what passes a block meanwhile to its sums, if curvature is gathered.

        The sums are of inputs, and of output gradients if the kind needs them. Inputs of layers are
        kept if these are wanted.

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
        for group in (group for group in self.gathering if gathers and group.place == place):
            sums_G = self._kind != "activations" and torch.is_grad_enabled()
            factors = {
                key: self.factor_store.on_device(key, n)
                for key, n in group.sizes.items()
                if sums_G or key == group.key_of_A
            }
            hooks += group.add_to(factors, wide=wide)
            sums |= factors
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for key, total in sums.items():
                self.factor_store.put(key, total)

    def stop_gathering(self) -> None:
        """Stop to gather; what was summed stays."""
        self._kind = None

    def stop_curvature(self) -> None:
        """Stop to gather, and set the factors that the kind does not sum."""
        assert self._kind is not None, "no curvature pass has been made"
        for group in self.gathering:
            for key, n in group.sizes.items():
                is_A = key == group.key_of_A
                if self._kind == "identity" or (self._kind == "activations" and not is_A):
                    total = PackedSymmetric.zeros(n, self.device)
                    total.fill_diagonal(group.num_tokens)
                    self.factor_store.put(key, total)
        self.stop_gathering()

    @property
    def gathered(self) -> dict[str, LinearModule]:
        """The linears for which the curvature pass gathers factors."""
        return linears_of(self.gathering)

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
        return shrunk_factors(own, self.layer_mean(shape.block, shape.role))

    def own_factors(self, name: str) -> PackedFactors:
        """Return the sums of a linear where they lie.

        A is shared with the other linears that read the same input.
        """
        group = self._group_of[name]
        A = self.factor_store.get(group.key_of_A)
        G = self.factor_store.get(group.key_of_G(name))
        return PackedFactors(A, G, group.num_tokens, tuple(self.terms.get(name, ())))

    def own_divisor(self, name: str, num_tokens: int) -> float:
        """Return the divisor of a linear's own sum of g g^T (x) a a^T over its tokens.

        In a mixture, further Kronecker terms weigh what its own tokens do in the first.
        """
        shape = self.layout.shapes[name]
        if shape.sees_all_tokens:
            return num_tokens
        return own_divisor(num_tokens, self.layer_mean(shape.block, shape.role))

    def layer_mean(self, block: int, role: str) -> LayerMean:
        """Return the mean factors of the linears of a role over all experts of a block."""
        if (block, role) not in self._layer_means:
            # blocks have their turns
            means = {key: mean for key, mean in self._layer_means.items() if key[0] == block}
            self._layer_means = means
            means[block, role] = self._mean_of_layer(block, role)
        return self._layer_means[block, role]

    def _mean_of_layer(self, block: int, role: str) -> LayerMean:
        sparse = self.layout.family.sparse
        assert sparse is not None
        shapes = [s for s in self.layout.linears if s.block == block and s.role == role]
        groups = [(shape.name, self._group_of[shape.name]) for shape in shapes]
        As = ((self.factor_store.get(g.key_of_A), g.num_tokens) for _, g in groups)
        Gs = ((self.factor_store.get(g.key_of_G(name)), g.num_tokens) for name, g in groups)
        is_consumer = role.endswith(sparse.linears.consumer)
        num_tokens = sum(group.num_tokens for _, group in groups)
        return LayerMean(
            mean_factor(As, has_basis=not is_consumer, has_bias=shapes[0].has_bias),
            mean_factor(Gs, has_basis=is_consumer),
            num_tokens / self.mixtures[block - self.blocks.first].num_chosen,
        )

    @property
    def head_weight(self) -> Tensor:
        """The weight [vocabulary, d] of the last shard's head."""
        head = self.model.get_submodule(self.layout.family.head)
        assert isinstance(head, nn.Linear)
        return head.weight

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the last shard's logits [n, T, vocabulary] float32."""
        logits = self.model.get_submodule(self.layout.family.head)(hidden)
        assert isinstance(logits, Tensor)
        return logits.float()
