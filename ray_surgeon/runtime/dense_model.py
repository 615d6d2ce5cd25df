"""The dense model's last hidden states of texts, with which later weights are compared.

Workers with the last shard keep them.

The head is never pruned, so the distributions of the next tokens follow from these states, a slice
of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ray_surgeon.runtime.transport import TensorPayload, decode
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.storage import files, tensor_files

CALIBRATION = "(calibration)"
"""Name of the calibration text among those that have states; no evaluation text can have it."""


@dataclass
class DenseStates:
    """Last hidden states of the dense model, in the memory of the last shard's host."""

    # text -> number of a sequence -> [1, T, d] bfloat16
    of_text: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def on_device(self, worker: Worker, text: str, number: int) -> Tensor:
        """Return the states [1, T, d] of one sequence."""
        return self.of_text[text][number].to(worker.device)


def keep_states(worker: Worker, text: str, numbers: Sequence[int], states: Tensor) -> None:
    """Keep the states [m, T, d] of some sequences of a text."""
    rows = torch.split(states.to("cpu", torch.bfloat16), 1)
    worker.keeping(DenseStates).of_text.setdefault(text, {}).update(
        zip(numbers, (row.clone() for row in rows), strict=True)
    )


def receive_states(
    worker: Worker, text: str, numbers: Sequence[int], states: TensorPayload
) -> None:
    """Keep states that another worker sent; see `keep_states`."""
    keep_states(worker, text, numbers, decode(states, torch.device("cpu")))


def kept_states(worker: Worker, text: str, numbers: Sequence[int]) -> TensorPayload:
    """Return the states [m, T, d] of some sequences of a text."""
    of_text = worker.kept(DenseStates).of_text[text]
    return worker.pack(torch.cat([of_text[number] for number in numbers]))


def write_states(worker: Worker, uri: str) -> None:
    """Write the states of all texts into one file, for a run that goes on later."""
    if worker.shard.blocks.is_last and worker.index.replica == 0:
        of_text = worker.kept(DenseStates).of_text
        tensor_files.write(
            uri,
            {
                f"{number} {text}": states
                for text, by_number in of_text.items()
                for number, states in by_number.items()
            },
        )


def read_states(worker: Worker, uri: str) -> None:
    """Read what `write_states` wrote."""
    if not worker.shard.blocks.is_last:
        return
    dense_states = DenseStates()
    reader = tensor_files.Reader()
    is_mapped = files.is_local(uri)
    # one after the other: all of them twice would need memory that no plan has
    for name in reader.names(uri):
        number, _, text = name.partition(" ")
        states = reader.read(uri, name)
        dense_states.of_text.setdefault(text, {})[int(number)] = (
            states.clone() if is_mapped else states
        )
    worker.keep(dense_states)
