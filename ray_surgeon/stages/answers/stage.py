"""The stages of answers to prompts: the dense model's, once, and the pruned model's beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ray_surgeon.plan.needs import StepPlan, WorkerView
from ray_surgeon.stages.answers.answers import (
    Answers,
    answers_of,
    dense_record,
    measure_answers,
    measure_rates,
    read_answers,
    remember_answers,
    shot_record,
    write_answers,
)
from ray_surgeon.stages.answers.prompts import Yardstick
from ray_surgeon.stages.stage import Facts, RunState, Stage
from ray_surgeon.storage import files

_PROMPT_TOKENS = 256
"""Tokens of a prompt, chat template included; a guess for the plan."""


@dataclass(frozen=True)
class DenseAnswers(Stage):
    """The dense model answers the prompts, before the first shot."""

    name = "answers"
    yardstick: Yardstick

    def run(self, run: RunState, facts: Facts) -> None:
        """Let the dense model answer, unless an earlier try of the run did.

        Raises:
            ValueError: the answers of an earlier try are gone.
        """
        answers = self._answers(run)
        run.keep(answers)
        facts |= {"prompts": len(answers.prompts), "num_tokens": answers.num_tokens}
        if not run.resumes:
            run.report.dense["generation"] = dense_record(answers, self.yardstick.text_of)

    def _answers(self, run: RunState) -> Answers:
        uri = run.directory.path("answers.json")
        if files.exists(uri):
            answers = read_answers(uri)
            if not run.resumes:  # otherwise its states are among those of the dense model
                remember_answers(run.cluster, answers)
            return answers
        if run.resumes:
            raise ValueError(
                f"{uri} is gone, and the dense model with it, whose answers it had; put it back, "
                "or start a new run"
            )
        section = self.yardstick.section
        prompts = self.yardstick.prompts_on(run.cluster)
        answers = answers_of(run.cluster, prompts, section.max_new_tokens, self.yardstick.ends)
        write_answers(uri, answers)
        return answers

    def fingerprints(self) -> Mapping[str, Any]:
        """Return the prompts: answers before and after are to the same ones."""
        return {"generation": self.yardstick.fingerprint}

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the writing of the answers."""
        section = self.yardstick.section
        yield worker.writing(self.name, [(section.num_prompts, section.max_new_tokens)])

    def on_host(self, worker: WorkerView) -> float:
        """Return the dense model's states of prompts and answers."""
        section = self.yardstick.section
        return worker.remembered(section.num_prompts * (_PROMPT_TOKENS + section.max_new_tokens))


@dataclass(frozen=True)
class Rates(Stage):
    """How many of the dense model's tokens the pruned model would accept, before corrections."""

    name = "answers"

    def run(self, run: RunState, facts: Facts) -> None:
        """Measure what corrections begin from."""
        rates = measure_rates(run.cluster, run.kept(Answers))
        run.record["generation_before_correction"] = asdict(rates)
        facts["accepted"] = rates.acceptance


@dataclass(frozen=True)
class PrunedAnswers(Stage):
    """The pruned model's answers beside the dense model's, after every shot."""

    name = "answers"
    yardstick: Yardstick

    def run(self, run: RunState, facts: Facts) -> None:
        """Compare the answers."""
        answers = run.kept(Answers)
        most = self.yardstick.section.max_new_tokens
        generation = measure_answers(run.cluster, answers, most)
        run.record["generation"] = shot_record(answers, generation, self.yardstick.text_of)
        facts |= {"accepted": generation.acceptance, "agreement": generation.agreement}

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the comparison; the writing is as that of the dense model."""
        section = self.yardstick.section
        length = _PROMPT_TOKENS + section.max_new_tokens
        yield worker.measuring(self.name, [(section.num_prompts, length)])
