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
from ray_surgeon.plan.needs import StepPlan, WorkerView
from ray_surgeon.plan.plan import DoesNotFitError, Plan, plan_job
from ray_surgeon.plan.room import DEVICES, Room
from ray_surgeon.plan.work import Shapes, Work
from ray_surgeon.run.inputs import work_of
from ray_surgeon.run.machines import _bytes
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
TB = 1e12


@functools.cache
def layout_of(name: str) -> ModelLayout:
    return LAYOUTS[name] if name in LAYOUTS else ModelLayout.of(shaped_config(name))


WITH_EXPERTS = ["attention", "expert_channels", "experts"]


def work_for(spec: JobSpec, name: str) -> Work:
    """Return what a plan of a job depends on, from the model's configuration alone."""
    layout = layout_of(name)
    method = method_for(spec.pruning, spec.curvature, layout, spec.model.dtype)
    last = stages_after_shots(spec, layout)
    stages = stages_of(spec, layout, method, unread_texts(spec), last)
    return work_of(spec, layout, method, stages)


def job_for(
    name: str,
    structure: str = "groups",
    num_shards: int = 1,
    sections: Mapping[str, Any] | None = None,
    **memory: Any,
) -> tuple[JobSpec, Work]:
    """Return a job; ``sections`` is merged into its spec, field by field."""
    document: dict[str, Any] = {
        "version": 2,
        "name": "plan",
        "model": {"source": "x", "dtype": "bfloat16"},
        "calibration": {"source": "python-docs", "num_sequences": 128, "sequence_length": 2048},
        "evaluation": [
            {"name": "docs", "source": "python-docs", "num_sequences": 24, "sequence_length": 2048}
        ],
        "pruning": {"structure": structure, "target_sparsity": 0.2, "num_shots": 1}
        | ({"width_multiple": 8} if name in LAYOUTS and structure == "groups" else {})
        | ({"groups": WITH_EXPERTS} if layout_of(name).num_experts else {}),
        "memory": memory,
        "cluster": {"num_shards": num_shards, "gpus_per_worker": 1},
        "output": {"uri": "x"}
        | ({"exports": ["per_block"]} if layout_of(name).num_experts else {}),
    }
    for section, fields in (sections or {}).items():
        given = document.get(section)
        both = isinstance(given, dict) and isinstance(fields, dict)
        document[section] = given | fields if both else fields
    spec = JobSpec.model_validate(document)
    return spec, work_for(spec, name)


def steps_of(
    name: str,
    work: Work,
    stores: Stores,
    blocks: BlockRange,
    *,
    on_cpu: bool = False,
    num_shards: int = 1,
    num_replicas: int = 1,
    shard: int = 0,
) -> dict[str, StepPlan]:
    """Return the steps of one worker by name."""
    layout = layout_of(name)
    placement = place(layout, num_shards, num_replicas)
    view = WorkerView(Shapes(layout, work), placement, stores, on_cpu, shard, blocks)
    return {step.name: step for step in view.steps()}


RESIDENT = Stores("device", "device")


def plan(
    name: str,
    device_memory: float,
    host_memory: float,
    num_shards: int = 1,
    structure: str = "groups",
    disk: float = 4 * TB,
    **memory: Any,
) -> Plan:
    spec, job = job_for(name, structure, num_shards, **memory)
    room = Room(device_memory, host_memory / min(8, num_shards), disk, device_is_host=False)
    return plan_job(
        layout_of(name),
        place(layout_of(name), num_shards, 1),
        job,
        spec.memory,
        room,
        DEVICES["h100"],
    )


def test_resident_where_it_fits() -> None:
    found = plan("llama-3-70b", 80 * GB, TB, 8)
    assert (found.stores.weights, found.stores.factors) == ("device", "device")
    assert all(seconds > 0 for name, seconds in found.seconds.items() if name != "load")
    assert found.excess()[0] <= 1


