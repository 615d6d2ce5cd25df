"""Finds the modules of a model whose type families.yaml lacks, on a tiny copy of it.

The feed-forward layers are found by building the copy with another width: linears whose outputs
become wider produce their channels, and those whose inputs become wider consume them. A pass then
shows that the channels are those of `FeedForward`, act(gate) * up or act(gate). `proof` proves the
result as it proves a described family. Nothing is known of attention, so it stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from ray_surgeon.errors import ConfigError
from ray_surgeon.models.attention import IN_PRODUCTS
from ray_surgeon.models.build import BUILDING, empty_model, matrix
from ray_surgeon.models.experts import Coupling
from ray_surgeon.models.families import FAMILIES, NO_ATTENTION, Family
from ray_surgeon.models.proof import PAGE, NotProvedError, prove_copy, random_weight
from ray_surgeon.models.tiny_models import (
    NoTinyCopyError,
    block_list,
    rebuilt,
    tiny_copy,
    width_fields,
)

_MORE = 8
"""Channels by which a width is changed to see which linears have it."""
_ACTIVATIONS = ("silu", "relu", "relu2", "gelu", "gelu_new", "gelu_pytorch_tanh")
"""Activations that are tried for models whose configuration names none; each is zero at zero."""

Linears = Mapping[str, nn.Linear | Conv1D]
"""Linears by their names in a block."""


class NotFoundError(ValueError):
    """The probing of a model ends; the message says what was not found."""


def probed_family(config: PretrainedConfig) -> Family:
    """Return the family of a model, found by probing a tiny copy, and proved on it.

    Args:
        config: configuration of a model that no entry of families.yaml describes.

    Raises:
        ConfigError: says what was found, and what was not.
    """
    found: list[str] = []
    try:
        _check_not_shared(config)  # a copy may have one of these blocks only
        return _probed(tiny_copy(config).config, found)
    except (NotFoundError, NoTinyCopyError, NotProvedError) as error:
        reason = str(error)
    except Exception as error:  # a family's code may raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
    known = ", ".join(sorted(FAMILIES))
    beside = "; found: " + ", ".join(found) if found else ""
    raise ConfigError(
        field="model.source",
        found=(
            f"the model type is {config.model_type!r}, which is not supported: probing a tiny "
            f"copy of it failed: {reason}{beside}"
        ),
        remedy=f"choose one of the known families ({known}), or describe it: {PAGE}",
    )


def _probed(tiny: PretrainedConfig, found: list[str]) -> Family:
    """Return the proved family of a tiny copy; what is found is added to `found`."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        with BUILDING:
            model: nn.Module = AutoModelForCausalLM.from_config(
                tiny,
                dtype=torch.float32,  # float64 would be the default of other threads
                attn_implementation=IN_PRODUCTS,
                experts_implementation="eager",  # the others take no float64
            )
        model = model.double().eval()
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(name, parameter.shape))
        list_name, blocks = block_list(model)
        found.append(f"{len(blocks)} blocks {list_name}")
        base, _, name_of_blocks = list_name.rpartition(".")
        tokens = torch.arange(1, 9)[None]
        before, after, tuple_size = _ends(model, base, blocks, tokens)
        width_field, coupling = _feed_forward(tiny, list_name)
        found.append(f"{coupling.consumer} after {' and '.join(coupling.producers)}")
        coupling, activation = _ordered(tiny, model, blocks, coupling, tokens)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    names = {module: name for name, module in model.named_modules()}
    embeddings = sorted(before, key=lambda name: before[name] is not embedding)
    family = Family(
        base=base,
        blocks=name_of_blocks,
        embeddings=tuple(embeddings),
        positions=tuple(
            name for name in embeddings[1:] if isinstance(before[name], nn.Embedding)
        ),
        final=tuple(after),
        head=names[head],
        attention=NO_ATTENTION,
        prunes_heads=False,
        ffn=coupling,
        width_field=width_field,
        transposed=isinstance(_linears(blocks).get(coupling.consumer), Conv1D),
        # nothing is known of what lies between a layer and the stream
        norms_outputs=True,
        activation=activation,
        tuple_size=tuple_size,
    )
    prove_copy(tiny, family, ("ffn",))
    return family


