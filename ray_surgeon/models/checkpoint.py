"""Where a checkpoint has each tensor of a model.

That is under the family's own name, or inside of a tensor with all experts of a layer.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ray_surgeon.maths.masks import Mask
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.experts import ExpertTensor
from ray_surgeon.models.families import Family
from ray_surgeon.models.layout import ModelLayout, Shapes

ReadStored = Callable[[str, int | None], Tensor]
"""(key, entry) -> a checkpoint's tensor, or only an entry of its first dimension."""

Shape = tuple[int, ...]

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What four bits stand for (OCP Microscaling Formats 1.0, E2M1)."""


_ENTRIES_AT_A_TIME = 2**24


class BadWeightsError(ValueError):
    """A weight of the checkpoint is NaN or infinite, which is only known once it is read."""


def check_finite(name: str, value: Tensor) -> None:
    """Refuse a tensor with entries that are no numbers.

    Raises:
        BadWeightsError: names the tensor.
    """
    # the test takes more than twice the bytes of what is tested
    parts = torch.split(value.flatten(), _ENTRIES_AT_A_TIME)
    count = value.numel() - sum(int(torch.isfinite(part).count_nonzero()) for part in parts)
    if count:
        problem = f"{name} has {count} NaN or infinite weights"
        raise BadWeightsError(f"model.source: {problem}; fetch it again")


@dataclass(frozen=True)
class StoredTensor:
    """What a checkpoint has of a tensor."""

    keys: tuple[str, ...]  # one; or blocks and scales
    part: ExpertTensor | None  # None if the tensor is the stored one

    def tensor(self, read: ReadStored) -> Tensor:
        """Return the tensor by rows.

        So products with it have the same bits however it was stored.
        """
        if self.part is None:
            return read(self.keys[0], None)
        entries = [read(key, self.part.expert) for key in self.keys]
        if len(entries) == 2:
            return from_mxfp4(*(entry[self.part.every] for entry in entries))
        # of [inputs, outputs], or [outputs] of a bias
        return entries[0][..., self.part.every].t().contiguous()


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return numbers of four bits with shared exponents as bfloat16, which holds them exactly.

    Args:
        blocks: [..., n, 16] uint8, each two numbers, the first in the lower bits.
        scales: [..., n] uint8, exponents of two, plus 127.

    Returns:
        [..., 32 n].
    """
    numbers = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    values = torch.tensor(_FP4, dtype=torch.bfloat16, device=blocks.device)[numbers.int()]
    return torch.ldexp(values, scales.int()[..., None] - 127).to(torch.bfloat16).flatten(-2)


def find_stored(layout: ModelLayout, name: str, keys: Container[str]) -> StoredTensor | None:
    """Return where a checkpoint has a parameter, or None.

    Some checkpoints leave out the leading ``model.`` or ``transformer.``, and tied heads are
    usually stored once.

    Args:
        layout: of the model.
        name: of the parameter, in the whole model.
        keys: of the checkpoint.
    """
    part = layout.family.part_of_stack(name)
    candidates = [name, layout.tied.get(name, name)]  # as a model in memory has them
    candidates = [*map(layout.family.stored_name, candidates), *candidates]
    if part is not None:
        candidates = [part.whole]
    candidates += [c.removeprefix("model.").removeprefix("transformer.") for c in candidates]
    for candidate in candidates:
        if candidate in keys:
            return StoredTensor((candidate,), part)
        # of MXFP4: numbers of four bits, two a byte, and the exponents of 32 at a time
        packed = (f"{candidate}_blocks", f"{candidate}_scales")
        if part is not None and all(key in keys for key in packed):
            return StoredTensor(packed, part)
    return None


