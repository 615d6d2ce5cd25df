"""The report and the files of a shot agree with its committed weights and masks."""

from __future__ import annotations

from typing import Any

import pytest

from ray_surgeon.report.findings import wall_s
from tests.conftest import LAYOUTS
from tests.integration.runs import GROUPS, ONE, SPARSEGPT, Jobs

CHANNELS = GROUPS | {"pruning__groups": ["ffn"]}
FEW: dict[str, Any] = {
    "calibration__num_sequences": 1,
    "calibration__sequence_length": 20,
}


def test_record_counts_the_parameters_that_could_be_cut_out(job: Jobs) -> None:
    done = job(ONE, cluster__num_replicas=2)
    (shot,) = done.shots
    columns = done.tensors(1)
    layout = LAYOUTS["llama"]
    cut = sum(
        int((~columns[f"{groups.consumer}.columns"][groups.columns].any(dim=1)).sum())
        * groups.num_parameters
        for groups in layout.group_sets
    )
    assert cut > 0
    assert shot["shrinkable"] == pytest.approx(cut / layout.linear_size)
    assert shot["predicted_loss_increase"] > 0
    assert shot["update_residual"] == {"median": 0, "max": 0}


def test_raised_damping_is_recorded_once_per_factor(job: Jobs) -> None:
    (shot,) = job(FEW | CHANNELS | ONE, curvature__damping={"a": 0, "g": 0}).shots
    events = [(event["linear"], event["factor"]) for event in shot["damping_used"]]
    assert {linear for linear, _ in events} >= {
        f"model.layers.{block}.mlp.down_proj" for block in range(4)
    }
    assert len(events) == len(set(events))
    assert all(event["asked"] == 0 < event["used"] for event in shot["damping_used"])


def test_raised_damping_of_sparsegpt_is_recorded_and_capped(job: Jobs) -> None:
    """Twenty tokens do not determine 32 inputs. The damping is raised up to its cap."""
    few = SPARSEGPT | FEW | {"pruning__damping": 0}
    for shot in job(few, cluster__num_shards=2).shots:
        names = [event["linear"] for event in shot["damping_used"]]
        assert names == [shape.name for shape in LAYOUTS["llama"].linears]
        assert all(event["asked"] == 0 < event["used"] for event in shot["damping_used"])
    bounded = job(few | ONE, folder="bounded", pruning__max_damping=1e-30, code=1)
    assert "cap 1e-30" in bounded.error


def test_clipped_terms_are_recorded(job: Jobs) -> None:
    options = {"curvature__kind": "extended_kfac", "curvature__num_kronecker_terms": 3}
    assert job(options | ONE).shots[0]["terms_clipped"]


def test_widths_are_rounded_and_predictions_recorded(job: Jobs) -> None:
    """Widths are multiples after the last shot only. Pruned consumers have predictions."""
    done = job(CHANNELS)
    for shot, is_rounded in ((1, False), (2, True)):
        masks = done.tensors(shot)
        widths = [
            int(masks[name].sum()) for name in masks if name.endswith("down_proj.columns")
        ]
        assert all(width % 8 == 0 for width in widths) == is_rounded, widths
    report = job(CHANNELS | ONE, folder="one", pruning__target_sparsity=0.2).report
    (shot,) = report["shots"]
    predicted = {
        linear["name"]: linear["predicted_loss_increase"] for linear in report["linears"]
    }
    lost = {name for name, count in shot["groups_removed"].items() if count}
    assert {name for name, cost in predicted.items() if cost} == lost
    assert shot["predicted_loss_increase"] == pytest.approx(sum(predicted.values()))


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_loss_curve_passes_through_the_shot_and_goes_on(
    job: Jobs, allocation: str
) -> None:
    done = job(CHANNELS | ONE, pruning__allocation=allocation)
    curve = dict(done.shot["loss_curve"])
    sparsities = list(curve)
    assert sparsities == sorted(sparsities)
    assert 2 < len(sparsities) <= 40
    sparsity = min(sparsities, key=lambda each: abs(each - done.shot["sparsity"]))
    assert sparsity == pytest.approx(done.shot["sparsity"])
    predicted = done.shot["predicted_loss_increase"]
    assert curve[sparsity] == pytest.approx(predicted, rel=1e-2)
    assert sparsities[-1] > sparsity


def test_report_has_the_steps_of_all_tries_and_the_size_of_the_source(job: Jobs) -> None:
    """Seconds of steps are those of the events, and the export counts."""
    done = job(CHANNELS | ONE, output__exports=["per_block"])
    weights = job.models["llama"] / "model.safetensors"
    assert done.report["source"]["bytes"] == weights.stat().st_size
    resumed = job(CHANNELS | ONE, "--resume", output__exports=["per_block", "masked"])
    events = [event for event in resumed.events if event.get("worker_seconds")]
    assert resumed.report["steps"] == [
        {name: event[name] for name in ("step", "shot", "seconds")} for event in events
    ]
    assert [event["step"] for event in events].count("export") > 1
    assert wall_s(resumed.report) == pytest.approx(sum(e["seconds"] for e in events))


def test_predicted_loss_of_experts_is_the_sum_of_their_costs(job: Jobs) -> None:
    experts = GROUPS | {"pruning__groups": ["experts"], "pruning__target_sparsity": 0.15}
    (shot,) = job(experts | ONE, model="mixtral", cluster__num_shards=2).shots
    assert shot["experts_removed"]
    assert shot["predicted_loss_increase"] == pytest.approx(
        sum(shot["experts_removed"].values())
    )
