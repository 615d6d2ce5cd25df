"""Plans from configurations alone: what fits how, what is refused and why. How right they are is
measured in test_smollm2.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.shaped_model import shaped_config
from ray_surgeon.maths.kronecker import PackedSymmetric
from ray_surgeon.memory.stores import Stores
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.pipeline import _bytes
from ray_surgeon.plan.needs import StepPlan, WorkerView
from ray_surgeon.plan.plan import DoesNotFitError, Plan, Planner
from ray_surgeon.plan.room import DEVICES, Room
from ray_surgeon.plan.work import Shapes, Work
from ray_surgeon.run.inputs import work_of
from ray_surgeon.run.reading import unread_texts
from ray_surgeon.run.stages import stages_after_shots, stages_of
from ray_surgeon.runtime.placement import place
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.stages.correction.stage import Correction
from ray_surgeon.stages.prune.methods import method_for
from ray_surgeon.stages.reconstruction.layers import Arrivals
from ray_surgeon.stages.weights import Load
from tests.conftest import LAYOUTS

GB = 1e9
RESIDENT = Stores("device", "device")
TOKENS = 128 * 2048
NOTHING_HELD: dict[str, Any] = {"calibration": {"held_aside": 0.0}}


@functools.cache
def layout_of(name: str) -> ModelLayout:
    return LAYOUTS[name] if name in LAYOUTS else ModelLayout.of(shaped_config(name))


@dataclasses.dataclass(frozen=True)
class Job:
    """A job, and what its plan depends on, from the model's configuration alone."""

    name: str  # of the model
    spec: JobSpec
    num_replicas: int = 1

    @functools.cached_property
    def work(self) -> Work:
        layout = layout_of(self.name)
        spec = self.spec
        method = method_for(spec.pruning, spec.curvature, layout, spec.model.dtype)
        last = stages_after_shots(spec, layout)
        stages = stages_of(spec, layout, method, unread_texts(spec), last)
        return work_of(spec, layout, method, stages)

    @functools.cached_property
    def placement(self) -> Any:
        return place(layout_of(self.name), self.spec.cluster.num_shards, self.num_replicas)

    def plan(self, device_gb: float = 80, host_gb: float = 1000, disk: float = 4000 * GB) -> Plan:
        """Return the plan of workers, of which eight share a host."""
        host = host_gb * GB / min(8, self.spec.cluster.num_shards)
        room = Room(device_gb * GB, host, disk, device_is_host=False)
        device = DEVICES["h100"]
        layout = layout_of(self.name)
        planner = Planner(Shapes(layout, self.work), self.spec.memory, device)
        return planner.best(self.placement, room)

    def steps(
        self,
        stores: Stores = RESIDENT,
        *,
        on_cpu: bool = False,
        shard: int = 0,
        blocks: int | None = None,
        work: Work | None = None,
    ) -> dict[str, StepPlan]:
        """Return the steps of one worker by name, which may have other blocks or work."""
        layout = layout_of(self.name)
        own = list(self.placement.blocks)
        if blocks is not None:
            own[shard] = BlockRange(0, blocks, layout.num_blocks)
        placement = dataclasses.replace(self.placement, blocks=tuple(own))
        shapes = Shapes(layout, work or self.work)
        view = WorkerView(shapes, placement, stores, on_cpu, shard)
        return {step.name: step for step in view.steps}