def parameters_in(family: Family, key: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    """Yield a checkpoint's tensor's parameters and shapes; `find_stored` is the way back."""
    sparse = family.sparse
    layer, inside, leaf = key.partition(f".{sparse.experts}.")
    if not (inside and sparse.stacked):
        yield family.name_of_stored(key), shape
        return
    consumer = sparse.linears.consumer
    linears = (consumer,) if leaf.startswith(consumer) else sparse.linears.producers
    kind = "bias" if leaf.endswith("_bias") else "weight"
    num_experts, *columns, rows = shape
    for linear, expert in itertools.product(linears, range(num_experts)):
        yield f"{layer}{inside}{expert}.{linear}.{kind}", (rows // len(linears), *columns)


def tensor_reader(
    layout: ModelLayout, keys: Container[str], read: ReadStored, where: str
) -> Callable[[str], Tensor]:
    """Return what reads a parameter by its name in the whole model.

    Args:
        layout: of the model.
        keys: of the checkpoint.
        read: one of its tensors.
        where: the checkpoint, for the ValueError if it has no such parameter.
    """

    def read_parameter(name: str) -> Tensor:
        stored = find_stored(layout, name, keys)
        if stored is None:
            raise ValueError(f"model.source: {where} has no tensor {name}")
        return stored.tensor(read)

    return read_parameter


def read_state(state: Mapping[str, Tensor]) -> ReadStored:
    """Return what reads the ``state_dict`` of a model in memory as a checkpoint."""
    return lambda key, entry: state[key] if entry is None else state[key][entry]


def read_shapes(shapes: Shapes) -> ReadStored:
    """Return what reads tensors without entries, of the shapes of a checkpoint's keys."""

    def read(key: str, entry: int | None) -> Tensor:
        shape = shapes[key] if entry is None else shapes[key][1:]
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    return read


def reader_of(layout: ModelLayout, model: nn.Module) -> Callable[[str], Tensor]:
    """Return what reads a parameter of a model in memory by its name in checkpoints.

    Raises:
        ValueError: weights that the family ties differ.
    """
    state = model.state_dict()
    check_tied(layout, state, read_state(state), "the model")
    read_stored = tensor_reader(layout, state, read_state(state), "the model")
    sparse = layout.family.sparse

    def read(name: str) -> Tensor:
        part = None if sparse.stacked else sparse.tensor_of(name)
        return read_stored(name) if part is None else part.in_memory(state)

    return read


def check_checkpoint(layout: ModelLayout, shapes: Shapes, where: str) -> None:
    """Compare a checkpoint's tensors with what the configuration needs, before anything is loaded.

    Args:
        layout: of the model.
        shapes: key -> shape of every tensor in the checkpoint.
        where: the checkpoint, for the error.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    read = read_shapes(shapes)
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
            problems["of another shape"].append(f"{key} is {present}, expected {expected}")
    if problems:
        details = [f"{len(p)} {what} ({', '.join(p[:3])})" for what, p in problems.items()]
        problem = f"{where} does not fit its config.json: {'; '.join(details)}"
        raise ValueError(f"model.source: {problem}. Give a complete checkpoint")


def check_tied(layout: ModelLayout, keys: Container[str], read: ReadStored, where: str) -> None:
    """Refuse a model with a tied head whose head differs from the embedding.

    Programs take one or the other.

    Args:
        layout: of the model.
        keys: of the checkpoint.
        read: one of its tensors; three rows of each tell two matrices apart.
        where: the checkpoint, for the error.

    Raises:
        ValueError: says what to change.
    """
    for head, embedding in layout.tied.items():
        stored = [find_stored(layout, name, keys) for name in (head, embedding)]
        key, tied_to = (tensor.keys[0] for tensor in stored if tensor is not None)
        num_rows = layout.parameters[embedding][0]
        for row in (0, num_rows // 2, num_rows - 1) if key != tied_to else ():
            of_head, of_embedding = (read(k, row).float().nan_to_num() for k in (key, tied_to))
            if not torch.equal(of_head, of_embedding):
                problem = f"{where} ties the head to the embedding, but {key} is not {tied_to}"
                remedy = f"set tie_word_embeddings to false, or remove {key}"
                raise ValueError(f"model.source: config.json of {problem}; {remedy}")


class Stored:
    """What a checkpoint calls tensors, without removed experts, and which it keeps together."""

    def __init__(
        self, layout: ModelLayout, blocks: BlockRange, masks: Mapping[str, Mask], *, stored: bool
    ) -> None:
        """Look up which experts are left, by the masks of the blocks' linears, if there are any.

        `stored` is whether tensors are as in the family's own checkpoints, or as they are here.
        """
        self._layout = layout
        self._stored = stored
        sets = [e for e in layout.expert_sets if masks and e.block in blocks]
        self._left = {experts.name: ~experts.removed(masks) for experts in sets}
        router = layout.family.sparse.router
        prefix = layout.family.block_prefix
        # name of a router -> which of its entries are left
        self.entries = {prefix(e.block) + router: self._left[e.name] for e in sets}
        # by its name, the tensor of all experts that is being put together
        self._stack = dict[str, Tensor]()

    def _part(self, name: str) -> ExpertTensor | None:
        return self._layout.family.part_of_stack(name) if self._stored else None

    def _place(self, experts: str, number: int) -> int:
        """Return the number of an expert among those that are left."""
        return int(self._left[experts][:number].sum()) if experts in self._left else number

    def name(self, name: str) -> str:
        """Return what a tensor is called."""
        if (whole := self._part(name)) is not None:
            return whole.whole
        if (part := self._layout.family.sparse.tensor_of(name)) is not None:
            number = self._place(part.experts, part.expert)
            name = f"{part.experts}.{number}.{part.linear}.{part.kind}"
        return self._layout.family.stored_name(name) if self._stored else name

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor of `name(name)`, with all parts that were given before filled in.

        Of experts that checkpoints keep together it is [num_experts, inputs, outputs], of a bias
        [num_experts, outputs].

        Args:
            name: of a tensor here.
            tensor: a linear's weight [R, C] or bias [R], or any other.
        """
        part = self._part(name)
        if part is None or not tensor.numel():
            return tensor
        if part.whole not in self._stack:
            num_left = self._place(part.experts, self._layout.num_experts)
            num_outputs = len(tensor) * (part.every.step or 1)
            self._stack = {part.whole: tensor.new_empty(num_left, *tensor.shape[1:], num_outputs)}
        stack = self._stack[part.whole]
        stack[self._place(part.experts, part.expert), ..., part.every] = tensor.t()
        return stack
