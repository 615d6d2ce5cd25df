"""Maps tensors of a model to tensors of checkpoints.

A tensor is stored under the family's own name, or inside a tensor with all experts of a layer.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ray_surgeon.errors import ConfigError
from ray_surgeon.maths.masks import Mask
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.experts import ExpertTensor
from ray_surgeon.models.families import Family
from ray_surgeon.models.layout import ModelLayout, Shapes

ReadStored = Callable[[str, int | None], Tensor]
"""(key, entry) -> a checkpoint's tensor, or one entry of its first dimension."""

Shape = tuple[int, ...]

_FP4 = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)
"""Values of the 16 four-bit codes (OCP Microscaling Formats 1.0, E2M1)."""


_ENTRIES_AT_A_TIME = 2**24


class BadWeightsError(ValueError):
    """A weight of the checkpoint is NaN or infinite, which is only found when it is read."""


def check_finite(name: str, value: Tensor) -> None:
    """Refuse a tensor with NaN or infinite entries.

    Raises:
        BadWeightsError: names the tensor.
    """
    # the check takes more than twice the memory of the entries that it checks
    count = value.numel()
    for part in torch.split(value.flatten(), _ENTRIES_AT_A_TIME):
        count -= int(torch.isfinite(part).count_nonzero())
    if count:
        raise BadWeightsError(
            f"model.source: {name} has {count} NaN or infinite weights; fetch it again"
        )


