"""Build the blocks of a model without weights, and name what is in them.

Names differ here, in the whole model and in checkpoints.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ray_surgeon.models.families import Family, family_of

_MAKES_EMPTY = threading.Lock()


@dataclass(frozen=True)
class BlockRange:
    """Blocks `first` to `last` (exclusive) of `num_blocks`."""

    first: int
    last: int
    num_blocks: int

    def __contains__(self, block: int) -> bool:
        return self.first <= block < self.last

    @property
    def is_first(self) -> bool:
        """Whether this range starts with the embedding."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Whether this range ends with the norm, the head and the loss."""
        return self.last == self.num_blocks


class NoPositions(nn.Module):
    """Stands for a learned position embedding in shards whose hidden states already contain it."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Return a scalar zero, which adds nothing."""
        return torch.zeros(())


def cache_argument(module: nn.Module) -> str:
    """Return how the installed transformers calls the cache of keys and values.

    ``past_key_values``, and ``cache`` later.
    """
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def shared_inputs_of(family: Family, block: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of the linears of a block, grouped by shared input.

    Those of layers that a mixture runs come after the others.
    """
    modules = dict(block.named_modules())
    groups = list(family.shared_inputs)
    if family.sparse is not None:
        linears = family.sparse.linears
        for layer in family.sparse.layers_in(modules):
            groups.append(tuple(f"{layer}.{name}" for name in linears.producers))
            groups.append((f"{layer}.{linears.consumer}",))
    # a bias is one more input, so linears with a bias and linears without have no A in common
    parts = dict[tuple[int, bool], list[str]]()
    for number, group in enumerate(groups):
        for name in group:
            if name in modules:
                has_bias = getattr(modules[name], "bias", None) is not None
                parts.setdefault((number, has_bias), []).append(name)
    return [tuple(names) for names in parts.values()]


def stored_name(family: Family, name: str) -> str:
    """Return what checkpoints call a tensor."""
    if family.stored and family.sparse is not None and f".{family.sparse.layer}." in name:
        for name_in_model, name_in_files in family.stored:
            name = name.replace(name_in_model, name_in_files)
    return name


@contextlib.contextmanager
def weights_on_meta() -> Iterator[None]:
    """Let parameters that this thread makes have no memory.

    Buffers have theirs, because they are not in checkpoints.

    accelerate's `init_empty_weights` does that to all threads of the process, for good if two of
    them overlap.
    """
    with _MAKES_EMPTY:
        register = nn.Module.register_parameter
        thread = threading.get_ident()
        is_open = True

        def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            register(module, name, parameter)
            if is_open and parameter is not None and threading.get_ident() == thread:
                empty = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
                empty.__dict__.update(parameter.__dict__)
                module._parameters[name] = empty

        nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            is_open = False  # whoever has kept it meanwhile has what was there before
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_blocks(config: PretrainedConfig, blocks: BlockRange, dtype: torch.dtype) -> nn.Module:
    """Build the causal LM on the meta device and keep only what the given blocks need.

    The family's own forward stays in charge of masks and positions: it sees a shorter block list,
    and at a cut the modules of the missing end are replaced by ones that do nothing.
    """
    family = family_of(config)
    # transformers writes the dtype into it, and other shards have theirs
    config = copy.deepcopy(config)
    with weights_on_meta():
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=family.runs_attention
        )
    model.eval().requires_grad_(False)
    base = model.get_submodule(family.base)
    all_blocks = base.get_submodule(family.blocks)
    assert isinstance(all_blocks, nn.ModuleList)
    own_blocks = all_blocks[blocks.first : blocks.last]
    setattr(base, family.blocks, own_blocks)
    if family.sparse is not None:
        for block in own_blocks:
            family.sparse.split(block)
    # forward looks kinds of attention up by the place in the list it has
    if getattr(config, "layer_types", None):
        base.config = copy.copy(base.config)
        base.config.layer_types = config.layer_types[blocks.first : blocks.last]  # type: ignore[union-attr]
    if not blocks.is_first:
        for name in family.embeddings:
            if getattr(base, name, None) is not None:
                setattr(base, name, NoPositions() if name in family.positions else nn.Identity())
    if not blocks.is_last:
        for name in (*family.final, family.head.rpartition(".")[2]):
            owner = model if name == family.head else base
            if getattr(owner, name, None) is not None:
                setattr(owner, name, nn.Identity())
    return model
