"""A shard: a contiguous run of decoder blocks, with hooks that gather curvature."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from ray_surgeon.maths.experts import ExpertSums, LayerMean, mean_factor, shrunk_factors
from ray_surgeon.maths.kronecker import PackedFactors, PackedSymmetric, Term, with_ones
from ray_surgeon.memory.factors import FactorStore
from ray_surgeon.memory.stores import Scratch, Stores
from ray_surgeon.memory.weights import Read, Slot, weight_store
from ray_surgeon.models.build import BlockRange, build_blocks, global_name, shared_inputs_of
from ray_surgeon.models.checkpoint import check_finite
from ray_surgeon.models.experts import Mixture, mixture_of
from ray_surgeon.models.layer_inputs import LayerInputs
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.linears import LinearModule, as_linear, num_inputs, use_fast_products
from ray_surgeon.models.loss import Comparison, compare_with_dense, next_token_loss, next_tokens
from ray_surgeon.models.removals import sum_removals


@dataclass
class SharedInput:
    """Linears that read the same input, and so share one A."""

    names: tuple[str, ...]  # global names of the linears
    modules: tuple[LinearModule, ...]  # the linears
    place: int  # of their block in the shard
    num_tokens: int = 0  # tokens in the sums

    @property
    def key_of_A(self) -> str:
        """Under which their A is stored."""
        return f"{self.names[0]}.A"

    @staticmethod
    def key_of_G(name: str) -> str:
        """Under which the G of one of them is stored."""
        return f"{name}.G"

    @property
    def keys(self) -> tuple[str, ...]:
        """Under which their A and all G are stored."""
        return (self.key_of_A, *map(self.key_of_G, self.names))


class ModelShard:
    """Blocks ``blocks.first`` to ``blocks.last`` of a causal LM, with sums A and G.

    Weights need no gradient. A is summed in the forward pass and G in the backward pass, so nothing
    is kept for both.
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
        scratch = scratch or Scratch(None, "none", "none", "none")
        self.weights = weight_store(self.stores.weights, self._slots(), device, scratch)
        self._in_blocks = frozenset(self.weights.names)
        self.factor_store = FactorStore(self.stores.factors, device, scratch)
        self.shared_inputs = list(self._find_shared_inputs())
        self.linears: dict[str, LinearModule] = {
            n: m for g in self.shared_inputs for n, m in zip(g.names, g.modules, strict=True)
        }
        self._group_of = {name: group for group in self.shared_inputs for name in group.names}
        self.mixtures = dict(self._find_mixtures())
        self.expert_sums: dict[int, ExpertSums] = {}
        self.layer_inputs: LayerInputs | None = (
            None  # what the present pass keeps of its layers' inputs, if anything
        )
        for module in (
            self.linears.values() if device.type == "cpu" and dtype == torch.float32 else ()
        ):
            use_fast_products(module)
        self.gathering: list[SharedInput] = []
        self.terms: dict[str, list[Term]] = {}
        self._kind: str | None = None
        self._has_tokens = True  # factors are sums over tokens, of which an expert may have few
        self._layer_means: dict[tuple[int, str], LayerMean] = {}

    def _slots(self) -> list[dict[str, Slot]]:
        """Return, for each block, global name -> where a tensor belongs."""
        saved = set(self.model.state_dict())
        slots = []
        for block in range(self.blocks.first, self.blocks.last):
            prefix = self.layout.family.block_prefix(block - self.blocks.first)
            module = self.model.get_submodule(prefix.rstrip("."))
            inside = [n for n, _ in module.named_parameters()] + [
                n for n, _ in module.named_buffers() if prefix + n in saved
            ]
            places = (
                (self.layout.family.block_prefix(block) + n, n.rpartition(".")) for n in inside
            )
            slots.append(
                {
                    n: Slot(module.get_submodule(owner), leaf, self._dtype_of(n))
                    for n, (owner, _, leaf) in places
                }
            )
        return slots

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name.endswith(self.layout.family.float32) else self.dtype

    @property
    def wanted(self) -> list[str]:
        """Global names of the tensors that `load` reads, in its order."""
        return [*self._outside_of_blocks.values(), *self.weights.names]

    @property
    def _outside_of_blocks(self) -> dict[str, str]:
        """Name in this shard -> global name of tensors outside of the blocks.

        A head tied to an embedding that is here is left out.
        """
        saved_names = set(self.model.state_dict())
        shared = self.layout.tied if self.blocks.is_first and self.blocks.is_last else {}
        local = [n for n, _ in self.model.named_parameters()] + [
            n for n, _ in self.model.named_buffers() if n in saved_names
        ]
        names = {
            name: global_name(self.layout.family, name, self.blocks.first)
            for name in local
            if name not in shared
        }
        return {
            name: full_name for name, full_name in names.items() if full_name not in self._in_blocks
        }

    def load(self, read_tensor: Read, *, stays: bool = True) -> None:
        """Load this shard's tensors, and only these.

        Args:
            read_tensor: global parameter name -> tensor, of any float dtype.
            stays: see `WeightStore.fill`.

        Raises:
            BadWeightsError: a weight is not finite.
        """
        for local, name in self._outside_of_blocks.items():
            value = read_tensor(name)
            check_finite(name, value)
            # the file's memory would stay mapped
            own = torch.empty_like(value, dtype=self.dtype, device=self.device).copy_(value)
            set_module_tensor_to_device(self.model, local, self.device, value=own)
        for local, source in (
            self.layout.tied.items() if self.blocks.is_first and self.blocks.is_last else ()
        ):
            owner = self.model.get_submodule(local.rpartition(".")[0])
            # a typed attribute would not be a Parameter
            setattr(owner, "weight", self.model.get_parameter(source))  # noqa: B010
        for module in self.model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[leaf] = buffer.to(self.device)
        self.model.requires_grad_(False)
        self.weights.fill(read_tensor, check_finite, stays=stays)

    def _find_shared_inputs(self) -> Iterator[SharedInput]:
        family = self.layout.family
        for place, block in enumerate(range(self.blocks.first, self.blocks.last)):
            local_prefix = family.block_prefix(place)
            for group in shared_inputs_of(
                family, self.model.get_submodule(local_prefix.rstrip("."))
            ):
                modules = tuple(
                    as_linear(self.model.get_submodule(local_prefix + linear)) for linear in group
                )
                yield SharedInput(
                    tuple(family.block_prefix(block) + linear for linear in group), modules, place
                )

    def _find_mixtures(self) -> Iterator[tuple[int, Mixture]]:
        family = self.layout.family
        for place in (
            range(self.blocks.last - self.blocks.first) if family.sparse is not None else ()
        ):
            assert family.sparse is not None
            mixture = mixture_of(
                self.model.get_submodule(family.block_prefix(place).rstrip(".")), family.sparse
            )
            if mixture is not None:
                yield place, mixture

    def route_around(self, block: int, kept: Tensor) -> None:
        """Let the router of a block go around the experts that are not kept, [num_experts] bool."""
        self.mixtures[block - self.blocks.first].router.kept = kept.clone()

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
            return [
                f"{n}.{p}"
                for n, m in self.linears.items()
                for p in (("weight",) if m.bias is None else ("weight", "bias"))
            ]
        tied = self.layout.tied
        names = (
            global_name(self.layout.family, name, self.blocks.first)
            for name in self.model.state_dict()
        )
        return [name for name in names if name not in tied]

    def tensor(self, name: str) -> Tensor:
        """Return a saved tensor by its global name, where it lies."""
        if name in self._in_blocks:
            return self.weights.get(name)
        value = self.model.state_dict()[name]
        assert isinstance(value, Tensor)
        return value.detach()

    # Curvature

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
        shapes = self.layout.shapes
        self.gathering = [
            g
            for g in self.shared_inputs
            if only is None or any(shapes[name].role in only for name in g.names)
        ]
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

        Inputs of layers are kept if these are wanted.

        The sums are of inputs, and of output gradients if the kind needs them.

        Args:
            place: of the block in the shard.
            wide: whether products are of float32 whatever the inputs are, because other threads of
                this process make products, too.
        """
        hooks = [] if self.layer_inputs is None else self.layer_inputs.watch(place)
        gathers = self._kind not in (None, "identity")
        sums = dict[str, PackedSymmetric]()
        sums_G = self._kind != "activations" and torch.is_grad_enabled()
        if gathers and place in self.expert_sums:
            hooks += sum_removals(self.expert_sums[place], self.mixtures[place])
        for group in (group for group in self.gathering if gathers and group.place == place):
            A = sums[group.key_of_A] = self.factor_store.on_device(
                group.key_of_A, self.layout.shapes[group.names[0]].num_columns
            )
            hooks.append(
                group.modules[0].register_forward_pre_hook(_add_inputs_to(group, A, wide=wide))
            )
            for name, module in zip(group.names, group.modules, strict=True) if sums_G else ():
                G = sums[group.key_of_G(name)] = self.factor_store.on_device(
                    group.key_of_G(name), self.layout.shapes[name].num_rows
                )
                hooks.append(module.register_forward_hook(_add_output_gradients_to(G)))
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
            shapes = [self.layout.shapes[name] for name in group.names]
            sizes = {group.key_of_A: shapes[0].num_columns} if self._kind == "identity" else {}
            sizes |= (
                {group.key_of_G(shape.name): shape.num_rows for shape in shapes}
                if self._kind in ("identity", "activations")
                else {}
            )
            for key, n in sizes.items():
                total = PackedSymmetric.zeros(n, self.device)
                total.fill_diagonal(group.num_tokens)
                self.factor_store.put(key, total)
        self.stop_gathering()

    @property
    def gathered(self) -> dict[str, LinearModule]:
        """The linears for which the curvature pass gathers factors."""
        return {
            name: module
            for group in self.gathering
            for name, module in zip(group.names, group.modules, strict=True)
        }

    def first_not_finite(self) -> str | None:
        """Return the first linear whose inputs in the curvature pass were not finite."""
        keys = ((group.names[0], group.key_of_A) for group in self.gathering)
        return next(
            (
                name
                for name, key in keys
                if key in self.factor_store and not self.factor_store.get(key).is_finite()
            ),
            None,
        )

    def drop_curvature(self) -> None:
        """Free the sums."""
        self.factor_store.clear()
        self.terms.clear()
        self.expert_sums.clear()
        self._layer_means.clear()

    def factors(self, name: str) -> PackedFactors:
        """Return the factors of a linear; see `own_factors`.

        Those of an expert are shrunk if they are of tokens; see `shrunk_factors`.
        """
        own = self.own_factors(name)
        shape = self.layout.shapes[name]
        return (
            own
            if shape.expert is None or not self._has_tokens
            else shrunk_factors(own, self.layer_mean(shape.block, shape.role))
        )

    def own_factors(self, name: str) -> PackedFactors:
        """Return the sums of a linear where they lie.

        A is shared with the other linears that read the same input.
        """
        group = self._group_of[name]
        A = self.factor_store.get(group.key_of_A)
        G = self.factor_store.get(group.key_of_G(name))
        return PackedFactors(A, G, group.num_tokens, tuple(self.terms.get(name, ())))

    def layer_mean(self, block: int, role: str) -> LayerMean:
        """Return the mean factors of the linears of a role over all experts of a block."""
        if (block, role) not in self._layer_means:
            assert self.layout.family.sparse is not None
            # blocks have their turns
            self._layer_means = {
                key: mean for key, mean in self._layer_means.items() if key[0] == block
            }
            shapes = [
                shape
                for shape in self.layout.linears
                if shape.block == block and shape.role == role
            ]
            names = [shape.name for shape in shapes]
            groups = [self._group_of[name] for name in names]
            tokens = [g.num_tokens for g in groups]
            is_consumer = role.endswith(self.layout.family.sparse.linears.consumer)
            keys_of_G = [group.key_of_G(name) for name, group in zip(names, groups, strict=True)]
            As, Gs = (
                zip(map(self.factor_store.get, keys), tokens, strict=True)
                for keys in ([g.key_of_A for g in groups], keys_of_G)
            )
            A = mean_factor(As, has_basis=not is_consumer, has_bias=shapes[0].has_bias)
            G = mean_factor(Gs, has_basis=is_consumer)
            num_chosen = self.mixtures[block - self.blocks.first].num_chosen
            self._layer_means[block, role] = LayerMean(A, G, sum(tokens) / num_chosen)
        return self._layer_means[block, role]

    # The head

    @torch.no_grad()
    def loss(
        self,
        hidden: Tensor,
        tokens: Tensor,
        *,
        with_gradient: bool = False,
        generator: torch.Generator | None = None,
        counts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Loss of the last shard's hidden states; see `next_token_loss`."""
        return next_token_loss(
            hidden,
            self._head_weight,
            tokens,
            with_gradient=with_gradient,
            generator=generator,
            counts=counts,
        )

    @torch.no_grad()
    def compare(
        self,
        hidden: Tensor,
        dense: Tensor,
        tokens: Tensor,
        *,
        with_gradient: bool = False,
        counts: Tensor | None = None,
        with_acceptance: bool = False,
    ) -> Comparison:
        """Compare the last shard's hidden states with the dense model's.

        See `compare_with_dense`.
        """
        return compare_with_dense(
            hidden,
            dense,
            tokens,
            self._head_weight,
            with_gradient=with_gradient,
            counts=counts,
            with_acceptance=with_acceptance,
        )

    @torch.no_grad()
    def next_tokens(self, hidden: Tensor, chances: Tensor, temperature: float) -> Tensor:
        """Draw next tokens after the last shard's hidden states; see `next_tokens`."""
        return next_tokens(hidden, self._head_weight, chances, temperature)

    @property
    def _head_weight(self) -> Tensor:
        head = self.model.get_submodule(self.layout.family.head)
        assert isinstance(head, nn.Linear)
        return head.weight

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the last shard's logits [n, T, vocabulary] float32."""
        logits = self.model.get_submodule(self.layout.family.head)(hidden)
        assert isinstance(logits, Tensor)
        return logits.float()


def inputs_of(module: LinearModule, inputs: Tensor) -> Tensor:
    """Return the inputs a [num_tokens, C] of a linear, with the bias's ones."""
    a = inputs.detach().flatten(0, -2)
    return a if module.bias is None else with_ones(a)


def watch_pairs(module: LinearModule, see: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
    """Call ``see(a, g)`` in the backward pass of a linear, float32.

    a [N, C] are its inputs, g [N, R] the gradients at its outputs.

    The inputs of micro-batches in flight are kept until then.
    """

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(
                lambda g: see(
                    inputs_of(module, inputs[0]).float(), g.detach().flatten(0, -2).float()
                )
            )  # type: ignore[no-untyped-call]

    return module.register_forward_hook(hook)


def _add_inputs_to(
    group: SharedInput, A: PackedSymmetric, *, wide: bool
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        a = inputs_of(group.modules[0], inputs[0])
        A.add(a.float() if wide else a)
        group.num_tokens += len(a)

    return hook


def _add_output_gradients_to(
    G: PackedSymmetric,
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def add(gradient: Tensor) -> None:
        G.add(gradient.detach().flatten(0, -2))

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(add)  # type: ignore[no-untyped-call]

    return hook