def job(
    name: str = "llama-3-70b",
    num_shards: int = 1,
    structure: str = "groups",
    *,
    num_replicas: int = 1,
    **sections: Any,
) -> Job:
    """Return a job whose spec has further sections merged into it, field by field."""
    text = {"name": "docs", "source": "python-docs", "num_sequences": 24, "sequence_length": 2048}
    document: dict[str, Any] = {
        "version": 2,
        "name": "plan",
        "model": {"source": "x", "dtype": "bfloat16"},
        "calibration": {"source": "python-docs", "num_sequences": 128, "sequence_length": 2048},
        "evaluation": [text],
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


def test_resident_where_it_fits() -> None:
    found = job(num_shards=8).plan()
    assert (found.stores.weights, found.stores.factors) == ("device", "device")
    assert all(seconds > 0 for name, seconds in found.seconds.items() if name != "load")
    assert found.excess()[0] <= 1


@pytest.mark.parametrize(
    ("name", "device_gb", "host_gb", "num_shards", "structure", "weights", "factors"),
    [
        ("llama-3-70b", 80, 1000, 1, "groups", "host", "host"),
        ("llama-3-70b", 80, 1000, 8, "rows_columns", "device", "host"),
        ("llama-3-405b", 80, 1000, 16, "groups", "disk", "host"),
        ("qwen3-32b", 24, 64, 1, "groups", "disk", "disk"),
    ],
)
def test_what_is_streamed_where_it_would_not_fit(
    name: str,
    device_gb: float,
    host_gb: float,
    num_shards: int,
    structure: str,
    weights: str,
    factors: str,
) -> None:
    found = job(name, num_shards, structure).plan(device_gb, host_gb)
    assert (found.stores.weights, found.stores.factors) == (weights, factors)
    assert found.stores.wave > 1
    assert found.stores.activations == "recompute"
    assert {worker.disk_bytes > 0 for worker in found.workers} == {weights == "disk"}


def test_fewer_sequences_with_gradients_take_less_of_the_curvature_pass() -> None:
    def flops(num_backward: int | None) -> float:
        curvature = {"kind": "kfac", "num_backward": num_backward}
        return float(
            job(num_shards=8, curvature=curvature).plan().as_record()["flops"]["curvature"]
        )

    whole = flops(None)
    assert flops(128) == whole
    without = whole - (whole - flops(64)) * 2  # no sequence has a gradient
    assert flops(32) == pytest.approx(without + (whole - without) / 4)
    assert 0.3 < without / whole < 0.6


@pytest.mark.parametrize("on_cpu", [False, True])
def test_pinned_memory_is_counted_as_it_is_reserved(on_cpu: bool) -> None:
    """In pieces, which torch keeps when what was in them is gone."""
    weights = 10 * 2 * 8192 * sum((8192, 1024, 1024, 8192, 28672, 28672, 28672, 1, 1))
    # A and G of two consumers
    factors = 10 * 4 * sum(PackedSymmetric.size(n) for n in (8192, 8192, 28672, 8192))
    two = job(num_shards=8, num_replicas=2)
    nothing_kept, of_weights, of_factors = (
        hosts(two.steps(stores, on_cpu=on_cpu, blocks=10))
        for stores in (RESIDENT, Stores("host", "device"), Stores("device", "host"))
    )
    kept = {step: of_factors[step] - nothing_kept[step] for step in nothing_kept}
    more = of_weights["evaluation"] - nothing_kept["evaluation"]
    if on_cpu:
        assert more == weights
        assert kept["evaluation"] == 0
        assert kept["curvature"] == 2 * kept["costs"] == factors
    else:
        assert weights < more < 1.2 * weights
        assert factors < kept["evaluation"] < 1.1 * factors
        assert kept["evaluation"] == kept["curvature"] == kept["costs"]


def test_hidden_states_that_travel_are_in_the_host_of_a_gpu() -> None:
    """A copy each way, and those that wait between shards, as many as the first shard is ahead."""
    wave = 2 * 2048 * 8192 * 4  # bfloat16, four sequences of 2048 tokens
    stores = Stores("device", "device", wave=4)
    travelling, alone, on_cpu = (
        hosts(job(num_shards=num_shards).steps(stores, on_cpu=on_cpu, blocks=20))
        for num_shards, on_cpu in ((4, False), (1, False), (4, True))
    )
    for step in ("evaluation", "curvature"):
        assert travelling[step] - travelling["costs"] == (2 + 4) * wave
        assert alone[step] == alone["costs"]
    assert on_cpu["evaluation"] == on_cpu["costs"], "they are counted with all else"


@pytest.mark.parametrize("on_cpu", [False, True])
def test_corrections_of_elements_have_masks_on_the_device_and_large_products(on_cpu: bool) -> None:
    """A product is as large as a weight, in float32 and with copies."""
    correction = {"lora_rank": 8, "steps_per_shot": 16, "learning_rate": 1e-3}
    masked = job("llama-3-70b", 8, "element", correction=correction, **NOTHING_HELD)
    stages = tuple(
        dataclasses.replace(stage, by_element=False) if isinstance(stage, Correction) else stage
        for stage in masked.work.stages
        if not isinstance(stage, Load)
    )
    with_masks = masked.steps(on_cpu=on_cpu, blocks=10)
    plain_work = dataclasses.replace(masked.work, stages=stages)
    without = masked.steps(on_cpu=on_cpu, blocks=10, work=plain_work)
    sizes = [linear.size for linear in layout_of("llama-3-70b").linears if linear.block < 10]
    more = with_masks["correction"].device - without["correction"].device
    assert more == 16 * max(sizes) + sum(sizes) * (not on_cpu)
    assert with_masks["correction"].host - without["correction"].host == sum(sizes)
    assert with_masks["evaluation"].device == without["evaluation"].device


def test_eager_attention_has_all_scores() -> None:
    kept = {}
    for length in (1024, 2048):
        text = {"name": "docs", "source": "python-docs", "num_sequences": 2}
        evaluation = [text | {"sequence_length": length}]
        steps = job("gpt_oss", evaluation=evaluation, calibration={"sequence_length": 512}).steps()
        kept[length] = {name: s.device - steps["load"].device for name, s in steps.items()}
    assert kept[2048]["evaluation"] > 3.5 * kept[1024]["evaluation"]
    assert kept[2048]["curvature"] == kept[1024]["curvature"]


def test_a_search_passes_once_for_every_kind_of_groups_and_keeps_consumers_twice() -> None:
    searched = {"search": {"num_sequences": 24, "rounds": 2}}
    search = job(num_shards=8, pruning=searched, **NOTHING_HELD)
    flops = search.plan().as_record()["flops"]
    passes = 2 * (2 * 80 + 1) + 1  # over as many windows as an evaluation, and three updates
    assert flops["search"] == pytest.approx(passes * flops["evaluation"] + 3 * flops["update"])
    without = hosts(job(num_shards=8, **NOTHING_HELD).steps(blocks=10))
    assert "search" not in without
    # and the hidden states that travel
    before = without["update"] + without["evaluation"] - without["costs"]
    twice = 2 * 10 * (28672 * 8192 + 8192 * 8192)  # bfloat16
    assert hosts(search.steps(blocks=10))["search"] - before == twice


def test_a_reconstruction_keeps_the_inputs_of_layers_and_trains_one_at_a_time() -> None:
    training = {"reconstruction": {"tokens_per_step": 1024, "num_epochs": 3}}

    def steps(pruning: Mapping[str, Any], **sections: Any) -> dict[str, StepPlan]:
        calibration = NOTHING_HELD["calibration"] | sections.pop("calibration", {})
        two = job(
            num_shards=8, num_replicas=2, pruning=pruning, calibration=calibration, **sections
        )
        return two.steps(blocks=10)

    without = steps({})
    trained = steps(training)
    layer = 3 * 8192 * 28672
    layout = layout_of("llama-3-70b")
    names = [f"model.layers.{block}.mlp.down_proj" for block in range(10)]
    placement = job(num_shards=8, num_replicas=2).placement
    owners = [placement.owners[layout.shapes[name].shared_input] for name in names]
    assert [owners.count(replica) for replica in (0, 1)] == [5, 5]
    for name in ("costs", "update"):  # bfloat16, half of the layers on each replica
        assert trained[name].host - without[name].host == 2 * TOKENS * 8192 * 5
    moving = (trained["curvature"].host - without["curvature"].host) / (2 * TOKENS * 8192)
    places = [(i, replica) for i in range(10) for replica in (0, 1)]
    assert moving == max(owners[: i + 1].count(replica) + (11 - i) / 2 for i, replica in places)
    for name in ("evaluation", "commit"):
        assert trained[name] == without[name]
    # producers need no gradients of their inputs, the consumer does
    expected = 10 / 2 * TOKENS * layer * (2 + 3 * (4 + 2 / 3))
    assert trained["update"].flops == pytest.approx(expected)
    weights = 32 * layer + 4 * layer / 3
    assert trained["update"].device > weights + (2 + 2 + 2) * TOKENS * 8192, "inputs and outputs"
    assert job(num_shards=8, pruning=training).plan().excess()[0] <= 1
    # of five sequences, of which one passes backward, the first replica gets three
    few = {"calibration": {"num_sequences": 5}, "curvature": {"kind": "kfac", "num_backward": 1}}
    assert len(Arrivals(1, 5, 2048, 2).of(0)) == 3
    kept = max(5 * owners[: i + 1].count(replica) + 3 * (11 - i) for i, replica in places)
    more = steps(training, **few)["curvature"].host - steps({}, **few)["curvature"].host
    assert more == pytest.approx(2 * 2048 * 8192 * kept)


def test_shards_without_a_layer_to_train_have_nothing_of_it() -> None:
    """Only the first block of this mixture has a feed-forward layer of its own."""
    pruning = {"groups": ["ffn"], "target_sparsity": 0.02, "reconstruction": {}}
    both = job("glm4_moe", 2, pruning=pruning)
    first, second = (both.steps(Stores(), on_cpu=True, shard=shard) for shard in (0, 1))
    assert list(first) == list(second)
    assert first["update"].flops > second["update"].flops == 0


def test_mixtures_of_experts_from_their_configurations() -> None:
    """Qwen3-30B-A3B on one device with the memory of its host."""
    layout = layout_of("qwen3-30b-a3b")
    assert layout.num_parameters == 30_532_122_624
    assert (layout.num_experts, layout.num_active_experts, len(layout.expert_sets)) == (128, 8, 48)
    found = job("qwen3-30b-a3b").plan()
    assert (found.stores.weights, found.stores.factors) == ("host", "host")
    factors = 48 * 128 * 4 * (768**2 / 2 + 2048**2 / 2)
    on_host = factors + 2 * (layout.num_parameters - 2 * 151936 * 2048)
    host = found.peak(found.workers[0].steps[2])[1]
    assert on_host < host < 1.2 * on_host, "with what pieces leave empty"
    # tokens; two operations for each of 3.3e9 weights that a token is multiplied with:
    # forward, backward, once more, without experts, and the factors
    active = TOKENS * 2 * 3.3e9
    assert active < found.as_record()["flops"]["curvature"] < 12 * active
    assert found.seconds["curvature"] > 0


@pytest.mark.slow
def test_a_large_mixture_of_experts_on_eight_devices() -> None:
    assert job("qwen3-235b-a22b", 8).plan(host_gb=2000).excess()[0] <= 1


def test_what_a_checkpoint_keeps_together_is_written_together() -> None:
    """gate_up_proj [6, 32, 96] of gpt-oss is in memory as a whole while it is written, embeddings
    of 320 x 32 and files of 1 GiB aside.
    """
    work = dataclasses.replace(job("gpt_oss").work, dtype="float32")
    shapes = Shapes(LAYOUTS["gpt_oss"], work)
    assert shapes.largest_tensor == 4 * 320 * 32
    assert shapes.largest_stored == 4 * 6 * 32 * 96


@pytest.mark.parametrize(("name", "step"), [("llama-3-70b", "update"), ("llama-3-405b", "costs")])
def test_what_does_not_fit_is_refused_with_the_step_and_a_remedy(name: str, step: str) -> None:
    expected = f"{step} on shard 0 needs .* of device memory, there are .*; give workers with .* "
    with pytest.raises(DoesNotFitError, match=expected + "times that"):
        job(name).plan(device_gb=8)


def test_the_smallest_number_of_shards_that_would_do() -> None:
    def plan(num_shards: int) -> Plan:
        resident = {"weights": "device", "factors": "device"}
        return job(num_shards=num_shards, memory=resident).plan()

    with pytest.raises(DoesNotFitError, match=r"set cluster\.num_shards: (\d+)") as refused:
        plan(2)
    number = int(str(refused.value).partition("num_shards: ")[2].partition(",")[0])
    assert plan(number).stores.weights == "device"
    with pytest.raises(DoesNotFitError):
        plan(number - 1)
    assert "leave memory to the plan" in str(refused.value)


def test_disk_that_is_too_small_is_refused() -> None:
    with pytest.raises(DoesNotFitError, match="of disk"):
        job(memory={"weights": "disk"}).plan(disk=GB)


def test_factors_are_those_that_are_gathered() -> None:
    groups, rows_columns = (
        job("llama", structure=name).work.gathered for name in ("groups", "rows_columns")
    )
    assert {name.rpartition(".")[2] for name in groups} == {"o_proj", "down_proj"}
    assert len(rows_columns) == 4 * 7


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 8e10), ("1.5TiB", 1.5 * 2**40), ("64g", 6.4e10), ("100", 100)]
)
def test_sizes_on_the_command_line(text: str, size: float) -> None:
    assert _bytes(text) == size


