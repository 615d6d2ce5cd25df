"""Keeps the last hidden states of the dense model on the workers with the last shard.

Later weights are compared with these states. The head is never pruned, so the distributions of the
next tokens follow from the states, a slice of tokens at a time. A teacher that is another model has
its own head, which is kept with the states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ray_surgeon.distributed.collectives import TensorPayload, decode
from ray_surgeon.distributed.weights import ModelRecipe, new_scratch, reader_of
from ray_surgeon.distributed.worker import DenseStates, Teacher, Worker
from ray_surgeon.memory.stores import Place, ReadAhead
from ray_surgeon.memory.transfers import transfers
from ray_surgeon.models.loss import Dense
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.storage import tensor_files

CALIBRATION = "(calibration)"
ANSWERS = "(answers)"
STREAM = "(stream)"
"""Names of texts that have states: the calibration, the dense model's answers, and the next part
of the text that a teacher reads during the training.

No evaluation text can have these names.
"""
_HEAD = "head"
"""Name of the teacher's head in the file of all states."""


def keep_states(
    worker: Worker, text: str, numbers: list[int], states: Sequence[Tensor]
) -> None:
    """Keep the states [1, T, d] of some sequences of a text.

    States are rounded to bfloat16, except those of answers, because rounding would lower the
    acceptance of a float32 model by some thousandths.
    """
    of_text = worker.state.dense_states.setdefault(text, {})
    for number, row in zip(numbers, states, strict=True):
        dtype = row.dtype if text == ANSWERS else torch.bfloat16
        of_text[number] = torch.empty(row.shape, dtype=dtype)
        transfers(row.device).land(row, of_text[number])


def forget_states(worker: Worker, text: str) -> None:
    """Free the states of a text."""
    worker.state.dense_states.pop(text, None)


def dense_states(worker: Worker) -> DenseStates:
    """Wait for all transfers, and return the states of all texts."""
    transfers(worker.device).settle()
    return worker.state.dense_states


def dense_state(worker: Worker, text: str, number: int) -> Dense:
    """Return the states [1, T, d] of a sequence on the device, and the dense model's own head."""
    states = dense_states(worker)
    return transfers(worker.device).staged(states[text][number]), states.head


def receive_states(
    worker: Worker,
    text: str,
    numbers: list[int],
    states: TensorPayload,
) -> None:
    """Keep the states [m, T, d] that another worker sent."""
    received = decode(states, torch.device("cpu"))
    keep_states(worker, text, numbers, torch.split(received, 1))


def kept_states(worker: Worker, text: str, numbers: list[int]) -> TensorPayload:
    """Return the states [m, T, d] of some sequences of a text."""
    of_text = dense_states(worker)[text]
    return worker.pack(torch.cat([of_text[number] for number in numbers]))


def write_states(worker: Worker, uri: str) -> None:
    """Write the states of all texts except the stream into one file, for a resumed run."""
    if not worker.shard.blocks.is_last or worker.index.replica > 0:
        return
    dense = dense_states(worker)
    tensors: dict[str, Tensor] = {}
    for text, states in dense.items():
        if text == STREAM:
            continue
        for number, tensor in states.items():
            tensors[f"{number} {text}"] = tensor
    if dense.head is not None:
        tensors[_HEAD] = dense.head
    tensor_files.write(uri, tensors)


def read_states(worker: Worker, uri: str) -> None:
    """Read the file that `write_states` wrote."""
    if not worker.shard.blocks.is_last:
        return
    reader = tensor_files.Reader()
    # one tensor at a time, because memory is not planned for two copies of all
    for name in reader.names(uri):
        tensor = reader.read(uri, name)
        if name == _HEAD:
            worker.state.dense_states.head = tensor.to(worker.device)
            continue
        number, _, text = name.partition(" ")
        keep_states(worker, text, [int(number)], [tensor])


def load_teacher(worker: Worker, recipe: ModelRecipe, place: Place) -> None:
    """Load the worker's blocks of the teacher beside the worker's own weights.

    Args:
        worker: has loaded its own weights.
        recipe: where the teacher's weights are.
        place: where the teacher's idle weights are kept.
    """
    scratch = new_scratch(worker, recipe.scratch, suffix="-teacher")
    layout, blocks = recipe.part(worker)
    shard = ModelShard(
        layout=layout,
        blocks=blocks,
        dtype=getattr(torch, recipe.model.dtype),
        device=worker.device,
        stores=replace(worker.shard.stores, weights=place),
        scratch=scratch,
    )
    read, stays = reader_of(worker, recipe)
    if not stays:
        read = ReadAhead(read, list(shard.wanted), layout.parameters)
    shard.load(read, stays=stays)
    worker.state.teacher = Teacher(shard, BlockRunner(shard), scratch)


def drop_teacher(worker: Worker) -> None:
    """Free the teacher and the states that it gave."""
    teacher = worker.state.teacher
    assert teacher is not None
    worker.state.teacher = None
    teacher.scratch.close()
    forget_states(worker, STREAM)
