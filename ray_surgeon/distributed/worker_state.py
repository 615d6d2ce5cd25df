"""The state that the steps of a worker leave for its later steps, in typed fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.nn.utils.rnn import pad_sequence

from ray_surgeon.maths.factorised import RaisedDamping
from ray_surgeon.maths.group_batch import GroupResult, KeptFactors
from ray_surgeon.maths.kronecker import PackedFactors
from ray_surgeon.memory.stores import Scratch
from ray_surgeon.models.hooks import LayerInputs
from ray_surgeon.models.loss import next_tokens
from ray_surgeon.models.runner import BlockRunner, Call
from ray_surgeon.models.shard import ModelShard


class Teacher(NamedTuple):
    """A second model beside the worker's own."""

    shard: ModelShard
    runner: BlockRunner
    scratch: Scratch


class TextBatch:
    """Texts that are being written together, a row each."""

    def __init__(
        self,
        shard: ModelShard,
        runner: BlockRunner,
        prompts: Sequence[Sequence[int]],
        chances: Sequence[Tensor],
        temperature: float,
    ) -> None:
        """Begin texts.

        Args:
            shard: that writes.
            runner: of its blocks.
            prompts: tokens of each text's prompt.
            chances: for each text [num_tokens] in [0, 1), by which its tokens are drawn.
            temperature: of the distribution that tokens are drawn from; 0 takes the likeliest.
        """
        self.cache = runner.new_cache()  # keys and values of all tokens so far
        self.num_tokens = 0  # so far, prompts included
        if not shard.blocks.is_last:
            return
        # what the last shard needs to choose the next tokens: [m, longest prompt] int64, zeros
        # after shorter ones; [m] int64; and [m, num_tokens]
        tokens = [torch.tensor(prompt) for prompt in prompts]
        self._prompts = pad_sequence(tokens, batch_first=True).to(shard.device)
        self._lengths = torch.tensor(
            [len(prompt) for prompt in tokens], device=shard.device
        )
        self._chances = torch.stack(list(chances)).to(shard.device)
        self._temperature = temperature

    def keep_rows(self, shard: ModelShard, runner: BlockRunner, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.cache.batch_select_indices(rows)
        kept = runner.new_cache()  # one that has no room set aside for the rows before
        kept.layers = self.cache.layers
        self.cache = kept
        if shard.blocks.is_last:
            self._prompts = self._prompts[rows]
            self._lengths = self._lengths[rows]
            self._chances = self._chances[rows]

    def choose(self, shard: ModelShard, hidden: Tensor) -> Tensor:
        """Return the tokens [m] that follow, after the last hidden states [m, d] before them."""
        position = self.num_tokens
        own = (position - self._lengths).clamp(0, self._chances.shape[1] - 1)
        chances = self._chances.gather(1, own[:, None])[:, 0]
        drawn = next_tokens(hidden, shard.head_weight, chances, self._temperature)
        if position >= self._prompts.shape[1]:
            return drawn
        return torch.where(position < self._lengths, self._prompts[:, position], drawn)


class DenseStates(dict[str, dict[int, Tensor]]):
    """Last hidden states of the dense model, in the memory of the last shard's host.

    Text -> number of a sequence -> [1, T, d].
    """

    head: Tensor | None = None
    """Weight [vocabulary, d] of its head, on the device, if it is not that of the pruned one."""


class LinearFit:
    """Sums over tokens by which a linear learns what a removed layer added.

    See `ray_surgeon.maths.folding.folded`.
    """

    def __init__(self, num_rows: int, num_columns: int, device: torch.device) -> None:
        """Begin with zeros."""
        self.A = torch.zeros(num_columns, num_columns, device=device)
        self.D = torch.zeros(num_rows, num_columns, device=device)
        self.inputs = dict[
            int, Tensor
        ]()  # number of a sequence -> [T, C], until it is summed
        self.before: Tensor | None = None  # the linear [R, C] before it learned


class Trainee(Protocol):
    """The trained parts on a worker by name, each of which has an owner among the replicas."""

    rounds: bool  # whether outputs are those of the weights after the training, in their dtype

    def tensors(self, name: str) -> list[Tensor]:
        """Return the tensors of a part, which its owner sends to the others after a step."""

    def gradients(self, name: str, num_tokens: int) -> list[Tensor]:
        """Return the gradients of the mean loss at a part, and keep them for the step."""

    def step(self, rate: float) -> None:
        """Make a step with the gradients of the owned parts, and forget all gradients."""

    def state(self) -> dict[str, Tensor]:
        """Return everything that steps change here, by name; not copied.

        A name is that of the part, or begins with it and a dot or space, as in ``part.A moment``.
        """

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to a state, maybe of another worker with these parts, from which steps go on.

        The tensors stay untouched.
        """

    def best(self) -> dict[str, Tensor]:
        """Return a copy of what is needed to go back to the present weights, by such names."""

    def back_to(self, best: Mapping[str, Tensor]) -> None:
        """Go back to the weights of what `best` returned."""

    def remove(self) -> None:
        """End the training; the weights are as they were before it."""

    def absorb(self) -> dict[str, tuple[float, float]]:
        """End the training; the weights are the trained ones.

        Returns:
            Name -> <change, wanted change> and |wanted change|^2.
        """


@dataclass
class TrainingState:
    """The training on a worker."""

    trainee: Trainee
    owners: Mapping[str, int]  # part -> the replica that owns it
    best: dict[str, Tensor] | None = None  # what `Trainee.best` returned


@dataclass
class WorkerState:
    """The state that the steps of a worker leave for its later steps.

    Steps free what nobody reads any more.
    """

    meeting: TCPStore | None = None
    """Where all workers meet, on the one that has opened it"""
    dense_states: DenseStates = field(default_factory=DenseStates)
    """States that later weights are compared with, on workers with the last shard"""
    teacher: Teacher | None = None
    """The model to train towards, where it is beside the worker's own"""
    writing: dict[int, TextBatch] = field(default_factory=dict)
    """Number -> batch of texts that the model writes"""
    waiting: dict[int, Tensor] = field(default_factory=dict)
    """Number -> micro-batch [n, T, d] that passes the shard block by block, all of one shape"""
    calls: list[Call] = field(default_factory=list)
    """Of the blocks, with the micro-batches that wait"""

    # Of a shot
    held_factors: dict[str, PackedFactors] = field(default_factory=dict)
    """Linear -> its factors of the windows held aside"""
    further_terms: Any = None
    """State of further curvature passes that an experimental `CurvatureKind` makes, until the
    update
    """
    candidates: dict[str, Any] = field(default_factory=dict)
    """Owned linear -> `Candidates` of rows and columns or `ElementCandidates`, until the update"""
    group_costs: dict[str, GroupResult] = field(default_factory=dict)
    """Owned consumer -> its basis and the marginal costs of its groups, until the update"""
    factors: KeptFactors | None = None
    """Factorised A of owned consumers, while their greedy paths are followed"""
    raised_damping: list[RaisedDamping] = field(default_factory=list)
    """Of owned linears that are pruned block after block"""
    layer_inputs: list[LayerInputs] = field(default_factory=list)
    """Of the layers that are reconstructed: of the windows they are trained on, then of those held
    aside, if there are any; from the curvature pass until they are trained
    """
    layer_errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Consumer of a reconstructed layer -> mean loss held aside before and after"""
    influences: dict[int, float] = field(default_factory=dict)
    """Block -> sum over tokens of 1 minus the cosine between its inputs and outputs"""
    fit: LinearFit | None = None
    """Of the linear that takes over from a removed layer"""
    training: TrainingState | None = None

    # Of exports, for owned linears
    rounded_scales: dict[str, Tensor] = field(default_factory=dict)
    """Linear -> [R, groups] scales of the rounded weights that are left"""
    mean_squares: dict[str, Tensor] = field(default_factory=dict)
    """Linear -> [C] mean squares of the inputs that are left"""
