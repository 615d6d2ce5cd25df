"""Recovery on streamed texts with a teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from transformers import AutoTokenizer

from ray_surgeon.config.schedule import NO_PRUNING
from ray_surgeon.config.sections import ModelSection, RecoverySection
from ray_surgeon.config.texts import StreamedSection
from ray_surgeon.distributed.cluster import LocalCluster
from ray_surgeon.distributed.dense_states import drop_teacher, load_teacher
from ray_surgeon.distributed.microbatch import Pass
from ray_surgeon.distributed.passes import remember
from ray_surgeon.distributed.weights import ModelRecipe
from ray_surgeon.memory.stores import NO_SCRATCH, Place, Stores
from ray_surgeon.recovery.recovery import share_of_peak, stream_of
from ray_surgeon.recovery.training import StreamBatches, Training
from ray_surgeon.run_state import HELD, CalibrationText, held_aside
from tests.integration import runs
from tests.integration.runs import Jobs, loaded

LENGTH = 24
TEXT = {"recovery__texts": [{"source": "python-docs", "max_tokens": 9000}]}
ON_TEXT = runs.ONE | runs.LORA | TEXT | {"recovery__num_tokens": 400}


@pytest.fixture
def text(tmp_path: Path) -> StreamedSection:
    path = tmp_path / "text.txt"
    path.write_text(
        " ".join(f"word {i} is {i * i % 97}" for i in range(2000)), encoding="utf-8"
    )
    return StreamedSection(source=str(path), split="all")


def weakened(
    model: Path, factor: float, **shape: Any
) -> tuple[LocalCluster, CalibrationText]:
    """Return a model with weakened feed-forward layers, and windows held aside."""
    cluster = loaded(model, **shape)
    tokens = np.random.default_rng(0).integers(1, 300, (6, LENGTH))
    held = CalibrationText.split(tokens, None, 4)
    remember(cluster, HELD, held.held)
    for worker in cluster.workers.values():
        for name in worker.shard.linears:
            if "down_proj" in name:
                worker.shard.set_weight(name, worker.shard.weight(name) * factor)
    return cluster, held


def trained(
    model: Path,
    text: StreamedSection,
    factor: float,
    place: Place = "device",
    **shape: Any,
) -> tuple[Training, LocalCluster, CalibrationText]:
    cluster, held = weakened(model, factor, **shape)
    options = {
        "rank": 4,
        "num_tokens": 40 * 3 * LENGTH,
        "sequences_per_step": 3,
        "texts": [text],
    }
    section = RecoverySection.model_validate(options | {"learning_rate": 2e-3})
    tokenizer = AutoTokenizer.from_pretrained(model)
    stream = stream_of(section, NO_PRUNING, LENGTH, tokenizer)
    assert stream is not None
    recipe = ModelRecipe(ModelSection(source=str(model)), (), NO_SCRATCH)
    cluster.stores = replace(cluster.stores, teacher=place)
    cluster.run_all(load_teacher, recipe, place)
    batches = StreamBatches(section, stream, cluster, 40, 0)
    training = Training(section, cluster, held, batches)
    training.train(1)
    cluster.run_all(drop_teacher)
    return training, cluster, held


def test_unchanged_model_has_no_loss(llama: Path, text: StreamedSection) -> None:
    training, _, _ = trained(llama, text, 1.0)
    assert training.undone is not None
    assert training.losses[0] < 1e-5, "states of the teacher are stored in bfloat16"


@pytest.mark.parametrize("shape", [{}, {"num_shards": 2, "num_replicas": 2}], ids=str)
def test_recovery_lowers_the_divergence(
    llama: Path, text: StreamedSection, shape: Any
) -> None:
    training, cluster, held = trained(llama, text, 0.8, **shape)
    assert training.undone is None
    assert held_aside(cluster, held)[0] < 0.75 * training.before
    first, *_, last = training.held
    assert last.value == pytest.approx(held_aside(cluster, held)[0], rel=1e-3)
    assert (first.tokens, last.tokens) == (0, len(training.losses) * 3 * LENGTH)
    assert last.acceptance is not None
    assert last.acceptance > 0.9


def test_losses_do_not_depend_on_shards_replicas_and_stores(
    llama: Path, text: StreamedSection
) -> None:
    on_disk = Stores(weights="disk", factors="disk", activations="recompute")
    ways: list[tuple[Place, dict[str, Any]]] = [
        ("device", {}),
        ("disk", {"stores": on_disk}),
        ("host", {"num_shards": 2, "num_replicas": 2}),
    ]
    losses = [
        trained(llama, text, 0.8, place, **shape)[0].losses for place, shape in ways
    ]
    assert losses[1] == losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)
    assert len(set(losses[0])) == 40


def test_teacher_on_the_host_takes_all_sequences_of_a_pass_together(llama: Path) -> None:
    placement = loaded(llama, num_replicas=2).placement
    one_pass = Pass(np.zeros((8, LENGTH), dtype=np.int64), of_teacher=True)
    ways: list[tuple[Place, int]] = [("device", 4), ("host", 1)]
    for place, number in ways:
        waves = one_pass.microbatches(placement, Stores(teacher=place))
        assert [len(of_replica) for of_replica in waves] == [number] * 2


def test_training_ends_when_its_text_ends(llama: Path, text: StreamedSection) -> None:
    """Training ends early, keeps its weights and reports the reason. A local text that is too short
    is refused.
    """
    path = Path(text.source)
    path.write_text(path.read_text(encoding="utf-8")[:2500], encoding="utf-8")
    with pytest.raises(ValueError, match=r"recovery\.texts\.0.*ended|needs?"):
        trained(llama, text, 0.8)
    elsewhere = f"memory://recovery/{path.name}"
    with fsspec.open(elsewhere, "wb") as file:
        file.write(path.read_bytes())
    text = text.model_copy(update={"source": elsewhere})
    training, cluster, held = trained(llama, text, 0.8)
    assert training.ended is not None
    assert "recovery.texts.0" in training.ended
    assert 3 < len(training.losses) < 40
    assert training.undone is None
    assert held_aside(cluster, held)[0] < 0.9 * training.before


def test_run_recovers_on_streamed_and_generated_texts(job: Jobs) -> None:
    """The second shot reads other windows than the first one. Some windows are the text generated
    for the calibration.
    """
    written = {"source": "self", "chat": False, "weight": 0.5, "prompt": "a"}
    texts = [*ON_TEXT["recovery__texts"], {"source": "calibration", "weight": 0.5}]
    settings = {"calibration__mix": [written], "recovery__texts": texts}
    done = job(ON_TEXT | settings | {"pruning__num_shots": 2, "recovery__loss": "kl"})
    first, second = done.shots
    assert len(first["recovery_losses"]) == 3
    assert len(second["recovery_losses"]) == 10
    assert second["recovery_held_aside"][-1]["tokens"] > 0
    assert second["recovery_losses"][:3] != first["recovery_losses"]


@pytest.mark.parametrize(("device", "share"), [("h100", 0.25), ("cpu", 0.0)])
def test_share_of_peak_flops(device: str, share: float) -> None:
    """With two shards, the training takes four seconds at full speed."""
    plan = {
        "device": device,
        "flops": {"recovery": 2 * 4 * 9.89e14},
        "disk_bytes": [0, 0],
    }
    assert share_of_peak(plan, "bfloat16", 1 / 16) == pytest.approx(share)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("recovery.texts=[{source: python-docs, split: all}]", "set split to train"),
        (
            "recovery.texts=[{source: python-docs, max_tokens: 7000}]",
            "max_tokens: must equal",
        ),
        ("recovery.texts=[{source: python-code, stride: 3}]", "remove them"),
        (
            "recovery.texts=[{source: calibration, max_tokens: 9}]",
            "source and weight alone",
        ),
        ("calibration.source=calibration", "has a place in a recovery only; name a text"),
        ("recovery.num_tokens=9000000", "recovery.texts.0"),
    ],
)
def test_unsuitable_recovery_texts_are_refused(
    settings: str, message: str, job: Jobs
) -> None:
    measured = [runs.windows("python-docs", name="docs", max_tokens=9000)]
    assert message in job.refused(settings, **{**ON_TEXT, "evaluation": measured})