@pytest.mark.parametrize(
    ("name", "device_memory", "host_memory", "num_shards", "structure", "weights", "factors"),
    [
        ("llama-3-70b", 80, 1000, 1, "groups", "host", "host"),
        ("llama-3-70b", 80, 64, 1, "groups", "disk", "disk"),
        ("llama-3-70b", 80, 1000, 8, "rows_columns", "device", "host"),
        ("llama-3-405b", 80, 2000, 16, "groups", "host", "host"),
        ("llama-3-405b", 80, 1000, 16, "groups", "disk", "host"),
        ("qwen3-32b", 24, 64, 1, "groups", "disk", "disk"),
    ],
)
def test_what_is_streamed_where_it_would_not_fit(
    name: str,
    device_memory: float,
    host_memory: float,
    num_shards: int,
    structure: str,
    weights: str,
    factors: str,
) -> None:
    found = plan(name, device_memory * GB, host_memory * GB, num_shards, structure)
    assert (found.stores.weights, found.stores.factors) == (weights, factors)
    assert found.stores.wave > 1
    assert found.stores.activations == "recompute"
    on_disk = [worker.disk for worker in found.workers]
    assert set(map(bool, on_disk)) == {weights == "disk"}


def test_fewer_sequences_with_gradients_take_less_of_the_curvature_pass() -> None:
    layout = layout_of("llama-3-70b")
    room = Room(80 * GB, TB / 8, 4 * TB, device_is_host=False)

    def flops(num_backward: int | None) -> float:
        curvature = {"kind": "kfac", "num_backward": num_backward}
        spec, work = job_for("llama-3-70b", num_shards=8, sections={"curvature": curvature})
        found = plan_job(layout, place(layout, 8, 1), work, spec.memory, room, DEVICES["h100"])
        return float(found.as_record()["flops"]["curvature"])

    assert flops(128) == flops(None)
    without = flops(None) - (flops(None) - flops(64)) * 2  # no sequence has a gradient
    assert flops(32) == pytest.approx(without + (flops(None) - without) / 4)
    assert 0.3 < without / flops(None) < 0.6


def test_pinned_memory_is_counted_as_it_is_reserved() -> None:
    """In pieces, which torch keeps when what was in them is gone."""
    _, work = job_for("llama-3-70b", num_shards=8)
    blocks = BlockRange(0, 10, 80)
    weights = [2 * 8192 * n for n in (8192, 1024, 1024, 8192, 28672, 28672, 28672, 1, 1)] * 10
    # A and G of two consumers
    factors = [4 * PackedSymmetric.size(n) for n in (8192, 8192, 28672, 8192)] * 10

    def hosts(stores: Stores, *, on_cpu: bool) -> dict[str, float]:
        steps = steps_of(
            "llama-3-70b", work, stores, blocks, on_cpu=on_cpu, num_shards=8, num_replicas=2
        )
        return {name: step.host for name, step in steps.items()}

    for on_cpu in (False, True):
        nothing_kept = hosts(RESIDENT, on_cpu=on_cpu)
        of_weights = hosts(Stores("host", "device"), on_cpu=on_cpu)
        of_factors = hosts(Stores("device", "host"), on_cpu=on_cpu)
        kept = {step: of_factors[step] - nothing_kept[step] for step in nothing_kept}
        more = of_weights["evaluation"] - nothing_kept["evaluation"]
        if on_cpu:
            assert more == sum(weights)
            assert kept["evaluation"] == 0
            assert kept["curvature"] == 2 * kept["costs"] == sum(factors)
        else:
            assert sum(weights) < more < 1.2 * sum(weights)
            assert sum(factors) < kept["evaluation"] < 1.1 * sum(factors)
            assert kept["evaluation"] == kept["curvature"] == kept["costs"]


def test_hidden_states_that_travel_are_in_the_host_of_a_gpu() -> None:
    """A copy each way, and those that wait between shards, as many as the first shard is ahead."""
    blocks = BlockRange(0, 20, 80)
    wave = 2 * 2048 * 8192 * 4  # bfloat16, four sequences of 2048 tokens
    hosts = []
    for num_shards, on_cpu in ((4, False), (1, False), (4, True)):
        _, work = job_for("llama-3-70b", num_shards=num_shards)
        stores = Stores("device", "device", wave=4)
        steps = steps_of("llama-3-70b", work, stores, blocks, on_cpu=on_cpu, num_shards=num_shards)
        hosts.append({name: step.host for name, step in steps.items()})
    for step in ("evaluation", "curvature"):
        assert hosts[0][step] - hosts[0]["costs"] == (2 + 4) * wave
        assert hosts[1][step] == hosts[1]["costs"]
    assert hosts[2]["evaluation"] == hosts[2]["costs"], "on a CPU they are counted with all else"


