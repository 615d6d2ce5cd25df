"""Time a checkpoint in transformers: ``python -m examples.time_transformers MODEL``.

Prints the seconds of the prompts and of the new tokens after them as JSON: the medians over turns
after a warm-up. `examples.engine_table` runs this program for every size of a model, each time in a
new process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ray_surgeon.config.schedule import SpeedSection
from ray_surgeon.export.speed import time_request


def main(argv: Sequence[str] | None = None) -> int:
    """Load the checkpoint, time it, and print the seconds."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.time_transformers", description=__doc__
    )
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="prompts at a time")
    parser.add_argument(
        "--prompt-length", type=int, default=256, help="tokens of a prompt"
    )
    parser.add_argument("--num-new-tokens", type=int, default=64, help="tokens after it")
    parser.add_argument("--turns", type=int, default=3, help="measurements")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    model.to(arguments.device).eval()
    request = SpeedSection(
        batch_size=arguments.batch_size,
        prompt_length=arguments.prompt_length,
        num_new_tokens=arguments.num_new_tokens,
    )
    time_request(model, request)
    turns = [time_request(model, request) for _ in range(arguments.turns)]
    seconds = [statistics.median(times) for times in zip(*turns, strict=True)]
    sys.stdout.write(json.dumps(seconds) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