def _check_not_shared(config: PretrainedConfig) -> None:
    """Refuse blocks that share weights, which pruning would change for all of them.

    Raises:
        NotFoundError: names a weight and its other name.
    """
    model = empty_model(config)
    list_name, _ = block_list(model)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for name, other in tied.items():
        if name.startswith(f"{list_name}.") and other.startswith(f"{list_name}."):
            raise NotFoundError(f"its blocks share weights: {name} is {other}")


def _ends(
    model: nn.Module, base: str, blocks: nn.ModuleList, tokens: Tensor
) -> tuple[dict[str, nn.Module], list[str], int]:
    """Return the modules that run before the blocks and after them, and how blocks return.

    Returns:
        Name -> module of those with parameters that run before the first block, names of those that
        run after the last one, and the number of items in the tuple that a block returns (0 for a
        tensor).
    """
    order: list[str] = []
    sizes: list[int] = []
    children = dict(model.get_submodule(base).named_children())
    hooks = []
    for name, child in children.items():
        if child is not blocks:
            hooks.append(
                child.register_forward_hook(lambda *_, name=name: order.append(name))
            )
    for number, block in enumerate(blocks):

        def ran(
            module: nn.Module, inputs: Any, output: Any, number: int = number
        ) -> None:
            order.append(f"block {number}")
            sizes.append(len(output) if isinstance(output, tuple) else 0)

        hooks.append(block.register_forward_hook(ran))
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    ran_blocks = [name for name in order if name.startswith("block ")]
    if ran_blocks != [f"block {number}" for number in range(len(blocks))]:
        raise NotFoundError(
            f"a pass does not run through the blocks in order: {ran_blocks}"
        )
    if len(set(sizes)) != 1:
        raise NotFoundError("blocks return tuples of different lengths")
    first = order.index(ran_blocks[0])
    last = order.index(ran_blocks[-1])
    before = {}
    for name in order[:first]:
        if any(True for _ in children[name].parameters()):
            before[name] = children[name]
    return before, order[last + 1 :], sizes[0]


def _feed_forward(tiny: PretrainedConfig, list_name: str) -> tuple[str, Coupling]:
    """Return the field of the feed-forward width, and the linears that have it.

    Raises:
        NotFoundError: there is no such field, or it sets more than one pair of layers.
    """
    reasons = []
    for name in width_fields(tiny):
        document = tiny.to_dict()
        width = int(document[name])
        document[name] = width + _MORE
        try:
            return name, _coupling(tiny, rebuilt(tiny, document), list_name, width)
        except NotFoundError as error:
            reasons.append(f"{name}: {error}")
    if not reasons:
        raise NotFoundError("no field of config.json names a feed-forward width")
    raise NotFoundError("; ".join(reasons))


def _coupling(
    tiny: PretrainedConfig, wider: PretrainedConfig, list_name: str, width: int
) -> Coupling:
    """Return the linears of a block that are wider in a second configuration.

    Raises:
        NotFoundError: they are not the producers and the one consumer of a layer of this width.
    """
    couplings: dict[Coupling, None] = {}
    narrow_blocks = empty_model(tiny).get_submodule(list_name).children()
    wide_blocks = empty_model(wider).get_submodule(list_name).children()
    for block, wide in zip(narrow_blocks, wide_blocks, strict=True):
        consumers, producers = _grown(block, wide, width)
        if not consumers and not producers:
            continue
        numbers = set(producers.values())
        if len(consumers) != 1 or len(numbers) != 1 or sum(producers.values()) > 2:
            raise NotFoundError(
                f"{len(consumers)} linears read it, and {len(producers)} produce it"
            )
        couplings[Coupling(consumers[0], tuple(producers), numbers.pop())] = None
    if len(couplings) != 1:
        raise NotFoundError(f"blocks have {len(couplings)} kinds of layers of this width")
    return next(iter(couplings))


