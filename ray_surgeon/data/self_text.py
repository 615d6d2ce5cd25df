"""The dense model writes its part of the calibration text, before the first shot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ray_surgeon.config.calibration import CalibrationSection
from ray_surgeon.data.conversations import write
from ray_surgeon.data.texts import order
from ray_surgeon.data.written_text import Language, WritingRequest
from ray_surgeon.run_state import CalibrationText, Facts, RunState
from ray_surgeon.storage import files, tensor_files


@dataclass(frozen=True)
class SelfText:
    """Fills in the calibration windows that the model writes."""

    section: CalibrationSection
    # index of a calibration text -> what the model writes for it; empty without a tokenizer
    requests: Mapping[int, WritingRequest] = field(repr=False)

    @staticmethod
    def of(section: CalibrationSection, language: Language | None) -> SelfText | None:
        """Return the stage if the model writes some of the calibration text.

        Args:
            section: of the calibration.
            language: of the model; None for a plan alone, which has no tokenizer.

        Raises:
            ValueError: the model cannot write it, or a file for it cannot be read.
        """
        if not any(text.is_written for text, _ in section.shares):
            return None
        if language is None:
            return SelfText(section, {})
        return SelfText(section, language.requests(section))

    def fill_in(self, run: RunState, facts: Facts) -> None:
        """Let the model write, unless an earlier try of the run did.

        Raises:
            ValueError: the text that an earlier try wrote is gone.
        """
        written = self._written(run)
        counts_of_texts = [count for _, count in self.section.shares]
        owners = np.array([number for number, _ in order(counts_of_texts)])
        tokens = run.calibration.copy()
        # whether a token belongs to an answer
        answers = np.zeros(tokens.shape, dtype=bool)
        counts = ~answers
        for number in self.requests:
            rows = owners == number
            tokens[rows] = written[f"{number}"].numpy()
            answers[rows] = written[f"{number}.answers"].numpy()
            if answers[rows].any():
                counts[rows] = answers[rows]
        weighed = counts if self.section.weigh == "answers" else None
        run.calibration = tokens
        run.text = CalibrationText.split(tokens, weighed, len(run.text.held))
        is_written = np.isin(owners, list(self.requests))
        facts["num_sequences"] = int(is_written.sum())
        if answers.any():
            facts["share of answers"] = float(answers[is_written].mean())

    def _written(self, run: RunState) -> dict[str, Tensor]:
        """Return the written windows and which of their tokens belong to answers."""
        uri = run.directory.path("written.safetensors")
        if was_written(run, uri):
            return tensor_files.read(uri)
        tensors = dict[str, Tensor]()
        for number, request in self.requests.items():
            text = write(run.cluster, request)
            tensors[f"{number}"] = torch.from_numpy(text.tokens)
            tensors[f"{number}.answers"] = torch.from_numpy(text.answers)
        tensor_files.write(uri, tensors)
        return tensors


def was_written(run: RunState, uri: str) -> bool:
    """Return whether an earlier try of a run has written a file that needs the dense model.

    Raises:
        ValueError: the file is gone, and the run no longer has the dense model.
    """
    is_there = files.exists(uri)
    if run.resumes and not is_there:
        raise ValueError(
            f"{uri} is gone, and the dense model; put it back, or start a new run"
        )
    return is_there
