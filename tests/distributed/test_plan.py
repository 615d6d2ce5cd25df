"""Plans from configurations alone: plans that fit, and refusals with their reasons.

test_smollm2.py measures how accurate they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, get_args

import pytest

from benchmarks.shaped_model import shaped_config
from ray_surgeon.config.job import JobSpec
from ray_surgeon.distributed.collectives import MESSAGE_BYTES
from ray_surgeon.distributed.memory_plan.device_resources import DEVICES, Room
from ray_surgeon.distributed.memory_plan.planned_job import PlannedJob, Shapes, StepPlan
from ray_surgeon.distributed.memory_plan.planner import (
    DoesNotFitError,
    Plan,
    Planner,
    plan_table,
)
from ray_surgeon.distributed.memory_plan.steps import plan_worker
from ray_surgeon.distributed.placement import place
from ray_surgeon.maths.products import PackedSymmetric
from ray_surgeon.memory.stores import TOGETHER, Place, Stores
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.pipeline import _bytes
from ray_surgeon.preparation.inputs import describe_job
from ray_surgeon.preparation.reading import unread_texts
from ray_surgeon.preparation.stages import stages_after_shots, stages_of
from ray_surgeon.pruning.methods import method_for
from tests.conftest import LAYOUTS

GB = 1e9
H100 = DEVICES["h100"]
RESIDENT = Stores("device", "device")
TOKENS = 128 * 2048
NOTHING_HELD: dict[str, Any] = {"calibration": {"held_aside": 0.0}}


@functools.cache
def layout_of(name: str) -> ModelLayout:
    """Return the layout of a tiny model or of a shape; "9 of x" is shape x with nine blocks."""
    number, _, shape = name.rpartition(" of ")
    return LAYOUTS.get(name) or ModelLayout.of(shaped_config(shape, int(number or 0)))


@dataclasses.dataclass(frozen=True)
class Job:
    """A job and the inputs of its plan, from the model's configuration alone."""

    name: str  # of the model
    spec: JobSpec
    num_replicas: int = 1

    @functools.cached_property
    def described(self) -> PlannedJob:
        layout = layout_of(self.name)
        spec = self.spec
        method = method_for(spec.pruning, spec.curvature, layout, spec.model.dtype)
        last = stages_after_shots(spec, layout)
        stages = stages_of(spec, layout, method, unread_texts(spec), last)
        return describe_job(spec, layout, method, stages)

    @functools.cached_property
    def placement(self) -> Any:
        return place(
            layout_of(self.name), self.spec.cluster.num_shards, self.num_replicas
        )

    def plan(
        self, device_gb: float = 80, host_gb: float = 1000, disk: float = 4000 * GB
    ) -> Plan:
        """Return the plan of workers, of which eight share a host."""
        host = host_gb * GB / min(8, self.spec.cluster.num_shards)
        room = Room(device_gb * GB, host, disk, device_is_host=False)
        layout = layout_of(self.name)
        planner = Planner(Shapes(layout, self.described), self.spec.memory, H100)
        return planner.best(self.placement, room)

    def steps(self, stores: Stores = RESIDENT, blocks: int = 0) -> dict[str, StepPlan]:
        """Return the steps of the first worker by name; its number of blocks may be given."""
        layout = layout_of(self.name)
        own = BlockRange(0, blocks or self.placement.blocks[0].last, layout.num_blocks)
        placement = dataclasses.replace(
            self.placement, blocks=(own, *self.placement.blocks[1:])
        )
        worker = plan_worker(Shapes(layout, self.described), placement, stores, False, 0)
        return {step.name: step for step in worker.steps}


def job(
    name: str = "llama-3-70b",
    num_shards: int = 1,
    structure: str = "groups",
    *,
    num_replicas: int = 1,
    **sections: Any,
) -> Job:
    """Return a job whose spec has further sections merged into it, field by field."""
    text = {"source": "python-docs", "sequence_length": 2048}
    document: dict[str, Any] = {
        "version": 2,
        "name": "plan",
        "model": {"source": "x", "dtype": "bfloat16"},
        "calibration": text | {"num_sequences": 128},
        "evaluation": [text | {"name": "docs", "num_sequences": 24}],
        "pruning": {"structure": structure, "target_sparsity": 0.2, "num_shots": 1},
        "cluster": {"num_shards": num_shards, "gpus_per_worker": 1},
        "output": {"uri": "x"},
    }
    if name in LAYOUTS and structure == "groups":
        document["pruning"]["width_multiple"] = 8
    if layout_of(name).num_experts:
        document["pruning"]["groups"] = ["attention", "expert_channels", "experts"]
        document["output"]["exports"] = ["per_block"]
    for section, fields in sections.items():
        is_mapping = isinstance(fields, Mapping)
        document[section] = document.get(section, {}) | fields if is_mapping else fields
    return Job(name, JobSpec.model_validate(document), num_replicas)


