"""What report and files of a shot say, against the committed weights and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_surgeon.maths.columns import sparsegpt, upper_inverse
from ray_surgeon.maths.curvature import RaisedDamping
from tests.conftest import LAYOUTS
from tests.integration.runs import report_of, run, tensors_of_shot

GROUPS: dict[str, Any] = {"pruning__structure": "groups", "pruning__width_multiple": 8}
CHANNELS = GROUPS | {"pruning__groups": ["ffn"]}
SPARSEGPT: dict[str, Any] = {"pruning__method": "sparsegpt", "pruning__structure": "element"}
FEW: dict[str, Any] = {"calibration__num_sequences": 1, "calibration__sequence_length": 20}
ONE = {"pruning__num_shots": 1}


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_what_rows_and_columns_would_shrink(
    num_replicas: int, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert run(tmp_path, model_folders["llama"], **ONE, cluster__num_replicas=num_replicas) == 0
    tensors = tensors_of_shot(tmp_path / "run", 1)
    layout = LAYOUTS["llama"]
    (shot,) = report_of(tmp_path / "run")["shots"]
    cut = 0
    for groups in layout.group_sets:
        gone = ~tensors[f"{groups.consumer}.columns"][groups.columns].any(dim=1)
        cut += int(gone.sum()) * groups.num_parameters
    assert cut > 0
    assert shot["shrinkable"] == pytest.approx(cut / layout.linear_size)
    assert shot["predicted_loss_increase"] > 0
    assert shot["update_residual"] == {"median": 0, "max": 0}


@pytest.mark.parametrize("options", [{}, CHANNELS], ids=["rows", "groups"])
def test_raised_damping(
    options: dict[str, Any], model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert (
        run(
            tmp_path,
            model_folders["llama"],
            **FEW,
            **options,
            **ONE,
            curvature__damping={"a": 0, "g": 0},
        )
        == 0
    )
    (shot,) = report_of(tmp_path / "run")["shots"]
    events = [(event["linear"], event["factor"]) for event in shot["damping_used"]]
    assert {linear for linear, _ in events} >= {
        f"model.layers.{block}.mlp.down_proj" for block in range(4)
    }
    assert len(events) == len(set(events))
    assert all(event["asked"] == 0 < event["used"] for event in shot["damping_used"])


def test_clipped_terms(model_folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"curvature__kind": "extended_kfac", "curvature__num_kronecker_terms": 3}
    assert run(tmp_path, model_folders["llama"], **options, **ONE) == 0
    assert report_of(tmp_path / "run")["shots"][0]["terms_clipped"]


def test_predictions_are_of_the_consumers_that_lost_channels(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert (
        run(tmp_path, model_folders["llama"], **CHANNELS, **ONE, pruning__target_sparsity=0.2) == 0
    )
    report = report_of(tmp_path / "run")
    predicted = {linear["name"]: linear["predicted_loss_increase"] for linear in report["linears"]}
    assert {name for name, cost in predicted.items() if cost} == {
        name for name, n in report["shots"][0]["groups_removed"].items() if n
    }
    assert report["shots"][0]["predicted_loss_increase"] == pytest.approx(sum(predicted.values()))


def test_predictions_for_whole_experts_are_their_costs(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    experts = {
        "pruning__structure": "groups",
        "pruning__groups": ["experts"],
        "pruning__target_sparsity": 0.15,
    }
    assert run(tmp_path, model_folders["mixtral"], **experts, **ONE, cluster__num_shards=2) == 0
    (shot,) = report_of(tmp_path / "run")["shots"]
    assert shot["experts_removed"]
    assert shot["predicted_loss_increase"] == pytest.approx(sum(shot["experts_removed"].values()))


def test_rows_of_producers_of_what_is_gone_are_zero(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert run(tmp_path, model_folders["llama"], **GROUPS) == 0
    tensors = tensors_of_shot(tmp_path / "run", 2)
    num_rows = 0
    for name in {name for groups in LAYOUTS["llama"].group_sets for name, _ in groups.producers}:
        gone = ~tensors[f"{name}.rows"]
        assert not tensors[f"{name}.weight"][gone].any()
        num_rows += int(gone.sum())
    assert num_rows > 0


def test_widths_are_multiples_after_the_last_shot_only(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert run(tmp_path, model_folders["llama"], **CHANNELS) == 0
    for shot, rounded in ((1, False), (2, True)):
        masks = tensors_of_shot(tmp_path / "run", shot)
        widths = [
            int(mask.sum()) for name, mask in masks.items() if name.endswith("down_proj.columns")
        ]
        assert all(width % 8 == 0 for width in widths) == rounded, widths


def test_heads_of_a_model_without_kv_groups_go_one_by_one(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    options = GROUPS | {"pruning__groups": ["attention"], "pruning__target_sparsity": 0.1}
    assert run(tmp_path, model_folders["gpt2"], **options, **ONE) == 0
    assert sum(report_of(tmp_path / "run")["shots"][0]["groups_removed"].values()) > 0


def test_damping_of_sparsegpt_is_that_of_the_shot(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(A: Any, damping: float, max_damping: float, name: str) -> Any:
        U, _ = upper_inverse(A, damping, max_damping, name)
        return U, (RaisedDamping(name, "A", 0.0, 1.0, float64_retry=False),)

    monkeypatch.setattr("ray_surgeon.stages.prune.layerwise.upper_inverse", raising)
    assert run(tmp_path, model_folders["llama"], **SPARSEGPT) == 0
    for shot in report_of(tmp_path / "run")["shots"]:
        assert [event["linear"] for event in shot["damping_used"]] == [
            shape.name for shape in LAYOUTS["llama"].linears
        ]


def test_sparsegpt_on_few_tokens(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two shots without damping, which goes only as far up as it may."""
    few = SPARSEGPT | FEW | {"pruning__damping": 0}
    assert run(tmp_path / "free", model_folders["llama"], **few) == 0
    assert (
        run(tmp_path / "bounded", model_folders["llama"], **few, **ONE, pruning__max_damping=1e-30)
        == 1
    )
    assert "cap 1e-30" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_what_a_shot_pruned_stays_pruned(
    method: str, model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a linear has several blocks of columns, too."""
    defaults: Any = sparsegpt.__kwdefaults__
    monkeypatch.setitem(defaults, "block_size", 8)
    assert run(tmp_path, model_folders["llama"], **(SPARSEGPT | {"pruning__method": method})) == 0
    first, second = (tensors_of_shot(tmp_path / "run", shot) for shot in (1, 2))
    masks = [name for name in first if name.endswith(".kept")]
    assert masks
    assert not any((second[name] & ~first[name]).any() for name in masks)