def test_corrections_of_elements_have_masks_on_the_device_and_large_products() -> None:
    """A product is as large as a weight, in float32 and with copies."""
    layout = layout_of("llama-3-70b")
    blocks = BlockRange(0, 10, 80)
    correction = {"lora_rank": 8, "steps_per_shot": 16, "learning_rate": 1e-3}
    sections = {"correction": correction, "calibration": {"held_aside": 0.0}}
    _, work = job_for("llama-3-70b", "element", num_shards=8, sections=sections)
    by_element = {True: work}
    by_element[False] = dataclasses.replace(
        work,
        stages=tuple(
            dataclasses.replace(stage, by_element=False) if isinstance(stage, Correction) else stage
            for stage in work.stages
            if not isinstance(stage, Load)
        ),
    )
    sizes = [linear.size for linear in layout.linears if linear.block < 10]
    for on_cpu in (False, True):
        with_masks, without = (
            steps_of(
                "llama-3-70b", by_element[masks], RESIDENT, blocks, on_cpu=on_cpu, num_shards=8
            )
            for masks in (True, False)
        )
        more = with_masks["correction"].device - without["correction"].device
        assert more == 16 * max(sizes) + sum(sizes) * (not on_cpu)
        assert with_masks["correction"].host - without["correction"].host == sum(sizes)
        assert with_masks["evaluation"].device == without["evaluation"].device


def test_eager_attention_has_all_scores() -> None:
    kept = {}
    for length in (1024, 2048):
        text = {"name": "docs", "source": "python-docs", "num_sequences": 2}
        sections = {
            "evaluation": [text | {"sequence_length": length}],
            "calibration": {"sequence_length": 512},
        }
        _, work = job_for("gpt_oss", sections=sections)
        steps = steps_of("gpt_oss", work, RESIDENT, BlockRange(0, 4, 4))
        at_rest = steps["load"].device
        kept[length] = {name: step.device - at_rest for name, step in steps.items()}
    assert kept[2048]["evaluation"] > 3.5 * kept[1024]["evaluation"]
    assert kept[2048]["curvature"] == kept[1024]["curvature"]


def test_a_search_passes_once_for_every_kind_of_groups_and_keeps_consumers_twice() -> None:
    layout = layout_of("llama-3-70b")
    room = Room(80 * GB, TB / 8, 4 * TB, device_is_host=False)
    nothing_held = {"calibration": {"held_aside": 0.0}}
    search = {"search": {"num_sequences": 24, "rounds": 2}}
    spec, work = job_for("llama-3-70b", num_shards=8, sections=nothing_held | {"pruning": search})
    found = plan_job(
        layout, place(layout, 8, 1), work, spec.memory, room, DEVICES["h100"]
    ).as_record()
    passes = 2 * (2 * 80 + 1) + 1
    expected = passes * found["flops"]["evaluation"] + 3 * found["flops"]["update"]
    assert found["flops"]["search"] == pytest.approx(expected), (
        "as many windows as an evaluation, and three updates"
    )
    _, plain = job_for("llama-3-70b", num_shards=8, sections=nothing_held)
    blocks = BlockRange(0, 10, 80)
    without, searching = (
        {
            name: step.host
            for name, step in steps_of("llama-3-70b", each, RESIDENT, blocks, num_shards=8).items()
        }
        for each in (plain, work)
    )
    assert "search" not in without
    # and the hidden states that travel
    before = without["update"] + without["evaluation"] - without["costs"]
    twice = 2 * 10 * (28672 * 8192 + 8192 * 8192)
    assert searching["search"] - before == twice, "bfloat16"