def hosts(steps: Mapping[str, StepPlan]) -> dict[str, float]:
    return {name: step.host for name, step in steps.items()}


def test_weights_and_factors_stay_on_the_device_if_they_fit() -> None:
    found = job(num_shards=8).plan()
    assert (found.stores.weights, found.stores.factors) == ("device", "device")
    assert all(seconds > 0 for name, seconds in found.seconds.items() if name != "load")
    assert found.excess()[0] <= 1


def test_memory_limits_the_sequences_in_one_pass() -> None:
    together = {gb: job("llama-2-7b").plan(gb).stores.together for gb in (24, 40, 80)}
    assert 1 < together[24] < together[40] == TOGETHER
    wide = (
        job("llama-2-7b")
        .steps(Stores(activations="recompute", wave=8, together=8))["curvature"]
        .device
    )
    narrow = (
        job("llama-2-7b")
        .steps(Stores(activations="recompute", wave=8))["curvature"]
        .device
    )
    assert wide > narrow + GB
    on_cpu = Room(80 * GB, 80 * GB, 4000 * GB, device_is_host=True)
    one = job("llama-2-7b")
    planner = Planner(
        Shapes(layout_of(one.name), one.described), one.spec.memory, DEVICES["cpu"]
    )
    assert planner.best(one.placement, on_cpu).stores.together == 1


@pytest.mark.parametrize(
    ("made", "room", "weights", "factors"),
    [
        (("llama-3-70b",), (), "host", "host"),
        (("llama-3-70b", 8, "rows_columns"), (), "device", "host"),
        (("llama-3-405b", 16), (), "disk", "host"),
        (("qwen3-32b",), (24, 64), "disk", "disk"),
    ],
)
def test_weights_that_do_not_fit_on_the_device_are_streamed(
    made: tuple[Any, ...], room: tuple[int, ...], weights: str, factors: str
) -> None:
    found = job(*made).plan(*room)
    assert (found.stores.weights, found.stores.factors) == (weights, factors)
    assert found.stores.wave > 1
    assert found.stores.activations == "recompute"
    assert {worker.view.disk_bytes > 0 for worker in found.workers} == {weights == "disk"}


def test_fewer_backward_sequences_make_the_curvature_pass_cheaper() -> None:
    def flops(num_backward: int | None) -> float:
        curvature = {"kind": "kfac", "num_backward": num_backward}
        plan = job(num_shards=8, curvature=curvature).plan()
        return float(plan.as_record()["flops"]["curvature"])

    whole = flops(None)
    assert flops(128) == whole
    without = whole - (whole - flops(64)) * 2  # no sequence has a gradient
    assert flops(32) == pytest.approx(without + (whole - without) / 4)
    assert 0.3 < without / whole < 0.6


def test_pinned_memory_is_counted_as_it_is_reserved() -> None:
    """Memory is reserved in pieces, which torch caches after their tensors are freed."""
    weights = 10 * 2 * 8192 * sum((8192, 1024, 1024, 8192, 28672, 28672, 28672, 1, 1))
    # A and G of two consumers
    factors = 10 * 4 * sum(PackedSymmetric.size(n) for n in (8192, 8192, 28672, 8192))
    two = job(num_shards=8, num_replicas=2)
    nothing_kept, of_weights, of_factors = (
        hosts(two.steps(stores, blocks=10))
        for stores in (RESIDENT, Stores("host", "device"), Stores("device", "host"))
    )
    kept = {step: of_factors[step] - nothing_kept[step] for step in nothing_kept}
    more = of_weights["evaluation"] - nothing_kept["evaluation"]
    assert weights < more < 1.2 * weights
    assert factors < kept["evaluation"] < 1.1 * factors
    assert kept["evaluation"] == kept["curvature"] == kept["costs"]


