"""Code shared by the two serving examples.

It prunes a model, starts an engine that serves it over HTTP, and measures tokens per second as a
client.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import ray_surgeon
from ray_surgeon.config.job import JobSpec, parse_spec
from ray_surgeon.storage.sources import open_model

if TYPE_CHECKING:
    from openai import OpenAI

PROMPT_WORDS = 256
NEW_TOKENS = 64
TURNS = 3
START_TIMEOUT_S = 300
_JOB = Path(__file__).parents[1] / "pipelines" / "smollm2-balanced.yaml"


def new_parser(name: str, description: str, *, port: int) -> argparse.ArgumentParser:
    """Return a parser with the arguments shared by the examples; `port` is the default port."""
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{name}", description=description
    )
    parser.add_argument(
        "--run", type=Path, default=Path("runs/serving"), help="run directory"
    )
    parser.add_argument("--port", type=int, default=port, help="of the server")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8], help="requests at a time"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="number of times each model is measured"
    )
    return parser


def has_client() -> bool:
    """Return whether the client package of the examples is installed."""
    return importlib.util.find_spec("openai") is not None


def check_engine(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    *,
    option: str,
    module: str,
) -> None:
    """End the program with an error if the engine cannot be started.

    The examples prune for minutes before they start the engine, so they check it first.

    Args:
        parser: parser of the command line.
        arguments: parsed command line, with ``python`` and the engine's program.
        option: option that gives the engine's program.
        module: Python package of the engine, for ``--python``.
    """
    if not has_client():
        parser.error("the client needs `pip install 'ray-surgeon[serve]'`")
    python = arguments.python
    if python is None:
        program = getattr(arguments, option)
        if shutil.which(program) is None:
            parser.error(
                f"--{option}: there is no program {program!r}; give the path of one, or "
                f"--python with a Python that has the package {module}"
            )
        return
    if shutil.which(python) is None:
        parser.error(f"--python: there is no program {python!r}; give the path of one")
    find = (
        f"import importlib.util, sys; sys.exit(not importlib.util.find_spec('{module}'))"
    )
    if subprocess.run([python, "-c", find], check=False).returncode:
        parser.error(
            f"--python: {python} has no package {module}; give a Python that has it"
        )


def dense_and_pruned(run: Path) -> tuple[Path, Path]:
    """Return the folders of SmolLM2-135M and of the exports of the quickstart's job.

    The job has no corrections. A finished job is not repeated.
    """
    document = parse_spec(_JOB.read_text(), ["model.dtype=float32"]).model_dump(
        mode="json"
    )
    spec = JobSpec.model_validate(
        document
        | {"recovery": None, "output": {"uri": str(run), "exports": ["uniform", "gguf"]}}
    )
    if not list((run / "export" / "gguf").glob("*-BF16.gguf")):
        ray_surgeon.prune(spec=spec, resume=(run / "spec.yaml").exists())
    return open_model(spec.model).small_files_folder(), run / "export"


@contextlib.contextmanager
def serving(command: Sequence[str], port: int) -> Iterator[OpenAI]:
    """Start an engine and yield a client of it once it answers.

    Raises:
        RuntimeError: the engine ends, or does not answer in time.
    """
    from openai import OpenAI

    # the engine must not inherit our OpenMP settings: llama.cpp takes three times as long for a
    # token if OMP_WAIT_POLICY is passive
    environment = {
        name: value for name, value in os.environ.items() if name[:4] != "OMP_"
    }
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(
                        f"{command[0]} does not serve: {log.read()[-2000:]}"
                    )
                if _answers(port):
                    break
                time.sleep(0.5)
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}/v1/models", timeout=2
        ) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def tokens_per_second(client: OpenAI, batch_size: int) -> tuple[float, float]:
    """Return the medians of prompt tokens and of new tokens per second.

    `batch_size` requests run concurrently. Answers do not end early, because short answers have a
    higher time per token.
    """
    model = client.models.list().data[0].id
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    prefill = list[float]()
    decode = list[float]()

    def ask(prompt: str, num_tokens: int) -> int:
        answer = client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=num_tokens,
            temperature=0.0,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage is not None
        return (
            answer.usage.prompt_tokens
            if num_tokens == 1
            else answer.usage.completion_tokens
        )

    with ThreadPoolExecutor(batch_size) as pool:
        for turn in range(TURNS + 1):  # the first one warms up
            # every prompt is different, so that prefix caching has no effect
            starts = [f"{batch_size} {turn} {i} " for i in range(batch_size)]
            long = [
                start + " ".join(words[(i + n) % 8] for n in range(PROMPT_WORDS))
                for i, start in enumerate(starts)
            ]
            for asked, num_tokens, rates in (
                (long, 1, prefill),
                ([start + "once" for start in starts], NEW_TOKENS, decode),
            ):
                start = time.perf_counter()
                done = sum(pool.map(ask, asked, [num_tokens] * batch_size))
                rates.append(done / (time.perf_counter() - start))
    return statistics.median(prefill[1:]), statistics.median(decode[1:])


def compare(
    engine: str, arguments: argparse.Namespace, command_of: Callable[..., list[str]]
) -> None:
    """Serve the dense and the pruned model in turns, and print their speeds.

    Args:
        engine: name of the engine.
        arguments: parsed command line; see `new_parser`.
        command_of: returns the command that serves a model, given its name (``dense`` or
            ``pruned``), the folders ``dense``, ``pruned`` (exports) and ``scratch``, and the
            arguments.
    """
    dense, exports = dense_and_pruned(arguments.run)
    batches = arguments.batches
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"dense": dense, "pruned": exports, "scratch": Path(scratch)}
        commands = {
            name: command_of(name, folders, arguments) for name in ("dense", "pruned")
        }
        rates = fastest(commands, arguments.port, batches, arguments.rounds)
    sys.stdout.write(
        "\n"
        f"| {engine}, tokens per second | batch | dense | pruned | ratio |\n"
        "|---|---|---|---|---|\n"
    )
    for step, name in enumerate(("prefill", "decode")):
        for batch_size in batches:
            before, after = (
                rates[which, batch_size][step] for which in ("dense", "pruned")
            )
            sys.stdout.write(
                f"| {name} | {batch_size} | {before:.0f} | {after:.0f} | {after / before:.2f} |\n"
            )


def fastest(
    commands: Mapping[str, Sequence[str]], port: int, batches: Sequence[int], rounds: int
) -> dict[tuple[str, int], tuple[float, float]]:
    """Serve models in turns; return `tokens_per_second` by name and number of concurrent requests.

    The fastest round of each counts: other work on the machine makes a round slower, never faster.
    In the first round, each model continues a text, which is printed.
    """
    rates: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for turn in range(rounds):
        for name, command in commands.items():
            with serving(command, port) as client:
                if turn == 0:
                    model = client.models.list().data[0].id
                    answer = client.completions.create(
                        model=model,
                        prompt="The with statement",
                        max_tokens=24,
                        temperature=0.0,
                    )
                    sys.stdout.write(
                        f"{name}: The with statement{answer.choices[0].text}\n"
                    )
                for size in batches:
                    rates.setdefault((name, size), []).append(
                        tokens_per_second(client, size)
                    )
    return {
        key: (max(r[0] for r in of), max(r[1] for r in of)) for key, of in rates.items()
    }
