"""Calibration text that the dense model writes: plain texts, and conversations packed into windows.

Conversations from the opening of a chat template: Xu et al. 2024 (Magpie, arXiv 2406.08464). Plain
text: Williams et al. 2024 (arXiv 2410.17170), self-calibration.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_surgeon.config.texts import ANSWER_TOKENS, CalibrationSection
from ray_surgeon.data.texts import order
from ray_surgeon.data.written_text import Conversations, Language, Prompt, WritingRequest
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.writing import GenerationRequest, write_texts
from ray_surgeon.errors import ConfigError
from ray_surgeon.run_state import CalibrationText, Facts, RunState
from ray_surgeon.storage import files, tensor_files

COOLER = 0.7
"""Factor on the temperature for answers: turns should differ, answers should make sense."""
MAX_ROUNDS = 10
"""Maximum number of rounds in which conversations are written until there are enough."""
_FEWEST_TURN_TOKENS = 3
"""Minimum number of tokens of a user's turn; shorter ones ask for nothing."""
_FEWEST_TURNS = 16
"""Minimum number of turns that are written together: fewer take as many steps."""
_USUAL_ANSWER = 0.7
"""Length of an answer relative to the maximum: an estimate until there are some answers."""
_USUAL_TURN = 0.4
"""Length of a user's turn relative to the maximum."""
_YIELD_OF_TURNS = 0.8
"""Fraction of users' turns that are useful: an estimate until there are some."""
_YIELD_OF_ANSWERS = 0.95
"""Fraction of answers that are useful: an estimate until there are some."""
_LOWEST_YIELD = 0.125
"""Lower bound on the fraction that is assumed to be useful."""
_MARGIN = 1.1
"""Factor by which more is written than seems needed."""
LONGEST_PERIOD = 64
"""Maximum length in tokens of a repeated piece of text."""
LOOP_TOKENS = 32
"""Minimum number of tokens that a piece of text and its repetitions cover in a loop."""
_LOOP_TIMES = 3
"""Minimum number of occurrences of the piece in a loop."""


@dataclass(frozen=True)
class WrittenText:
    """Windows that the model wrote."""

    tokens: NDArray[np.int64]  # [n, T]
    answers: NDArray[np.bool_]  # [n, T], whether a token belongs to an answer


def write(cluster: Cluster, request: WritingRequest) -> WrittenText:
    """Let the model write windows.

    Args:
        cluster: with loaded workers.
        request: for texts or conversations.

    Raises:
        RuntimeError: there are too few useful conversations.
        ValueError: a file of prompts does not suffice.
    """
    if isinstance(request, Conversations):
        return Writer(cluster, request).windows()
    texts = write_texts(cluster, request.wanted)
    whole = []
    for start, text in zip(request.starts, texts, strict=True):
        whole.append([*start, *text.tolist()])
    tokens = np.array(whole, dtype=np.int64).reshape(-1, request.sequence_length)
    return WrittenText(tokens, np.zeros(tokens.shape, dtype=np.bool_))


@dataclass(frozen=True)
class Conversation:
    """One conversation, all tokens of the chat template included."""

    tokens: tuple[int, ...]
    answer: slice  # positions of the answer, with the token that ends it


def pack(
    conversations: Sequence[Conversation],
    num_sequences: int,
    length: int,
) -> WrittenText:
    """Pack conversations into windows [n, length]; a last window that is not full is dropped.

    Every window starts with a new conversation; its last conversation is cut at the window's end.
    There are at most `num_sequences` windows.
    """
    # each token, and whether it belongs to an answer
    windows = list[list[tuple[int, bool]]]()
    for conversation in conversations:
        if not windows or len(windows[-1]) >= length:
            windows.append([])
        answer = range(conversation.answer.start, conversation.answer.stop)
        for position, token in enumerate(conversation.tokens):
            windows[-1].append((token, position in answer))
    full = [window[:length] for window in windows if len(window) >= length]
    full = full[:num_sequences]
    pairs = np.array(full, dtype=np.int64).reshape(-1, length, 2)
    return WrittenText(pairs[..., 0].copy(), pairs[..., 1] == 1)