def test_factors_are_counted_in_the_layout_of_the_device() -> None:
    of_cpu, of_gpu = (
        Shapes(layout_of("llama-3-70b"), job().described, device).factor_bytes[0]
        for device in ("cpu", "cuda")
    )
    rows = (8192, 8192, 28672, 8192)
    assert of_cpu == 4 * sum(PackedSymmetric.size(n) for n in rows)
    assert of_gpu == 4 * sum(n * (n + 1024) // 2 for n in rows)


def test_layer_removal_is_planned_with_passes_of_half_the_blocks() -> None:
    """A fifth of 80 blocks in two shots: eight of them in each. The first is measured as a whole,
    and each one twice on the windows held aside; every fit uses half of the calibration's text.
    """
    pruning = {"groups": ["blocks"], "num_shots": 2}
    deep = job(num_shards=8, pruning=pruning, calibration={"held_aside": 6 / 128})
    record = deep.plan().as_record()
    windows = 6 * 2 * 8 + 6 * 40 * (1 + 7 / 2) + 128 * 8 / 2
    of_window = record["flops"]["evaluation"] / (24 + 6)
    assert record["flops"]["depth"] == pytest.approx(windows * of_window, rel=1e-3)
    states = 2 * 81 * 2048 * 8192 * 2
    assert deep.steps()["depth"].device > deep.steps()["evaluation"].device + states
    assert "curvature" not in record["flops"]


def test_reconstruction_keeps_layer_inputs_and_trains_one_layer_at_a_time() -> None:
    training = {"reconstruction": {"tokens_per_step": 1024, "num_epochs": 3}}
    without, trained = (
        job(num_shards=8, num_replicas=2, pruning=pruning, **NOTHING_HELD).steps(
            blocks=10
        )
        for pruning in ({}, training)
    )
    layer = 3 * 8192 * 28672
    for name in ("costs", "update"):  # bfloat16, half of the layers on each replica
        assert trained[name].host - without[name].host == 2 * TOKENS * 8192 * 5
    for name in ("evaluation", "commit"):
        assert trained[name] == without[name]
    # producers need no gradients of their inputs, the consumer does
    of_layer = 2 + 3 * (4 + 2 / 3)
    of_trials = 2 * 2 + 2 * 3 * 0.25 * (4 + 2 / 3)  # three rates on two layers
    expected = TOKENS * layer * (10 / 2 * of_layer + of_trials)
    assert trained["update"].flops == pytest.approx(expected)
    weights = 24 * layer + 4 * layer / 3
    assert trained["update"].device > weights + (2 + 2 + 2) * TOKENS * 8192, (
        "inputs and outputs"
    )


def test_mixture_of_experts_is_planned_from_its_configuration() -> None:
    """A quarter of Qwen3-30B-A3B on a quarter of a device, with the memory of its host."""
    layout = layout_of("12 of qwen3-30b-a3b")
    assert layout.num_parameters == 30_532_122_624 - 36 * 623_120_640
    assert (layout.num_experts, layout.num_active_experts, len(layout.expert_sets)) == (
        128,
        8,
        12,
    )
    found = job("12 of qwen3-30b-a3b").plan(device_gb=20)
    assert (found.stores.weights, found.stores.factors) == ("host", "host")
    factors = 12 * 128 * 4 * (768**2 / 2 + 2048**2 / 2)
    on_host = factors + 2 * (layout.num_parameters - 2 * 151936 * 2048)
    host = found.peak(found.workers[0].steps[2])[1]
    assert on_host < host < 1.2 * on_host, "with what pieces leave empty"
    # tokens; two operations for each of 1e9 weights that a token is multiplied with:
    # forward, backward, once more, without experts, and the factors
    active = TOKENS * 2 * 1e9
    assert active < found.as_record()["flops"]["curvature"] < 12 * active


@pytest.mark.slow
def test_large_mixture_of_experts_fits_on_eight_devices() -> None:
    assert job("qwen3-235b-a22b", 8).plan(host_gb=2000).excess()[0] <= 1


def test_tensors_that_a_checkpoint_keeps_together_are_written_together() -> None:
    """gate_up_proj [6, 32, 96] of gpt-oss is in memory as a whole while it is written; embeddings
    of 320 x 32 and files of 1 GiB aside.
    """
    described = dataclasses.replace(job("gpt_oss").described, dtype="float32")
    shapes = Shapes(LAYOUTS["gpt_oss"], described)
    assert shapes.largest_tensor == 4 * 320 * 32
    assert shapes.largest_stored == 4 * 6 * 32 * 96


def test_refusal_names_the_step_that_does_not_fit_and_a_remedy() -> None:
    expected = (
        "update on shard 0 needs .* of device memory, there are .*; give workers with .* "
    )
    with pytest.raises(DoesNotFitError, match=expected + "times that"):
        job("9 of llama-3-70b").plan(device_gb=8)
    with pytest.raises(DoesNotFitError, match="of disk"):
        job("9 of llama-3-70b", memory={"weights": "disk"}).plan(disk=GB)


def test_refusal_names_the_smallest_sufficient_number_of_shards() -> None:
    def plan(num_shards: int) -> Plan:
        resident = {"weights": "device", "factors": "device"}
        return job(num_shards=num_shards, memory=resident).plan()

    with pytest.raises(
        DoesNotFitError, match=r"set cluster\.num_shards: (\d+)"
    ) as refused:
        plan(2)
    number = int(str(refused.value).partition("num_shards: ")[2].partition(",")[0])
    assert plan(number).stores.weights == "device"
    with pytest.raises(DoesNotFitError):
        plan(number - 1)
    assert "leave memory to the plan" in str(refused.value)


def test_sizes_on_the_command_line() -> None:
    sizes = {"80GB": 8e10, "1.5TiB": 1.5 * 2**40, "64g": 6.4e10, "100": 100}
    assert {text: _bytes(text) for text in sizes} == sizes


def test_text_generation_is_planned_with_its_cache() -> None:
    layout = layout_of("llama-3-70b")
    written = {"source": "self", "num_sequences": 64}
    found = job(num_shards=8, calibration=written).plan()
    assert found.seconds["sampling"] > 0
    of_token = (
        layout.num_blocks // 8 * 2 * layout.heads.num_kv * layout.heads.head_dim * 2
    )
    caches = 64 * 2048 * of_token
    devices = {step.name: step.device for step in found.workers[0].steps}
    assert caches < devices["sampling"] - devices["load"] < 1.2 * caches


# Recovery of four blocks of Llama-3-70B: two shards of two blocks, two replicas, 16 steps of two
# sequences

ENTRIES = 2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192  # of a block's linears
TWO_BLOCKS = 2 * 2 * (ENTRIES + 2 * 8192)
HEAD = 2 * 128256 * 8192
EMBEDDING = HEAD
LAST = HEAD + 2 * 8192  # with the norm
# rows and columns of linears
SIDES = 2 * (4 * 8192 + 2 * (8192 + 1024) + 3 * (8192 + 28672))
LOW_RANK: dict[str, Any] = {"rank": 8, "num_tokens": 16 * 2 * 2048, "learning_rate": 1e-4}
ALL = LOW_RANK | {"rank": "all"}
TAUGHT = {"texts": [{"source": "python-code"}]}


def recovered(
    recovery: Mapping[str, Any], stores: Stores = RESIDENT, **sections: Any
) -> Plan:
    sections = {**NOTHING_HELD, **sections, "recovery": recovery}
    made = job("4 of llama-3-70b", 2, num_replicas=2, **sections)
    planner = Planner(
        Shapes(layout_of(made.name), made.described, "cuda"), made.spec.memory, H100
    )
    return planner.plan(
        made.placement, Room(1e12, 1e12, 1e12, device_is_host=False), stores
    )


def test_memory_of_a_teacher_is_counted_in_its_place() -> None:
    alone = recovered(LOW_RANK).steps["recovery"]
    plans = {
        place: recovered(LOW_RANK | TAUGHT, Stores(teacher=place))
        for place in get_args(Place)
    }
    on_device, on_host, on_disk = (plan.steps["recovery"] for plan in plans.values())
    outside = (EMBEDDING, LAST)
    for i, of_ends in enumerate(outside):
        size = TWO_BLOCKS + of_ends
        assert on_device[i].device - alone[i].device == size
        # one pass, for all 32 sequences
        flops = 2 * 2 * ENTRIES * 32 / 2 * 2048
        assert on_device[i].flops - alone[i].flops == pytest.approx(flops)
        assert (on_device[i].host_bytes, on_device[i].disk_bytes) == (size, size)
        assert (on_host[i].host_bytes, on_host[i].disk_bytes) == (size + TWO_BLOCKS, size)
        assert on_disk[i].host_bytes == on_disk[i].disk_bytes == size + TWO_BLOCKS
        assert TWO_BLOCKS < on_host[i].host - on_disk[i].host < 1.4 * TWO_BLOCKS
        # that pass needs most: two blocks, states of 16 sequences six times, one that computes
        corrections = (8 + 12 / 2) * 8 * SIDES
        states = 6 * 16 * 2048 * 2 * 8192 + 2048 * (2 * 3 * 28672 + 4 * 8192)
        streamed = 2 * of_ends + TWO_BLOCKS + corrections + TWO_BLOCKS + states
        assert on_host[i].device == on_disk[i].device == pytest.approx(streamed)
    # states of 32 sequences, or those of the calibration
    assert on_device[1].host - alone[1].host == 2 * 8192 * (32 * 2048 - TOKENS)
    assert on_device[0].host == alone[0].host
    assert [worker.view.disk_bytes for worker in plans["disk"].workers] == [
        TWO_BLOCKS
    ] * 2


def test_teacher_is_moved_off_the_device_only_if_needed() -> None:
    """Jobs without a teacher have no option for one."""
    taught = job("9 of llama-3-70b", recovery=LOW_RANK | TAUGHT, **NOTHING_HELD)
    assert [taught.plan(gb).stores.teacher for gb in (80, 44)] == ["device", "host"]
    assert "teacher" not in job("9 of llama-3-70b", recovery=LOW_RANK).plan(44).places
    with pytest.raises(ValueError, match=r"memory\.teacher: needs recovery\.texts"):
        job(recovery=LOW_RANK, memory={"teacher": "host"})


def test_training_all_weights_counts_gradients_masters_and_moments() -> None:
    on_host = Stores("device", "host", "recompute")
    parameters = TWO_BLOCKS / 2
    # bytes that a token keeps of the inputs of a block's linears
    columns = 2 * (6 * 8192 + 28672)
    stepping = 4 * parameters / 2  # gradients of one of two blocks
    owned = 12 * parameters / 2 + stepping  # of one of two replicas
    messages = 2 * MESSAGE_BYTES
    for stores, device, host, products in (
        (RESIDENT, owned, 0, 6),
        (on_host, 0, owned, 8),
    ):
        whole = recovered(ALL, stores)
        corrected = recovered(LOW_RANK, stores).steps["recovery"]
        views = [worker.view for worker in whole.workers]
        for own, other, view in zip(
            whole.steps["recovery"], corrected, views, strict=True
        ):
            passing = view.idle + view.passing(more_kept=columns, num_sequences=1)
            assert own.device - passing == pytest.approx(TWO_BLOCKS + device + messages)
            # and the weights as they were
            assert own.host - other.host == pytest.approx(TWO_BLOCKS + host)
            head = HEAD / 2 * view.blocks.is_last
            flops = 16 * 2048 * (products * 2 * ENTRIES + 3 * 2 * head)
            assert own.flops == pytest.approx(flops)
    held: dict[str, Any] = {"calibration": {"held_aside": 0.05}}
    best = recovered(ALL, **held).steps["recovery"][0].host
    assert best - recovered(ALL).steps["recovery"][0].host == TWO_BLOCKS


def test_training_all_weights_keeps_them_on_the_device() -> None:
    made = job("9 of llama-3-70b", recovery=ALL, **NOTHING_HELD)
    stores = made.plan(device_gb=200).stores
    assert stores.weights == "device"
    remedy = (
        r"recovery on shard 0 needs .* \(with weights: device, .* or give "
        r"recovery.rank a number"
    )
    with pytest.raises(DoesNotFitError, match=remedy):
        made.plan(device_gb=24)
    assert job("9 of llama-3-70b", recovery=LOW_RANK, **NOTHING_HELD).plan(
        24
    ).stores.weights != ("device")


def test_recovery_plan_counts_trials_checks_and_worker_hours() -> None:
    held: dict[str, Any] = {"calibration": {"held_aside": 0.05}}
    plan = recovered(LOW_RANK | {"learning_rate": None}, **held)
    step, check = (
        recovered(LOW_RANK).steps["recovery"][0].flops / 16,
        3 * 2048 * 2 * 2 * ENTRIES,  # six windows on two replicas
    )
    # a trial of three steps more; checks of the start, of two trials, after 5, 10, 15, 16 steps
    flops = (16 + 3) * step + (1 + 2 + 4) * check
    assert plan.steps["recovery"][0].flops == pytest.approx(flops)
    record = plan.as_record()
    hours = 4 * sum(plan.seconds.values()) / 3600
    assert record["worker_hours"] == hours
    caption = plan_table(plan).caption
    assert str(caption).startswith(f"at least {hours:.3g} GPU-hours")
