"""Faults of an object store are retried or reported, and no shot is lost or incomplete."""

from __future__ import annotations

import errno
import http.client
import json
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from botocore.exceptions import ClientError
from s3fs import S3FileSystem

from ray_surgeon.checkpointing import RunDirectory, TakenOverError
from ray_surgeon.storage import files, tensor_files
from tests.integration.runs import MASKED, Done, Jobs, assert_same_shot, tensors_in

SECRET = "wJalr-a-secret-that-must-not-appear"
FAULTS = ("500", "503", "reset", "short") * 5 + ("silence",)  # silence takes the longest
OF_ONE_HOP = (
    "connection",
    "transfer-encoding",
    "content-length",
    "expect",
    "date",
    "server",
)
NUM_FAULTS = 200


class FaultyProxy(BaseHTTPRequestHandler):
    """Forwards requests to the real server, or fails at random like stores and networks."""

    protocol_version = "HTTP/1.1"
    upstream: tuple[str, int]
    chance = random.Random(0)
    probability = 0.0
    kinds: tuple[str, ...] = FAULTS
    injected: ClassVar[Counter[str]] = Counter()

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True

    def answer(self) -> None:
        body = self.read_body()
        fault = ""
        if self.chance.random() < self.probability:
            fault = self.chance.choice(self.kinds)
            self.injected[fault] += 1
        self.close_connection = fault in ("reset", "silence", "short")
        if fault in ("500", "503"):
            self.refuse(int(fault))
        elif fault == "reset":
            self.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            self.connection.close()
        elif fault == "silence":
            time.sleep(0.3)  # longer than the client's timeout
        else:
            self.hand_on(body, short=fault == "short")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

    def read_body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def refuse(self, status: int) -> None:
        code = "InternalError" if status == 500 else "SlowDown"
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def hand_on(self, body: bytes, *, short: bool) -> None:
        connection = http.client.HTTPConnection(*self.upstream, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in OF_ONE_HOP}
        connection.request(
            self.command, self.path, body, headers | {"Content-Length": str(len(body))}
        )
        reply = connection.getresponse()
        content = reply.read()
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in OF_ONE_HOP:
                self.send_header(name, value)
        length = (
            reply.getheader("Content-Length")
            if self.command == "HEAD"
            else str(len(content))
        )
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if short else content)
        connection.close()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def faulty(
    s3: None, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> Iterator[type[FaultyProxy]]:
    """Put the proxy in front of the S3 server; it has no faults until `probability` is set."""
    host, _, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").partition(":")
    FaultyProxy.upstream = (host, int(port))
    FaultyProxy.probability = 0.0
    FaultyProxy.chance = random.Random(0)
    FaultyProxy.injected.clear()
    FaultyProxy.kinds = FAULTS
    server = ThreadingHTTPServer(("127.0.0.1", 0), FaultyProxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setitem(
        fsspec.config.conf,
        "s3",
        {"config_kwargs": {"read_timeout": 0.25, "retries": {"max_attempts": 0}}},
    )
    monkeypatch.setattr(files, "FIRST_PAUSE_S", 0.005)
    monkeypatch.setattr(files, "LONGEST_PAUSE_S", 0.1)
    # the pauses of the clients are not configurable
    monkeypatch.setattr(S3FileSystem, "retries", 2)
    S3FileSystem.clear_instance_cache()
    yield FaultyProxy
    FaultyProxy.probability = 0.0
    server.shutdown()
    server.server_close()


THREE_SHOTS = MASKED | {"pruning__num_shots": 3}
THERE = {
    "model__source": "s3://bucket/model",
    "calibration__source": "s3://bucket/text.txt",
}


@pytest.fixture
def sound(faulty: type[FaultyProxy], job: Jobs) -> Done:
    """Return a run on disk, and upload its model and text to the bucket."""
    done = job(THREE_SHOTS, folder="sound", cluster__num_shards=2)
    for path in job.models["llama"].iterdir():
        files.put_file(f"s3://bucket/model/{path.name}", path)
    files.put_file("s3://bucket/text.txt", job.folder / "sound/text.txt")
    return done


def assert_came(uri: str, folder: Path, sound: Done) -> None:
    """Download a run and compare it with the run on disk."""
    filesystem, path = files.open_filesystem(uri)
    filesystem.get(path, str(folder), recursive=True)
    came = Done(folder, "", "")
    for shot in (1, 2, 3):
        assert_same_shot(sound.uri, came.uri, shot)
    assert len(came.shots) == 3
    assert [event["shot"] for event in came.events if event["step"] == "commit"] == [
        1,
        2,
        3,
    ]
    mine, expected = (tensors_in(done.export("masked")) for done in (came, sound))
    assert expected
    torch.testing.assert_close(mine, expected, rtol=0, atol=0)


@pytest.mark.slow
def test_no_shot_is_lost_in_two_hundred_faults(
    faulty: type[FaultyProxy], sound: Done, job: Jobs
) -> None:
    said = ""
    number = 0
    while sum(faulty.injected.values()) < NUM_FAULTS:
        number += 1
        uri = f"s3://bucket/runs/{number}"
        faulty.probability = 0.6
        ended = job(THREE_SHOTS | THERE, folder=f"run-{number}", output__uri=uri)
        faulty.probability = 0.0
        assert_came(uri, job.folder / f"came-{number}", sound)
        said += ended.out + ended.error
    assert set(faulty.injected) == set(FAULTS)
    written = [path for path in job.folder.glob("came-*/**/*") if path.is_file()]
    assert SECRET not in said + "".join(
        path.read_text(errors="ignore") for path in written
    )


def test_run_resumes_after_an_outage_of_the_store(
    faulty: type[FaultyProxy], sound: Done, job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outage ends the run, which keeps its complete shots."""
    put = tensor_files.write

    def put_and_fail(uri: str, tensors: Any) -> int:
        if "shots/0002/masks" in uri:
            patch.setattr(files, "PATIENCE_S", 1.0)
            faulty.probability = 1.0
            faulty.kinds = ("503", "reset")
        return put(uri, tensors)

    uri = "s3://bucket/run"
    options = THREE_SHOTS | THERE | {"output__uri": uri}
    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "write", put_and_fail)
        error = job(options, code=1).error
    assert "failed: " in error
    assert "--resume" in error
    faulty.probability = 0.0
    names = files.list_names(f"{uri}/shots/0002")
    assert names == ["shard-0001.safetensors"], "the second shot is incomplete"
    assert "continuing after round 1" in job(options, "--resume").out
    assert {"spec.yaml", "run.json", "events.jsonl", "report.json"} <= set(
        files.list_names(uri)
    )
    assert_came(uri, job.folder / "came", sound)


def test_events_are_written_after_an_outage_of_the_store(
    faulty: type[FaultyProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run continues without events. A newer attempt is noticed after the outage."""
    monkeypatch.setattr(files, "PATIENCE_S", 0.3)
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


def test_missing_files_are_not_retried(
    faulty: type[FaultyProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(files, "sleep", pauses.append)
    with pytest.raises(FileNotFoundError):
        files.read_bytes("s3://bucket/absent")
    with pytest.raises(FileNotFoundError):
        files.read_bytes("s3://no-such-bucket/absent")
    assert pauses == []


@pytest.mark.parametrize("code", ["IncompleteBody", "BadDigest"])
def test_damaged_uploads_are_retried(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs raises the same error for them as for invalid requests."""
    monkeypatch.setattr(files, "sleep", lambda seconds: None)
    calls: list[str] = []

    def upload(uri: str) -> str:
        calls.append(uri)
        if len(calls) == 1:
            raise OSError(errno.EINVAL, code) from ClientError(
                {"Error": {"Code": code}}, "PutObject"
            )
        return "done"

    assert files.tries_again(upload)("s3://bucket/key") == "done"


def test_retry_time_counts_from_the_first_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An interrupted transfer of an hour is retried, but a store that stays away is not retried
    forever.
    """
    clock = [0.0]
    calls: list[float] = []
    monkeypatch.setattr(files, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        files, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    )

    def transfer(uri: str, failures: int) -> str:
        calls.append(clock[0])
        clock[0] += 3600
        if len(calls) <= failures:
            raise ConnectionResetError("reset")
        return "done"

    assert files.tries_again(transfer)("s3://bucket/large", 1) == "done"
    assert len(calls) == 2
    calls.clear()
    with pytest.raises(ConnectionResetError):
        files.tries_again(lambda uri: transfer(uri, 10**6))("s3://bucket/large")
    assert len(calls) == 2, "the second failure is an hour after the first"
    calls.clear()
    with pytest.raises(ConnectionResetError):
        files.tries_again(lambda uri: transfer(uri, 10**6))("/a/local/file")
    assert len(calls) == 1


def test_large_files_are_uploaded_in_parts(s3: None, cache: Path) -> None:
    tensors = {"large": torch.arange(30_000_000, dtype=torch.float32)}
    size = tensor_files.write("s3://bucket/large.safetensors", tensors)
    assert size > 100 * 2**20
    assert files.size_bytes("s3://bucket/large.safetensors") == size
    filesystem, path = files.open_filesystem("s3://bucket/large.safetensors")
    assert filesystem.info(path)["ETag"].strip('"').endswith("-3"), (
        "the tag of the object has its number of parts"
    )
    assert torch.equal(
        tensor_files.read("s3://bucket/large.safetensors")["large"], tensors["large"]
    )


def test_full_disk_is_reported_and_keeps_the_previous_shot(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if "shots/0002/masks" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        failed = job(THREE_SHOTS, code=1)
    for part in ("No space left on device", "masks-0001.safetensors", "--resume"):
        assert part in failed.error
    manifests = [path.parent.name for path in failed.uri.glob("shots/*/manifest.json")]
    assert manifests == ["0001"]
    assert not list(failed.uri.rglob(".writing-*")), "no temporary file is left"
    assert "continuing after round 1" in job(THREE_SHOTS, "--resume").out