def test_a_reconstruction_keeps_the_inputs_of_layers_and_trains_one_at_a_time() -> None:
    layout = layout_of("llama-3-70b")
    room = Room(80 * GB, TB / 8, 4 * TB, device_is_host=False)
    blocks = BlockRange(0, 10, 80)
    placement = place(layout, 8, 2)
    training = {"reconstruction": {"tokens_per_step": 1024, "num_epochs": 3}}

    def steps(pruning: Mapping[str, Any], **sections: Any) -> dict[str, StepPlan]:
        calibration = {"held_aside": 0.0} | sections.pop("calibration", {})
        sections |= {"pruning": pruning, "calibration": calibration}
        _, work = job_for("llama-3-70b", num_shards=8, sections=sections)
        return steps_of("llama-3-70b", work, RESIDENT, blocks, num_shards=8, num_replicas=2)

    without = steps({})
    trained = steps(training)
    tokens = 128 * 2048
    layer = 3 * 8192 * 28672
    owners = [
        placement.owners[layout.shapes[f"model.layers.{block}.mlp.down_proj"].shared_input]
        for block in range(10)
    ]
    assert [owners.count(replica) for replica in (0, 1)] == [5, 5]
    for name in ("costs", "update"):
        assert trained[name].host - without[name].host == 2 * tokens * 8192 * 5, (
            "bfloat16, half of the layers on each replica"
        )
    moving = (trained["curvature"].host - without["curvature"].host) / (2 * tokens * 8192)
    assert moving == max(
        owners[: i + 1].count(replica) + (11 - i) / 2 for i in range(10) for replica in (0, 1)
    )
    for name in ("evaluation", "commit"):
        assert trained[name] == without[name]
    assert trained["update"].flops == pytest.approx(
        10 / 2 * tokens * layer * (2 + 3 * (4 + 2 / 3))
    ), "producers need no gradients of their inputs, the consumer does"
    weights = 32 * layer + 4 * layer / 3
    inputs_and_outputs = (2 + 2 + 2) * tokens * 8192
    assert trained["update"].device > weights + inputs_and_outputs
    spec, work = job_for("llama-3-70b", num_shards=8, sections={"pruning": training})
    found = plan_job(layout, place(layout, 8, 1), work, spec.memory, room, DEVICES["h100"])
    assert found.excess()[0] <= 1
    # of five sequences, of which one passes backward, the first replica gets three
    few: dict[str, Any] = {
        "calibration": {"num_sequences": 5},
        "curvature": {"kind": "kfac", "num_backward": 1},
    }
    assert len(Arrivals(1, 5, 2048, 2).of(0)) == 3
    kept = max(
        5 * owners[: i + 1].count(replica) + 3 * (11 - i) for i in range(10) for replica in (0, 1)
    )
    more = steps(training, **few)["curvature"].host - steps({}, **few)["curvature"].host
    assert more == pytest.approx(2 * 2048 * 8192 * kept)


def test_shards_without_a_layer_to_train_have_nothing_of_it() -> None:
    """Only the first block of this mixture has a feed-forward layer of its own."""
    layout = layout_of("glm4_moe")
    pruning = {"groups": ["ffn"], "target_sparsity": 0.02, "reconstruction": {}}
    _, work = job_for("glm4_moe", num_shards=2, sections={"pruning": pruning})
    first, second = (
        steps_of("glm4_moe", work, Stores(), blocks, on_cpu=True, num_shards=2, shard=shard)
        for shard, blocks in enumerate(place(layout, 2, 1).blocks)
    )
    assert list(first) == list(second)
    assert first["update"].flops > second["update"].flops == 0


def test_mixtures_of_experts_from_their_configurations() -> None:
    """Qwen3-30B-A3B on one device with the memory of its host, Qwen3-235B-A22B on eight."""
    layout = layout_of("qwen3-30b-a3b")
    assert layout.num_parameters == 30_532_122_624
    assert (layout.num_experts, layout.num_active_experts, len(layout.expert_sets)) == (128, 8, 48)
    found = plan("qwen3-30b-a3b", 80 * GB, TB)
    assert (found.stores.weights, found.stores.factors) == ("host", "host")
    on_host = 48 * 128 * 4 * (768**2 / 2 + 2048**2 / 2) + 2 * (
        layout.num_parameters - 2 * 151936 * 2048
    )
    assert on_host < found.peak(found.workers[0].steps[2])[1] < 1.2 * on_host, (
        "with what pieces leave empty"
    )
    assert plan("qwen3-235b-a22b", 80 * GB, 2 * TB, 8).excess()[0] <= 1
    # tokens; two operations for each of 3.3e9 weights that a token is multiplied with
    active = 128 * 2048 * 2 * 3.3e9
    flops = found.as_record()["flops"]
    assert active < flops["curvature"] < 12 * active, (
        "forward, backward, once more, without experts, and the factors"
    )
    assert found.seconds["curvature"] > 0


def test_what_a_checkpoint_keeps_together_is_written_together() -> None:
    """gate_up_proj [6, 32, 96] of gpt-oss is in memory as a whole while it is written, embeddings
    of 320 x 32 and files of 1 GiB aside.
    """
    _, work = job_for("gpt_oss")
    shapes = Shapes(LAYOUTS["gpt_oss"], dataclasses.replace(work, dtype="float32"))
    assert shapes.largest_tensor == 4 * 320 * 32
    assert shapes.largest_stored == 4 * 6 * 32 * 96


