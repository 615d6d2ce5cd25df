"""Calibration text that the dense model writes: plain texts, and conversations packed into windows.

Conversations from the opening of a chat template: Xu et al. 2024 (Magpie, arXiv 2406.08464). Plain
text: Williams et al. 2024 (arXiv 2410.17170), self-calibration.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from ray_surgeon.data.prompts import Prompt
from ray_surgeon.data.written_text import Conversations, Request
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.writing import GenerationRequest, write_texts
from ray_surgeon.spec.texts import ANSWER_TOKENS

COOLER = 0.7
"""Answers are drawn at so much of the temperature: turns should differ, answers make sense."""
MAX_ROUNDS = 10
"""Times that more conversations are written because there were too few."""
_FEWEST_TURN_TOKENS = 3
"""Tokens of a user's turn; shorter ones ask for nothing."""
_FEWEST_TURNS = 16
"""Turns that are written together, at least: fewer take as many steps."""
_USUAL_ANSWER = 0.7
"""Of the most tokens, what an answer has: a guess, until some answers are there."""
_USUAL_TURN = 0.4
"""Likewise of a user's turn."""
_YIELD_OF_TURNS = 0.8
"""Of users' turns, those that are of use: a guess, until some are there."""
_YIELD_OF_ANSWERS = 0.95
"""Likewise of answers."""
_LOWEST_YIELD = 0.125
"""Of what is written, what is counted on to be of use when next to nothing was."""
_MARGIN = 1.1
"""By how much more is written than seems needed."""
LONGEST_PERIOD = 64
"""Tokens of a piece of text that is looked for again after itself."""
_LOOP_TOKENS = 32
"""Tokens that a piece of text and its repetitions cover, at least, in a loop."""
_LOOP_TIMES = 3
"""Times that the piece is there, at least."""


@dataclass(frozen=True)
class WrittenText:
    """Windows that the model wrote."""

    tokens: NDArray[np.int64]  # [n, T]
    answers: NDArray[np.bool_]  # [n, T], whether a token belongs to an answer of the model


def write(cluster: Cluster, request: Request) -> WrittenText:
    """Let the model write windows.

    Args:
        cluster: with loaded workers.
        request: what is to be written.

    Raises:
        RuntimeError: too few conversations come out.
        ValueError: a file of prompts does not suffice.
    """
    if isinstance(request, Conversations):
        return Writer(cluster, request).windows()
    texts = write_texts(cluster, request.wanted)
    whole = [[*start, *text.tolist()] for start, text in zip(request.starts, texts, strict=True)]
    tokens = np.array(whole, dtype=np.int64).reshape(-1, request.sequence_length)
    return WrittenText(tokens, np.zeros(tokens.shape, dtype=np.bool_))


@dataclass(frozen=True)
class Conversation:
    """One conversation, all tokens of the chat template included."""

    tokens: tuple[int, ...]
    answer: slice  # places of the answer, with the token that ends it


def pack(conversations: Sequence[Conversation], num_sequences: int, length: int) -> WrittenText:
    """Lay conversations one after the other into windows [n, length], as many as are full.

    Every window begins with the beginning of a conversation; the last one in it is cut where the
    window ends. There are `num_sequences` windows at most.
    """
    windows = list[list[tuple[int, bool]]]()  # each token, and whether it belongs to an answer
    for made in conversations:
        if not windows or len(windows[-1]) >= length:
            windows.append([])
        answer = range(made.answer.start, made.answer.stop)
        windows[-1] += [(token, place in answer) for place, token in enumerate(made.tokens)]
    full = [window[:length] for window in windows if len(window) >= length][:num_sequences]
    pairs = np.array(full, dtype=np.int64).reshape(-1, length, 2)
    return WrittenText(pairs[..., 0].copy(), pairs[..., 1] == 1)


