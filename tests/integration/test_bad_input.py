"""What cannot work ends in exit code 2 with a clear message, before a worker starts, and overwrites
nothing.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

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
from tests.integration.runs import run, tiny_spec


@pytest.fixture(autouse=True)
def no_worker_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*args: object, **kwargs: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(pipeline, "run", start)


@pytest.fixture
def model(model_folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folders["llama"], tmp_path / "model"))


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


SPEC_ERRORS: list[tuple[dict[str, Any], list[str]]] = [
    ({"pruning__target_sparsity": 0}, ["pruning.target_sparsity", "greater than 0", "got 0)"]),
    ({"pruning__target_sparsity": 1}, ["pruning.target_sparsity", "less than 1"]),
    ({"pruning__target_sparsity": -3}, ["pruning.target_sparsity", "got -3"]),
    ({"pruning__num_shot": 1}, ["pruning.num_shot", "correct its name"]),
    ({"cluster__num_shards": 5}, ["cluster.num_shards: 5", "4 blocks", "give 1 to 4"]),
    ({"curvature__num_backward": 7}, ["num_backward: 7", "6 calibration sequences", "give 1 to 6"]),
    (
        {"curvature__num_backward": 1, "cluster__num_replicas": 2},
        ["num_backward: 1", "every replica", "give 2 to 6"],
    ),
    (
        {"pruning__structure": "groups", "pruning__groups": ["experts"], "pruning__search": {}},
        ["search: does not go with whole experts", "use expert_channels"],
    ),
    (
        {"pruning__structure": "groups", "pruning__allocation": "uniform", "pruning__search": {}},
        ["pruning.search", "correct its name"],
    ),
    (
        {
            "pruning__structure": "groups",
            "pruning__groups": ["ffn"],
            "pruning__width_multiple": 1000,
        },
        ["at most 0.0000 of the parameters", "lower pruning.width_multiple, which is 1000"],
    ),
    (
        {
            "pruning__structure": "groups",
            "pruning__groups": ["attention"],
            "pruning__reconstruction": {},
        },
        ["reconstruction: is of ffn and shared_experts", "got groups attention", "add one of them"],
    ),
    (
        {
            "pruning__structure": "groups",
            "pruning__reconstruction": {},
            "curvature__kind": "identity",
        },
        ["curvature.kind: identity keeps no inputs", "use kfac or activations"],
    ),
    (
        {
            "pruning__structure": "groups",
            "pruning__width_multiple": 8,
            "pruning__search": {"num_sequences": 600},
        },
        ["calibration", "606 sequences", "need 38760"],
    ),
    ({"cluster__num_replicas": 7}, ["num_replicas: 7", "6 calibration sequences"]),
    ({"model__source": "/absent/model"}, ["model.source", "no folder '/absent/model'"]),
    ({"calibration__source": "/absent/text.txt"}, ["calibration", "no file /absent/text.txt"]),
    ({"calibration__num_sequences": 600}, ["calibration", "tokens", "need 38376"]),
    ({"calibration__sequence_length": 200}, ["calibration.sequence_length: 200", "at most 128"]),
    (
        {"output__uri": "/tmp/ray/session/_ray_pkg_12/runs/x"},
        ["output.uri", "Ray's copy of the working directory", "give a whole path"],
    ),
    ({"output__uri": "nosuch://somewhere"}, ["nosuch://somewhere", "Protocol not known"]),
    # no file system takes a name of 320 characters
    ({"model__source": "/" + "long" * 80}, ["model.source: cannot read"]),
    (
        {
            "evaluation": [
                {
                    "name": "a",
                    "source": "/" + "long" * 80,
                    "num_sequences": 4,
                    "sequence_length": 40,
                }
            ]
        },
        ["evaluation.0 (a)"],
    ),
]


@pytest.mark.parametrize(("changes", "words"), SPEC_ERRORS, ids=[str(c) for c, _ in SPEC_ERRORS])
def test_specs_that_cannot_work(
    changes: dict[str, Any],
    words: list[str],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = refused(capsys, run(tmp_path, model, **changes))
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("field", ["model__source", "calibration__source", "output__uri"])
@pytest.mark.parametrize(
    "uri",
    [
        "http://me:S3CRET@host/x.txt",
        "https://host/x.txt?X-Amz-Expires=9&X-Amz-Signature=S3CRET",
        "https://S3CRET@host/x",
    ],
)
def test_credentials_are_refused_and_not_shown(
    uri: str, field: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, run(tmp_path, model, **{field: uri}))
    assert f"{field.replace('__', '.')}: holds credentials" in message
    assert "S3CRET" not in message


def test_a_gpu_that_is_not_there(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cluster.gpus_per_worker: 1, but torch sees no GPU" in refused(
        capsys, run(tmp_path, model, cluster__gpus_per_worker=1)
    )
    assert not (tmp_path / "run").exists()


def test_a_home_is_found(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    assert run(tmp_path, Path("~") / model.name, "--dry-run", memory__scratch="~/scratch") == 0


def test_a_limit_that_is_too_low_is_to_be_raised(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, run(tmp_path, model, "--dry-run", memory__limit_gib=0.1))
    found = re.search(r"raise memory\.limit_gib to ([0-9.]+)", message)
    assert found is not None, message
    assert run(tmp_path, model, "--dry-run", memory__limit_gib=float(found[1])) == 0


def test_unknown_family(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    assert "known families: deepseek_v3, gemma3_text, glm4_moe, gpt2, gpt_oss, llama" in refused(
        capsys, run(tmp_path, model)
    )
    (model / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": config | {"model_type": "gemma3_text"}})
    )
    assert "Save its text part, a gemma3_text, as a model of its own" in refused(
        capsys, run(tmp_path, model)
    )


def test_a_tokenizer_that_is_code_is_not_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = json.loads((model / "tokenizer_config.json").read_text())
    code = {"auto_map": {"AutoTokenizer": ["evil.Slow", None]}, "tokenizer_class": "Evil"}
    (model / "tokenizer_config.json").write_text(json.dumps(said | code))
    (model / "tokenizer.json").unlink()
    assert "it is code, which is never run, so make a tokenizer.json of it" in refused(
        capsys, run(tmp_path, model)
    )


def test_unknown_architecture_and_remote_code(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"model_type": "made_up", "auto_map": {"AutoConfig": "evil.Config"}})
    )
    (model / "evil.py").write_text("raise SystemExit('code of a stranger ran')")
    assert "known families" in refused(capsys, run(tmp_path, model))


def test_missing_tensor(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.3.mlp.down_proj.weight"]
    save_file(tensors, model / "model.safetensors")
    assert "1 missing (model.layers.3.mlp.down_proj.weight)" in refused(
        capsys, run(tmp_path, model)
    )


def test_a_head_of_its_own_in_a_model_that_is_tied(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second copy of the embedding is right."""
    tensors = load_file(model / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, model / "model.safetensors")
    assert run(tmp_path, model, "--dry-run") == 0
    save_file(tensors | {"lm_head.weight": embedding[:-8].clone()}, model / "model.safetensors")
    assert "lm_head.weight is (312" in refused(capsys, run(tmp_path, model))
    save_file(tensors | {"lm_head.weight": 2 * embedding}, model / "model.safetensors")
    assert "set tie_word_embeddings to false, or remove lm_head.weight" in refused(
        capsys, run(tmp_path, model)
    )

    def reset(source: ModelFiles, key: str, entry: int | None = None) -> None:
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr(ModelFiles, "read", reset)
    assert "model.source: cannot read" in refused(capsys, run(tmp_path, model))


