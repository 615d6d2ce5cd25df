"""Calibration text that the dense model writes: plain texts, and conversations packed into windows.

Conversations from the opening of a chat template: Xu et al. 2024 (Magpie, arXiv 2406.08464). Plain
text: Williams et al. 2024 (arXiv 2410.17170), self-calibration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.sampling import Wanted, write_texts
from ray_surgeon.spec.written import ANSWER_TOKENS
from ray_surgeon.stages.self_text.loops import repeats
from ray_surgeon.stages.self_text.requests import Conversations, Request
from ray_surgeon.storage.prompts import Prompt

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


# What is to be written


@dataclass(frozen=True)
class WrittenText:
    """Windows that the model wrote."""

    tokens: NDArray[np.int64]  # [n, T]
    answers: NDArray[np.bool_]  # [n, T], whether a token belongs to an answer of the model


# Writing it


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
        return _Writer(cluster, request).windows()
    texts = write_texts(cluster, request.wanted)
    whole = [[*start, *text.tolist()] for start, text in zip(request.starts, texts, strict=True)]
    tokens = np.array(whole, dtype=np.int64).reshape(-1, request.sequence_length)
    return WrittenText(tokens, np.zeros(tokens.shape, dtype=np.bool_))


def write_prompts(
    cluster: Cluster, request: Conversations, count: int
) -> tuple[tuple[int, ...], ...]:
    """Let the model write prompts: users' turns with the chat template around them.

    Args:
        cluster: with loaded workers.
        request: of conversations whose turns the model writes.
        count: how many prompts.

    Returns:
        Tokens of so many prompts, or of fewer where others came twice, were in a loop, or had
        special tokens.
    """
    return _Writer(cluster, request).prompts(count)


@dataclass(frozen=True)
class Conversation:
    """One conversation, all tokens of the chat template included."""

    tokens: tuple[int, ...]
    answer: slice  # places of the answer, with the token that ends it


def pack(conversations: Sequence[Conversation], num_sequences: int, length: int) -> WrittenText:
    """Lay conversations one after the other into windows.

    Every window begins with the beginning of a conversation; the last one in it is cut where the
    window ends.

    Args:
        conversations: in their order.
        num_sequences: windows, at most.
        length: T, tokens of a window.

    Returns:
        The windows that are full.
    """
    tokens = np.zeros((num_sequences, length), dtype=np.int64)
    answers = np.zeros((num_sequences, length), dtype=np.bool_)
    window = place = 0
    for conversation in conversations:
        if window == num_sequences:
            break
        part = conversation.tokens[: length - place]
        tokens[window, place : place + len(part)] = part
        answer = conversation.answer
        answers[window, place + answer.start : place + answer.stop] = True  # numpy cuts it
        place += len(part)
        if place == length:
            window += 1
            place = 0
    return WrittenText(tokens[:window], answers[:window])


@dataclass(frozen=True)
class _Asked:
    """What an answer is written for."""

    tokens: tuple[int, ...]  # before the answer
    answer: tuple[int, ...] | None = None  # if it is given


class _Writer:
    """Conversations in the making."""

    def __init__(self, cluster: Cluster, request: Conversations) -> None:
        self._cluster = cluster
        self._request = request
        self._marks = request.marks
        self._conversations: list[Conversation] = []
        self._asked: list[_Asked] = []  # not answered yet
        self._of_file = self._prompts()
        self._seen: set[tuple[int, ...]] = set()
        self._num_turns = 0  # of users, written
        self._num_used_turns = 0
        self._num_answers = 0

    def windows(self) -> WrittenText:
        """Write until all windows are full.

        Raises:
            RuntimeError: too few conversations come out.
            ValueError: the file of prompts does not suffice.
        """
        request = self._request
        for number in range(MAX_ROUNDS):
            if not (missing := self._num_missing()):
                break
            needed = self._num_needed(missing)
            more = needed - len(self._asked)
            if more > 0 and request.prompts is None:
                self._write_turns(more, number)
            elif more > 0:
                self._take_prompts(more)
            needed = self._num_needed(missing)  # the lengths of turns are known now
            is_short = request.prompts is None and 2 * len(self._asked) < needed
            if is_short and number < MAX_ROUNDS - 1:
                continue  # few answers take as many steps as many
            now = self._asked[:needed]
            self._asked = self._asked[needed:]
            self._write_answers(now, number)
        if not (missing := self._num_missing()):
            return self._packed()
        raise RuntimeError(
            f"{request.where}: after {MAX_ROUNDS} rounds, {self._num_used_turns} of "
            f"{self._num_turns} users' turns and {len(self._conversations)} of {self._num_answers} "
            "answers were of use (others came twice, were in a loop or had special tokens), and "
            f"{missing} of {request.num_sequences} windows are not full; change temperature, give "
            "prompts, or give another text in place of this one"
        )

    def prompts(self, count: int) -> tuple[tuple[int, ...], ...]:
        """Write users' turns until there are enough, or no more come; return them as prompts."""
        for number in range(MAX_ROUNDS):
            if len(self._asked) >= count:
                break
            self._write_turns(count - len(self._asked), number)
        return tuple(prompt.tokens for prompt in self._asked[:count])

    def _packed(self) -> WrittenText:
        request = self._request
        return pack(self._conversations, request.num_sequences, request.sequence_length)

    def _num_missing(self) -> int:
        """Return how many windows are not full."""
        return self._request.num_sequences - len(self._packed().tokens)

    def _num_needed(self, missing: int) -> int:
        """Return how many answers are to be written to fill so many windows."""
        length = self._request.sequence_length
        each = self._mean_tokens()
        useful = _usual(len(self._conversations), self._num_answers, _YIELD_OF_ANSWERS)
        tokens = missing * (length + each / 2)  # half a conversation is cut off at the end
        return max(4, math.ceil(_MARGIN * tokens / each / useful))

    def _mean_tokens(self) -> float:
        """Return how many tokens a conversation has, as far as is known."""
        if self._conversations:
            return float(np.mean([len(c.tokens) for c in self._conversations]))
        request = self._request
        if self._asked:
            before = float(np.mean([len(asked.tokens) for asked in self._asked]))
        elif request.prompts is not None:
            before = float(np.mean([len(prompt.tokens) for prompt in request.prompts]))
        else:
            marks = request.sequence_length - request.room
            before = marks + _USUAL_TURN * request.turn_tokens
        return min(before + _USUAL_ANSWER * ANSWER_TOKENS, request.sequence_length)

    def _write_turns(self, count: int, number: int) -> None:
        """Let the model write users' turns, and keep those that make sense."""
        request = self._request
        useful = _usual(self._num_used_turns, self._num_turns, _YIELD_OF_TURNS)
        count = max(_FEWEST_TURNS, math.ceil(count / useful))
        ends = self._marks.ends_of_turn
        prompts = (self._marks.opening,) * count
        seed = _seed(request.seed, number, 0)
        wanted = Wanted(prompts, request.turn_tokens + 1, request.temperature, seed, ends)
        self._num_turns += count
        for text in write_texts(self._cluster, wanted):
            # one that has not ended is cut: models of code paste long pieces of it
            turn = tuple(text[:-1].tolist())
            if self._is_turn(turn) and turn not in self._seen:
                self._seen.add(turn)
                self._num_used_turns += 1
                self._asked.append(_Asked((*self._marks.opening, *turn, *self._marks.closing)))

    def _is_turn(self, turn: Sequence[int]) -> bool:
        enough = len(turn) >= _FEWEST_TURN_TOKENS
        return enough and self._marks.special.isdisjoint(turn) and not repeats(turn)

    def _take_prompts(self, count: int) -> None:
        """Take prompts of the file, some of them again with other draws if there are too few.

        Raises:
            ValueError: the file does not suffice.
        """
        for _ in range(count):
            if (prompt := next(self._of_file, None)) is None:
                break
            self._asked.append(_Asked(prompt.tokens, prompt.answer))
        if not self._asked:
            tokens = sum(len(c.tokens) for c in self._conversations)
            needed = self._request.num_sequences * self._request.sequence_length
            raise ValueError(
                f"{self._request.where}.prompts: {len(self._request.prompts or ())} prompts gave "
                f"{len(self._conversations)} conversations of {tokens} tokens, but the windows "
                f"need {needed} and what is cut off at their ends; give more prompts or fewer "
                "num_sequences"
            )

    def _prompts(self) -> Iterator[Prompt]:
        """Yield the prompts of the file in a drawn order, and those without an answer again."""
        prompts = self._request.prompts or ()
        order = np.random.default_rng(self._request.seed).permutation(len(prompts))
        drawn = [prompts[i] for i in order]
        yield from drawn
        again = [prompt for prompt in drawn if prompt.answer is None]
        while again and self._request.temperature:
            yield from again

    def _write_answers(self, prompts: Sequence[_Asked], number: int) -> None:
        """Let the model answer what has no answer, and keep the conversations that make sense."""
        request = self._request
        open_ones = [prompt.tokens for prompt in prompts if prompt.answer is None]
        ends = self._marks.ends_of_answer
        wanted = Wanted(
            tuple(open_ones),
            ANSWER_TOKENS,
            COOLER * request.temperature,
            _seed(request.seed, number, 1),
            ends,
            max_length=request.sequence_length,
        )
        written = iter(write_texts(self._cluster, wanted))
        for prompt in prompts:
            answer = prompt.answer if prompt.answer is not None else tuple(next(written).tolist())
            self._num_answers += 1
            has_ended = answer[-1:] and answer[-1] in ends
            said = answer[:-1] if has_ended else answer
            if prompt.answer is None and (not said or repeats(said) or not self._is_text(said)):
                continue
            tail = self._marks.end[1:] if answer[-1:] == self._marks.end[:1] else ()
            start = len(prompt.tokens)
            answer_places = slice(start, start + len(answer))
            self._conversations.append(
                Conversation((*prompt.tokens, *answer, *tail), answer_places)
            )

    def _is_text(self, tokens: Sequence[int]) -> bool:
        return self._marks.special.isdisjoint(tokens)


def _usual(num_used: int, num_written: int, guess: float) -> float:
    """Return which part of what is written is of use, a guess if nothing was written yet."""
    return max(_LOWEST_YIELD, num_used / num_written) if num_written else guess


def _seed(seed: int, number: int, part: int) -> int:
    """Return a seed for a part of a round, 0 for turns and 1 for answers."""
    return int(np.random.SeedSequence([seed, number, part]).generate_state(1)[0])


# What is kept of it


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
