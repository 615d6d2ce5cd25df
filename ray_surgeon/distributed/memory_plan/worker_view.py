"""One worker as the estimates of its steps see it, by arithmetic on shapes.

The estimates themselves are in `ray_surgeon.distributed.memory_plan.steps`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ray_surgeon.distributed.memory_plan.planned_job import (
    ActivationBytes,
    Shapes,
    StepPlan,
)
from ray_surgeon.distributed.placement import Placement
from ray_surgeon.distributed.writing import texts_together
from ray_surgeon.memory.stores import Place, Stores
from ray_surgeon.models.loss import bytes_at_the_head
from ray_surgeon.models.runner import TOKENS_OF_ROOM

TextSizes = Sequence[tuple[int, int]]  # number of windows of each text, and their length

_LOGIT_BYTES = 40.0
"""Bytes read or written for a logit; a fit."""


class WorkerView:
    """One worker, in whose terms the needs of steps are estimated.

    Attributes:
        shard: the shard that it holds.
        blocks: of the shard.
        shapes: sizes of the model.
        stores: where idle weights and factors are kept.
        linears: of the worker's blocks.
        owners: linear -> replica that owns it.
        sequences: calibration sequences of the replica that has most of them.
        wave: sequences that pass together.
        together: of these, sequences that pass a block in one call.
        device_is_host: whether device and host have one memory.
        weights: bytes on the device while blocks run.
        idle: bytes on the device of weights that stay there.
        all_blocks: bytes of the weights of all blocks.
        pinned_blocks: bytes that they take in the host's memory, if they are kept there.
        all_factors: bytes of all packed factors.
        largest_factors: bytes of the packed factors of the block that has most.
        outside: bytes of the weights outside of the blocks.
        active: parameters of the linears that a token is multiplied with.
        head_flops: operations of the head for a token, forward.
        host: bytes of the host's memory in every step; `memory_plan.steps` adds the bytes
            that steps keep there for others.
    """

    def __init__(
        self,
        shapes: Shapes,
        placement: Placement,
        stores: Stores,
        device_is_host: bool,
        shard: int,
    ) -> None:
        """Describe the worker of a shard that has most to do.

        Args:
            shapes: sizes of the model.
            placement: of the job.
            stores: where idle weights and factors are kept.
            device_is_host: whether device and host have one memory.
            shard: of the worker.
        """
        job = shapes.job
        self.shard = shard
        self.blocks = blocks = placement.blocks[shard]
        self.shapes = shapes
        self.stores = stores
        self._own = slice(blocks.first, blocks.last)
        self.num_blocks = blocks.last - blocks.first
        self.num_shards = placement.num_shards
        self.num_replicas = placement.num_replicas
        self.device_is_host = device_is_host
        self.linears = [linear for block in shapes.linears[self._own] for linear in block]
        self.owners = {s.name: placement.owners[s.shared_input] for s in self.linears}
        self.num_sequences = job.num_sequences
        self.sequence_length = job.sequence_length
        self.sequences = -(-self.num_sequences // self.num_replicas)
        self.wave = min(stores.wave_of(self.sequences, self.num_shards), self.sequences)
        self.together = min(stores.together, self.wave)
        self.num_waves = -(-self.sequences // self.wave)
        self._in_flight = min(self.num_waves, self.num_shards - shard)
        config = shapes.layout.config
        self.hidden_size = int(config.hidden_size)
        self._hidden = self.hidden_size * shapes.width
        vocabulary = int(config.vocab_size) if blocks.is_last else 0
        self.head_flops = 2 * vocabulary * self.hidden_size
        self._head = bytes_at_the_head(vocabulary, shapes.width, on_cpu=device_is_host)
        self._sum_up_blocks()

    def _sum_up_blocks(self) -> None:
        shapes = self.shapes
        stores = self.stores
        factors = shapes.factor_bytes[self._own]
        largest = map(max, zip(*shapes.activations[self._own], strict=True))
        self._activations = ActivationBytes._make(largest)
        self.all_blocks = sum(shapes.block_bytes[self._own])
        self.all_factors = sum(factors)
        self.largest_factors = max(factors)
        self.active = sum(shapes.active_parameters[self._own])
        # a GPU's host keeps weights and factors in pinned pieces, which torch does not give back
        self.outside, pinned_weights, pinned_factors = shapes.of_shard(self.blocks)
        self.idle = self.outside
        if stores.weights == "device":
            self.idle += self.all_blocks
        self.weights = self.idle + self._running(stores.weights)
        self.pinned_blocks = self.all_blocks if self.device_is_host else pinned_weights
        self.host: float = 0
        if stores.weights == "host":
            self.host += self.pinned_blocks
        if stores.factors == "host" and not self.device_is_host:
            self.host += pinned_factors

    def _running(self, place: Place) -> int:
        """Return the bytes on the device of running blocks whose weights are kept elsewhere."""
        if self.device_is_host or place == "device":
            return 0
        # the present block and the next one, which is copied ahead
        return 2 * max(self.shapes.block_bytes[self._own])

    @property
    def disk_bytes(self) -> float:
        """Bytes of scratch; a teacher's weights need none if its files are local."""
        size = 0
        if self.stores.factors == "disk":
            size += self.all_factors
        if self.stores.weights == "disk":
            size += self.all_blocks
        if self.stores.teacher == "disk":
            size += self.all_blocks
        return size

    @property
    def num_runs_forward(self) -> int:
        """How often a sequence that passes backward runs forward."""
        return 2 if self.stores.activations == "recompute" else 1

    def remembered(self, num_tokens: int) -> float:
        """Return the bytes of the dense model's last hidden states, in bfloat16."""
        if not self.blocks.is_last:
            return 0.0
        return 2.0 * self.hidden_size * num_tokens

    def bubble(self, num_sequences: int, stores: Stores) -> float:
        """Return the factor on the time of a pass because shards wait for each other.

        Args:
            num_sequences: of one replica.
            stores: which determine the waves.
        """
        waves = -(-num_sequences // stores.wave_of(num_sequences, self.num_shards))
        return (waves + self.num_shards - 1) / waves

    def measuring(
        self, name: str, texts: TextSizes, *, of_teacher: bool = False
    ) -> StepPlan:
        """Return a step of passes forward over texts.

        Args:
            name: of the step.
            texts: number of windows of each text, and their length.
            of_teacher: whether they pass the dense model's blocks, without the head; its idle
                weights are not counted.
        """
        stores = self.stores.of_teacher if of_teacher else self.stores
        num_heads = 0 if of_teacher else 1
        # with those packed and unpacked to travel
        num_states = 3 if self.num_shards == 1 else 6
        peak = host = 0.0
        tokens = 0
        loads = 0
        memory_bytes = 0.0
        sent_bytes = 0.0
        for count, length in texts:
            own = -(-count // self.num_replicas)
            wave = min(stores.wave_of(own, self.num_shards), own)
            together = min(stores.together, wave)
            memory_bytes += self.pass_bytes(
                own, length, heads=num_heads, together=together
            )
            sent_bytes += self.sent_bytes(own * length, num_passes=1)
            moment = together * self.forward_bytes(length)
            if not of_teacher:
                moment = max(moment, self._head)
            peak = max(peak, num_states * wave * length * self._hidden + moment)
            host = max(host, self.travelling(length, wave))
            tokens += own * length
            loads += -(-own // wave)
        host_bytes, disk_bytes = self.moved(stores.weights, loads * self.all_blocks)
        return StepPlan(
            name=name,
            device=self.idle + self._running(stores.weights) + peak,
            host=self.host + host,
            flops=tokens * (2 * self.active + 2 * num_heads * self.head_flops),
            host_bytes=host_bytes,
            disk_bytes=disk_bytes,
            memory_bytes=memory_bytes,
            sent_bytes=sent_bytes,
        )

    def pass_bytes(
        self,
        num_sequences: float,
        length: int,
        forward: float = 1.0,
        backward: float = 0.0,
        heads: float = 1.0,
        together: int = 0,
    ) -> float:
        """Return the bytes that passes read or write in the device's memory.

        Args:
            num_sequences: of one replica.
            length: tokens of a sequence.
            forward: number of forward passes of each sequence.
            backward: number of backward passes of each sequence.
            heads: number of times that logits are computed.
            together: sequences in one call; given by the stores if 0.
        """
        size = together or self.stores.in_a_call(num_sequences, self.num_shards)
        num_calls = -(-num_sequences // size)
        tokens = num_sequences * length
        own = self.shapes.traffic(self.blocks)
        passed_bytes = num_calls * forward * own.weight_bytes
        passed_bytes += num_calls * backward * own.weight_bytes
        passed_bytes += tokens * (
            forward * own.forward_token + backward * own.backward_token
        )
        if self.head_flops:
            vocabulary = self.head_flops / (2 * self.hidden_size)
            passed_bytes += num_sequences * heads * (_LOGIT_BYTES * length * vocabulary)
        return passed_bytes

    def sent_bytes(self, num_tokens: float, num_passes: float) -> float:
        """Return the bytes of hidden states that passes send to other shards."""
        if self.num_shards == 1:
            return 0.0
        return num_tokens * self._hidden * num_passes

    def forward_bytes(self, length: int) -> float:
        """Return the bytes that a block needs to run forward on one sequence."""
        own = self._activations
        return length * (own.forward_only + 4 * length * own.scores)

    def writing(
        self, name: str, texts: TextSizes, num_prompt_tokens: int = 0
    ) -> StepPlan:
        """Return a step that writes texts, token by token, and keeps their keys and values.

        Args:
            name: of the step.
            texts: number of texts that are written together, and tokens of each without its prompt.
            num_prompt_tokens: tokens of each prompt.
        """
        of_token = self._cached_bytes_per_token()
        most = 0.0
        flops = 0.0
        num_passes = 0
        memory_bytes = 0.0
        for num_texts, length in texts:
            batches = -(-num_texts // texts_together(length))  # the same on any cluster
            batch = -(-num_texts // batches)
            rounds = -(-batches // self.num_replicas)  # a batch belongs to one replica
            own = min(num_texts, rounds * batch)
            cached = of_token * (length + TOKENS_OF_ROOM)
            # the keys and values of one block are copied when they grow
            in_blocks = min(own, batch * self.num_shards) * self.num_blocks
            caches = cached * (in_blocks + batch)
            logits = 20 * self.shapes.layout.config.vocab_size if self.head_flops else 0
            most = max(most, caches + batch * (self._activations.moment + logits))
            flops += own * length * (2 * self.active + self.head_flops)
            flops += own * num_prompt_tokens * 2 * self.active
            num_passes += length * rounds
            # a token reads the keys and values of half of the tokens on average
            memory_bytes += self.num_blocks * own * length * of_token * length / 2
        memory_bytes += num_passes * self.shapes.traffic(self.blocks).weight_bytes
        if self.head_flops:
            memory_bytes += num_passes * self.outside
        host_bytes, disk_bytes = self.moved(
            self.stores.weights, num_passes * self.all_blocks
        )
        return StepPlan(
            name=name,
            device=self.weights + most,
            host=self.host,
            flops=flops,
            host_bytes=host_bytes,
            disk_bytes=disk_bytes,
            memory_bytes=memory_bytes,
        )

    def _cached_bytes_per_token(self) -> float:
        """Return the bytes of the keys and values of a token in one block."""
        heads = self.shapes.layout.heads
        size: float = (
            1.0 * heads.num_kv * (heads.query_dim + heads.value_dim) * self.shapes.width
        )
        return size

    def passing(
        self,
        *,
        more_kept: float = 0.0,
        more_in_a_moment: float = 0.0,
        num_sequences: int = 0,
    ) -> float:
        """Return the peak bytes on the device of a pass forward and backward, without weights.

        Args:
            more_kept: bytes that a block keeps for a token beside its own activations.
            more_in_a_moment: bytes for a token while a block runs backward, beside its own.
            num_sequences: that pass on the replica; those of the calibration if not given.
        """
        T = self.sequence_length
        sequences = num_sequences or self.sequences
        wave = min(self.stores.wave_of(sequences, self.num_shards), sequences)
        in_flight = min(-(-sequences // wave), self.num_shards - self.shard)
        of_wave = wave * T * self._hidden
        own = self._activations
        kept = own.kept + more_kept + 2 * T * own.scores
        moment = own.moment + more_in_a_moment + 4 * T * own.scores
        gathered = self.shapes.job.gathered
        widest = max(
            (s.num_columns for s in self.linears if s.name in gathered), default=0
        )
        tokens = min(self.stores.together, wave) * T
        conversion = 4 * (tokens + 256) * widest
        waiting: float = 2 * of_wave
        if self.num_shards > 1:  # states are packed and unpacked to travel
            waiting += 3 * of_wave
        if self.stores.activations == "keep":
            waiting += in_flight * wave * T * kept * self.num_blocks
        else:
            waiting += in_flight * self.num_blocks * of_wave
            moment += kept
        return waiting + max(tokens * moment + conversion, self._head)

    def travelling(self, length: int, wave: int = 0) -> float:
        """Return the host's bytes of a GPU's hidden states that travel between shards.

        These are a copy each way, and the states of waves that wait between shards.

        Args:
            length: tokens of a sequence.
            wave: sequences of a wave; those of the calibration if 0.
        """
        if self.device_is_host or self.num_shards == 1:
            return 0.0
        return float((2 + self._in_flight) * (wave or self.wave) * length * self._hidden)

    @staticmethod
    def moved(where: Place, size: float) -> tuple[float, float]:
        """Return the bytes moved between host and device, and between disk and host.

        Args:
            where: they are kept.
            size: bytes that are moved to or from the device.
        """
        if where == "device":
            return 0, 0
        if where == "host":
            return size, 0
        return size, size