class Writer:
    """Lets a model write conversations."""

    def __init__(self, cluster: Cluster, request: Conversations) -> None:
        """Prepare to write on a cluster with loaded workers."""
        self._cluster = cluster
        self._request = request
        self._conversations: list[Conversation] = []
        self._unanswered: list[Prompt] = []
        self._of_file = self._prompts()
        self._turns: set[tuple[int, ...]] = set()  # useful turns of users
        self._num_turns = 0  # written turns of users, useful or not
        self._num_answers = 0

    def windows(self) -> WrittenText:
        """Write until all windows are full.

        Raises:
            RuntimeError: there are too few useful conversations.
            ValueError: the file of prompts does not suffice.
        """
        request = self._request
        missing = request.num_sequences
        for number in range(MAX_ROUNDS):
            self._write_round(missing, number)
            written = pack(
                self._conversations,
                request.num_sequences,
                request.sequence_length,
            )
            missing = request.num_sequences - len(written.tokens)
            if not missing:
                return written
        raise RuntimeError(
            f"{request.where}: after {MAX_ROUNDS} rounds, {len(self._turns)} of "
            f"{self._num_turns} users' turns and {len(self._conversations)} of "
            f"{self._num_answers} answers were of use (no loops, no special tokens, none "
            f"twice), and {missing} windows are not full; change temperature, give "
            "prompts, or another text"
        )

    def prompts(self, count: int) -> tuple[tuple[int, ...], ...]:
        """Write users' turns, and return them as prompts, with the chat template around them.

        Returns:
            Tokens of `count` prompts, or of fewer if too many were duplicates, were in a loop, or
            had special tokens.
        """
        for number in range(MAX_ROUNDS):
            num_missing = count - len(self._unanswered)
            if num_missing > 0:
                self._write_turns(num_missing, number)
        return tuple(prompt.tokens for prompt in self._unanswered[:count])

    def _write_round(self, missing: int, number: int) -> None:
        """Write as much as seems needed to fill the missing windows.

        Raises:
            ValueError: the file of prompts does not suffice.
        """
        if self._request.prompts is not None:
            self._take_prompts(missing)
        else:
            num_turns = self._num_needed(missing) - len(self._unanswered)
            if num_turns > 0:
                self._write_turns(num_turns, number)
        needed = self._num_needed(missing)  # the lengths of turns are known now
        is_short = self._request.prompts is None and 2 * len(self._unanswered) < needed
        if is_short and number < MAX_ROUNDS - 1:
            return  # few answers take as many steps as many
        self._write_answers(self._unanswered[:needed], number)
        del self._unanswered[:needed]

    def _take_prompts(self, missing: int) -> None:
        """Take prompts from the file, and used ones again if there are too few of them.

        Raises:
            ValueError: none is left.
        """
        request = self._request
        num_prompts = self._num_needed(missing) - len(self._unanswered)
        self._unanswered.extend(itertools.islice(self._of_file, max(0, num_prompts)))
        if not self._unanswered:
            count = len(request.prompts or ())
            raise ConfigError(
                field=f"{request.where}.prompts",
                found=f"{count} leave {missing} windows that are not full",
                remedy="give more prompts or fewer num_sequences",
            )

    def _num_needed(self, missing: int) -> int:
        """Return the number of answers that fill the missing windows, as an estimate."""
        request = self._request
        prompts = self._unanswered or request.prompts
        if prompts:
            before = fmean(len(prompt.tokens) for prompt in prompts)
        else:
            before = request.marks.num_tokens + _USUAL_TURN * request.turn_tokens
        if self._conversations:
            each = fmean(len(conversation.tokens) for conversation in self._conversations)
        else:
            each = min(before + _USUAL_ANSWER * ANSWER_TOKENS, request.sequence_length)
        num_useful = len(self._conversations)
        useful = _useful_fraction(num_useful, self._num_answers, _YIELD_OF_ANSWERS)
        # half a conversation is cut off at the end
        tokens = missing * (request.sequence_length + each / 2)
        return max(4, math.ceil(_MARGIN * tokens / each / useful))

    def _write_turns(self, count: int, number: int) -> None:
        """Let the model write users' turns, and keep those that make sense."""
        request = self._request
        marks = request.marks
        useful = _useful_fraction(len(self._turns), self._num_turns, _YIELD_OF_TURNS)
        count = max(_FEWEST_TURNS, math.ceil(count / useful))
        self._num_turns += count
        wanted = GenerationRequest(
            prompts=(marks.opening,) * count,
            num_tokens=request.turn_tokens + 1,
            temperature=request.temperature,
            seed=_seed(request.seed, number, 0),
            ends=marks.ends_of_turn,
        )
        for text in write_texts(self._cluster, wanted):
            # an unfinished turn is cut: models of code paste long pieces of it
            turn = tuple(text[:-1].tolist())
            if turn not in self._turns and self._makes_sense(turn, _FEWEST_TURN_TOKENS):
                self._turns.add(turn)
                self._unanswered.append(Prompt((*marks.opening, *turn, *marks.closing)))

    def _makes_sense(self, tokens: Sequence[int], fewest: int) -> bool:
        if len(tokens) < fewest:
            return False
        if not self._request.marks.special.isdisjoint(tokens):
            return False
        return not repeats(tokens)

    def _prompts(self) -> Iterator[Prompt]:
        """Yield the file's prompts in random order, and again those without an answer."""
        prompts = self._request.prompts or ()
        order = np.random.default_rng(self._request.seed).permutation(len(prompts))
        drawn = [prompts[i] for i in order]
        yield from drawn
        if self._request.temperature:
            unanswered = [prompt for prompt in drawn if prompt.answer is None]
            yield from itertools.cycle(unanswered)

    def _write_answers(self, prompts: Sequence[Prompt], number: int) -> None:
        """Let the model answer prompts, and keep the conversations that make sense.

        Prompts that have an answer keep it.
        """
        request = self._request
        ends = request.marks.ends_of_answer
        wanted = GenerationRequest(
            prompts=tuple(prompt.tokens for prompt in prompts if prompt.answer is None),
            num_tokens=ANSWER_TOKENS,
            temperature=COOLER * request.temperature,
            seed=_seed(request.seed, number, 1),
            ends=ends,
            max_length=request.sequence_length,
        )
        written = iter(write_texts(self._cluster, wanted))
        self._num_answers += len(prompts)
        for prompt in prompts:
            answer = prompt.answer
            if answer is None:
                answer = tuple(next(written).tolist())
                said = answer[:-1] if ends.issuperset(answer[-1:]) else answer
                if not self._makes_sense(said, 1):
                    continue
            self._conversations.append(self._conversation(prompt.tokens, answer))

    def _conversation(
        self,
        question: tuple[int, ...],
        answer: tuple[int, ...],
    ) -> Conversation:
        """Return a conversation, completed by the template's tokens after the answer."""
        end = self._request.marks.end
        tail: tuple[int, ...] = ()
        if answer[-1:] == end[:1]:
            tail = end[1:]
        return Conversation(
            tokens=(*question, *answer, *tail),
            answer=slice(len(question), len(question) + len(answer)),
        )