@pytest.mark.parametrize(
    ("name", "step"),
    [("llama-3-70b", "update"), ("llama-3-405b", "costs"), ("qwen3-32b", "update")],
)
def test_what_does_not_fit_is_refused_with_the_step_and_a_remedy(name: str, step: str) -> None:
    expected = (
        f"{step} on shard 0 needs .* of device memory, there are .*; give workers with .* times "
        "that"
    )
    with pytest.raises(DoesNotFitError, match=expected):
        plan(name, 8 * GB, TB)


def test_the_smallest_number_of_shards_that_would_do() -> None:
    with pytest.raises(DoesNotFitError, match=r"set cluster\.num_shards: (\d+)") as refused:
        plan("llama-3-70b", 80 * GB, TB, 2, weights="device", factors="device")
    number = int(str(refused.value).partition("num_shards: ")[2].partition(",")[0])
    assert (
        plan("llama-3-70b", 80 * GB, TB, number, weights="device", factors="device").stores.weights
        == "device"
    )
    with pytest.raises(DoesNotFitError):
        plan("llama-3-70b", 80 * GB, TB, number - 1, weights="device", factors="device")
    assert "leave memory to the plan" in str(refused.value)


def test_disk_that_is_too_small_is_refused() -> None:
    with pytest.raises(DoesNotFitError, match="of disk"):
        plan("llama-3-70b", 80 * GB, TB, disk=GB, weights="disk")


def test_factors_are_those_that_are_gathered() -> None:
    jobs = {structure: job_for("llama", structure)[1] for structure in ("groups", "rows_columns")}
    assert {name.rpartition(".")[2] for name in jobs["groups"].gathered} == {"o_proj", "down_proj"}
    assert len(jobs["rows_columns"].gathered) == 4 * 7


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 8e10), ("1.5TiB", 1.5 * 2**40), ("64g", 6.4e10), ("100", 100)]
)
def test_sizes_on_the_command_line(text: str, size: float) -> None:
    assert _bytes(text) == size


def written(num_sequences: int, length: int, texts_per_sequence: int = 1) -> dict[str, Any]:
    """Return the section of a calibration that the model writes."""
    return {
        "source": "self",
        "num_sequences": num_sequences,
        "sequence_length": length,
        "texts_per_sequence": texts_per_sequence,
    }


def test_text_that_the_model_writes_has_a_step_with_its_keys_and_values() -> None:
    layout = layout_of("llama-3-70b")
    room = Room(80 * GB, TB, TB, device_is_host=False)
    in_parts = written(64, 2048) | {
        "num_sequences": 128,
        "mix": [{"source": "self", "texts_per_sequence": 64, "seed": 1}],
    }
    plans = []
    for calibration in ({}, written(64, 2048), in_parts):
        spec, work = job_for("llama-3-70b", "groups", 8, sections={"calibration": calibration})
        placement = place(layout, 8, 1)
        plans.append(plan_job(layout, placement, work, spec.memory, room, DEVICES["h100"]))
    assert "sampling" not in plans[0].seconds
    assert plans[1].seconds["sampling"] > 0
    caches = (
        64 * 2048 * (layout.num_blocks // 8) * 2 * layout.heads.num_kv * layout.heads.head_dim * 2
    )
    steps = {step.name: step for step in plans[1].workers[0].steps}
    sampling = steps["sampling"].device
    assert caches < sampling - steps["load"].device < 1.2 * caches
    both = {step.name: step for step in plans[2].workers[0].steps}
    assert both["sampling"].device > sampling, "a copy while keys grow weighs more"
    assert plans[2].seconds["sampling"] > plans[1].seconds["sampling"]


def test_a_batch_of_texts_is_written_by_one_replica() -> None:
    """64 short texts are one batch, 128 are two: as much work for a replica, and keys and values of
    64 texts.
    """
    one, two = (
        steps_of(
            "llama",
            job_for("llama", sections={"calibration": written(count, 128)})[1],
            Stores(),
            BlockRange(0, 4, 4),
            on_cpu=True,
            num_replicas=2,
        )["sampling"]
        for count in (64, 128)
    )
    assert (one.flops, one.device) == (two.flops, two.device)
