"""What the two serving examples share: a pruned model, an engine that answers over HTTP, and tokens per second as a client sees them."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI

import ray_surgeon
from ray_surgeon.models.gguf import convert_gguf
from ray_surgeon.spec import JobSpec, parse_spec
from ray_surgeon.storage.sources import open_model

PROMPT_TOKENS, NEW_TOKENS, TURNS = 512, 64, 3


def dense_and_pruned(run: Path) -> tuple[Path, Path]:
    """Return the folders of SmolLM2-135M and of the exports of the quickstart's job without corrections, which runs unless it has run."""
    document = parse_spec(Path("pipelines/quickstart.yaml").read_text()).model_dump(mode="json")
    spec = JobSpec.model_validate(document | {"correction": None, "output": {"uri": str(run), "exports": ["uniform", "gguf"]}})
    if not (run / "report.json").exists():
        ray_surgeon.prune(spec=spec)
    return open_model(spec.model, convert_gguf).small_files_folder(), run / "export"


@contextlib.contextmanager
def serving(command: Sequence[str], port: int) -> Iterator[OpenAI]:
    """Start an engine and yield a client of it once it answers.

    Raises:
        RuntimeError: it ends before it answers.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not _answers(port):
            if process.poll() is not None:
                assert process.stderr is not None
                raise RuntimeError(f"{command[0]} ended: {process.stderr.read()[-2000:]}")
            time.sleep(0.5)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    finally:
        process.terminate()
        process.wait(60)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def tokens_per_second(client: OpenAI, batch_size: int) -> tuple[float, float]:
    """Return tokens of prompts, and new tokens, that the engine handles a second for so many requests at a time; medians."""
    model = client.models.list().data[0].id
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    prefill, decode = list[float](), list[float]()

    def ask(prompt: str, num_tokens: int) -> int:
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=num_tokens, temperature=0.0)
        assert answer.usage is not None
        return answer.usage.prompt_tokens if num_tokens == 1 else answer.usage.completion_tokens

    with ThreadPoolExecutor(batch_size) as pool:
        for turn in range(TURNS + 1):  # the first one warms up
            # every prompt starts in its own way, so that no cache of prefixes helps
            long = [f"{turn} {i} " + " ".join(words[(i + n) % 8] for n in range(PROMPT_TOKENS // 2)) for i in range(batch_size)]
            for asked, num_tokens, rates in ((long, 1, prefill), ([f"{turn} {i}: once" for i in range(batch_size)], NEW_TOKENS, decode)):
                start = time.perf_counter()
                done = sum(pool.map(ask, asked, [num_tokens] * batch_size))
                rates.append(done / (time.perf_counter() - start))
    return statistics.median(prefill[1:]), statistics.median(decode[1:])


def report(engine: str, rates: dict[tuple[str, int], list[tuple[float, float]]]) -> None:
    """Print the table."""
    sys.stdout.write(f"\n| {engine}, tokens per second | batch | dense | pruned | ratio |\n|---|---|---|---|---|\n")
    for step, name in enumerate(("prefill", "decode")):
        for batch_size in sorted({batch for _, batch in rates}):
            dense, pruned = (statistics.median(rate[step] for rate in rates[which, batch_size]) for which in ("dense", "pruned"))
            sys.stdout.write(f"| {name} | {batch_size} | {dense:.0f} | {pruned:.0f} | {pruned / dense:.2f} |\n")
