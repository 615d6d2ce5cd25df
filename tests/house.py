"""What the source weighs: ``python -m tests.house``.

Lines without blanks, comments and docstrings, at the width that ruff formats to; lines that are too
long; assignments of several values at once; files that know of experts.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
WIDTH = 100
FILE_LINES = 300
FUNCTION_LINES = 40
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}
_NO_CODE |= {tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}

_EXCUSED = re.compile(r"\\p\{L\}")
"""Expressions of tokenizers, which are one word each."""


@dataclass(frozen=True)
class Weight:
    """Of all files below a folder."""

    num_files: int
    num_lines: int  # of code
    num_long: int  # lines wider than `WIDTH` that ruff does not excuse
    num_assignments: int
    num_packed: int  # assignments of a tuple that is written out


def weight(folder: Path) -> Weight:
    """Return what the Python files below a folder weigh."""
    paths = sorted(folder.rglob("*.py"))
    num_lines = num_long = num_assignments = num_packed = 0
    for path in paths:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        num_lines += len(code_lines(text, tree))
        lines = (re.sub(r"  # (type:|noqa).*", "", line) for line in text.split("\n"))
        num_long += sum(len(line) > WIDTH and not _EXCUSED.search(line) for line in lines)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                num_assignments += 1
                num_packed += is_packed(node)
    return Weight(len(paths), num_lines, num_long, num_assignments, num_packed)


def is_packed(node: ast.stmt) -> bool:
    """Whether an assignment gives several names a value each."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    )


def code_lines(text: str, tree: ast.Module) -> set[int]:
    """Return the numbers of the lines of a file that are code."""
    lines = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue
        if isinstance(node.value.value, str):
            assert node.end_lineno is not None
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return lines


def too_large(folder: Path) -> list[str]:
    """Return files of more than `FILE_LINES`, and functions of more than `FUNCTION_LINES`.

    Docstrings of functions do not count.
    """
    large = []
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > FILE_LINES:
            large.append(path.name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                if body and (body[-1].end_lineno or 0) - body[0].lineno >= FUNCTION_LINES:
                    large.append(f"{path.name}: {node.name}")
    return large


def files_with(word: str) -> list[str]:
    """Return the files of the package in which a word occurs."""
    package = ROOT / "ray_surgeon"
    pattern = re.compile(word, re.IGNORECASE)
    return [
        path.relative_to(package).as_posix()
        for path in sorted(package.rglob("*.py"))
        if pattern.search(path.read_text(encoding="utf-8"))
    ]


def words(path: Path) -> int:
    """Return the number of words of a document: bars and dashes of tables are none."""
    return sum(any(map(str.isalnum, word)) for word in path.read_text(encoding="utf-8").split())


def words_of_docs() -> int:
    """Return the number of words of docs/ without the generated reference of the spec."""
    return sum(words(path) for path in (ROOT / "docs").glob("*.md") if path.name != "spec.md")


def main() -> None:
    """Print the figures."""
    for name in ("ray_surgeon", "tests", "benchmarks", "examples"):
        found = weight(ROOT / name)
        share = found.num_packed / max(1, found.num_assignments)
        sys.stdout.write(
            f"{name}: {found.num_lines} lines in {found.num_files} files, {found.num_long} longer "
            f"than {WIDTH}, {share:.1%} of assignments packed\n"
        )
    readme = words(ROOT / "README.md")
    sys.stdout.write(f"README: {readme} words; docs: {words_of_docs()} words\n")
    experts = files_with("expert")
    sys.stdout.write(f"expert: {len(experts)} files: {', '.join(experts)}\n")


if __name__ == "__main__":
    main()
