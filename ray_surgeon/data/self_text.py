"""The dense model writes its part of the calibration text, before the first shot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from ray_surgeon.data.conversations import write
from ray_surgeon.data.texts import order
from ray_surgeon.data.written_text import Language, Request
from ray_surgeon.run_state import CalibrationText, Facts, RunState
from ray_surgeon.spec.calibration import CalibrationSection
from ray_surgeon.storage import files, tensor_files


@dataclass(frozen=True)
class SelfText:
    """Fills in the windows of a calibration that the model writes."""

    section: CalibrationSection
    # number of a calibration text -> what is to be written for it; nothing without a tokenizer
    requests: Mapping[int, Request] = field(repr=False)

    @staticmethod
    def of(section: CalibrationSection, language: Language | None) -> SelfText | None:
        """Return the stage if the model writes some of the calibration.

        Args:
            section: of the calibration.
            language: of the model; None for a plan alone, which has no tokenizer.

        Raises:
            ValueError: the model cannot write it, or a file for it cannot be read.
        """
        if not any(text.is_written for text, _ in section.shares):
            return None
        return SelfText(section, {} if language is None else language.requests(section))

    def fill_in(self, run: RunState, facts: Facts) -> None:
        """Let the model write, unless an earlier try of the run did.

        Raises:
            ValueError: what an earlier try wrote is gone.
        """
        uri = run.directory.path("written.safetensors")
        if was_written(run, uri):
            tensors = tensor_files.read(uri)
        else:
            tensors = {}
            for number, request in self.requests.items():
                text = write(run.cluster, request)
                tensors[f"{number}"] = torch.from_numpy(text.tokens)
                tensors[f"{number}.answers"] = torch.from_numpy(text.answers)
            tensor_files.write(uri, tensors)
        owners = np.array([number for number, _ in order([n for _, n in self.section.shares])])
        tokens = run.calibration.copy()
        answers = np.zeros(tokens.shape, dtype=bool)  # whether a token belongs to an answer
        counts = ~answers
        for number in self.requests:
            rows = owners == number
            tokens[rows] = tensors[f"{number}"].numpy()
            answers[rows] = tensors[f"{number}.answers"].numpy()
            if answers[rows].any():
                counts[rows] = answers[rows]
        weighed = counts if self.section.weigh == "answers" else None
        run.calibration = tokens
        run.text = CalibrationText.split(tokens, weighed, len(run.text.held))
        is_written = np.isin(owners, list(self.requests))
        facts["num_sequences"] = int(is_written.sum())
        if answers.any():
            facts["share of answers"] = float(answers[is_written].mean())


def was_written(run: RunState, uri: str) -> bool:
    """Whether an earlier try of a run has written a file that only the dense model can write.

    Raises:
        ValueError: it is gone, and the run has the dense model no more.
    """
    is_there = files.exists(uri)
    if run.resumes and not is_there:
        raise ValueError(f"{uri} is gone, and the dense model; put it back, or start a new run")
    return is_there
