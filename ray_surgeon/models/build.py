"""Builds the blocks of a model without weights, and reads and cuts the linears in them."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ray_surgeon.maths.products import times
from ray_surgeon.models.families import Family

LinearModule: TypeAlias = nn.Linear | Conv1D
"""A linear as the method sees it: `nn.Linear` [R, C], or GPT-2's `Conv1D` [C, R]."""
BUILDING = threading.RLock()
"""Held while transformers builds or loads a model.

Until it has done so, it replaces functions and the default dtype of the whole process. If two
threads do this at once, the replacements stay.
"""
_THREAD = threading.local()


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
    """Replaces a learned position embedding in shards whose hidden states already contain it."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Return a scalar zero, which adds nothing."""
        return torch.zeros(())


def cache_argument(module: nn.Module) -> str:
    """Return the name of the argument of `module.forward` that takes the cache of keys and values.

    It is ``past_key_values`` in some releases of transformers, and ``cache`` in later ones.
    """
    if "cache" in inspect.signature(module.forward).parameters:
        return "cache"
    return "past_key_values"


def _on_meta(
    module: nn.Module,
    name: str,
    parameter: nn.Parameter,
) -> nn.Parameter | None:
    """Return a copy of a parameter without memory while `build_blocks` runs in this thread.

    Buffers keep their memory, because checkpoints do not have them.

    accelerate's `init_empty_weights` affects all threads of the process, permanently if two calls
    overlap.
    """
    if not getattr(_THREAD, "builds_blocks", False):
        return None
    empty = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    empty.__dict__.update(parameter.__dict__)
    # initial values on the meta device would take transformers most of the time
    empty._is_hf_initialized = True  # type: ignore[attr-defined]
    return empty


register_module_parameter_registration_hook(_on_meta)  # type: ignore[arg-type]


def empty_model(
    config: PretrainedConfig,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
) -> nn.Module:
    """Build the causal LM without memory for its parameters.

    Args:
        config: of the model; it is not changed.
        dtype: of the parameters.
        attention: the attention implementation; None for the model's own choice.
    """
    # transformers writes the dtype into it, and other shards have theirs
    config = copy.deepcopy(config)
    # meanwhile the dtype is the default of all threads, and nobody else expects float64
    built_as = torch.float32 if dtype == torch.float64 else dtype
    _THREAD.builds_blocks = True
    try:
        with BUILDING:
            model: nn.Module = AutoModelForCausalLM.from_config(
                config,
                dtype=built_as,
                attn_implementation=attention,
            )
    finally:
        _THREAD.builds_blocks = False
    if dtype != built_as:
        model = model.to(dtype)
    return model.eval().requires_grad_(False)


def build_blocks(
    config: PretrainedConfig,
    family: Family,
    blocks: BlockRange,
    dtype: torch.dtype,
) -> nn.Module:
    """Build the causal LM on the meta device and keep only what the given blocks need.

    The family's own forward stays in charge of masks and positions: it sees a shorter block list,
    and at a cut the modules of the missing end are replaced by ones that do nothing.
    """
    model = empty_model(config, dtype, family.runs_attention)

    base: Any = model.get_submodule(family.base)
    all_blocks = base.get_submodule(family.blocks)
    assert isinstance(all_blocks, nn.ModuleList)
    own_blocks = all_blocks[blocks.first : blocks.last]
    setattr(base, family.blocks, own_blocks)
    for block in own_blocks:
        family.sparse.split(block)

    # forward looks up the kind of attention of a block by its place in the shortened list
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        own_types = layer_types[blocks.first : blocks.last]
        base.config = _with_layer_types(base.config, own_types)

    if not blocks.is_first:
        _replace_modules(base, family.embeddings, positions=family.positions)
        if family.has_multipliers:
            # hidden states of earlier shards have been multiplied
            base.embedding_multiplier = 1.0
    if not blocks.is_last:
        _replace_modules(model, (family.head,))
        _replace_modules(base, family.final)
    return model


def _with_layer_types(config: Any, layer_types: list[str]) -> Any:
    """Return a copy of a configuration with other kinds of blocks.

    Some classes compute the kinds from the numbers of the blocks.
    """
    own = copy.copy(config)
    kind = type(config)
    name = kind.attribute_map.get("layer_types", "layer_types")
    if isinstance(getattr(kind, name, None), property):
        own.__class__ = type(kind.__name__, (kind,), {name: layer_types})
    else:
        own.layer_types = layer_types
    return own


def _replace_modules(
    owner: nn.Module, names: Iterable[str], positions: Collection[str] = ()
) -> None:
    """Replace children of a module, where they exist, by ones that do nothing."""
    for name in names:
        if getattr(owner, name, None) is None:
            continue
        if name in positions:
            setattr(owner, name, NoPositions())
        else:
            setattr(owner, name, nn.Identity())


def as_linear(module: nn.Module) -> LinearModule:
    """Return the module, which must be a linear."""
    assert isinstance(module, nn.Linear | Conv1D), f"{type(module).__name__} is no linear"
    return module


def matrix(module: LinearModule) -> Tensor:
    """Return the weight as a view [R, inputs]; writing to it writes to the module."""
    weight: Tensor = module.weight.detach()
    if isinstance(module, Conv1D):
        return weight.T
    return weight


def cut(
    module: LinearModule,
    part: str,
    stored: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    """Return the ``weight`` or ``bias`` of a linear with only its kept rows and columns.

    Args:
        module: the linear.
        part: ``weight`` or ``bias``.
        stored: the tensor, in the layout in which the module stores it; so is the result.
        rows: [R] bool, kept outputs.
        columns: [C] bool, kept inputs.
    """
    rows = rows.to(stored.device)
    columns = columns.to(stored.device)
    if part == "bias":
        return stored[rows]
    if isinstance(module, Conv1D):
        return stored[columns][:, rows]
    return stored[rows][:, columns]


def use_fast_products(module: LinearModule) -> None:
    """Make a linear compute its products with `times`."""

    def forward(x: Tensor) -> Tensor:
        weight: Tensor = module.weight
        if not isinstance(module, Conv1D):
            weight = weight.T
        y = times(x, weight)
        if module.bias is None:
            return y
        return y + module.bias

    module.forward = forward  # type: ignore[method-assign]


def num_inputs(module: LinearModule) -> int:
    """Return the number of inputs; a bias counts as none."""
    return int(matrix(module).shape[1])