def test_text_that_the_model_writes_has_a_step_with_its_keys_and_values() -> None:
    layout = layout_of("llama-3-70b")
    written = {"source": "self", "num_sequences": 64}
    mix = [{"source": "self", "texts_per_sequence": 64, "seed": 1}]
    plans = [
        job(num_shards=8, calibration=calibration).plan()
        for calibration in ({}, written, {"source": "self", "mix": mix})
    ]
    assert "sampling" not in plans[0].seconds
    assert plans[2].seconds["sampling"] > plans[1].seconds["sampling"] > 0
    of_token = layout.num_blocks // 8 * 2 * layout.heads.num_kv * layout.heads.head_dim * 2
    caches = 64 * 2048 * of_token
    own, both = ({step.name: step.device for step in p.workers[0].steps} for p in plans[1:])
    assert caches < own["sampling"] - own["load"] < 1.2 * caches
    assert both["sampling"] > own["sampling"], "a copy while keys grow weighs more"


def test_a_batch_of_texts_is_written_by_one_replica() -> None:
    """64 short texts are one batch, 128 are two: as much work for a replica, and keys and values of
    64 texts.
    """
    written = {"source": "self", "sequence_length": 128}
    one, two = (
        job("llama", num_replicas=2, calibration=written | {"num_sequences": count}).steps(
            Stores(), on_cpu=True
        )["sampling"]
        for count in (64, 128)
    )
    assert (one.flops, one.device) == (two.flops, two.device)
