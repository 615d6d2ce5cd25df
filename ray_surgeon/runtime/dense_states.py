"""What the dense model says: its last hidden states of texts, on workers with the last shard.

Later weights are compared with them: the head is never pruned, so the distributions of the next
tokens follow from these states, a slice of tokens at a time. A teacher that is another model has
its own head, which is kept with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ray_surgeon.memory.transfers import transfers
from ray_surgeon.models.loss import Dense
from ray_surgeon.runtime.collectives import TensorPayload, decode
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.runtime.worker_state import DenseStates
from ray_surgeon.storage import tensor_files

CALIBRATION = "(calibration)"
ANSWERS = "(answers)"
STREAM = "(stream)"
"""Names of texts that have states: the calibration, the dense model's answers, and what comes next
of a text that a teacher sees while the training goes on.

No evaluation text can have them.
"""
_HEAD = "head"
"""What a head of its own is called in the file of all states."""


def keep_states(worker: Worker, text: str, numbers: list[int], states: Sequence[Tensor]) -> None:
    """Keep the states [1, T, d] of some sequences of a text.

    They are rounded to bfloat16, but those of answers, of which that alone would cost a float32
    model some thousandths of the acceptance.
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
    """Return the states of all texts, once all are there."""
    transfers(worker.device).settle()
    return worker.state.dense_states


def dense_state(worker: Worker, text: str, number: int) -> Dense:
    """Return the states [1, T, d] of a sequence of a text, on the device; and a head of its own."""
    states = dense_states(worker)
    return transfers(worker.device).staged(states[text][number]), states.head


def receive_states(worker: Worker, text: str, numbers: list[int], states: TensorPayload) -> None:
    """Keep the states [m, T, d] that another worker sent."""
    keep_states(worker, text, numbers, torch.split(decode(states, torch.device("cpu")), 1))


def kept_states(worker: Worker, text: str, numbers: list[int]) -> TensorPayload:
    """Return the states [m, T, d] of some sequences of a text."""
    of_text = dense_states(worker)[text]
    return worker.pack(torch.cat([of_text[number] for number in numbers]))


def write_states(worker: Worker, uri: str) -> None:
    """Write the states of all texts but a stream into one file, for a run that goes on later."""
    if worker.shard.blocks.is_last and worker.index.replica == 0:
        tensors = dict[str, Tensor]()
        for text, states in dense_states(worker).items():
            if text != STREAM:
                tensors |= {f"{number} {text}": tensor for number, tensor in states.items()}
        if (head := dense_states(worker).head) is not None:
            tensors[_HEAD] = head
        tensor_files.write(uri, tensors)


def read_states(worker: Worker, uri: str) -> None:
    """Read what `write_states` wrote."""
    if not worker.shard.blocks.is_last:
        return
    reader = tensor_files.Reader()
    # one after the other: all of them twice would need memory that no plan has
    for name in reader.names(uri):
        tensor = reader.read(uri, name)
        if name == _HEAD:
            worker.state.dense_states.head = tensor.to(worker.device)
            continue
        number, _, text = name.partition(" ")
        keep_states(worker, text, [int(number)], [tensor])
