"""The section of a job spec on recovery: training after pruning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from ray_surgeon.config.base import Positive, Section, tag
from ray_surgeon.config.numbers import Count, CountOrZero
from ray_surgeon.config.sections import ModelSection
from ray_surgeon.config.texts import StreamedSection

_Rank = Annotated[
    Annotated[int, Field(ge=1, le=4096), Tag(tag("rank"))]
    | Annotated[Literal["all"], Tag(tag("all"))],
    Discriminator(lambda value: tag("all" if isinstance(value, str) else "rank")),
]


class RecoverySection(Section):
    """Training after pruning, towards the dense model.

    By default, low-rank corrections of all linears are trained and then absorbed.
    """

    rank: _Rank = 32
    """Rank of the trained product B A of every linear, which is absorbed at the end; or `all`: all
    weights of the blocks are trained, which stay on the device. Embeddings, the last norm and the
    head do not change, so that tied weights stay tied and both models have the same head
    """
    num_tokens: Count = 65_536
    """Number of training tokens after the last shot, or of each size, rounded up to whole steps: a
    number, or for example 100k or 2M
    """
    num_tokens_between_shots: CountOrZero = 0
    """Number of training tokens after every other shot, as in the paper; a number, or for example
    100k
    """
    texts: tuple[StreamedSection, ...] = ()
    """Texts of the training, read while it runs. The dense model processes them too. If empty: the
    calibration windows, repeatedly
    """
    teacher: ModelSection | None = None
    """The model to train towards, with the same vocabulary, if pruning is null; null: the dense
    model of this job
    """
    loss: Literal["kl", "cross_entropy"] = "kl"
    """Loss of the training: the divergence from the dense model (kl), which restores lost
    abilities, or the cross-entropy of the text (cross_entropy), which also teaches the text
    """
    learning_rate: float | None = Field(None, gt=0, le=1)
    """Adam's largest learning rate, relative to the root mean square of each weight; after a short
    warm-up it falls linearly to zero. null: the highest of three rates with harmless first steps on
    the windows held aside; it is halved if these get worse later
    """
    sequences_per_step: Positive = 2
    """Number of sequences per step"""
    commit_minutes: float = Field(30.0, gt=0)
    """Minutes between two commits of the training's state, from which a run resumes; may differ on
    --resume
    """
    seed: int = Field(0, ge=0)
    """Seed of the initial A, and of the order of the sequences"""

    @property
    def has_teacher(self) -> bool:
        """Whether the dense model is loaded during the training of the pruned one."""
        return bool(self.texts) and self.loss == "kl"

    @property
    def sees_calibration(self) -> bool:
        """Whether the training needs the dense model's states of the calibration text."""
        return self.loss == "kl" and not self.texts

    @property
    def trains_all(self) -> bool:
        """Whether all weights are trained, instead of low-rank corrections."""
        return self.rank == "all"

    def num_steps(self, sequence_length: int, *, ends: bool = True) -> int:
        """Return the number of steps after a shot, with `ends` if it reaches a requested size."""
        num_tokens = self.num_tokens if ends else self.num_tokens_between_shots
        return -(-num_tokens // (self.sequences_per_step * sequence_length))