class Writer:
    """Conversations in the making."""

    def __init__(self, cluster: Cluster, request: Conversations) -> None:
        """Take a cluster with loaded workers, and what they are to write."""
        self._cluster = cluster
        self._request = request
        self._conversations: list[Conversation] = []
        self._unanswered: list[Prompt] = []
        self._of_file = self._prompts()
        self._turns: set[tuple[int, ...]] = set()  # of users, that are of use
        self._num_turns = 0  # of users, written
        self._num_answers = 0

    def windows(self) -> WrittenText:
        """Write until all windows are full.

        Raises:
            RuntimeError: too few conversations come out.
            ValueError: the file of prompts does not suffice.
        """
        request = self._request
        missing = request.num_sequences
        for number in range(MAX_ROUNDS):
            self._write_round(missing, number)
            written = pack(self._conversations, request.num_sequences, request.sequence_length)
            missing = request.num_sequences - len(written.tokens)
            if not missing:
                return written
        turns = f"{len(self._turns)} of {self._num_turns} users' turns"
        answers = f"{len(self._conversations)} of {self._num_answers} answers"
        useful = "of use (no loops, no special tokens, none twice)"
        problem = f"{turns} and {answers} were {useful}, and {missing} windows are not full"
        remedy = "change temperature, give prompts, or another text"
        raise RuntimeError(f"{request.where}: after {MAX_ROUNDS} rounds, {problem}; {remedy}")

    def prompts(self, count: int) -> tuple[tuple[int, ...], ...]:
        """Write users' turns, and return them as prompts, with the chat template around them.

        Returns:
            Tokens of so many prompts, or of fewer where others came twice, were in a loop, or had
            special tokens.
        """
        for number in range(MAX_ROUNDS):
            if (more := count - len(self._unanswered)) > 0:
                self._write_turns(more, number)
        return tuple(prompt.tokens for prompt in self._unanswered[:count])

    def _write_round(self, missing: int, number: int) -> None:
        """Write what seems needed to fill so many windows.

        Raises:
            ValueError: the file of prompts does not suffice.
        """
        request = self._request
        more = self._num_needed(missing) - len(self._unanswered)
        if request.prompts is not None:  # some of them again with other draws if there are too few
            self._unanswered += itertools.islice(self._of_file, max(0, more))
            if not self._unanswered:
                problem = f"{len(request.prompts)} leave {missing} windows that are not full"
                remedy = "give more prompts or fewer num_sequences"
                raise ValueError(f"{request.where}.prompts: {problem}; {remedy}")
        elif more > 0:
            self._write_turns(more, number)
        needed = self._num_needed(missing)  # the lengths of turns are known now
        is_short = request.prompts is None and 2 * len(self._unanswered) < needed
        if is_short and number < MAX_ROUNDS - 1:
            return  # few answers take as many steps as many
        self._write_answers(self._unanswered[:needed], number)
        del self._unanswered[:needed]

    def _num_needed(self, missing: int) -> int:
        """Return how many answers are to be written to fill so many windows."""
        request = self._request
        before = request.marks.num_tokens + _USUAL_TURN * request.turn_tokens
        if prompts := self._unanswered or request.prompts:
            before = fmean(len(prompt.tokens) for prompt in prompts)
        each = min(before + _USUAL_ANSWER * ANSWER_TOKENS, request.sequence_length)
        if self._conversations:
            each = fmean(len(conversation.tokens) for conversation in self._conversations)
        useful = _usual(len(self._conversations), self._num_answers, _YIELD_OF_ANSWERS)
        # half a conversation is cut off at the end
        tokens = missing * (request.sequence_length + each / 2)
        return max(4, math.ceil(_MARGIN * tokens / each / useful))

    def _write_turns(self, count: int, number: int) -> None:
        """Let the model write users' turns, and keep those that make sense."""
        request = self._request
        marks = request.marks
        useful = _usual(len(self._turns), self._num_turns, _YIELD_OF_TURNS)
        count = max(_FEWEST_TURNS, math.ceil(count / useful))
        self._num_turns += count
        prompts = (marks.opening,) * count
        most = request.turn_tokens + 1
        seed = _seed(request.seed, number, 0)
        wanted = GenerationRequest(prompts, most, request.temperature, seed, marks.ends_of_turn)
        for text in write_texts(self._cluster, wanted):
            # one that has not ended is cut: models of code paste long pieces of it
            turn = tuple(text[:-1].tolist())
            if turn not in self._turns and self._makes_sense(turn, _FEWEST_TURN_TOKENS):
                self._turns.add(turn)
                self._unanswered.append(Prompt((*marks.opening, *turn, *marks.closing)))

    def _makes_sense(self, tokens: Sequence[int], fewest: int) -> bool:
        is_text = len(tokens) >= fewest and self._request.marks.special.isdisjoint(tokens)
        return is_text and not repeats(tokens)

    def _prompts(self) -> Iterator[Prompt]:
        """Yield the prompts of the file in a drawn order, and those without an answer again."""
        prompts = self._request.prompts or ()
        order = np.random.default_rng(self._request.seed).permutation(len(prompts))
        drawn = [prompts[i] for i in order]
        yield from drawn
        if self._request.temperature:
            yield from itertools.cycle(prompt for prompt in drawn if prompt.answer is None)

    def _write_answers(self, prompts: Sequence[Prompt], number: int) -> None:
        """Let the model answer what has no answer, and keep the conversations that make sense."""
        request = self._request
        end = request.marks.end
        ends = request.marks.ends_of_answer
        questions = tuple(prompt.tokens for prompt in prompts if prompt.answer is None)
        how = COOLER * request.temperature, _seed(request.seed, number, 1), ends
        wanted = GenerationRequest(
            questions, ANSWER_TOKENS, *how, max_length=request.sequence_length
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
            tail = end[1:] if answer[-1:] == end[:1] else ()
            place = slice(len(prompt.tokens), len(prompt.tokens) + len(answer))
            self._conversations.append(Conversation((*prompt.tokens, *answer, *tail), place))


def _usual(num_used: int, num_written: int, guess: float) -> float:
    """Return which part of what is written is of use, a guess if nothing was written yet."""
    return max(_LOWEST_YIELD, num_used / num_written) if num_written else guess


def _seed(seed: int, number: int, part: int) -> int:
    """Return a seed for a part of a round, 0 for turns and 1 for answers."""
    return int(np.random.SeedSequence([seed, number, part]).generate_state(1)[0])


def repeats(tokens: Sequence[int] | NDArray[np.int64]) -> bool:
    """Whether tokens get stuck in a loop: a piece of them comes again and again after itself.

    Somewhere, a piece of 1 to 64 tokens must stand three times or more in a row, and cover 32
    tokens or more; the last one may be cut short.
    """
    text = np.asarray(tokens)
    for period in range(1, min(LONGEST_PERIOD, len(text) // 2) + 1):
        different = np.flatnonzero(text[period:] != text[:-period])
        borders = np.concatenate([[-1], different, [len(text) - period]])
        longest = int(np.diff(borders).max()) - 1
        if longest + period >= max(_LOOP_TOKENS, _LOOP_TIMES * period):
            return True
    return False
