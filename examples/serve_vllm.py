"""Prune SmolLM2-135M, serve it in vLLM, ask it over HTTP, and compare its speed with the dense model's.

``pip install -e '.[quickstart,serve]' && python -m examples.serve_vllm --vllm /path/to/vllm`` with vLLM in an environment of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.serving import compare, dense_and_pruned


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
    options = ["--port", str(arguments.port), "--max-model-len", "1024", "--enforce-eager", "--no-enable-prefix-caching"]
    folders = {"dense": dense, "pruned": exports / "uniform"}
    commands = {name: [arguments.vllm, "serve", str(folder), *options] for name, folder in folders.items()}
    compare("vLLM", commands, arguments.port, arguments.batches, arguments.rounds)


if __name__ == "__main__":
    main()
