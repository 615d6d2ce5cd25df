"""A store that fails: every fault is survived or said clearly, no shot is lost, and none is taken
for whole that is not.
"""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from botocore.exceptions import ClientError
from moto.moto_server.werkzeug_app import DomainDispatcherApplication
from s3fs import S3FileSystem
from safetensors.torch import load_file
from werkzeug.test import run_wsgi_app
from werkzeug.wrappers import Response
from werkzeug.wsgi import get_input_stream

from ray_surgeon.report.directory import RunDirectory, TakenOverError
from ray_surgeon.storage import files, retrying, tensor_files
from tests.integration.runs import Jobs, assert_same_shot

SECRET = "wJalr-a-secret-that-must-not-appear"
FAULTS = {"500": 5, "503": 5, "reset": 5, "silence": 1, "short": 4}
"""And how often each of them comes; silence takes long."""
NUM_FAULTS = 200


@dataclass
class Faults:
    """In front of the server's application: with a chance, which is none at first, a request fails
    in one of the ways in which stores and networks fail.
    """

    chance: random.Random = field(default_factory=lambda: random.Random(0))
    probability: float = 0.0
    kinds: tuple[str, ...] = tuple(FAULTS)
    injected: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def drawn(self) -> str | None:
        with self.lock:
            if self.chance.random() >= self.probability:
                return None
            fault = self.chance.choices(self.kinds, [FAULTS[kind] for kind in self.kinds])[0]
            self.injected[fault] += 1
            return fault

    def answer(self, app: Any, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ["wsgi.input"] = io.BytesIO(get_input_stream(environ).read())
        fault = self.drawn()
        if fault in ("500", "503"):
            code = "InternalError" if fault == "500" else "SlowDown"
            body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>"
            response = Response(body, int(fault), content_type="application/xml")
            return response(environ, start_response)
        if fault in ("reset", "silence"):
            linger = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if fault == "reset":
                environ["werkzeug.socket"].setsockopt(*linger)
            else:
                time.sleep(0.3)  # longer than the client waits
            raise ConnectionResetError
        parts, status, headers = run_wsgi_app(app, environ)
        content = b"".join(parts)
        start_response(status, headers.to_wsgi_list())
        return [content[: len(content) // 2] if fault == "short" else content]


@pytest.fixture
def faulty(s3: None, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Faults:
    """Put faults in front of the S3 server."""
    faults = Faults()
    plain = DomainDispatcherApplication.__call__
    monkeypatch.setattr(
        DomainDispatcherApplication,
        "__call__",
        lambda app, *request: faults.answer(functools.partial(plain, app), *request),
    )
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patient = {"read_timeout": 0.25, "retries": {"max_attempts": 0}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": patient})
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.005)
    monkeypatch.setattr(retrying, "_LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(S3FileSystem, "retries", 2)  # the pauses of the clients cannot be set
    S3FileSystem.clear_instance_cache()
    return faults


def upload_model(folder: Path) -> None:
    for path in folder.iterdir():
        files.put_file(f"s3://bucket/model/{path.name}", path)


def download_run(uri: str, target: Path) -> None:
    filesystem, path = files.open_filesystem(uri)
    filesystem.get(path, str(target), recursive=True)


@pytest.mark.slow
def test_two_hundred_faults_and_no_shot_lost(faulty: Faults, job: Jobs) -> None:
    options = {"pruning__num_shots": 3, "output__exports": ["masked"]}
    sound = job(options, folder="sound").uri
    upload_model(job.models["llama"])
    files.put_file("s3://bucket/text.txt", job.folder / "sound/text.txt")
    options |= {"model__source": "s3://bucket/model", "calibration__source": "s3://bucket/text.txt"}
    written = ""
    number = 0
    while sum(faulty.injected.values()) < NUM_FAULTS:
        number += 1
        uri = f"s3://bucket/runs/{number}"
        faulty.probability = 0.6
        done = job(options, folder=f"run-{number}", output__uri=uri)
        faulty.probability = 0.0
        download_run(uri, done.uri)
        for shot in (1, 2, 3):
            assert_same_shot(sound, done.uri, shot)
        assert len(done.shots) == 3
        assert [event["shot"] for event in done.events if event["step"] == "commit"] == [1, 2, 3]
        paths = list((sound / "export/masked").glob("*.safetensors"))
        assert len(paths) == ("output__exports" in options)
        for path in paths:
            mine = load_file(done.uri / "export/masked" / path.name)
            expected = load_file(path)
            assert mine.keys() == expected.keys()
            assert all(torch.equal(mine[key], expected[key]) for key in expected)
        written += done.out + done.error
    assert faulty.injected.keys() == FAULTS.keys()
    for path in job.folder.glob("run-*/run/**/*"):
        written += path.read_text(errors="ignore") if path.is_file() else ""
    assert SECRET not in written


def test_a_store_that_stays_away_ends_the_run_and_keeps_its_shots(
    faulty: Faults, job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying, "PATIENCE_S", 1.0)
    put = tensor_files.write

    def put_and_fail(uri: str, tensors: Any) -> int:
        if "shots/0002/masks" in uri:
            faulty.probability = 1.0
            faulty.kinds = ("503", "reset")
        return put(uri, tensors)

    options = {"output__uri": "s3://bucket/run"}
    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "write", put_and_fail)
        error = job(options, code=1).error
    assert "failed: " in error
    assert "--resume" in error
    faulty.probability = 0.0
    assert files.exists("s3://bucket/run/shots/0002/shard-0001.safetensors"), (
        "the second shot is half written"
    )
    assert not files.exists("s3://bucket/run/shots/0002/manifest.json")
    assert "resumed_after_shot=1" in job(options, "--resume").out
    sound = job({}, folder="sound")
    download_run("s3://bucket/run", job.folder / "came")
    assert_same_shot(sound.uri, job.folder / "came", 2)


def test_records_of_steps_wait_for_a_store_that_is_away(
    faulty: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of work are not lost for them. A try that has begun meanwhile is noticed once the store
    is back.
    """
    monkeypatch.setattr(retrying, "PATIENCE_S", 0.3)
    run = RunDirectory("s3://bucket/away")
    other = RunDirectory("s3://bucket/away")
    run.start("a: spec", {})
    faulty.probability = 1.0
    faulty.kinds = ("503",)
    run.add_event({"step": "costs", "number": 1})
    faulty.probability = 0.0
    assert not files.exists("s3://bucket/away/events.jsonl")
    run.add_event({"step": "costs", "number": 2})
    assert [
        json.loads(line)["number"]
        for line in files.read_text("s3://bucket/away/events.jsonl").splitlines()
    ] == [1, 2]
    other.start("a: spec", {})
    with pytest.raises(TakenOverError):
        run.add_event({"step": "costs", "number": 3})


def test_refusals_are_not_tried_again(faulty: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(retrying, "sleep", pauses.append)
    with pytest.raises(FileNotFoundError):
        files.read_bytes("s3://bucket/absent")
    with pytest.raises(FileNotFoundError):
        files.read_bytes("s3://no-such-bucket/absent")
    assert pauses == []


@pytest.mark.parametrize("code", ["IncompleteBody", "BadDigest"])
def test_damaged_uploads_are_tried_again(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs tells them as it tells requests that make no sense."""
    monkeypatch.setattr(retrying, "sleep", lambda seconds: None)
    calls: list[str] = []

    def upload(uri: str) -> str:
        calls.append(uri)
        if len(calls) == 1:
            raise OSError(errno.EINVAL, code) from ClientError(
                {"Error": {"Code": code}}, "PutObject"
            )
        return "done"

    assert retrying.tries_again(upload)("s3://bucket/key") == "done"


def test_patience_counts_from_the_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transfer of an hour that breaks is tried again, too, and a store that stays away is given
    up.
    """
    clock = [0.0]
    calls: list[float] = []
    monkeypatch.setattr(retrying, "monotonic", lambda: clock[0])
    monkeypatch.setattr(retrying, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))

    def transfer(uri: str, failures: int) -> str:
        calls.append(clock[0])
        clock[0] += 3600
        if len(calls) <= failures:
            raise ConnectionResetError("reset")
        return "done"

    assert retrying.tries_again(transfer)("s3://bucket/large", 1) == "done"
    assert len(calls) == 2
    calls.clear()
    with pytest.raises(ConnectionResetError):
        retrying.tries_again(lambda uri: transfer(uri, 10**6))("s3://bucket/large")
    assert len(calls) == 2, "the second failure came an hour after the first"
    calls.clear()
    with pytest.raises(ConnectionResetError):
        retrying.tries_again(lambda uri: transfer(uri, 10**6))("/a/local/file")
    assert len(calls) == 1


def test_large_files_in_parts(s3: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 * 2**20)
    uri = "s3://bucket/large.safetensors"
    large = torch.arange(3_000_000, dtype=torch.float32)
    assert tensor_files.write(uri, {"large": large}) == files.size_bytes(uri)
    filesystem, path = files.open_filesystem(uri)
    assert filesystem.info(path)["ETag"].strip('"').endswith("-3"), (
        "an object of three parts says so in its tag"
    )
    assert torch.equal(tensor_files.read(uri)["large"], large)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_is_full(number: int, job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or forbidden: it is said, and the shot before stays."""
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if "shots/0002/masks" in str(target):
            raise OSError(number, os.strerror(number), str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        failed = job(code=1)
    for part in (os.strerror(number), "masks-0001.safetensors", "--resume"):
        assert part in failed.error
    assert RunDirectory(str(failed.uri)).committed_indices() == [1]
    assert not list(failed.uri.rglob(".writing-*")), "scratch files stay behind"
    assert "resumed_after_shot=1" in job({}, "--resume").out
