"""A shard: a contiguous run of decoder blocks with hooks that gather curvature while activations and gradients pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ray_surgeon.models.layout import BlockRange, ModelLayout, build_blocks, global_name
from ray_surgeon.models.linears import LinearModule, as_linear, matrix, num_inputs, num_outputs
from ray_surgeon.models.loss import next_token_loss
from ray_surgeon.surgery.extended.terms import Term
from ray_surgeon.surgery.kronecker import KroneckerFactors, add_second_moment, symmetrize, with_ones


class BadWeightsError(ValueError):
    """A weight of the checkpoint is NaN or infinite, which is only known once it is read."""


@dataclass
class SharedInput:
    """Linears that read the same input, and the sums gathered there."""

    names: tuple[str, ...]  # global names of the linears
    modules: tuple[LinearModule, ...]  # the linears
    A: Tensor | None = None  # [C, C] sum of a a^T, shared by all of them; None outside a curvature pass
    G: tuple[Tensor, ...] = ()  # one [R, R] sum of g g^T a linear
    num_tokens: int = 0  # tokens in A


class ModelShard:
    """Blocks ``blocks.first`` to ``blocks.last`` of a causal LM: loads, runs forward and backward, gathers A and G.

    Weights need no gradient. A is summed in the forward pass and G in the backward pass, so nothing is kept for both.
    """

    def __init__(self, layout: ModelLayout, blocks: BlockRange, dtype: torch.dtype, device: torch.device) -> None:
        """Build the shard without weights.

        Args:
            layout: of the whole model.
            blocks: the blocks this shard holds.
            dtype: dtype of weights and activations; factors are float32 whatever it is.
            device: where it computes.
        """
        self.layout, self.blocks, self.dtype, self.device = layout, blocks, dtype, device
        self.model = build_blocks(layout.config, blocks, dtype)
        self.base = self.model.get_submodule(layout.family.base)
        self.shared_inputs: list[SharedInput] = []
        self.gathering: list[SharedInput] = []
        self.terms: dict[str, list[Term]] = {}
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}
        self._hooks: list[RemovableHandle] = []

    def load(self, read_tensor: Callable[[str], Tensor]) -> None:
        """Load this shard's tensors, and only these.

        Args:
            read_tensor: global parameter name -> tensor, of any float dtype.

        Raises:
            BadWeightsError: a weight is not finite.
        """
        tied = self.layout.tied
        shares_embedding = self.blocks.is_first and self.blocks.is_last
        saved_names = set(self.model.state_dict())
        for local in [n for n, _ in self.model.named_parameters()] + [n for n, _ in self.model.named_buffers() if n in saved_names]:
            if local in tied and shares_embedding:
                continue
            name = global_name(self.layout.family, local, self.blocks.first)
            value = read_tensor(name)
            if not torch.isfinite(value).all():
                raise BadWeightsError(
                    f"model.source: {name} has {int((~torch.isfinite(value)).sum())} NaN or infinite weights; fetch it again"
                )
            set_module_tensor_to_device(self.model, local, self.device, value=value, dtype=self.dtype)
        for local, source in tied.items() if shares_embedding else ():
            owner = self.model.get_submodule(local.rpartition(".")[0])
            setattr(owner, "weight", self.model.get_parameter(source))  # noqa: B010 - a typed attribute would not be a Parameter
        self.model.to(self.device)
        self.model.requires_grad_(False)
        self.shared_inputs = list(self._find_shared_inputs())

    def _find_shared_inputs(self) -> Iterator[SharedInput]:
        family = self.layout.family
        for block in range(self.blocks.first, self.blocks.last):
            local_prefix = family.block_prefix(block - self.blocks.first)
            for group in family.shared_inputs:
                modules = tuple(as_linear(self.model.get_submodule(local_prefix + linear)) for linear in group)
                yield SharedInput(tuple(family.block_prefix(block) + linear for linear in group), modules)

    @property
    def linears(self) -> dict[str, LinearModule]:
        """Global name -> linear, in order."""
        return {name: module for group in self.shared_inputs for name, module in zip(group.names, group.modules, strict=True)}

    def weight(self, name: str) -> Tensor:
        """Return W [R, C] float32 of a linear, its bias as the last column."""
        module = self.linears[name]
        W = matrix(module).float()
        return (
            W.clone(memory_format=torch.contiguous_format)
            if module.bias is None
            else torch.cat([W, module.bias.detach().float()[:, None]], dim=1)
        )

    def set_weight(self, name: str, W: Tensor) -> None:
        """Write W [R, C], bias in the last column, into a linear."""
        module = self.linears[name]
        with torch.no_grad():
            matrix(module).copy_(W[:, : num_inputs(module)])
            if module.bias is not None:
                module.bias.copy_(W[:, -1])

    def tensors(self, *, linears_only: bool) -> dict[str, Tensor]:
        """Return global name -> tensor: of the linears, or of everything this shard saves in an export.

        A tied head is left out: the embedding is saved once, by the first shard.
        """
        if linears_only:
            named = {f"{n}.{p}": t for n, m in self.linears.items() for p, t in (("weight", m.weight), ("bias", m.bias)) if t is not None}
        else:
            tied = self.layout.tied
            state = {global_name(self.layout.family, n, self.blocks.first): t for n, t in self.model.state_dict().items()}
            named = {n: t for n, t in state.items() if n not in tied}
        return {name: tensor.detach() for name, tensor in named.items()}

    # Curvature

    def start_curvature(self, kind: str = "kfac", *, consumers_only: bool = False) -> None:
        """Zero the sums and install the hooks.

        Args:
            kind: ``activations`` sums A in a forward pass alone and takes G = I; ``identity`` takes A = G = I and needs no pass (both
                times the number of tokens, as sums over tokens are); all others sum A and G.
            consumers_only: whether only the consumers of coupled groups are wanted.
        """
        assert not self._hooks
        consumers = (self.layout.family.ffn.consumer, self.layout.family.attention.consumer)
        self.gathering = [group for group in self.shared_inputs if not consumers_only or group.names[0].endswith(consumers)]
        for group in self.gathering:
            first = group.modules[0]
            C = num_inputs(first) + (first.bias is not None)
            group.A = torch.zeros(C, C, device=self.device)
            group.G = tuple(torch.zeros(num_outputs(m), num_outputs(m), device=self.device) for m in group.modules)
            group.num_tokens = 0
            if kind == "identity":
                group.num_tokens = 1
                for total in (group.A, *group.G):
                    total.fill_diagonal_(1)
                continue
            self._hooks.append(first.register_forward_pre_hook(add_inputs_to(group)))
            for module, G in zip(group.modules, group.G, strict=True) if kind != "activations" else ():
                self._hooks.append(module.register_forward_hook(_add_output_gradients_to(G)))

    def stop_curvature(self, kind: str = "kfac") -> None:
        """Remove the hooks and complete the symmetric sums of the kind that was started."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._saved.clear()
        for group in self.gathering:
            assert group.A is not None
            if kind == "activations":
                for G in group.G:
                    G.fill_diagonal_(group.num_tokens)
            for total in (group.A, *group.G):
                symmetrize(total)

    @property
    def gathered(self) -> dict[str, LinearModule]:
        """The linears for which the curvature pass gathers factors."""
        return {name: module for group in self.gathering for name, module in zip(group.names, group.modules, strict=True)}

    def first_not_finite(self) -> str | None:
        """Return the first linear whose inputs were NaN or infinite in the curvature pass so far."""
        return next((g.names[0] for g in self.gathering if g.A is not None and not torch.isfinite(g.A.triu()).all()), None)

    def drop_curvature(self) -> None:
        """Free the sums."""
        for group in self.shared_inputs:
            group.A, group.G = None, ()
        self.terms.clear()

    def factors(self, name: str) -> KroneckerFactors:
        """Return the factors of a linear; A is shared with the other linears that read the same input, not copied."""
        for group in self.shared_inputs:
            if name in group.names:
                assert group.A is not None, "no curvature pass has been made"
                return KroneckerFactors(group.A, group.G[group.names.index(name)], group.num_tokens, tuple(self.terms.get(name, ())))
        raise KeyError(name)

    # Forward and backward

    def _run(self, inputs: Tensor) -> Tensor:
        key = "input_ids" if inputs.dtype == torch.int64 else "inputs_embeds"
        hidden = self.base(**{key: inputs}, use_cache=False).last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden

    @torch.no_grad()
    def infer(self, inputs: Tensor) -> Tensor:
        """Run the blocks without gradients: tokens [n, T] int64 or hidden states [n, T, d] -> hidden states [n, T, d]."""
        return self._run(inputs)

    def forward(self, micro_batch: int, inputs: Tensor) -> Tensor:
        """Run the blocks, keep what the backward pass of this micro-batch needs, return detached hidden states [n, T, d]."""
        if inputs.dtype == torch.int64:
            with torch.no_grad():
                inputs = self.base.get_submodule(self.layout.family.embeddings[0])(inputs)
        leaf = inputs.requires_grad_()
        hidden = self._run(leaf)
        self._saved[micro_batch] = (leaf, hidden)
        return hidden.detach()

    def backward(self, micro_batch: int, gradient: Tensor) -> Tensor:
        """Run a micro-batch backwards: gradient at the outputs [n, T, d] -> gradient at the inputs [n, T, d]."""
        leaf, hidden = self._saved.pop(micro_batch)
        torch.autograd.backward(hidden, gradient)
        assert leaf.grad is not None
        return leaf.grad

    @torch.no_grad()
    def loss(
        self, hidden: Tensor, tokens: Tensor, *, with_gradient: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Loss of the last shard's hidden states; see `next_token_loss`."""
        head = self.model.get_submodule(self.layout.family.head)
        assert isinstance(head, nn.Linear)
        return next_token_loss(hidden, head.weight, tokens, with_gradient=with_gradient, generator=generator)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the last shard's logits [n, T, vocabulary] float32."""
        logits = self.model.get_submodule(self.layout.family.head)(hidden)
        assert isinstance(logits, Tensor)
        return logits.float()


def inputs_of(module: LinearModule, inputs: Tensor) -> Tensor:
    """Return the inputs a [num_tokens, C] float32 of a linear, with the bias's ones."""
    a = inputs.detach().flatten(0, -2).float()
    return a if module.bias is None else with_ones(a)


def watch_pairs(module: LinearModule, see: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
    """Call ``see(a, g)`` in the backward pass with the inputs [N, C] and output gradients [N, R] of a linear, float32.

    The inputs of micro-batches in flight are kept until then.
    """

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda g: see(inputs_of(module, inputs[0]), g.detach().flatten(0, -2).float()))  # type: ignore[no-untyped-call]

    return module.register_forward_hook(hook)


def add_inputs_to(group: SharedInput) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Return a forward pre-hook that sums A of linears with a shared input."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert group.A is not None
        a = inputs_of(group.modules[0], inputs[0])
        add_second_moment(group.A, a)
        group.num_tokens += len(a)

    return hook


def _add_output_gradients_to(G: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def add(gradient: Tensor) -> None:
        add_second_moment(G, gradient.detach().flatten(0, -2).float())

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(add)  # type: ignore[no-untyped-call]

    return hook