@dataclass(frozen=True)
class StoredTensor:
    """The part of a checkpoint that contains one tensor of a model."""

    keys: tuple[str, ...]  # one key, or those of MXFP4 blocks and scales
    part: ExpertTensor | None  # position in the stored tensor; None if it is stored alone

    def tensor(self, read: ReadStored) -> Tensor:
        """Return the tensor, contiguous by rows.

        Products with it are then bit-identical for every way in which it may be stored.
        """
        if self.part is None:
            return read(self.keys[0], None)
        if len(self.keys) == 2:
            blocks_key, scales_key = self.keys
            blocks = read(blocks_key, self.part.expert)
            scales = read(scales_key, self.part.expert)
            return from_mxfp4(blocks[self.part.every], scales[self.part.every])
        # [inputs, outputs], or [outputs] of a bias
        stored = read(self.keys[0], self.part.expert)
        return stored[..., self.part.every].t().contiguous()


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Convert MXFP4, four-bit numbers with shared exponents, to bfloat16, which is exact.

    Args:
        blocks: [..., n, 16] uint8, two numbers per byte, the first in the lower bits.
        scales: [..., n] uint8, exponents of two, plus 127.

    Returns:
        [..., 32 n] bfloat16.
    """
    numbers = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    values = torch.tensor(_FP4, dtype=torch.bfloat16, device=blocks.device)[numbers.int()]
    return (
        torch.ldexp(values, scales.int()[..., None] - 127).to(torch.bfloat16).flatten(-2)
    )


def find_stored(
    layout: ModelLayout,
    name: str,
    keys: Container[str],
) -> StoredTensor | None:
    """Find a parameter in a checkpoint.

    Some checkpoints leave out the leading ``model.`` or ``transformer.``, and tied heads are
    usually stored once.

    Args:
        layout: of the model.
        name: of the parameter, in the whole model.
        keys: of the checkpoint.

    Returns:
        The place of the parameter, or None if the checkpoint does not contain it.
    """
    part = layout.family.part_of_stack(name)
    if part is None:
        tied = layout.tied.get(name, name)
        stored_name = layout.family.stored_name
        candidates = [stored_name(name), stored_name(tied), name, tied]
    else:
        candidates = [part.whole]
    for candidate in candidates.copy():
        candidates.append(candidate.removeprefix("model.").removeprefix("transformer."))
    for candidate in candidates:
        if candidate in keys:
            return StoredTensor((candidate,), part)
        # MXFP4: two numbers per byte, and one exponent for 32 numbers
        blocks_key = f"{candidate}_blocks"
        scales_key = f"{candidate}_scales"
        if part is not None and blocks_key in keys and scales_key in keys:
            return StoredTensor((blocks_key, scales_key), part)
    return None


def parameters_in(family: Family, key: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    """Yield names and shapes of the parameters in a checkpoint's tensor.

    This is the inverse of `find_stored`.
    """
    sparse = family.sparse
    layer, inside, leaf = key.partition(f".{sparse.experts}.")
    if not (inside and sparse.stacked):
        yield family.name_of_stored(key), shape
        return
    linears = sparse.linears.producers
    if leaf.startswith(sparse.linears.consumer):
        linears = (sparse.linears.consumer,)
    kind = "weight"
    if leaf.endswith("_bias"):
        kind = "bias"
    num_experts, *columns, rows = shape
    for linear, expert in itertools.product(linears, range(num_experts)):
        yield f"{layer}{inside}{expert}.{linear}.{kind}", (rows // len(linears), *columns)


def tensor_reader(
    layout: ModelLayout, keys: Container[str], read: ReadStored, where: str
) -> Callable[[str], Tensor]:
    """Return a function that reads a parameter by its name in the whole model.

    Args:
        layout: of the model.
        keys: of the checkpoint.
        read: reads a tensor of the checkpoint.
        where: the checkpoint, for the ValueError if it does not contain the parameter.
    """

    def read_parameter(name: str) -> Tensor:
        stored = find_stored(layout, name, keys)
        if stored is None:
            raise ValueError(f"model.source: {where} has no tensor {name}")
        return stored.tensor(read)

    return read_parameter


def read_state(state: Mapping[str, Tensor]) -> ReadStored:
    """Return a function that reads the ``state_dict`` of a model in memory as a checkpoint."""

    def read(key: str, entry: int | None) -> Tensor:
        if entry is None:
            return state[key]
        return state[key][entry]

    return read


def read_shapes(shapes: Shapes) -> ReadStored:
    """Return a function that reads tensors on the meta device, given the shape of every key."""

    def read(key: str, entry: int | None) -> Tensor:
        shape = shapes[key]
        if entry is not None:
            shape = shape[1:]
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    return read


def reader_of(layout: ModelLayout, model: nn.Module) -> Callable[[str], Tensor]:
    """Return a function that reads a parameter of a model in memory by its name.

    Raises:
        ValueError: tied weights differ.
    """
    state = model.state_dict()
    check_tied(layout, state, read_state(state), "the model")
    read_stored = tensor_reader(layout, state, read_state(state), "the model")
    sparse = layout.family.sparse

    def read(name: str) -> Tensor:
        if not sparse.stacked:
            part = sparse.tensor_of(name)
            if part is not None:
                return part.in_memory(state)
        return read_stored(name)

    return read


def check_checkpoint(layout: ModelLayout, shapes: Shapes, where: str) -> None:
    """Check that a checkpoint has the tensors that the configuration needs, without reading them.

    Args:
        layout: of the model.
        shapes: key -> shape of every tensor in the checkpoint.
        where: the checkpoint, for the error.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    read = read_shapes(shapes)
    # kind of problem -> tensors that have it
    problems = defaultdict[str, list[str]](list)
    for name, shape in layout.parameters.items():
        stored = find_stored(layout, name, shapes)
        if stored is None:
            problems["missing"].append(name)
            continue
        key = stored.keys[0]
        present = str(tuple(stored.tensor(read).shape))
        expected = str(shape)
        if stored.part is not None:
            present = f"{shapes[key][0]} times {present}"
            expected = f"{layout.num_experts} times {expected}"
        if present != expected:
            problem = f"{key} is {present}, expected {expected}"
            problems["of another shape"].append(problem)
    if not problems:
        return
    details = list[str]()
    for kind, tensors in problems.items():
        details.append(f"{len(tensors)} {kind} ({', '.join(tensors[:3])})")
    raise ValueError(
        f"model.source: {where} does not fit its config.json: {'; '.join(details)}. "
        f"Give a complete checkpoint"
    )


