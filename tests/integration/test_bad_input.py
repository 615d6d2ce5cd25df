"""Invalid input ends in exit code 2 with a clear message, before a worker starts, and overwrites
nothing.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from s3fs import S3FileSystem
from safetensors.torch import load_file, save_file

from ray_surgeon.pipeline import main
from ray_surgeon.report import html_report
from ray_surgeon.run import command, driver
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import ModelFiles
from tests.integration.runs import ONE, Jobs, changes_of, copied_model


@pytest.fixture
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*args: object, **kwargs: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(command, "run", start)


pytestmark = pytest.mark.usefixtures("no_worker")


@pytest.fixture
def workers_may_start(monkeypatch: pytest.MonkeyPatch, no_worker: None) -> None:
    monkeypatch.undo()


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


GROUPS = "pruning.structure=groups; pruning.groups"
ELEMENT = "model=opt; pruning.structure=element"
IDENTITY = "curvature.kind=identity; pruning.reconstruction={}"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("pruning.num_shot=1", ["pruning.num_shot", "do you mean num_shots?"]),
        ("cluster.num_shards=5", ["cluster.num_shards: 5", "4 blocks", "give 1 to 4"]),
        ("cluster.num_replicas=7", ["num_replicas: 7", "6 calibration sequences"]),
        ("curvature.num_backward=7", ["num_backward: 7", "6 calibration", "give 1 to 6"]),
        (
            "curvature.num_backward=1; cluster.num_replicas=2",
            ["every replica", "give 2 to 6"],
        ),
        (
            f"{GROUPS}=[ffn]; pruning.width_multiple=1000",
            ["at most 0.0000", "which is 1000"],
        ),
        (
            f"{GROUPS}=[attention]; pruning.reconstruction={{}}",
            ["is of channels", "to groups"],
        ),
        (
            f"{GROUPS}=[ffn]; {IDENTITY}",
            ["identity keeps no inputs", "use kfac or activations"],
        ),
        (f"{ELEMENT}; pruning.target_sparsity=0.995", ["biases count and stay"]),
        (
            f"{ELEMENT}; pruning.method=wanda; pruning.target_sparsity=0.975",
            ["0.9697 is all"],
        ),
        ("model.source=/absent/model", ["model.source", "no folder '/absent/model'"]),
        (f"model.source={'/' + 'long' * 80}", ["model.source: cannot read"]),
        (
            "calibration.source=/absent/text.txt",
            ["calibration", "no file /absent/text.txt"],
        ),
        (
            "calibration.sequence_length=200",
            ["calibration.sequence_length: 200", "at most 128"],
        ),
        ("calibration.max_tokens=3000", ["evaluation.0.max_tokens: must equal"]),
        (
            "output.uri=/tmp/ray/session/_ray_pkg_12/x",
            ["output.uri", "Ray's copy of the working"],
        ),
        ("output.uri=nosuch://somewhere", ["nosuch://somewhere", "Protocol not known"]),
    ],
)
def test_invalid_settings_are_refused(settings: str, words: list[str], job: Jobs) -> None:
    message = job.refused(settings)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("field", "uri"),
    [
        ("model__source", "http://me:S3CRET@host/x.txt"),
        ("calibration__source", "https://host/x.txt?X-Amz-Signature=S3CRET"),
        ("output__uri", "http://me:S3CRET@host/x.txt"),
    ],
)
def test_credentials_are_refused_and_not_shown(field: str, uri: str, job: Jobs) -> None:
    message = job.refused(**{field: uri})
    assert f"{field.replace('__', '.')}: holds credentials" in message
    assert "S3CRET" not in message


def test_missing_gpu_is_reported(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = job.refused("cluster.gpus_per_worker=1")
    assert "cluster.gpus_per_worker: 1, but torch sees no GPU" in message
    assert not (job.folder / "run").exists()


def test_tilde_in_paths_is_the_home_directory(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = job.models["llama"]
    monkeypatch.setenv("HOME", str(model.parent))
    job({"memory__scratch": "~/scratch"}, "--dry-run", model=Path("~") / model.name)


def test_suggested_memory_limit_is_sufficient(job: Jobs) -> None:
    message = job.refused("memory.limit_gib=0.1", "--dry-run")
    found = re.search(r"raise memory\.limit_gib to ([0-9.]+)", message)
    assert found is not None, message
    job({"memory__limit_gib": float(found[1])}, "--dry-run")


def test_output_head_of_a_tied_model_must_equal_the_embedding(
    job: Jobs, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second copy of the embedding and a leftover index file are accepted."""
    left_over = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(left_over))
    tensors = load_file(model / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(
        tensors | {"lm_head.weight": embedding.clone()}, model / "model.safetensors"
    )
    job({}, "--dry-run", model=model)
    save_file(
        tensors | {"lm_head.weight": embedding[:-8].clone()}, model / "model.safetensors"
    )
    assert "lm_head.weight is (312" in job.refused(model=model)
    save_file(tensors | {"lm_head.weight": 2 * embedding}, model / "model.safetensors")
    assert "set tie_word_embeddings to false, or remove lm_head.weight" in job.refused(
        model=model
    )

    def reset(source: ModelFiles, key: str, entry: int | None = None) -> None:
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr(ModelFiles, "read", reset)
    assert "model.source: cannot read" in job.refused(model=model)


def test_run_directory_with_other_contents_is_refused(job: Jobs) -> None:
    folder = job.folder / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("do not touch")
    assert "holds no run of this program" in job.refused()
    (folder / "thesis.txt").rename(folder / "run.json")
    (folder / "run.json").write_text(json.dumps({"fingerprints": {"method": "another"}}))
    (folder / "spec.yaml").write_text("{}")
    message = job.refused()
    assert (
        "another run: different calibration, code, evaluation, method, model, tok"
        in message
    )
    assert job.refused("", "--resume") == message
    assert sorted(path.name for path in folder.iterdir()) == ["run.json", "spec.yaml"]


def test_channels_that_tensor_parallel_cannot_split_are_refused(job: Jobs) -> None:
    """Engines split feed-forward channels as well as heads."""
    model = copied_model(job.models["llama"], job.folder / "odd", intermediate_size=50)
    (model / "model.safetensors").unlink()
    split = f"{GROUPS}=[attention]; pruning.tensor_parallel=4"
    assert "has 50 channels; give a divisor" in job.refused(
        split, "--dry-run", model=model
    )


def test_speed_requests_beyond_the_last_position_are_refused(job: Jobs) -> None:
    """GPT-2 would fail only after pruning; a Llama accepts such requests."""
    groups = f"{GROUPS}=[ffn]; pruning.width_multiple=8; output.exports=[per_block]"
    speed = f"{groups}; output.speed={{prompt_length: 100, num_new_tokens: 29}}"
    message = job.refused(speed, model="gpt2")
    assert (
        "a prompt of 100 tokens and 29 new ones, but the model takes at most 128"
        in message
    )
    job(changes_of(speed), "--dry-run")


def test_missing_spec_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nosuch://spec.yaml"]) == 2
    assert "nosuch://spec.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["/absent/spec.yaml"])
    assert ended.value.code == 2
    assert "there is no file /absent/spec.yaml" in capsys.readouterr().err


def test_unreachable_s3_is_reported(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE_S", 0.1)
    impatient = {"connect_timeout": 0.5, "retries": {"max_attempts": 0}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": impatient})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    S3FileSystem.clear_instance_cache()
    for setting in (
        "model.source=s3://bucket/model",
        "calibration.source=s3://bucket/t.txt",
        "output.uri=s3://bucket/run",
    ):
        assert "s3://bucket/" in job.refused(setting)
    S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("workers_may_start")
def test_resuming_a_changed_job_names_the_changes(
    job: Jobs, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a job may change. Also: the folder of a run that was killed at its start can be
    used, weights may be symbolic links, and a failing report page does not end the run.
    """

    def fail(*arguments: object) -> str:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(html_report, "page", fail)
    (model / "model.safetensors").rename(job.folder / "elsewhere.safetensors")
    (model / "model.safetensors").symlink_to("../elsewhere.safetensors")
    (job.folder / "run").mkdir()
    for name in (".writable", "spec.yaml"):
        (job.folder / "run" / name).write_text("")
    options = ONE | {"model": model}
    done = job(options)
    assert not (done.uri / "report.html").exists()
    assert "no fonts" in (done.uri / "events.jsonl").read_text()

    def refused(settings: str = "", **changes: Any) -> str:
        return job.refused(settings, "--resume", **options | changes)

    assert (
        "different method (pruning.target_sparsity 0.3 there, 0.2 here); choose another folder"
        in refused("pruning.target_sparsity=0.2")
    )
    assert (
        "different calibration, method (calibration.seed 0 there, 3 here; calibration.stride 64 "
        "there, None here)" in refused("calibration.seed=3; calibration.stride=null")
    )
    assert "different model (model.source" in refused(model="opt")
    with monkeypatch.context() as patch:
        patch.setattr("ray_surgeon.preparation.inputs.__version__", "9.9.9")
        assert "different code (version 0.2.0 there, 9.9.9 here)" in refused()
    job(options, "--resume", name="renamed")
    weights = done.uri / "shots/0001/shard-0001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "shard-0001.safetensors has" in refused()
    weights.unlink()
    assert "is missing" in refused()


@pytest.mark.usefixtures("workers_may_start")
def test_failure_to_start_ray_is_reported(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home(section: object) -> str:
        raise RuntimeError(
            "cannot start a local Ray: read-only; it needs a writable home"
        )

    monkeypatch.setattr(driver, "connect", no_home)
    error = job(cluster__backend="ray", code=1).error
    assert error.startswith("failed: cannot start a local Ray")
