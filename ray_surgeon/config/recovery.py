"""The section of a job spec on recovery: training after pruning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from ray_surgeon.config.base import Positive, Section, tag
from ray_surgeon.config.sections import ModelSection
from ray_surgeon.config.texts import StreamedSection

_Rank = Annotated[
    Annotated[int, Field(ge=1, le=4096), Tag(tag("rank"))]
    | Annotated[Literal["all"], Tag(tag("all"))],
    Discriminator(lambda value: tag("all" if isinstance(value, str) else "rank")),
]


class RecoverySection(Section):
    """Training after pruning, towards the dense model.

    Low-rank corrections beside every linear are the smallest setting; they are absorbed.
    """

    rank: _Rank = 32
    """What is trained: a product B A of this rank beside every linear, which is absorbed; or all
    weights of the blocks, which stay on the device. Embeddings, the last norm and the head stay as
    they are, so that tied ones stay tied and the dense model's head is the pruned one's, too
    """
    num_tokens: Positive = 65_536
    """Tokens of the training after the last shot, or of each size, rounded up to whole steps"""
    num_tokens_between_shots: int = Field(0, ge=0)
    """Likewise after every other shot, as in the paper"""
    texts: tuple[StreamedSection, ...] = ()
    """Texts of the training, read while it goes on; none: the calibration's windows, again and
    again. The dense model sees them beside the pruned one
    """
    teacher: ModelSection | None = None
    """The model to train towards, of the same vocabulary, where pruning is null; null: the dense
    model of this job
    """
    loss: Literal["kl", "cross_entropy"] = "kl"
    """What is lowered on the text: the divergence from the dense model (kl), which recovers what
    pruning took, or the loss (cross_entropy), which also teaches the text
    """
    learning_rate: float | None = Field(None, gt=0, le=1)
    """Largest learning rate of Adam, relative to the root mean square of each weight; it rises
    shortly, then falls to zero. null: the highest of three whose first steps do no harm on the
    windows held aside; it is halved where they get worse later
    """
    sequences_per_step: Positive = 2
    """Sequences of one step"""
    commit_minutes: float = Field(30.0, gt=0)
    """Minutes between two commits of the training's state, from which a run goes on; may differ
    when it does
    """
    seed: int = Field(0, ge=0)
    """Seed of A at the start, and of the order of the sequences"""

    @property
    def has_teacher(self) -> bool:
        """Whether the dense model is beside the pruned one while it is trained."""
        return bool(self.texts) and self.loss == "kl"

    @property
    def sees_calibration(self) -> bool:
        """Whether the training needs the dense model's states of the calibration text."""
        return self.loss == "kl" and not self.texts

    @property
    def trains_all(self) -> bool:
        """Whether all weights are trained, not low-rank corrections."""
        return self.rank == "all"

    def num_steps(self, sequence_length: int, *, ends: bool = True) -> int:
        """Return how many steps are made after a shot, which ends at a size asked for or not."""
        num_tokens = self.num_tokens if ends else self.num_tokens_between_shots
        return -(-num_tokens // (self.sequences_per_step * sequence_length))
