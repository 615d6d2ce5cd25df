"""What cannot work ends in exit code 2 with a clear message, before a worker starts, and overwrites
nothing.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import fsspec
import pytest
import torch
from s3fs import S3FileSystem
from safetensors.torch import load_file, save_file

import ray_surgeon
from ray_surgeon import pipeline
from ray_surgeon.pipeline import main
from ray_surgeon.report import html_report
from ray_surgeon.run import driver
from ray_surgeon.storage import copies, retrying
from ray_surgeon.storage.sources import ModelFiles
from tests.integration.runs import Refused, completed, copied_model, overrides, run

ONE_SHOT = {"pruning__num_shots": 1}


@pytest.fixture
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*args: object, **kwargs: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(pipeline, "run", start)


pytestmark = pytest.mark.usefixtures("no_worker")


@pytest.fixture
def workers_may_start(monkeypatch: pytest.MonkeyPatch, no_worker: None) -> None:
    monkeypatch.undo()


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


NAME_TOO_LONG = "/" + "long" * 80
GROUPS = "pruning.structure=groups; pruning.groups"
SEARCH = "pruning.width_multiple=8; pruning.search={num_sequences: 600}"
IDENTITY = "curvature.kind=identity; pruning.reconstruction={}"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("pruning.target_sparsity=-3", ["pruning.target_sparsity", "greater than 0", "got -3"]),
        ("pruning.num_shot=1", ["pruning.num_shot", "correct its name"]),
        ("cluster.num_shards=5", ["cluster.num_shards: 5", "4 blocks", "give 1 to 4"]),
        ("cluster.num_replicas=7", ["num_replicas: 7", "6 calibration sequences"]),
        ("curvature.num_backward=7", ["num_backward: 7", "6 calibration", "give 1 to 6"]),
        ("curvature.num_backward=1; cluster.num_replicas=2", ["every replica", "give 2 to 6"]),
        (f"{GROUPS}=[experts]; pruning.search={{}}", ["with whole experts", "use expert_channels"]),
        (f"{GROUPS}=[ffn]; pruning.allocation=uniform; pruning.search={{}}", ["correct its name"]),
        (f"{GROUPS}=[ffn]; pruning.width_multiple=1000", ["at most 0.0000", "which is 1000"]),
        (f"{GROUPS}=[attention]; pruning.reconstruction={{}}", ["is of channels", "to groups"]),
        (f"{GROUPS}=[ffn]; {IDENTITY}", ["identity keeps no inputs", "use kfac or activations"]),
        (f"{GROUPS}=[ffn]; {SEARCH}", ["606 sequences", "need 38760"]),
        ("model.source=/absent/model", ["model.source", "no folder '/absent/model'"]),
        (f"model.source={NAME_TOO_LONG}", ["model.source: cannot read"]),
        ("calibration.source=/absent/text.txt", ["calibration", "no file /absent/text.txt"]),
        ("calibration.num_sequences=600", ["calibration", "tokens", "need 38376"]),
        ("calibration.sequence_length=200", ["calibration.sequence_length: 200", "at most 128"]),
        ("calibration.max_tokens=3000", ["evaluation.0.max_tokens: must equal"]),
        (f"evaluation.0.source={NAME_TOO_LONG}", ["evaluation.0 (docs)"]),
        ("output.uri=/tmp/ray/session/_ray_pkg_12/x", ["output.uri", "Ray's copy of the working"]),
        ("output.uri=nosuch://somewhere", ["nosuch://somewhere", "Protocol not known"]),
    ],
)
def test_specs_that_cannot_work(settings: str, words: list[str], refused: Refused) -> None:
    message = refused(settings)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("field", ["model__source", "calibration__source", "output__uri"])
@pytest.mark.parametrize(
    "uri", ["http://me:S3CRET@host/x.txt", "https://host/x.txt?X-Amz-Signature=S3CRET"]
)
def test_credentials_are_refused_and_not_shown(uri: str, field: str, refused: Refused) -> None:
    message = refused(**{field: uri})
    assert f"{field.replace('__', '.')}: holds credentials" in message
    assert "S3CRET" not in message


def test_an_absent_gpu(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused("cluster.gpus_per_worker=1")
    assert "cluster.gpus_per_worker: 1, but torch sees no GPU" in message
    assert not (tmp_path / "run").exists()


def test_a_home_is_found(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(llama.parent))
    assert run(tmp_path, Path("~") / llama.name, "--dry-run", memory__scratch="~/scratch") == 0


def test_a_limit_that_is_too_low_is_raised(refused: Refused, llama: Path, tmp_path: Path) -> None:
    message = refused("memory.limit_gib=0.1", "--dry-run")
    found = re.search(r"raise memory\.limit_gib to ([0-9.]+)", message)
    assert found is not None, message
    assert run(tmp_path, llama, "--dry-run", memory__limit_gib=float(found[1])) == 0


def test_a_head_of_its_own_in_a_model_that_is_tied(
    refused: Refused, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second copy of the embedding is right, and so is an index that is left over."""
    left_over = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(left_over))
    tensors = load_file(model / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, model / "model.safetensors")
    assert run(tmp_path, model, "--dry-run") == 0
    save_file(tensors | {"lm_head.weight": embedding[:-8].clone()}, model / "model.safetensors")
    assert "lm_head.weight is (312" in refused(source=model)
    save_file(tensors | {"lm_head.weight": 2 * embedding}, model / "model.safetensors")
    assert "set tie_word_embeddings to false, or remove lm_head.weight" in refused(source=model)

    def reset(source: ModelFiles, key: str, entry: int | None = None) -> None:
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr(ModelFiles, "read", reset)
    assert "model.source: cannot read" in refused(source=model)


