"""Compares pruned models with the dense one by the number of tasks that they solve.

``python -m benchmarks.tasks DENSE PRUNED... --sets gsm8k hellaswag --limit 50`` evaluates every
model and prints a Markdown table: a count, its 95 % interval (Wilson's), and for every model after
the first the problems lost and won, with the p-value of McNemar's exact test. Decoding is greedy,
in batches, and deterministic on one machine (`benchmarks.generation`). `benchmarks.case_sets`
defines the sets and their grading, and `benchmarks.humaneval` those of HumanEval, which runs
generated code and therefore needs ``--run-code``.

All answers are stored in the file of ``--out``, which is written after every set. ``--resume``
reuses the finished results of the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import case_sets, humaneval
from benchmarks.case_sets import Case, cases_of, outcome_of_choice, outcome_of_reply
from benchmarks.generation import greedy_completions, loaded, log_likelihoods
from benchmarks.humaneval import Limits, comparison, named_folders
from benchmarks.intervals import wilson

SETS = ("humaneval", *case_sets.SETS)
REQUESTS = {
    "gsm8k": "Please reason step by step, and put your final answer within \\boxed{}.",
    "reasoning-gym": "Answer with the number only.",
}
"""Set -> the last sentence of its prompts."""
NUM_NEW_TOKENS = {"gsm8k": 512, "reasoning-gym": 24}
"""Set -> maximum number of tokens of a reply."""
_NEXT_QUESTION = "\nQuestion:"

Outcomes = dict[str, str]  # case -> "passed" or the failure
Result = dict[str, Any]  # of one model on one set: answers, outcomes, wall_s, cpu_s
Record = dict[str, Any]  # of one model: name, folder, settings, sets (set -> Result)


def answers_with_numbers(
    model: Any, tokenizer: Any, name: str, cases: Sequence[Case], batch_size: int
) -> list[str]:
    """Return the replies to cases of a set without choices.

    The prompt uses the model's chat template. A model without one continues "Question: ... Answer:"
    up to the next question.
    """
    is_chat = tokenizer.chat_template is not None
    prompts = []
    for case in cases:
        question = f"{case.prompt}\n{REQUESTS[name]}"
        if is_chat:
            message = {"role": "user", "content": question}
            prompt = tokenizer.apply_chat_template(
                [message], add_generation_prompt=True, tokenize=False
            )
        else:
            prompt = f"Question: {question}\nAnswer:"
        prompts.append(prompt)
    replies = greedy_completions(
        model,
        tokenizer,
        prompts,
        batch_size=batch_size,
        num_new_tokens=NUM_NEW_TOKENS[name],
        is_complete=lambda reply: not is_chat and _NEXT_QUESTION in reply,
        add_special_tokens=not is_chat,
    )
    if is_chat:
        return replies
    return [reply.partition(_NEXT_QUESTION)[0] for reply in replies]


def result_of_cases(
    model: Any, tokenizer: Any, name: str, cases: Sequence[Case], batch_size: int
) -> Result:
    """Return the answers and outcomes of a set of `benchmarks.case_sets`."""
    if not cases[0].choices:
        replies = answers_with_numbers(model, tokenizer, name, cases, batch_size)
        outcomes = {}
        for case, reply in zip(cases, replies, strict=True):
            outcomes[case.name] = outcome_of_reply(case, reply)
        return {"answers": replies, "outcomes": outcomes}
    pairs = [(case.prompt, choice) for case in cases for choice in case.choices]
    scores = log_likelihoods(model, tokenizer, pairs, batch_size=batch_size)
    outcomes = {}
    answers = []
    for case in cases:
        of_case = scores[: len(case.choices)]
        scores = scores[len(case.choices) :]
        answers.append(of_case)
        outcomes[case.name] = outcome_of_choice(
            case, of_case, is_per_byte=name == "hellaswag"
        )
    return {"answers": answers, "outcomes": outcomes}


def result_of_humaneval(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[humaneval.Task],
    batch_size: int,
    *,
    allow_network: bool,
) -> Result:
    """Return the completions of HumanEval's tasks, and the outcomes of running them."""
    completions = greedy_completions(
        model,
        tokenizer,
        [task["prompt"] for task in tasks],
        batch_size=batch_size,
        num_new_tokens=humaneval.NUM_NEW_TOKENS,
        is_complete=humaneval.is_function_complete,
    )
    of_tasks = {}
    for task, completion in zip(tasks, completions, strict=True):
        of_tasks[task["task_id"]] = completion
    outcomes = humaneval.outcomes_of(
        of_tasks, tasks, Limits(), allow_network=allow_network
    )
    return {"answers": completions, "outcomes": outcomes}


def evaluate(
    record: Record, cases: Mapping[str, Sequence[Any]], arguments: argparse.Namespace
) -> None:
    """Add the results of the sets that a model's record lacks; the file is written after each.

    Args:
        record: record of the model, with the results of an earlier call.
        cases: set -> its cases or tasks.
        arguments: parsed command line.
    """
    missing = [name for name in cases if name not in record["sets"]]
    if not missing:
        return
    model, tokenizer = loaded(
        record["folder"], arguments.dtype, trust_remote_code=arguments.trust_remote_code
    )
    for name in missing:
        start_s = time.monotonic()
        start_cpu_s = time.process_time()
        if name == "humaneval":
            result = result_of_humaneval(
                model,
                tokenizer,
                cases[name],
                arguments.batch_size,
                allow_network=arguments.allow_network,
            )
        else:
            result = result_of_cases(
                model, tokenizer, name, cases[name], arguments.batch_size
            )
        result["wall_s"] = time.monotonic() - start_s
        result["cpu_s"] = time.process_time() - start_cpu_s
        record["sets"][name] = result
        write(arguments.out, record)


