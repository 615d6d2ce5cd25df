"""What the steps of a job need on a worker, by arithmetic on shapes.

That is memory, operations, and bytes that move. Stages say what they need in terms of a
`WorkerView`; the plan sums it up.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from ray_surgeon.memory.stores import Place, Stores
from ray_surgeon.models.loss import TOKENS_PER_SLICE, bytes_at_the_head
from ray_surgeon.models.runner import TOKENS_OF_ROOM
from ray_surgeon.plan.counts import CALL, NOTHING, SLICE, Counted, StepPlan, head_counts
from ray_surgeon.plan.work import ActivationBytes, Shapes
from ray_surgeon.runtime.placement import Placement
from ray_surgeon.runtime.writing import texts_together

TextSizes = Sequence[tuple[int, int]]  # number of windows of each text, and their length


class WorkerView:
    """One worker, in whose terms a stage says what it needs.

    Attributes:
        shard: which one it holds.
        blocks: of the shard.
        shapes: sizes of the model.
        stores: where idle weights and factors are kept.
        linears: of the worker's blocks.
        owners: linear -> replica that owns it.
        sequences: of the calibration that the replica with most of them has.
        wave: sequences that pass together.
        together: of these, sequences that pass a block in one call.
        device_is_host: whether device and host have one memory.
        weights: bytes on the device while blocks run.
        idle: bytes on the device of weights that stay there.
        all_blocks: bytes of the weights of all blocks.
        pinned_blocks: bytes that they take in the host's memory, if they are kept there.
        all_factors: bytes of all packed factors.
        largest_factors: bytes of those of a block, at most.
        outside: bytes of what lies outside of the blocks.
        active: parameters of the linears that a token is multiplied with.
        head_flops: operations of the head for a token, forward.
        host: bytes of the host's memory in every step.
    """

    def __init__(
        self, shapes: Shapes, placement: Placement, stores: Stores, device_is_host: bool, shard: int
    ) -> None:
        """Take one worker of a shard, the one with most to do."""
        work = shapes.work
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
        self.num_sequences = work.num_sequences
        self.sequence_length = work.sequence_length
        self.sequences = -(-self.num_sequences // self.num_replicas)
        self.wave = min(stores.wave_of(self.sequences, self.num_shards), self.sequences)
        self.together = min(stores.together, self.wave)
        self.num_waves = -(-self.sequences // self.wave)
        self._in_flight = min(self.num_waves, self.num_shards - shard)
        config = shapes.layout.config
        self.hidden_size = int(config.hidden_size)
        self._hidden = self.hidden_size * shapes.width
        vocabulary = config.vocab_size * blocks.is_last
        self.head_flops = 2 * vocabulary * config.hidden_size
        self._head = bytes_at_the_head(vocabulary, shapes.width, on_cpu=device_is_host)
        self._sum_up_blocks()
        self.host += sum(stage.on_host(self) for stage in work.stages)

    def _sum_up_blocks(self) -> None:
        shapes = self.shapes
        stores = self.stores
        sizes = shapes.block_bytes[self._own]
        factors = shapes.factor_bytes[self._own]
        most = map(max, zip(*shapes.activations[self._own], strict=True))
        self._activations = ActivationBytes(*most)
        self.all_blocks = sum(sizes)
        self.all_factors = sum(factors)
        self.largest_factors = max(factors)
        self.active = sum(shapes.active_parameters[self._own])
        # of weights and factors for a GPU there are pinned pieces, which torch keeps
        self.outside, pinned_weights, pinned_factors = shapes.of_shard(self.blocks)
        is_resident = stores.weights == "device"
        self.idle = self.outside + self.all_blocks * is_resident
        self.weights = self.idle + self._running(stores.weights)
        self.pinned_blocks = self.all_blocks if self.device_is_host else pinned_weights
        if self.device_is_host:
            pinned_factors = 0
        self.host: float = self.pinned_blocks * (stores.weights == "host")
        self.host += pinned_factors * (stores.factors == "host")

    def _running(self, place: Place) -> int:
        """Return the bytes on the device of weights that are not kept there, while they run."""
        # on the CPU a block runs where it lies, elsewhere the next one is ahead
        runs_in_place = self.device_is_host or place == "device"
        return 0 if runs_in_place else 2 * max(self.shapes.block_bytes[self._own])

    @property
    def disk_bytes(self) -> float:
        """Bytes of scratch; a teacher's weights may need none, if its files are local."""
        factors = self.all_factors * (self.stores.factors == "disk")
        num_models = (self.stores.weights, self.stores.teacher).count("disk")
        return factors + self.all_blocks * num_models

    @functools.cached_property
    def steps(self) -> list[StepPlan]:
        """All steps, each of them once, in their order."""
        steps: dict[str, StepPlan] = {}
        for step in (step for stage in self.shapes.work.stages for step in stage.needs(self)):
            steps[step.name] = steps[step.name].then(step) if step.name in steps else step
        for more in (needs for stage in self.shapes.work.stages for needs in stage.beside(self)):
            if (own := steps.get(more.name)) is not None:
                device = own.device + more.device
                steps[more.name] = replace(own, device=device, host=own.host + more.host)
        return list(steps.values())

    def remembered(self, num_tokens: int) -> float:
        """Return the bytes of the dense model's last hidden states, bfloat16."""
        return 2.0 * self.hidden_size * num_tokens * self.blocks.is_last

    def bubble(self, num_sequences: int, stores: Stores) -> float:
        """Return how much longer a pass takes because shards wait; sequences of one replica."""
        waves = -(-num_sequences // stores.wave_of(num_sequences, self.num_shards))
        return (waves + self.num_shards - 1) / waves

    def measuring(self, name: str, texts: TextSizes, *, of_teacher: bool = False) -> StepPlan:
        """Return passes forward over texts, of which each has a number of windows and a length.

        With `of_teacher` they pass the dense model's blocks, without the head; its idle weights are
        not counted.
        """
        stores = self.stores.of_teacher if of_teacher else self.stores
        heads = 0 if of_teacher else 2
        peak = host = 0.0
        tokens = 0
        loads = 0
        counts = NOTHING
        for count, length in texts:
            own = -(-count // self.num_replicas)
            wave = min(stores.wave_of(own, self.num_shards), own)
            together = min(stores.together, wave)
            counts += self.pass_counts(own, length, heads=heads / 2, together=together)
            between = 3 + 3 * (self.num_shards > 1)
            moment = max(together * self.forward_bytes(length), self._head * (heads > 0))
            peak = max(peak, between * wave * length * self._hidden + moment)
            host = max(host, self.travelling(length, wave))
            tokens += own * length
            loads += -(-own // wave)
        flops = tokens * (2 * self.active + heads * self.head_flops)
        moved = self.moved(stores.weights, loads * self.all_blocks)
        device = self.idle + self._running(stores.weights) + peak
        return StepPlan(name, device, self.host + host, flops, 0.0, *moved, counts=counts)

    def pass_counts(
        self,
        num_sequences: float,
        length: int,
        forward: float = 1.0,
        backward: float = 0.0,
        heads: float = 1.0,
        together: int = 0,
    ) -> Counted:
        """Return the counts of passes over sequences, beside their products.

        Args:
            num_sequences: of one replica.
            length: of a sequence.
            forward: how often each passes forward.
            backward: likewise, backward.
            heads: how often there are logits.
            together: sequences of a call; as many as the stores say if not given.
        """
        size = together or self.stores.in_a_call(num_sequences, self.num_shards)
        num_calls = -(-num_sequences // size)
        tokens = num_sequences * length
        own = self.shapes.counts(self.blocks)
        counts = own.forward.times(num_calls * forward) + own.backward.times(num_calls * backward)
        passed = forward * own.forward_token + backward * own.backward_token
        counts += Counted(memory_bytes=tokens * passed)
        counts += Counted(CALL, 4).times(num_calls * forward)
        if self.head_flops:
            vocabulary = self.head_flops / (2 * self.hidden_size)
            logits = head_counts(length, TOKENS_PER_SLICE, vocabulary, backward=bool(backward))
            counts += logits.times(num_sequences * heads)
        sent = tokens * self._hidden * (forward + backward) * (self.num_shards > 1)
        return counts + Counted(sent_bytes=sent)

    def forward_bytes(self, length: int) -> float:
        """Return the bytes of a block that runs forward on one sequence."""
        own = self._activations
        return length * (own.forward_only + 4 * length * own.scores)

    def writing(self, name: str, texts: TextSizes, num_prompt_tokens: int = 0) -> StepPlan:
        """Return the writing of texts, token by token, with their keys and values.

        `texts` has the number of those that are written together, and the tokens of each, beside
        those of its prompt.
        """
        heads = self.shapes.layout.heads
        # keys and values of a token in a block
        of_token = 1.0 * heads.num_kv * (heads.query_dim + heads.value_dim) * self.shapes.width
        most = 0.0
        flops = 0.0
        num_passes = 0
        counts = NOTHING
        for num_texts, length in texts:
            batches = -(-num_texts // texts_together(length))  # whatever the cluster is
            batch = -(-num_texts // batches)
            rounds = -(-batches // self.num_replicas)  # a batch is one replica's
            own = min(num_texts, rounds * batch)
            cached = of_token * (length + TOKENS_OF_ROOM)
            # those of a block are copied when they grow
            in_blocks = min(own, batch * self.num_shards) * self.num_blocks
            caches = cached * (in_blocks + batch)
            logits = 20 * self.shapes.layout.config.vocab_size if self.head_flops else 0
            most = max(most, caches + batch * (self._activations.moment + logits))
            flops += own * length * (2 * self.active + self.head_flops)
            flops += own * num_prompt_tokens * 2 * self.active
            num_passes += length * rounds
            # keys and values of half of the tokens in the mean
            counts += Counted(memory_bytes=self.num_blocks * own * length * of_token * length / 2)
        counts += self.shapes.counts(self.blocks).forward.times(num_passes)
        head = self.outside * (self.head_flops > 0)
        counts += Counted(CALL + SLICE[0], 1, head, calls=1).times(num_passes)
        moved = self.moved(self.stores.weights, num_passes * self.all_blocks)
        return StepPlan(name, self.weights + most, self.host, flops, 0.0, *moved, counts=counts)

    def passing(
        self, *, more_kept: float = 0.0, more_in_a_moment: float = 0.0, num_sequences: int = 0
    ) -> float:
        """Return the device's bytes of a pass forward and backward.

        These are what waits for its backward pass, and the moment that needs most.

        Args:
            more_kept: bytes of a token in a block beside its own activations.
            more_in_a_moment: likewise, while a block runs backward.
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
        gathered = self.shapes.work.gathered
        widest = max((s.num_columns for s in self.linears if s.name in gathered), default=0)
        tokens = min(self.stores.together, wave) * T
        conversion = 4 * (tokens + 256) * widest
        # what is packed and unpacked on the way
        waiting: float = 2 * of_wave + 3 * of_wave * (self.num_shards > 1)
        if self.stores.activations == "keep":
            waiting += in_flight * wave * T * kept * self.num_blocks
        else:
            waiting += in_flight * self.num_blocks * of_wave
            moment += kept
        return waiting + max(tokens * moment + conversion, self._head)

    def travelling(self, length: int, wave: int = 0) -> float:
        """Return the host's bytes of a GPU's hidden states that travel.

        That is a copy each way, and what waits between shards; of the calibration's waves, if no
        number of sequences is given.
        """
        if self.device_is_host or self.num_shards == 1:
            return 0.0
        return float((2 + self._in_flight) * (wave or self.wave) * length * self._hidden)

    @staticmethod
    def moved(where: Place, size: float) -> tuple[float, float]:
        """Return the bytes that move between host and device, and between disk and host."""
        return size * (where != "device"), size * (where == "disk")
