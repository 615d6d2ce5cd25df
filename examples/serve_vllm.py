"""Prune SmolLM2-135M, serve it in vLLM, ask it over HTTP, and compare its speed with the dense model's.

``pip install -e '.[quickstart,serve]' && python -m examples.serve_vllm --vllm /path/to/vllm`` with vLLM in an environment of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.serving import dense_and_pruned, report, serving, tokens_per_second


def main() -> None:
    """Serve dense and pruned in turns."""
    parser = argparse.ArgumentParser(prog="python -m examples.serve_vllm", description="Serve a pruned model in vLLM.")
    parser.add_argument("--vllm", default="vllm", help="the program vllm")
    parser.add_argument("--run", type=Path, default=Path("runs/serving"), help="run directory")
    parser.add_argument("--port", type=int, default=8011, help="of the server")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="requests at a time")
    parser.add_argument("--rounds", type=int, default=2, help="how often each model has its turn")
    arguments = parser.parse_args()
    dense, exports = dense_and_pruned(arguments.run)
    rates: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for turn in range(arguments.rounds):
        for name, folder in (("dense", dense), ("pruned", exports / "uniform")):
            command = [arguments.vllm, "serve", str(folder), "--port", str(arguments.port), "--max-model-len", "1024"]
            command += ["--enforce-eager", "--no-enable-prefix-caching"]
            with serving(command, arguments.port) as client:
                if turn == 0:
                    model = client.models.list().data[0].id
                    answer = client.completions.create(model=model, prompt="The with statement", max_tokens=24, temperature=0.0)
                    sys.stdout.write(f"{name}: The with statement{answer.choices[0].text}\n")
                for batch_size in arguments.batches:
                    rates.setdefault((name, batch_size), []).append(tokens_per_second(client, batch_size))
    report("vLLM", rates)


if __name__ == "__main__":
    main()
