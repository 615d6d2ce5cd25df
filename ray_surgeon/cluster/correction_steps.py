"""The part of a worker that trains low-rank corrections."""

from __future__ import annotations

from ray_surgeon.cluster.messages import LowRankOptions
from ray_surgeon.cluster.state import ShardState
from ray_surgeon.models.low_rank import LowRankCorrections


class CorrectionSteps(ShardState):
    """Called in the order of `steps.train_corrections`."""

    _corrections: LowRankCorrections | None = None

    def start_corrections(self, options: LowRankOptions) -> None:
        """Put B A beside every linear; see `LowRankCorrections`."""
        seeds = {name: options.seed + self.number_of[name] for name in self.shard.linears}
        self._corrections = LowRankCorrections(
            self.shard, self.masks, set(self.owned()), rank=options.rank, learning_rate=options.learning_rate, seed_of=seeds
        )

    def step_corrections(self, num_tokens: int) -> None:
        """Sum the gradients to the owners, make a step of the optimizer there, and send the result to the replicas."""
        corrections = self._corrections
        assert corrections is not None
        for name in self.shard.linears:
            for gradient in corrections.gradients(name, num_tokens):
                self.replicas.reduce(gradient, self.owner(name))
        corrections.step()
        for name, part in corrections.parts.items():
            for parameter in (part.A, part.B):
                self.replicas.broadcast(parameter.detach(), self.owner(name))

    def absorb_corrections(self) -> None:
        """Add every B A to its weight."""
        assert self._corrections is not None
        self._corrections.absorb()
        self._corrections = None
