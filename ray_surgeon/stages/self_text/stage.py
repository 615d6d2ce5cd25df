"""The dense model writes its part of the calibration text, before the first shot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from ray_surgeon.plan.needs import StepPlan, WorkerView
from ray_surgeon.spec.calibration import CalibrationSection
from ray_surgeon.stages.self_text.conversations import WrittenText, write
from ray_surgeon.stages.self_text.requests import Request, to_be_written
from ray_surgeon.stages.stage import CalibrationText, Facts, RunState, Stage
from ray_surgeon.storage import files, tensor_files
from ray_surgeon.storage.texts import order


@dataclass(frozen=True)
class SelfText(Stage):
    """Fills in the windows of a calibration that the model writes."""

    name = "sampling"
    section: CalibrationSection
    # number of a calibration text -> what is to be written for it; nothing without a tokenizer
    requests: Mapping[int, Request] = field(repr=False)

    @staticmethod
    def of(
        section: CalibrationSection, tokenizer: Any, config: PretrainedConfig
    ) -> SelfText | None:
        """Return the stage if the model writes some of the calibration.

        Args:
            section: of the calibration.
            tokenizer: of the model; None for a plan alone.
            config: of the model.

        Raises:
            ValueError: the model cannot write it, or a file for it cannot be read.
        """
        if not any(text.is_written for text, _ in section.shares):
            return None
        requests = {} if tokenizer is None else to_be_written(section, tokenizer, config)
        return SelfText(section, requests)

    def run(self, run: RunState, facts: Facts) -> None:
        """Let the model write, unless an earlier try of the run did.

        Raises:
            ValueError: what an earlier try wrote is gone.
        """
        uri = run.directory.path("written.safetensors")
        if was_written(run, uri):
            texts = from_tensors(tensor_files.read(uri))
        else:
            texts = {n: write(run.cluster, request) for n, request in self.requests.items()}
            tensor_files.write(uri, as_tensors(texts))
        tokens = run.calibration.copy()
        counts = np.ones(tokens.shape, dtype=bool)  # whether a token counts
        for row, (number, i) in enumerate(order([count for _, count in self.section.shares])):
            if text := texts.get(number):
                tokens[row] = text.tokens[i]
                counts[row] = text.answers[i] if text.answers.any() else True
        weighed = counts if self.section.weigh == "answers" else None
        run.calibration = tokens
        run.text = CalibrationText.split(tokens, weighed, len(run.text.held))
        facts["num_sequences"] = sum(len(text.tokens) for text in texts.values())
        answers = np.concatenate([text.answers for text in texts.values()])
        if answers.any():
            facts["share of answers"] = float(answers.mean())

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the writing, token by token."""
        length = self.section.sequence_length
        sizes = [text.sizes(n, length) for text, n in self.section.shares if text.is_written]
        yield worker.writing(self.name, sizes)


def as_tensors(written: Mapping[int, WrittenText]) -> dict[str, Tensor]:
    """Return texts by their numbers as tensors for one file."""
    tensors = {}
    for number, text in written.items():
        tensors[str(number)] = torch.from_numpy(text.tokens)
        tensors[f"{number}.answers"] = torch.from_numpy(text.answers)
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[int, WrittenText]:
    """Return what `as_tensors` was given."""
    numbers = [int(name) for name in tensors if name.isdigit()]
    return {
        n: WrittenText(tensors[f"{n}"].numpy(), tensors[f"{n}.answers"].numpy()) for n in numbers
    }


def was_written(run: RunState, uri: str) -> bool:
    """Whether an earlier try of a run has written a file that only the dense model can write.

    Raises:
        ValueError: it is gone, and the run has the dense model no more.
    """
    is_there = files.exists(uri)
    if run.resumes and not is_there:
        raise ValueError(
            f"{uri} is gone, and the dense model that wrote it; put it back, or start a new run"
        )
    return is_there