def check_tied(
    layout: ModelLayout,
    keys: Container[str],
    read: ReadStored,
    where: str,
) -> None:
    """Refuse a model with a tied head whose head differs from the embedding.

    Some programs would read the head, others the embedding.

    Args:
        layout: of the model.
        keys: of the checkpoint.
        read: reads a tensor of the checkpoint; three rows of each matrix are compared.
        where: the checkpoint, for the error.

    Raises:
        ValueError: says what to change.
    """
    for head, embedding in layout.tied.items():
        stored_head = find_stored(layout, head, keys)
        stored_embedding = find_stored(layout, embedding, keys)
        assert stored_head is not None, head
        assert stored_embedding is not None, embedding
        head_key = stored_head.keys[0]
        embedding_key = stored_embedding.keys[0]
        if head_key == embedding_key:
            continue
        num_rows = layout.parameters[embedding][0]
        for row in (0, num_rows // 2, num_rows - 1):
            head_row = read(head_key, row).float().nan_to_num()
            embedding_row = read(embedding_key, row).float().nan_to_num()
            if not torch.equal(head_row, embedding_row):
                raise ConfigError(
                    field="model.source",
                    found=(
                        f"config.json of {where} ties the head to the embedding, but "
                        f"{head_key} is not {embedding_key}"
                    ),
                    remedy=f"set tie_word_embeddings to false, or remove {head_key}",
                )


class Stored:
    """Names and tensors of a pruned model as a checkpoint stores them.

    Removed experts are left out, and some families stack the others in one tensor.
    """

    def __init__(
        self,
        layout: ModelLayout,
        blocks: BlockRange,
        masks: Mapping[str, Mask],
        *,
        stored: bool,
    ) -> None:
        """Find the remaining experts.

        Args:
            layout: of the model.
            blocks: whose tensors are stored.
            masks: of the blocks' linears; if empty, no expert is removed.
            stored: whether names and stacks are those of the family's own checkpoints, or those of
                the model here.
        """
        self._layout = layout
        self._stored = stored
        # name of a layer's experts -> which of them are left, [num_experts] bool
        self._is_left = dict[str, Tensor]()
        # name of a router -> which of its entries are left, [num_experts] bool
        self.entries = dict[str, Tensor]()
        for experts in layout.expert_sets:
            if masks and experts.block in blocks:
                is_left = ~experts.removed(masks)
                prefix = layout.family.block_prefix(experts.block)
                self._is_left[experts.name] = is_left
                self.entries[prefix + layout.family.sparse.router] = is_left
        # the stacked tensor that is being filled, by its name
        self._stack = dict[str, Tensor]()

    def _part(self, name: str) -> ExpertTensor | None:
        if not self._stored:
            return None
        return self._layout.family.part_of_stack(name)

    def _place(self, experts: str, number: int) -> int:
        """Return the number of an expert among the remaining ones."""
        if experts not in self._is_left:
            return number
        return int(self._is_left[experts][:number].sum())

    def name(self, name: str) -> str:
        """Return the stored name of a tensor."""
        stacked = self._part(name)
        if stacked is not None:
            return stacked.whole
        part = self._layout.family.sparse.tensor_of(name)
        if part is not None:
            number = self._place(part.experts, part.expert)
            name = f"{part.experts}.{number}.{part.linear}.{part.kind}"
        if not self._stored:
            return name
        return self._layout.family.stored_name(name)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor to store under `name(name)`.

        A stacked tensor contains all of its parts that were passed so far. It is
        [num_experts, inputs, outputs], or [num_experts, outputs] for a bias.

        Args:
            name: of a tensor in the model here.
            tensor: a linear's weight [R, C] or bias [R], or any other.
        """
        part = self._part(name)
        if part is None or not tensor.numel():
            return tensor
        if part.whole not in self._stack:
            num_left = self._place(part.experts, self._layout.num_experts)
            num_outputs = len(tensor) * (part.every.step or 1)
            stack = tensor.new_empty(num_left, *tensor.shape[1:], num_outputs)
            self._stack = {part.whole: stack}
        stack = self._stack[part.whole]
        stack[self._place(part.experts, part.expert), ..., part.every] = tensor.t()
        return stack
