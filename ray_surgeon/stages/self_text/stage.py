"""The dense model writes its part of the calibration text, before the first shot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from ray_surgeon.plan.needs import StepPlan, WorkerView
from ray_surgeon.spec.calibration import CalibrationSection
from ray_surgeon.spec.written import SelfSection
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
        if not any(isinstance(text, SelfSection) for text, _ in section.shares):
            return None
        requests = {} if tokenizer is None else to_be_written(section, tokenizer, config)
        return SelfText(section, requests)

    def run(self, run: RunState, facts: Facts) -> None:
        """Let the model write, unless an earlier try of the run did.

        Raises:
            ValueError: what an earlier try wrote is gone.
        """
        uri = run.directory.path("written.safetensors")
        if files.exists(uri):
            texts = from_tensors(tensor_files.read(uri))
        elif run.resumes:
            raise ValueError(
                f"{uri} is gone, and the dense model with it, which wrote it; put it back, or "
                "start a new run"
            )
        else:
            texts = {n: write(run.cluster, request) for n, request in self.requests.items()}
            tensor_files.write(uri, as_tensors(texts))
        tokens, counts = self.filled(run.calibration, texts)
        run.calibration = tokens
        run.text = CalibrationText.split(tokens, counts, len(run.text.held))
        facts["num_sequences"] = sum(len(text.tokens) for text in texts.values())
        answers = np.concatenate([text.answers for text in texts.values()])
        if answers.any():
            facts["share of answers"] = float(answers.mean())

    def filled(
        self, calibration: NDArray[np.int64], texts: Mapping[int, WrittenText]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        """Return the calibration with what the model wrote, and which tokens count.

        Args:
            calibration: [num_sequences, sequence_length] tokens.
            texts: number of a calibration text -> what the model wrote for it.

        Returns:
            Tokens, and likewise whether each counts; None if all do.
        """
        tokens = calibration.copy()
        counts = np.ones(tokens.shape, dtype=bool)
        shares = [count for _, count in self.section.shares]
        for row, (number, i) in enumerate(order(shares)):
            if text := texts.get(number):
                tokens[row] = text.tokens[i]
                counts[row] = text.answers[i] if text.answers.any() else True
        return tokens, counts if self.section.weigh == "answers" else None

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the writing, token by token."""
        length = self.section.sequence_length
        shares = self.section.shares
        sizes = [text.sizes(n, length) for text, n in shares if isinstance(text, SelfSection)]
        yield worker.writing(self.name, sizes)


def as_tensors(written: Mapping[int, WrittenText]) -> dict[str, Tensor]:
    """Return texts by their numbers as tensors for one file."""
    tensors = {}
    for number, text in written.items():
        tensors[str(number)] = torch.from_numpy(text.tokens)
        tensors[f"{number}.answers"] = torch.from_numpy(text.answers)
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[int, WrittenText]:
    """Return what `as_tensors` was given; a text without answers has none."""
    texts = {}
    for name, tokens in tensors.items():
        if name.isdigit():
            none = torch.zeros(tokens.shape, dtype=torch.bool)
            answers = tensors.get(f"{name}.answers", none)
            texts[int(name)] = WrittenText(tokens.numpy(), answers.numpy())
    return texts