def _grown(
    block: nn.Module, wide: nn.Module, width: int
) -> tuple[list[str], dict[str, int]]:
    """Return the linears of a block whose inputs have a width, and those whose outputs have it.

    The latter with the number of times that they have it.

    Raises:
        NotFoundError: something else has other sizes in the block with the larger width.
    """
    consumers: list[str] = []
    producers: dict[str, int] = {}
    wide_modules: dict[str, Any] = dict(wide.named_modules())
    for name, module in block.named_modules():
        own = {key: p.shape for key, p in module.named_parameters(recurse=False)}
        others = wide_modules[name].named_parameters(recurse=False)
        if own == {key: p.shape for key, p in others}:
            continue
        if not isinstance(module, nn.Linear | Conv1D):
            raise NotFoundError(f"it also sets the width of {name}, which is no linear")
        rows, columns = matrix(module).shape
        sizes = (rows, columns, *matrix(wide_modules[name]).shape)
        parts = rows // width
        if sizes == (rows, width, rows, width + _MORE):
            consumers.append(name)
        elif sizes == (parts * width, columns, parts * (width + _MORE), columns):
            producers[name] = parts
        else:
            raise NotFoundError(f"{name}, {rows} x {columns}, does not have this width")
    return consumers, producers


def _linears(blocks: nn.ModuleList) -> Linears:
    linears: dict[str, nn.Linear | Conv1D] = {}
    for block in blocks:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                linears.setdefault(name, module)
    return linears


def _ordered(
    tiny: PretrainedConfig,
    model: nn.Module,
    blocks: nn.ModuleList,
    coupling: Coupling,
    tokens: Tensor,
) -> tuple[Coupling, str]:
    """Return the linears with the gate first, and the name of the activation.

    Raises:
        NotFoundError: the channels are neither act(gate) * up nor act(gate).
    """
    names = ("hidden_act", "hidden_activation", "activation_function")
    named = [str(getattr(tiny, name)) for name in names if getattr(tiny, name, None)]
    for block in blocks:
        modules = dict(block.named_modules())
        if coupling.consumer not in modules:
            continue
        values = _values(model, modules, coupling, tokens)
        *parts, channels = values
        for activation in named[:1] or _ACTIVATIONS:
            if activation not in ACT2FN:
                continue
            for gate in range(len(parts)):
                if not _is_product(parts, gate, channels, activation):
                    continue
                if gate == 0:
                    return coupling, activation
                if coupling.num_parts == 1:
                    producers = coupling.producers[::-1]
                    return Coupling(coupling.consumer, producers), activation
        break
    raise NotFoundError(
        f"the inputs of {coupling.consumer} are not act(gate) * up, or act(gate), with the "
        f"activation {named[0] if named else 'of any known name'}"
    )


def _values(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    coupling: Coupling,
    tokens: Tensor,
) -> list[Tensor]:
    """Return the outputs of the producers, part by part, and the inputs of the consumer."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for name in coupling.producers:

        def keep(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            seen[name] = output

        hooks.append(modules[name].register_forward_hook(keep))

    def keep_inputs(module: nn.Module, inputs: Any) -> None:
        seen[coupling.consumer] = inputs[0]

    hooks.append(modules[coupling.consumer].register_forward_pre_hook(keep_inputs))
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    values: list[Tensor] = []
    for name in coupling.producers:
        values.extend(seen[name].chunk(coupling.num_parts, dim=-1))
    return [*values, seen[coupling.consumer]]


def _is_product(
    parts: Sequence[Tensor], gate: int, channels: Tensor, activation: str
) -> bool:
    """Whether channels are act(gate) times the other part, to rounding of float32."""
    expected = ACT2FN[activation](parts[gate])
    for number, part in enumerate(parts):
        if number != gate:
            expected = expected * part
    if expected.shape != channels.shape:
        return False
    largest = float(expected.abs().max())
    return float((channels - expected).abs().max()) <= 1e-6 * largest