def test_an_index_that_is_left_over(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}})
    )
    assert run(tmp_path, model, "--dry-run") == 0


def test_cut_weights(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "cut short" in refused(capsys, run(tmp_path, model))


def test_no_tokenizer(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer that loads" in refused(capsys, run(tmp_path, model))


def test_tokenizer_of_another_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: number + 1000 for token, number in vocabulary.items()}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "the tokenizer belongs to another model" in refused(capsys, run(tmp_path, model))


def test_run_directory_that_holds_something_else(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("do not touch")
    assert "holds no run of this program" in refused(capsys, run(tmp_path, model))
    (folder / "thesis.txt").rename(folder / "run.json")
    (folder / "run.json").write_text(json.dumps({"fingerprints": {"method": "another"}}))
    message = refused(capsys, run(tmp_path, model))
    assert (
        "another run: different calibration, code, evaluation, method, model, tokenizer (version "
        "None there, 0.2.0 here)" in message
    )
    assert refused(capsys, run(tmp_path, model, "--resume")) == message
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_a_data_set_that_is_cut_here_is_cut_at_one_place(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets.Dataset.from_dict({"text": list(topics.values())[:8]}).save_to_disk(
        str(tmp_path / "set")
    )
    capsys.readouterr()
    text = {"source": str(tmp_path / "set"), "num_sequences": 2, "sequence_length": 40}
    changes = {
        "calibration": text | {"max_tokens": 3000},
        "evaluation": [text | {"name": "docs", "max_tokens": 1000}],
    }
    assert "evaluation.0.max_tokens: must equal that of" in refused(
        capsys, run(tmp_path, model, **changes)
    )
    changes["evaluation"] = [text | {"name": "docs", "max_tokens": 3000}]
    assert run(tmp_path, model, "--dry-run", **changes) == 0


def test_more_than_the_weights_beside_biases(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 32 inputs and a bias 32 of 33 can go."""
    wanda = {
        "pruning__method": "wanda",
        "pruning__structure": "element",
        "pruning__target_sparsity": 0.975,
    }
    assert (
        "but 0.9697 is all that wanda can take from this model, because biases count and stay"
        in refused(capsys, run(tmp_path, model_folders["opt"], **wanda))
    )
    assert run(tmp_path, model_folders["llama"], "--dry-run", **wanda) == 0


def test_channels_that_cannot_be_split(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads are not all that an engine splits."""
    config = json.loads((model_folders["llama"] / "config.json").read_text())
    shutil.copytree(model_folders["llama"], tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
    (tmp_path / "model/model.safetensors").unlink()
    groups = {
        "pruning__structure": "groups",
        "pruning__groups": ["attention"],
        "pruning__tensor_parallel": 4,
        "output__exports": [],
    }
    message = refused(capsys, run(tmp_path, tmp_path / "model", "--dry-run", **groups))
    assert "has 50 channels; give a divisor" in message


def test_requests_beyond_the_table_of_positions(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In GPT-2 they would fail when everything is done; a Llama takes them."""
    groups = {
        "pruning__structure": "groups",
        "pruning__width_multiple": 8,
        "output__exports": ["per_block"],
    }
    speed = {"output__speed": {"prompt_length": 100, "num_new_tokens": 29}}
    message = refused(capsys, run(tmp_path, model_folders["gpt2"], **groups, **speed))
    assert (
        "output.speed: a prompt of 100 tokens and 29 new ones, but the model takes at most 128"
        in message
    )
    target = {"latency_s": 1.0, "request": {"prompt_length": 128}}
    message = refused(
        capsys,
        run(
            tmp_path,
            model_folders["opt"],
            **groups,
            pruning__target=target,
            pruning__target_sparsity=None,
        ),
    )
    assert "pruning.target.request: a prompt of 128 tokens" in message
    assert run(tmp_path, model_folders["llama"], "--dry-run", **groups, **speed) == 0


@pytest.mark.parametrize("spec", ["/absent/spec.yaml", "nosuch://spec.yaml"])
def test_absent_spec(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert spec in refused(capsys, main([spec]))


def test_spec_that_is_no_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("a: [unclosed")
    assert "not valid YAML" in refused(capsys, main([str(path)]))
    path.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused(capsys, main([str(path)]))


def test_unreachable_s3(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying, "PATIENCE_S", 0.5)
    monkeypatch.setitem(
        fsspec.config.conf,
        "s3",
        {"config_kwargs": {"connect_timeout": 0.5, "retries": {"max_attempts": 0}}},
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    S3FileSystem.clear_instance_cache()
    for changes in (
        {"model__source": "s3://bucket/model"},
        {"calibration__source": "s3://bucket/t.txt"},
        {"output__uri": "s3://bucket/run"},
    ):
        assert "s3://bucket/" in refused(capsys, run(tmp_path, model, **changes))
    S3FileSystem.clear_instance_cache()


def test_dry_run_needs_no_worker(model: Path, tmp_path: Path) -> None:
    assert main([str(tiny_spec(tmp_path, model)), "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()


def test_config_that_transformers_refuses(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": "small"}))
    assert "transformers cannot read config.json" in refused(capsys, run(tmp_path, model))
    (model / "config.json").write_text("{")
    assert "not valid JSON" in refused(capsys, run(tmp_path, model))


def test_files_that_may_not_be_read(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(uri: str) -> Path:
        raise PermissionError(f"{uri}: Forbidden")

    with fsspec.open("memory://denied/config.json", "w") as file:
        file.write("{}")
    monkeypatch.setattr(copies, "local_copy", denied)
    assert "cannot read memory://denied" in refused(
        capsys, run(tmp_path, model, model__source="memory://denied")
    )


def test_output_that_cannot_be_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    message = refused(capsys, run(tmp_path, model, output__uri=str(tmp_path / "file" / "run")))
    assert "output.uri: cannot use" in message


def test_different_limits_of_one_text_would_leak(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "evaluation.0.max_tokens: must equal" in refused(
        capsys, run(tmp_path, model, calibration__max_tokens=3000)
    )


def test_resume_from_a_damaged_shot(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert run(tmp_path, model, pruning__num_shots=1) == 0
    capsys.readouterr()
    weights = tmp_path / "run/shots/0001/shard-0001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "shard-0001.safetensors has" in refused(
        capsys, run(tmp_path, model, "--resume", pruning__num_shots=1)
    )
    weights.unlink()
    assert "is missing" in refused(capsys, run(tmp_path, model, "--resume", pruning__num_shots=1))


def test_resume_shows_what_is_different(
    model: Path,
    model_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    assert run(tmp_path, model, pruning__num_shots=1) == 0
    capsys.readouterr()
    message = refused(
        capsys, run(tmp_path, model, "--resume", pruning__num_shots=1, pruning__target_sparsity=0.2)
    )
    assert (
        "different method (pruning.target_sparsity 0.3 there, 0.2 here); choose another folder"
        in message
    )
    message = refused(
        capsys,
        run(
            tmp_path,
            model,
            "--resume",
            pruning__num_shots=1,
            calibration__seed=3,
            calibration__stride=None,
        ),
    )
    assert (
        "different calibration, method (calibration.seed 0 there, 3 here; calibration.stride 64 "
        "there, None here)" in message
    )
    message = refused(capsys, run(tmp_path, model_folders["opt"], "--resume", pruning__num_shots=1))
    assert "different model (model.source" in message
    with monkeypatch.context() as patch:
        patch.setattr(ray_surgeon, "__version__", "9.9.9")
        message = refused(capsys, run(tmp_path, model, "--resume", pruning__num_shots=1))
    assert "different code (version 0.2.0 there, 9.9.9 here)" in message
    assert run(tmp_path, model, "--resume", pruning__num_shots=1, name="renamed") == 0, (
        "what does not matter may change"
    )


def test_a_folder_of_a_run_that_was_killed_at_once_can_be_used(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    (tmp_path / "run").mkdir()
    for name in (".writable", "spec.yaml"):
        (tmp_path / "run" / name).write_text("")
    assert run(tmp_path, model, pruning__num_shots=1) == 0


def test_weights_may_be_links_and_a_failed_drawing_ends_no_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> str:
        raise RuntimeError("no fonts")

    monkeypatch.undo()
    monkeypatch.setattr(html_report, "page", fail)
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (model / "model.safetensors").symlink_to("../elsewhere.safetensors")
    assert run(tmp_path, model, pruning__num_shots=1) == 0
    assert not (tmp_path / "run/report.html").exists()
    assert "no fonts" in (tmp_path / "run/events.jsonl").read_text()


def test_a_ray_that_cannot_start_is_said(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home(address: str | None, num_cpus: int) -> str:
        raise RuntimeError("cannot start a local Ray: read-only; it needs a writable home")

    monkeypatch.setattr(driver, "connect", no_home)
    assert run(tmp_path, model, cluster={"backend": "ray"}) == 1
    assert capsys.readouterr().err.startswith("failed: cannot start a local Ray")