def _useful_fraction(num_useful: int, num_written: int, estimate: float) -> float:
    """Return the useful fraction of written texts; an estimate if there are none."""
    if not num_written:
        return estimate
    return max(_LOWEST_YIELD, num_useful / num_written)


def _seed(seed: int, number: int, part: int) -> int:
    """Return a seed for a part of a round: part 0 for turns, part 1 for answers."""
    return int(np.random.SeedSequence([seed, number, part]).generate_state(1)[0])


def repeats(tokens: Sequence[int] | NDArray[np.int64]) -> bool:
    """Return whether tokens get stuck in a loop, that is, repeat a piece again and again.

    A piece of 1 to 64 tokens must occur at least three times in a row and cover at least 32
    tokens; the last occurrence may be cut short.
    """
    return longest_loop(tokens) >= LOOP_TOKENS


def longest_loop(tokens: Sequence[int] | NDArray[np.int64]) -> int:
    """Return the number of tokens in the longest loop; 0 if there is none.

    In a loop, a piece of 1 to 64 tokens occurs at least three times in a row; the last occurrence
    may be cut short only after three whole ones.
    """
    text = np.asarray(tokens)
    most = 0
    for period in range(1, min(LONGEST_PERIOD, len(text) // 2) + 1):
        different = np.flatnonzero(text[period:] != text[:-period])
        borders = np.concatenate([[-1], different, [len(text) - period]])
        covered = int(np.diff(borders).max()) - 1 + period
        if covered >= _LOOP_TIMES * period:
            most = max(most, covered)
    return most


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