def write(path: Path, record: Record) -> None:
    """Write a model's record into the file of all models, atomically."""
    records = read(path)
    records[record["name"]] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".new")
    written.write_text(json.dumps({"models": list(records.values())}, indent=1) + "\n")
    os.replace(written, path)


def read(path: Path) -> dict[str, Record]:
    """Return the records of a file of results by name; empty if the file does not exist."""
    if not path.exists():
        return {}
    models = json.loads(path.read_text())["models"]
    return {record["name"]: record for record in models}


def begun(arguments: argparse.Namespace) -> list[Record]:
    """Return the record of each model, with the results of an earlier call if resumed.

    Raises:
        ValueError: the file exists without --resume, or another command wrote it.
    """
    if arguments.out.exists() and not arguments.resume:
        raise ValueError(
            f"{arguments.out} exists; give --resume to continue it, or another --out"
        )
    earlier = read(arguments.out)
    settings = {
        "dtype": arguments.dtype,
        "batch_size": arguments.batch_size,
        "limit": arguments.limit,
        "num_threads": arguments.threads,
    }
    records = []
    for name, folder in named_folders(arguments.models).items():
        record: Record = {
            "name": name,
            "folder": folder,
            "settings": settings,
            "sets": {},
        }
        found = earlier.get(name, record)
        if (found["folder"], found["settings"]) != (folder, settings):
            raise ValueError(
                f"{arguments.out} has {name} of {found['folder']} with {found['settings']}, not "
                f"of {folder} with {settings}; repeat that command, or give another --out"
            )
        records.append(found)
    return records


def count_text(passed: int, num_cases: int) -> str:
    """Return a count and its 95 % interval in cases, such as "52 (41 to 64)"."""
    low, high = wilson(passed, num_cases)
    return f"{passed} ({low * num_cases:.0f} to {high * num_cases:.0f})"


def table(outcomes: Mapping[str, Mapping[str, Outcomes]]) -> str:
    """Return a Markdown table with a line per set.

    Args:
        outcomes: model -> set -> outcomes; models are compared with the first one.
    """
    dense, *others = outcomes
    header = f"| set | cases | {dense} |"
    rule = "|---|---:|---:|"
    for name in others:
        header += f" {name} | lost, won | p |"
        rule += "---:|---:|---:|"
    lines = [header, rule]
    for name, of_dense in outcomes[dense].items():
        num_cases = len(of_dense)
        passed = comparison(of_dense, of_dense).passed
        line = f"| {name} | {num_cases} | {count_text(passed, num_cases)} |"
        for other in others:
            found = comparison(of_dense, outcomes[other][name])
            count = count_text(found.passed, num_cases)
            line += f" {count} | {found.lost}, {found.won} | {found.p_value:.2g} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def outcomes_in(
    records: Sequence[Record], sets: Sequence[str]
) -> dict[str, dict[str, Outcomes]]:
    """Return model -> set -> outcomes of complete records."""
    found = {}
    for record in records:
        found[record["name"]] = {name: record["sets"][name]["outcomes"] for name in sets}
    return found


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks")
    add = parser.add_argument
    add("models", nargs="+", help="FOLDER or NAME=FOLDER; the dense one first")
    add("--sets", nargs="+", choices=SETS, default=SETS, help="all, if not given")
    add("--limit", type=int, help="only the first N cases of each set")
    add("--out", type=Path, default=Path("runs/tasks.json"), help="answers and outcomes")
    add("--resume", action="store_true", help="reuse the results in --out")
    add("--dtype", default="bfloat16", help="of the computation")
    add("--batch-size", type=int, default=16)
    add("--threads", type=int, default=1, help="of torch; %(default)s")
    add("--trust-remote-code", action="store_true", help="run code from a folder")
    add("--run-code", action="store_true", help="run the code generated for humaneval")
    add(
        "--allow-network",
        action="store_true",
        help="run it even if the network stays reachable",
    )
    arguments = parser.parse_args(argv)
    if arguments.limit is not None and arguments.limit < 1:
        parser.error(f"--limit must be at least 1, got {arguments.limit}")
    check_run_code(parser, arguments)
    return arguments


def check_run_code(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> None:
    """End the command if it would run generated code without being told to."""
    if "humaneval" in arguments.sets and not arguments.run_code:
        parser.error(
            "humaneval runs generated code: add --run-code, or name other --sets"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate every model, and print the table."""
    arguments = arguments_of(argv)
    torch.set_num_threads(arguments.threads)
    records = begun(arguments)
    cases: dict[str, Sequence[Any]] = {}
    for name in dict.fromkeys(arguments.sets):
        if name == "humaneval":
            humaneval.check_sandbox(Limits(), allow_network=arguments.allow_network)
            cases[name] = humaneval.fetch_tasks()[: arguments.limit]
        else:
            cases[name] = cases_of(name, arguments.limit)
    for record in records:
        evaluate(record, cases, arguments)
    sys.stdout.write(table(outcomes_in(records, list(cases))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