def test_run_directory_that_holds_something_else(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("do not touch")
    assert "holds no run of this program" in refused()
    (folder / "thesis.txt").rename(folder / "run.json")
    (folder / "run.json").write_text(json.dumps({"fingerprints": {"method": "another"}}))
    message = refused()
    assert "another run: different calibration, code, evaluation, method, model, tok" in message
    assert "(version None there, 0.2.0 here)" in message
    assert refused("", "--resume") == message
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_a_data_set_is_cut_at_one_place(refused: Refused, llama: Path, tmp_path: Path) -> None:
    topic_texts = datasets.Dataset.from_dict({"text": list(topics.values())[:8]})
    topic_texts.save_to_disk(str(tmp_path / "set"))
    text = {"source": str(tmp_path / "set"), "num_sequences": 2, "sequence_length": 40}
    text |= {"max_tokens": 3000, "name": "docs"}
    changes = {
        "calibration": {k: v for k, v in text.items() if k != "name"},
        "evaluation": [text | {"max_tokens": 1000}],
    }
    assert "evaluation.0.max_tokens: must equal that of" in refused(**changes)
    assert run(tmp_path, llama, "--dry-run", **changes | {"evaluation": [text]}) == 0


def test_more_than_the_weights_beside_biases(
    refused: Refused, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Of 32 inputs and a bias 32 of 33 can go."""
    wanda = "pruning.method=wanda; pruning.structure=element; pruning.target_sparsity=0.975"
    message = "0.9697 is all that wanda can take from this model, because biases count and stay"
    assert message in refused(wanda, source=model_folders["opt"])
    assert run(tmp_path, model_folders["llama"], "--dry-run", *overrides(wanda)) == 0


def test_channels_that_cannot_be_split(refused: Refused, llama: Path, tmp_path: Path) -> None:
    """Heads are not all that an engine splits."""
    model = copied_model(llama, tmp_path / "odd", intermediate_size=50)
    (model / "model.safetensors").unlink()
    split = f"{GROUPS}=[attention]; pruning.tensor_parallel=4"
    assert "has 50 channels; give a divisor" in refused(split, "--dry-run", source=model)


def test_requests_beyond_the_table_of_positions(
    refused: Refused, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """In GPT-2 they would fail when everything is done; a Llama takes them."""
    groups = f"{GROUPS}=[ffn]; pruning.width_multiple=8; output.exports=[per_block]"
    speed = f"{groups}; output.speed={{prompt_length: 100, num_new_tokens: 29}}"
    message = refused(speed, source=model_folders["gpt2"])
    assert "a prompt of 100 tokens and 29 new ones, but the model takes at most 128" in message
    latency = "pruning.target={latency_s: 1, request: {prompt_length: 128}}"
    latency = f"{groups}; {latency}; pruning.target_sparsity=null"
    message = refused(latency, source=model_folders["opt"])
    assert "pruning.target.request: a prompt of 128 tokens" in message
    assert run(tmp_path, model_folders["llama"], "--dry-run", *overrides(speed)) == 0


@pytest.mark.parametrize("spec", ["/absent/spec.yaml", "nosuch://spec.yaml"])
def test_absent_spec(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([spec]) == 2
    assert spec in capsys.readouterr().err


def test_unreachable_s3(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "PATIENCE_S", 0.1)
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
        assert "s3://bucket/" in refused(setting)
    S3FileSystem.clear_instance_cache()


def test_files_that_may_not_be_read(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(uri: str) -> Path:
        raise PermissionError(f"{uri}: Forbidden")

    with fsspec.open("memory://denied/config.json", "w") as file:
        file.write("{}")
    monkeypatch.setattr(copies, "local_copy", denied)
    assert "cannot read memory://denied" in refused("model.source=memory://denied")


def test_output_that_cannot_be_written(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "output.uri: cannot use" in refused(output__uri=str(tmp_path / "file" / "run"))


@pytest.mark.usefixtures("workers_may_start")
def test_resuming_shows_what_is_different_or_damaged(
    refused: Refused,
    model: Path,
    model_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What does not matter may change; and a folder of a run that was killed at once can be used,
    the weights may be links, and a drawing that fails ends no run.
    """

    def fail(*arguments: object) -> str:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(html_report, "page", fail)
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (model / "model.safetensors").symlink_to("../elsewhere.safetensors")
    (tmp_path / "run").mkdir()
    for name in (".writable", "spec.yaml"):
        (tmp_path / "run" / name).write_text("")
    completed(tmp_path, model, **ONE_SHOT)
    assert not (tmp_path / "run/report.html").exists()
    assert "no fonts" in (tmp_path / "run/events.jsonl").read_text()

    def refused_to_resume(settings: str = "", source: Path = model) -> str:
        return refused(settings, "--resume", source=source, **ONE_SHOT)

    assert (
        "different method (pruning.target_sparsity 0.3 there, 0.2 here); choose another folder"
        in refused_to_resume("pruning.target_sparsity=0.2")
    )
    assert (
        "different calibration, method (calibration.seed 0 there, 3 here; calibration.stride 64 "
        "there, None here)" in refused_to_resume("calibration.seed=3; calibration.stride=null")
    )
    assert "different model (model.source" in refused_to_resume(source=model_folders["opt"])
    with monkeypatch.context() as patch:
        patch.setattr(ray_surgeon, "__version__", "9.9.9")
        assert "different code (version 0.2.0 there, 9.9.9 here)" in refused_to_resume()
    assert run(tmp_path, model, "--resume", **ONE_SHOT, name="renamed") == 0
    weights = tmp_path / "run/shots/0001/shard-0001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "shard-0001.safetensors has" in refused_to_resume()
    weights.unlink()
    assert "is missing" in refused_to_resume()


@pytest.mark.usefixtures("workers_may_start")
def test_a_ray_that_cannot_start_is_said(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home(address: str | None, num_cpus: int) -> str:
        raise RuntimeError("cannot start a local Ray: read-only; it needs a writable home")

    monkeypatch.setattr(driver, "connect", no_home)
    assert run(tmp_path, llama, cluster={"backend": "ray"}) == 1
    assert capsys.readouterr().err.startswith("failed: cannot start a local Ray")
