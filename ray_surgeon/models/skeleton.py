"""The model without its weights: built on the meta device, cut to a range of blocks, measured, and checked against a checkpoint."""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ray_surgeon.models.adapters import Adapter, adapter_for
from ray_surgeon.models.linears import as_linear, num_inputs, num_outputs


class NoPositions(nn.Module):
    """Stands for a learned position embedding in shards whose hidden states already contain it."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Return a scalar zero, which adds nothing."""
        return torch.zeros(())


@dataclass(frozen=True)
class BlockRange:
    """Blocks `first` to `last` (exclusive) of `num_blocks`."""

    first: int
    last: int
    num_blocks: int

    @property
    def is_first(self) -> bool:
        """Whether this range starts with the embedding."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Whether this range ends with the norm, the head and the loss."""
        return self.last == self.num_blocks


def num_blocks_of(config: PretrainedConfig) -> int:
    """Return the number of decoder blocks."""
    return int(config.num_hidden_layers)


def build_skeleton(config: PretrainedConfig, blocks: BlockRange, dtype: torch.dtype) -> nn.Module:
    """Build the causal LM on the meta device and keep only what the given blocks need.

    The family's own forward stays in charge of masks and positions: it sees a shorter block list, and at a cut the modules
    of the missing end are replaced by ones that do nothing.
    """
    adapter = adapter_for(config)
    with init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    base = model.get_submodule(adapter.base)
    all_blocks = base.get_submodule(adapter.blocks)
    assert isinstance(all_blocks, nn.ModuleList)
    setattr(base, adapter.blocks, nn.ModuleList(list(all_blocks)[blocks.first : blocks.last]))
    if getattr(config, "layer_types", None):  # forward looks kinds of attention up by the place in the list it has
        base.config = copy.copy(config)
        base.config.layer_types = config.layer_types[blocks.first : blocks.last]  # type: ignore[union-attr]
    if not blocks.is_first:
        for name in adapter.embeddings:
            if getattr(base, name, None) is not None:
                setattr(base, name, NoPositions() if name in adapter.positions else nn.Identity())
    if not blocks.is_last:
        for name in (*adapter.final, adapter.head.rpartition(".")[2]):
            owner = model if name == adapter.head else base
            if getattr(owner, name, None) is not None:
                setattr(owner, name, nn.Identity())
    return model


def check_buildable(config: PretrainedConfig, where: str) -> None:
    """Refuse a configuration of which transformers cannot build a model.

    Raises:
        ValueError: whatever its code raised, and where the configuration is.
    """
    n = num_blocks_of(config)
    try:
        build_skeleton(config, BlockRange(0, n, n), torch.float32)
    except Exception as error:  # the code of any family may raise anything
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model.source: config.json of {where} describes no model that can be built: {reason}; fetch it again") from error


def global_name(adapter: Adapter, local: str, first_block: int) -> str:
    """Return the name in the whole model of a parameter or module of a shard."""
    prefix = f"{adapter.base}.{adapter.blocks}."
    if not local.startswith(prefix):
        return local
    index, dot, rest = local.removeprefix(prefix).partition(".")
    return f"{prefix}{int(index) + first_block}{dot}{rest}"


def parameter_shapes(config: PretrainedConfig, blocks: BlockRange) -> dict[str, tuple[int, ...]]:
    """Return global name -> shape of every parameter and saved buffer of a range of blocks, tied ones once."""
    adapter = adapter_for(config)
    model = build_skeleton(config, blocks, torch.float32)
    tensors = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    tied = tied_names(config, adapter) if blocks.is_first else {}
    return {global_name(adapter, name, blocks.first): tuple(t.shape) for name, t in tensors.items() if name not in tied}


def checkpoint_key(name: str, keys: Container[str], tied: Mapping[str, str]) -> str | None:
    """Return the key under which a checkpoint stores a parameter, or None.

    Some checkpoints leave out the leading ``model.`` or ``transformer.``, and tied heads are usually stored once.
    """
    candidates = [name, tied.get(name, name)]
    candidates += [c.removeprefix("model.").removeprefix("transformer.") for c in candidates]
    return next((c for c in candidates if c in keys), None)


def tied_names(config: PretrainedConfig, adapter: Adapter) -> dict[str, str]:
    """Return {head weight: embedding weight} when the configuration ties them."""
    if not getattr(config, "tie_word_embeddings", False):
        return {}
    return {f"{adapter.head}.weight": f"{adapter.token_embedding}.weight"}


def check_checkpoint(config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare a checkpoint's tensors with what the configuration needs, before anything is loaded.

    Args:
        config: the model's configuration.
        shapes: key -> shape of every tensor in the checkpoint.
        where: the checkpoint, for the error.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    adapter, n = adapter_for(config), num_blocks_of(config)
    tied = tied_names(config, adapter)
    missing, wrong = [], []
    for name, shape in parameter_shapes(config, BlockRange(0, n, n)).items():
        key = checkpoint_key(name, shapes, tied)
        if key is None:
            missing.append(name)
        elif shapes[key] != shape:
            wrong.append(f"{key} is {shapes[key]}, expected {shape}")
    if missing or wrong:
        details = [f"{len(missing)} missing ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})"] if missing else []
        details += [f"{len(wrong)} of another shape ({'; '.join(wrong[:3])})"] if wrong else []
        raise ValueError(f"model.source: {where} does not fit its config.json: {'; '.join(details)}. Give a complete checkpoint")


@dataclass(frozen=True)
class LinearShape:
    """Shape of one linear as the method sees it: [num_rows, num_columns], the bias being the last column.

    `site` numbers the input sites of the model; linears of one site read the same input.
    """

    name: str
    num_rows: int
    num_columns: int
    has_bias: bool
    block: int
    site: int


def linear_shapes(config: PretrainedConfig) -> list[LinearShape]:
    """Return every prunable linear of the model in order."""
    adapter, n = adapter_for(config), num_blocks_of(config)
    model = build_skeleton(config, BlockRange(0, n, n), torch.float32)
    shapes = []
    for block in range(n):
        for site_index, site in enumerate(adapter.sites):
            for linear in site:
                name = adapter.block_prefix(block) + linear
                module = as_linear(model.get_submodule(name))
                bias = module.bias is not None
                site_id = block * len(adapter.sites) + site_index
                shapes.append(LinearShape(name, num_outputs(module), num_inputs(module) + bias, bias, block, site_id))
    return shapes


def num_parameters(config: PretrainedConfig) -> int:
    """Return the parameters of the whole model, tied ones once."""
    n = num_blocks_of(config)
    return sum(math.prod(shape) for shape in parameter_shapes(config, BlockRange(0, n, n)).values())
