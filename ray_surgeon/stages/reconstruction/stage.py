"""What the reconstruction of layers needs and did; its work is in curvature pass and update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ray_surgeon.maths.reconstruction import TOKENS_AT_A_TIME
from ray_surgeon.models.layout import LinearShape
from ray_surgeon.plan.needs import Beside, StepPlan, WorkerView
from ray_surgeon.stages.prune.groups import Groups
from ray_surgeon.stages.prune.method import Method
from ray_surgeon.stages.reconstruction.layers import errors_of, summary_of
from ray_surgeon.stages.reconstruction.section import ReconstructionSection
from ray_surgeon.stages.stage import Facts, RunState, Stage


@dataclass(frozen=True)
class ReconstructionStage(Stage):
    """Layers are trained in the update, where the weights from before are still there."""

    name: ClassVar[str] = "reconstruction"
    section: ReconstructionSection
    kinds: frozenset[str]  # of the groups whose layers are trained
    # sequences that pass backward in the curvature pass, 0 if none do, None if all do
    num_backward: int | None

    @staticmethod
    def of(method: Method) -> ReconstructionStage | None:
        """Return the stage if a method reconstructs layers."""
        if not isinstance(method, Groups) or method.reconstruction is None:
            return None
        curvature = method.used_curvature
        num_backward = 0 if curvature.gathers == "A" else curvature.sequences_backward
        reconstruction = method.reconstruction
        return ReconstructionStage(reconstruction.section, reconstruction.kinds, num_backward)

    def run(self, run: RunState, facts: Facts) -> None:
        """Report which layers the update trained, and their errors held aside."""
        of_workers = run.cluster.run_all(errors_of)
        errors = {name: pair for own in of_workers for name, pair in own.of_layer.items()}
        rate = max(own.rate for own in of_workers)
        run.record |= {"reconstruction": errors, "reconstruction_rate": rate}
        facts |= {"rate": rate, **summary_of(errors)}

    # For the plan

    def layers(self, worker: WorkerView) -> list[LinearShape]:
        """Return the last linears of the layers of a worker that are trained."""
        sets = worker.shapes.layout.group_sets
        consumers = {groups.consumer for groups in sets if groups.kind in self.kinds}
        return [linear for linear in worker.linears if linear.name in consumers]

    def needs(self, worker: WorkerView) -> Iterable[StepPlan]:
        """Return the training of one layer at a time, with inputs and outputs of all tokens."""
        layers = self.layers(worker)
        if not layers:
            return
        width = worker.shapes.width
        hidden = worker.hidden_size
        tokens = worker.num_sequences * worker.sequence_length
        sizes = self._sizes(worker, layers)
        # hidden entries: forward alone, or backward, too
        together = max(4 * TOKENS_AT_A_TIME, 7 * min(tokens, self.section.tokens_per_step))
        widest = max(linear.num_columns for linear in layers)
        at_a_time = together * (width * widest + 4 * hidden)
        # and the consumer that is returned
        states = max(sizes) * (28 + 2 * width) + 4 * max(linear.size for linear in layers)
        device = worker.idle + states + tokens * hidden * (2 + 2 * width) + at_a_time
        factors = worker.all_factors / worker.num_replicas
        device += factors * (worker.stores.factors == "device")
        # whole, and in every epoch left, its weights' gradients and those of the hidden entries
        epochs = self.section.num_epochs
        of_owners = dict.fromkeys(range(worker.num_replicas), 0)
        for size, linear in zip(sizes, layers, strict=True):
            of_token = 2 * size + epochs * (4 * size + 2 * linear.size)
            of_owners[worker.owners[linear.name]] += of_token
        yield StepPlan("update", device, worker.host, tokens * max(of_owners.values()))

    def _sizes(self, worker: WorkerView, layers: list[LinearShape]) -> list[int]:
        """Return the parameters of each layer, a fused producer's once."""
        layout = worker.shapes.layout
        of_layer: dict[str, int] = {}
        for groups in layout.group_sets:
            if groups.kind in self.kinds:
                names = {groups.consumer, *(name for name, _ in groups.producers)}
                of_layer[groups.consumer] = sum(layout.shapes[name].size for name in names)
        return [of_layer[linear.name] for linear in layers]

    def beside(self, worker: WorkerView) -> Mapping[str, Beside]:
        """Return the inputs of layers, bfloat16, from the curvature pass to the update."""
        owners = [worker.owners[linear.name] for linear in self.layers(worker)]
        tokens = worker.num_sequences * worker.sequence_length
        of_layer = 2.0 * tokens * worker.hidden_size
        moving = Beside(host=of_layer * self._layers_at_once(worker, owners))
        kept = Beside(host=of_layer * max(map(owners.count, owners), default=0))
        return {"curvature": moving, "costs": kept, "search": kept, "update": kept}

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
        most = 0.0
        for replica in range(N):
            for number in range(len(owners)):
                own = owners[: number + 1].count(replica)
                # one part more is on its way
                most = max(most, own + (len(owners) - number + 1) * part)
        return most
