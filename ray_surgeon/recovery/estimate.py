"""What a recovery needs on a worker, for the plan.

It is trained in steps, checked on the windows held aside, and the dense model, where it is beside
the pruned one, sees the sequences of some steps at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ray_surgeon.plan.counts import ADAM_BYTES, Counted, StepPlan
from ray_surgeon.plan.estimate import WorkerView
from ray_surgeon.recovery.batches import steps_ahead
from ray_surgeon.recovery.rates import steps_between_checks, trial_steps
from ray_surgeon.runtime.collectives import MESSAGE_BYTES
from ray_surgeon.spec.recovery import RecoverySection

# each of corrections, a part for a linear; and of all weights, a part for a parameter
_PRODUCTS = (9, 2)
"""Launches of B A x forward and backward beside a linear's own; of a weight's gradient, its sum."""
_STEP = (14, 8)
"""Launches of an optimizer's step for a part."""
_START = (28, 10)
_SYNCS_OF_START = (4, 5)
"""Launches and syncs for a part at the start and the end."""
_STEP_BYTES = 4.0
"""Of a weight in float32 while it makes a step: its gradient."""
_PASS_BYTES = 16.0
"""Of a product B A and its copies, for an entry."""


class RecoveryNeeds:
    """A recovery on one worker."""

    def __init__(
        self, section: RecoverySection, num_held: int, worker: WorkerView, *, by_element: bool
    ) -> None:
        """Count what is trained.

        Args:
            section: of the recovery.
            num_held: windows held aside.
            worker: that trains.
            by_element: whether masks are of elements.
        """
        self._section = section
        self._num_held = num_held
        self._worker = worker
        self._by_element = by_element
        self._trains_all = section.rank == "all"
        self._entries = worker.all_blocks / worker.shapes.width  # that are trained
        layout = worker.shapes.layout
        self._names = layout.parameters_of(worker.blocks)
        self._num_parts = sum(layout.block_of(name) is not None for name in self._names)
        if section.rank != "all":
            sizes = [linear.num_rows + linear.num_columns for linear in worker.linears]
            self._entries = float(section.rank * sum(sizes))
            self._num_parts = len(sizes)
        self._size = section.sequences_per_step
        self._per_step = -(-self._size // worker.num_replicas)  # sequences of a replica
        self._runs = 1 + (worker.stores.activations == "recompute")
        self._num_steps = section.num_steps(worker.sequence_length)

    def steps(self, name: str) -> Iterable[StepPlan]:
        """Yield the parts of the step with this name, one after the other."""
        worker = self._worker
        T = worker.sequence_length
        # the second rate is taken most often, after the first one was tried
        tries = bool(self._num_held) and self._section.learning_rate is None
        num_steps = self._num_steps + trial_steps(self._num_steps) * tries
        parts = [(self._start(name), 1), (self._step(name), num_steps)]
        if self._num_held:
            num_checks = -(-self._num_steps // steps_between_checks(self._num_steps))
            num_checks += 1 + 2 * tries
            parts.append((worker.measuring(name, [(self._num_held, T)]), num_checks))
        if self._section.has_teacher:
            ahead = worker.measuring(name, [(self._num_ahead, T)], of_teacher=True)
            own = -(-self._num_ahead // worker.num_replicas)
            ahead = replace(ahead, bubble=worker.bubble(own, worker.stores.of_teacher))
            # those of a trial are seen again where they are many
            parts.append((ahead, -(-num_steps // steps_ahead(self._size))))
        device, host = self._kept()
        for part, number in parts:
            both = replace(part, device=part.device + device, host=part.host + host)
            yield both.times(number)

    def _kept(self) -> tuple[float, float]:
        """Return the bytes that stay while it goes on, on the device and on the host."""
        worker = self._worker
        device, host = self._trained()
        # on a CPU masks of elements are those of the host
        masks = sum(linear.size for linear in worker.linears) * self._by_element
        device += masks * (not worker.device_is_host)
        if self._section.has_teacher:
            place = worker.stores.teacher
            device += worker.outside + worker.all_blocks * (place == "device")
            host += worker.pinned_blocks * (place == "host")
            host += worker.remembered(self._num_ahead * worker.sequence_length)
        return device, host

    def _trained(self) -> tuple[float, float]:
        """Return the bytes of what is trained, on the device and on the host.

        For corrections these are A, B and gradients (between replicas one copy more), Adam's
        moments at a linear's owner, and the best state so far. For all weights, gradients; masters
        and moments at the owner, and of one block what a step makes of them; a message and its
        copy; and on the host the weights as they were, and the best so far.
        """
        worker = self._worker
        N = worker.num_replicas
        has_best = int(self._num_held > 0)
        if not self._trains_all:
            of_entry = 8 + (8 if N == 1 else 12 / N) + has_best * (4 + 8 / N)
            return of_entry * self._entries, 0.0
        is_on_device = worker.stores.factors == "device"
        # weights in float32 are their own masters
        has_masters = worker.shapes.width < 4 or not (is_on_device or worker.device_is_host)
        own = (8 + 4 * has_masters) * self._entries / N
        own += _STEP_BYTES * self._entries / worker.num_blocks
        copies = (1 + has_best) * worker.all_blocks
        device = worker.all_blocks + own * is_on_device + 2 * MESSAGE_BYTES * (N > 1)
        return device, copies + own * (not is_on_device)

    def _start(self, name: str) -> StepPlan:
        """Return what is done once, at the start and the end; the dense model is loaded."""
        worker = self._worker
        largest = max(linear.size for linear in worker.linears)
        product = 0.0 if self._trains_all else _PASS_BYTES * largest  # is absorbed
        of_part = Counted(_START[self._trains_all], _SYNCS_OF_START[self._trains_all])
        size = (worker.all_blocks + worker.outside) * self._section.has_teacher
        loads = len(self._names) * self._section.has_teacher
        moved = (0.0, 0.0, size * (not worker.device_is_host), size)
        counts = of_part.times(self._num_parts) + Counted(loads, loads, size)
        return StepPlan(name, worker.weights + product, worker.host, *moved, counts=counts)

    def _step(self, name: str) -> StepPlan:
        """Return one step of the training."""
        worker = self._worker
        T = worker.sequence_length
        columns = sum(linear.num_columns for linear in worker.linears)
        inputs = worker.shapes.width * columns / worker.num_blocks
        device = worker.weights + worker.passing(more_kept=inputs, num_sequences=self._per_step)
        if self._by_element and not self._trains_all:
            device += _PASS_BYTES * max(linear.size for linear in worker.linears)
        # forward and backward, to weights only where all are trained
        flops = 2 * worker.active * (1 + self._runs + self._trains_all)
        if not self._trains_all:
            flops += 2 * self._entries * (2 + self._runs)
        flops += worker.head_flops * (2 + (self._section.loss == "kl"))
        loads = 2 * -(-self._per_step // worker.stores.wave_of(self._per_step, worker.num_shards))
        moved, of_disk = worker.moved(worker.stores.weights, loads * worker.all_blocks)
        if self._trains_all and worker.stores.factors != "device":
            # gradients and weights; masters and moments pass the host's memory
            moved += (2 * worker.shapes.width + ADAM_BYTES) * self._entries / worker.num_replicas
        bubble = worker.bubble(self._per_step, worker.stores)
        host = worker.host + worker.travelling(T)
        sums = (flops * self._per_step * T, 0.0, moved, of_disk, bubble)
        return StepPlan(name, device, host, *sums, self._counts())

    def _counts(self) -> Counted:
        """Return what one step launches."""
        worker = self._worker
        N = worker.num_replicas
        per_step = self._per_step
        calls = -(-per_step // worker.stores.in_a_call(per_step, worker.num_shards))
        counts = worker.pass_counts(per_step, worker.sequence_length, self._runs, 1.0)
        launches = _PRODUCTS[self._trains_all] * calls * len(worker.linears)
        launches += _STEP[self._trains_all] * self._num_parts
        # of all weights, each block has an optimizer
        counts += Counted(launches, 1 + max(1, worker.num_blocks * self._trains_all), calls=2)
        # parameters and two moments, read and written; gradients and the result are sent
        adam = ADAM_BYTES * self._entries / (N if self._trains_all else 1)
        of_entry = 2.0 * worker.shapes.width if self._trains_all else 12.0
        return counts + Counted(memory_bytes=adam, sent_bytes=of_entry * self._entries * (N > 1))

    @property
    def _num_ahead(self) -> int:
        """Sequences that the dense model sees in one pass."""
        return min(steps_ahead(self._size), self._num_steps) * self._size
