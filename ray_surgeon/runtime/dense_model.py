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

from ray_surgeon.runtime.collectives import TensorPayload, decode
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.storage import tensor_files

CALIBRATION = "(calibration)"
ANSWERS = "(answers)"
"""Names of the calibration text and of the dense model's answers among the texts that have states.

No evaluation text can have them.
"""


@dataclass
class DenseStates:
    """Last hidden states of the dense model, in the memory of the last shard's host."""

    # text -> number of a sequence -> [1, T, d]
    of_text: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def on_device(self, worker: Worker, text: str, number: int) -> Tensor:
        """Return the states [1, T, d] of one sequence."""
        return self.of_text[text][number].to(worker.device)


def keep_states(
    worker: Worker, text: str, numbers: Sequence[int], states: Sequence[Tensor]
) -> None:
    """Keep the states [1, T, d] of some sequences of a text.

    They are rounded to bfloat16, but those of answers, of which that alone would cost a float32
    model some thousandths of the acceptance.
    """
    dtype = None if text == ANSWERS else torch.bfloat16
    rows = (row.to("cpu", dtype, copy=True) for row in states)
    of_text = worker.keeping(DenseStates).of_text.setdefault(text, {})
    of_text.update(zip(numbers, rows, strict=True))


def receive_states(
    worker: Worker, text: str, numbers: Sequence[int], states: TensorPayload
) -> None:
    """Keep the states [m, T, d] that another worker sent."""
    keep_states(worker, text, numbers, torch.split(decode(states, torch.device("cpu")), 1))


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
    # one after the other: all of them twice would need memory that no plan has
    for name in reader.names(uri):
        number, _, text = name.partition(" ")
        states = reader.read(uri, name)
        dense_states.of_text.setdefault(text, {})[int(number)] = states.clone()
    worker.keep(dense_states)
