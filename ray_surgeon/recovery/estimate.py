"""The needs of a recovery on a worker, for the plan.

A recovery trains in steps and is checked on the windows held aside. A dense model beside the pruned
one sees the sequences of several steps at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from ray_surgeon.plan.counts import ADAM_BYTES, Counted, StepPlan
from ray_surgeon.plan.estimate import WorkerView
from ray_surgeon.recovery.batches import steps_ahead
from ray_surgeon.recovery.rates import steps_between_checks, trial_steps
from ray_surgeon.runtime.collectives import MESSAGE_BYTES
from ray_surgeon.spec.recovery import RecoverySection


class _Launches(NamedTuple):
    """Launches and syncs of a training, beside those of the passes."""

    # of B A x forward and backward for each linear, or of the sum of a weight's gradient
    products: int
    step: int  # of an optimizer's step, for each part
    start: int  # at the start and the end, for each part
    syncs_of_start: int  # likewise


_OF_CORRECTIONS = _Launches(products=9, step=14, start=28, syncs_of_start=4)
"""Launches of low-rank corrections, which have one part for each linear."""
_OF_WEIGHTS = _Launches(products=2, step=8, start=10, syncs_of_start=5)
"""Launches of a training of all weights, which has one part for each parameter."""
_STEP_BYTES = 4.0
"""Bytes for a weight in float32 while it makes a step: its gradient."""
_PASS_BYTES = 16.0
"""Bytes of a product B A and its copies, for each entry."""


class RecoveryNeeds:
    """The needs of a recovery on one worker."""

    def __init__(
        self,
        section: RecoverySection,
        num_held: int,
        worker: WorkerView,
        *,
        by_element: bool,
    ) -> None:
        """Count the trained parts and their entries.

        Args:
            section: of the recovery.
            num_held: number of windows held aside.
            worker: that trains.
            by_element: whether masks are of elements.
        """
        self._section = section
        self._num_held = num_held
        self._worker = worker
        self._by_element = by_element
        self._trains_all = section.rank == "all"
        layout = worker.shapes.layout
        self._names = layout.parameters_of(worker.blocks)
        if section.rank == "all":
            self._launches = _OF_WEIGHTS
            self._entries = worker.all_blocks / worker.shapes.width  # that are trained
            in_blocks = [n for n in self._names if layout.block_of(n) is not None]
            self._num_parts = len(in_blocks)
        else:
            self._launches = _OF_CORRECTIONS
            sizes = [linear.num_rows + linear.num_columns for linear in worker.linears]
            self._entries = float(section.rank * sum(sizes))
            self._num_parts = len(sizes)
        self._size = section.sequences_per_step
        self._per_step = -(-self._size // worker.num_replicas)  # sequences of a replica
        self._runs = 1  # forward passes of a block in a step
        if worker.stores.activations == "recompute":
            self._runs = 2
        self._num_steps = section.num_steps(worker.sequence_length)

    def steps(self, name: str) -> Iterable[StepPlan]:
        """Yield the parts of the step with this name, one after the other."""
        worker = self._worker
        T = worker.sequence_length
        num_steps = self._num_steps
        num_measures_of_trials = 0
        # usually the second rate is taken, after the first one was tried
        if self._num_held and self._section.learning_rate is None:
            num_steps += trial_steps(self._num_steps)
            num_measures_of_trials = 2
        parts = [(self._start(name), 1), (self._step(name), num_steps)]
        if self._num_held:
            num_checks = -(-self._num_steps // steps_between_checks(self._num_steps))
            num_checks += 1 + num_measures_of_trials
            parts.append((worker.measuring(name, [(self._num_held, T)]), num_checks))
        if self._section.has_teacher:
            ahead = worker.measuring(name, [(self._num_ahead, T)], of_teacher=True)
            own = -(-self._num_ahead // worker.num_replicas)
            ahead = replace(ahead, bubble=worker.bubble(own, worker.stores.of_teacher))
            # the sequences of a trial are seen again if there are many
            parts.append((ahead, -(-num_steps // steps_ahead(self._size))))
        device, host = self._kept()
        for part, number in parts:
            both = replace(part, device=part.device + device, host=part.host + host)
            yield both.times(number)

    def _kept(self) -> tuple[float, float]:
        """Return the bytes kept throughout the recovery, on the device and on the host."""
        worker = self._worker
        device, host = self._trained()
        # on a CPU masks of elements are those of the host
        if self._by_element and not worker.device_is_host:
            device += sum(linear.size for linear in worker.linears)
        if self._section.has_teacher:
            place = worker.stores.teacher
            on_device = worker.outside
            if place == "device":
                on_device += worker.all_blocks
            device += on_device
            if place == "host":
                host += worker.pinned_blocks
            host += worker.remembered(self._num_ahead * worker.sequence_length)
        return device, host

    def _trained(self) -> tuple[float, float]:
        """Return the bytes of the trained parts, on the device and on the host."""
        if self._trains_all:
            return self._trained_weights()
        return self._trained_corrections(), 0.0

    def _trained_corrections(self) -> float:
        """Return the bytes of corrections on the device.

        These are A, B and gradients (between replicas one copy more), Adam's moments at a linear's
        owner, and the best state so far.
        """
        N = self._worker.num_replicas
        of_entry = 16.0
        if N > 1:
            of_entry = 8 + 12 / N
        if self._num_held > 0:
            of_entry += 4 + 8 / N
        return of_entry * self._entries

    def _trained_weights(self) -> tuple[float, float]:
        """Return the bytes of a training of all weights, on the device and on the host.

        These are gradients; masters and moments at the owner, and the temporaries of a step for one
        block; a message and its copy; and on the host the original weights and the best ones so
        far.
        """
        worker = self._worker
        N = worker.num_replicas
        is_on_device = worker.stores.factors == "device"
        of_entry = 8
        # weights in float32 are their own masters
        if worker.shapes.width < 4 or not (is_on_device or worker.device_is_host):
            of_entry += 4
        own = of_entry * self._entries / N
        own += _STEP_BYTES * self._entries / worker.num_blocks
        device = worker.all_blocks
        host = worker.all_blocks
        if self._num_held > 0:
            host += worker.all_blocks
        if is_on_device:
            device += own
        else:
            host += own
        if N > 1:
            device += 2 * MESSAGE_BYTES
        return device, host

    def _start(self, name: str) -> StepPlan:
        """Return what is done once, at the start and the end; the dense model is loaded."""
        worker = self._worker
        product = 0.0
        if not self._trains_all:  # it is absorbed
            product = _PASS_BYTES * max(linear.size for linear in worker.linears)
        of_part = Counted(self._launches.start, self._launches.syncs_of_start)
        counts = of_part.times(self._num_parts)
        loaded_bytes = 0.0
        moved_bytes = 0.0
        if self._section.has_teacher:
            loaded_bytes = worker.all_blocks + worker.outside
            if not worker.device_is_host:
                moved_bytes = loaded_bytes
            num_loads = len(self._names)
            counts += Counted(num_loads, num_loads, loaded_bytes)
        return StepPlan(
            name,
            device=worker.weights + product,
            host=worker.host,
            host_bytes=moved_bytes,
            disk_bytes=loaded_bytes,
            counts=counts,
        )

    def _step(self, name: str) -> StepPlan:
        """Return one step of the training."""
        worker = self._worker
        T = worker.sequence_length
        columns = sum(linear.num_columns for linear in worker.linears)
        inputs = worker.shapes.width * columns / worker.num_blocks
        device = worker.weights + worker.passing(
            more_kept=inputs,
            num_sequences=self._per_step,
        )
        if self._by_element and not self._trains_all:
            device += _PASS_BYTES * max(linear.size for linear in worker.linears)
        wave = worker.stores.wave_of(self._per_step, worker.num_shards)
        loads = 2 * -(-self._per_step // wave)
        moved, of_disk = worker.moved(worker.stores.weights, loads * worker.all_blocks)
        if self._trains_all and worker.stores.factors != "device":
            # gradients and weights; masters and moments pass the host's memory
            of_entry = 2 * worker.shapes.width + ADAM_BYTES
            moved += of_entry * self._entries / worker.num_replicas
        return StepPlan(
            name,
            device=device,
            host=worker.host + worker.travelling(T),
            flops=self._flops_of_token() * self._per_step * T,
            host_bytes=moved,
            disk_bytes=of_disk,
            bubble=worker.bubble(self._per_step, worker.stores),
            counts=self._counts(),
        )

    def _flops_of_token(self) -> float:
        """Return the operations of a pass forward and backward, for one token."""
        worker = self._worker
        if self._trains_all:
            flops = 2 * worker.active * (2 + self._runs)
        else:  # no gradients of the weights
            flops = 2 * worker.active * (1 + self._runs)
            flops += 2 * self._entries * (2 + self._runs)
        num_heads = 2
        if self._section.loss == "kl":
            num_heads = 3
        return flops + worker.head_flops * num_heads

    def _counts(self) -> Counted:
        """Return the counts of one step."""
        worker = self._worker
        N = worker.num_replicas
        per_step = self._per_step
        calls = -(-per_step // worker.stores.in_a_call(per_step, worker.num_shards))
        counts = worker.pass_counts(per_step, worker.sequence_length, self._runs, 1.0)
        launches = self._launches.products * calls * len(worker.linears)
        launches += self._launches.step * self._num_parts
        # parameters and two moments, read and written; gradients and the result are sent
        memory_bytes = ADAM_BYTES * self._entries
        sent_bytes_of_entry = 12.0
        num_optimizers = 1
        if self._trains_all:
            memory_bytes /= N
            sent_bytes_of_entry = 2.0 * worker.shapes.width
            num_optimizers = max(1, worker.num_blocks)  # one for each block
        sent_bytes = 0.0
        if N > 1:
            sent_bytes = sent_bytes_of_entry * self._entries
        counts += Counted(launches, 1 + num_optimizers, calls=2)
        return counts + Counted(memory_bytes=memory_bytes, sent_bytes=sent_bytes)

    @property
    def _num_ahead(self) -> int:
        """Sequences that the dense model sees in one pass."""
        return min(steps_ahead(self._size), self._num_steps) * self._size
