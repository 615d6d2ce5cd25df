"""Build the blocks of a model without weights, and name what is in them.

Names differ here, in the whole model and in checkpoints.
"""

from __future__ import annotations

import copy
import inspect
import threading
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ray_surgeon.maths.products import times
from ray_surgeon.models.families import family_of

LinearModule: TypeAlias = nn.Linear | Conv1D
"""A linear as the method sees it: `nn.Linear` [R, C], or GPT-2's `Conv1D` [C, R]."""
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
    """Stands for a learned position embedding in shards whose hidden states already contain it."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Return a scalar zero, which adds nothing."""
        return torch.zeros(())


def cache_argument(module: nn.Module) -> str:
    """Return how the installed transformers calls the cache of keys and values.

    ``past_key_values``, and ``cache`` later.
    """
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """Return a parameter that has no memory in place of one, where `build_blocks` makes it.

    Buffers have theirs, because they are not in checkpoints.

    accelerate's `init_empty_weights` does that to all threads of the process, for good if two of
    them overlap.
    """
    if not getattr(_THREAD, "builds_blocks", False):
        return None
    empty = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    empty.__dict__.update(parameter.__dict__)
    return empty


register_module_parameter_registration_hook(_on_meta)  # type: ignore[arg-type]


def build_blocks(config: PretrainedConfig, blocks: BlockRange, dtype: torch.dtype) -> nn.Module:
    """Build the causal LM on the meta device and keep only what the given blocks need.

    The family's own forward stays in charge of masks and positions: it sees a shorter block list,
    and at a cut the modules of the missing end are replaced by ones that do nothing.
    """
    family = family_of(config)
    # transformers writes the dtype into it, and other shards have theirs
    config = copy.deepcopy(config)
    _THREAD.builds_blocks = True
    try:
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=family.runs_attention
        )
    finally:
        _THREAD.builds_blocks = False
    model.eval().requires_grad_(False)
    base = model.get_submodule(family.base)
    all_blocks = base.get_submodule(family.blocks)
    assert isinstance(all_blocks, nn.ModuleList)
    own_blocks = all_blocks[blocks.first : blocks.last]
    setattr(base, family.blocks, own_blocks)
    for block in own_blocks:
        family.sparse.split(block)
    # forward looks kinds of attention up by the place in the list it has
    if getattr(config, "layer_types", None):
        base.config = copy.copy(base.config)
        base.config.layer_types = config.layer_types[blocks.first : blocks.last]  # type: ignore[union-attr]
    missing = [] if blocks.is_first else [(base, name) for name in family.embeddings]
    if not blocks.is_last:
        missing += [(model, family.head), *((base, name) for name in family.final)]
    for owner, name in missing:
        if getattr(owner, name, None) is not None:
            setattr(owner, name, NoPositions() if name in family.positions else nn.Identity())
    return model


def as_linear(module: nn.Module) -> LinearModule:
    """Return a module that is a linear; a family that names another kind is wrong."""
    assert isinstance(module, nn.Linear | Conv1D), f"{type(module).__name__} is no linear"
    return module


def matrix(module: LinearModule) -> Tensor:
    """Return the weight as a view [R, inputs]; writing to it writes to the module."""
    weight: Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def cut(module: LinearModule, part: str, stored: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the ``weight`` or ``bias`` of a linear with its kept rows and columns.

    It is as it is stored; the rows [R] and input columns [C] are bool.
    """
    rows = rows.to(stored.device)
    columns = columns.to(stored.device)
    if part == "bias":
        return stored[rows]
    return stored[columns][:, rows] if isinstance(module, Conv1D) else stored[rows][:, columns]


def use_fast_products(module: LinearModule) -> None:
    """Let a linear make its products by `times`."""

    def forward(x: Tensor) -> Tensor:
        y = times(x, module.weight if isinstance(module, Conv1D) else module.weight.T)
        return y if module.bias is None else y + module.bias

    module.forward = forward  # type: ignore[method-assign]


def num_inputs(module: LinearModule) -> int:
    """Return C without the bias."""
    return int(matrix(module).shape[1])
