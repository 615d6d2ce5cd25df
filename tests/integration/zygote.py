"""Runs command lines, each in a fork of a process that has imported everything, and says what each of them needed.

A line of standard input is a JSON list of arguments; the answer is a line with exit code, output, seconds and peak memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import traceback

import torch

import ray_surgeon.pipeline
from ray_surgeon.cluster.usage import process_usage


def refuse(*args: object) -> None:
    raise AssertionError("a worker was started")


def child(arguments: list[str], path: str) -> None:
    if "--workers-may-start" in arguments:
        arguments.remove("--workers-may-start")
    else:
        ray_surgeon.pipeline.run = refuse  # type: ignore[assignment]
    with open(path, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            code = ray_surgeon.pipeline.main(arguments)
        except BaseException:
            traceback.print_exc()
            code = 99
        file.flush()
    with open(path + ".usage", "w", encoding="utf-8") as file:
        json.dump([code, process_usage(torch.device("cpu")).peak_rss_bytes], file)
    os._exit(0)


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            path, start = f"{folder}/out", time.perf_counter()
            pid = os.fork()
            if not pid:
                child(json.loads(line), path)
            os.waitpid(pid, 0)
            seconds = time.perf_counter() - start
            with open(path + ".usage", encoding="utf-8") as file:
                code, peak = json.load(file)
            with open(path, encoding="utf-8") as file:
                print(json.dumps({"code": code, "text": file.read(), "seconds": seconds, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
