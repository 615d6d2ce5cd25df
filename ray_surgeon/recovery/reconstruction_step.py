"""The stage of the reconstruction of layers: its needs and its report.

The work itself is done in the curvature pass and in the update.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable

from ray_surgeon.maths.reconstruction import TOKENS_AT_A_TIME
from ray_surgeon.models.layout import LinearShape
from ray_surgeon.plan.counts import NOTHING, Counted, StepPlan
from ray_surgeon.plan.estimate import WorkerView
from ray_surgeon.recovery.reconstruction import (
    RATES,
    TRIAL_PART,
    Reconstruction,
    layer_errors,
)
from ray_surgeon.run_state import Facts, RunState, Stage

_STEP = 32
"""Launches of a step of a training."""
_LAYER = 124
_SYNCS_OF_LAYER = 15
"""Launches and syncs of a layer's training beside its steps: its errors, and its weights."""
_STEP_BYTES = (40.0, 24.0)
"""Bytes of a step for a parameter, in float32 and in a narrower dtype: Adam's, gradients, products.
"""
_HIDDEN = 7.0
_WIDE = 15.0
"""Entries that pass the memory for each of a token's hidden states and channels."""


class ReconstructionStage(Reconstruction, Stage):
    """Trains layers in the update, while the weights from before the shot are still there."""

    name = "reconstruction"

    def report(self, run: RunState, facts: Facts) -> None:
        """Report which layers the update trained, and their errors held aside."""
        errors = dict[str, tuple[float, float]]()
        for of_worker in run.cluster.run_all(layer_errors):
            errors.update(of_worker)
        rate = 0.0
        if errors:
            rate = run.record["reconstruction_rate"]
        run.record["reconstruction"] = errors
        run.record["reconstruction_rate"] = rate
        num_trained = 0
        better = []  # errors after the training relative to those before, where they fell
        for before, after in errors.values():
            if before > 0:
                num_trained += 1
                if after < before:
                    better.append(after / before)
        num_undone = num_trained - len(better)
        ratio = 1.0
        if num_trained:
            ratio = (sum(better) + num_undone) / num_trained
        facts["rate"] = rate
        facts["layers"] = num_trained
        facts["layers undone"] = num_undone
        facts["error held aside"] = ratio

    # For the plan

    def _layers(self, worker: WorkerView) -> dict[LinearShape, int]:
        """Return the last linears of the layers of a worker that are trained.

        Each has the parameters of its layer, a fused producer's once.
        """
        layout = worker.shapes.layout
        sets = [groups for groups in layout.group_sets if groups.kind in self.kinds]
        layers = {g.consumer: {g.consumer, *(name for name, _ in g.producers)} for g in sets}
        sizes = {name: sum(layout.shapes[n].size for n in layer) for name, layer in layers.items()}
        return {linear: sizes[linear.name] for linear in worker.linears if linear.name in sizes}

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the training of one layer at a time, with inputs and outputs of all tokens."""
        sizes = self._layers(worker)
        if not sizes:
            return
        section = self.section
        width = worker.shapes.width
        hidden = worker.hidden_size
        tokens = worker.num_sequences * worker.sequence_length
        # hidden entries: forward alone, or backward, too
        together = max(4 * TOKENS_AT_A_TIME, 7 * min(tokens, section.tokens_per_step))
        widest = max(linear.num_columns for linear in sizes)
        at_a_time = together * (width * widest + 4 * hidden)
        # float32: the whole layer, what is left of it, weights, gradients and two moments; narrow
        # ones take as much; and the consumer that is returned
        states = max(sizes.values()) * 24 + 4 * max(linear.size for linear in sizes)
        device = worker.idle + states + tokens * hidden * (2 + 2 * width) + at_a_time
        device += worker.all_factors / worker.num_replicas * (worker.stores.factors == "device")
        # whole, and in every epoch left, its weights' gradients and those of the hidden entries
        of_owners = collections.defaultdict[int, float](float)
        counts = dict.fromkeys(worker.owners.values(), NOTHING)
        for linear, size in sizes.items():
            of_token = 2 * size + section.num_epochs * (4 * size + 2 * linear.size)
            owner = worker.owners[linear.name]
            of_owners[owner] += of_token
            counts[owner] += self._counts(worker, linear, size, section.num_epochs)
        slowest = max(of_owners, key=lambda owner: of_owners[owner])
        if section.learning_rate is None:
            first, size = next(iter(sizes.items()))
            num_layers = min(2, len(sizes))  # whose dense outputs serve all rates
            num_trials = len(RATES) * num_layers
            counts[slowest] += self._counts(worker, first, size, TRIAL_PART).times(num_trials)
            trained = TRIAL_PART * (4 * size + 2 * first.size)
            of_owners[slowest] += num_layers * 2 * size + num_trials * trained
        flops = tokens * of_owners[slowest]
        yield StepPlan("update", device, worker.host, flops, counts=counts[slowest])

    def _counts(
        self, worker: WorkerView, linear: LinearShape, size: int, num_epochs: float
    ) -> Counted:
        """Return the counts of the training of one layer, with so many parameters."""
        tokens = worker.num_sequences * worker.sequence_length
        num_steps = max(1, int(num_epochs * (tokens // min(tokens, self.section.tokens_per_step))))
        entries = _HIDDEN * worker.hidden_size + _WIDE * linear.num_columns
        passed = (1 + num_epochs) * tokens * worker.shapes.width * entries
        counts = Counted(_LAYER, _SYNCS_OF_LAYER, passed)
        counts += Counted(_STEP, 0, _STEP_BYTES[worker.shapes.width < 4] * size).times(num_steps)
        # the inputs of all replicas come to the owner
        inputs = 2.0 * tokens * worker.hidden_size * (worker.num_replicas > 1)
        return counts + Counted(sent_bytes=inputs)

    def beside(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the inputs of layers, bfloat16, from the curvature pass to the update."""
        owners = [worker.owners[linear.name] for linear in self._layers(worker)]
        of_layer = 2.0 * worker.num_sequences * worker.sequence_length * worker.hidden_size
        kept = of_layer * max(map(owners.count, owners), default=0)
        yield StepPlan("curvature", 0.0, of_layer * self._layers_at_once(worker, owners))
        yield from (StepPlan(name, 0.0, kept) for name in ("costs", "update"))

    def _layers_at_once(self, worker: WorkerView, owners: list[int]) -> float:
        """Return of how many layers a replica has the inputs at most.

        These are a part of those that are not sent yet, and all of its own.
        """
        N = worker.num_replicas
        if N == 1:
            return len(owners)
        total = worker.num_sequences
        backward = total if self.num_backward is None else self.num_backward
        part = (-(-backward // N) + -(-(total - backward) // N)) / total
        places = range(1, len(owners) + 1)
        own = [max(collections.Counter(owners[:place]).values()) for place in places]
        # one part more is on its way
        at_once = (count + (len(own) - number + 1) * part for number, count in enumerate(own))
        return max(at_once, default=0.0)
