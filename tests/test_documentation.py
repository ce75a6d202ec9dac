"""Every Python block of README and docs, and every example in a docstring, runs, and prints what it says it prints.

A document is one namespace: its blocks run from top to bottom, as a reader would. What a block prints is compared with
the ``output`` block below it, if there is one, and what follows ``>>>`` with the lines below (``...`` stands for
anything). Blocks in other languages (``console``, ``text``) aren't run.
"""

from __future__ import annotations

import ast
import doctest
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from sybil import Document, Example, Sybil
from sybil.document import PythonDocStringDocument
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers import myst, rest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MODULES = sorted((ROOT / "persample").rglob("*.py"))
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS

evaluate = PythonEvaluator()


def run_block(example: Example) -> None:
    with redirect_stdout(StringIO()) as printed:
        evaluate(example)
    example.namespace["__printed__"] = printed.getvalue()


def compare_output(example: Example) -> str:
    """What differs, or nothing."""
    printed, checker = example.namespace["__printed__"], doctest.OutputChecker()
    shown = doctest.Example("", example.parsed)
    return "" if checker.check_output(shown.want, printed, FLAGS) else checker.output_difference(shown, printed, FLAGS)


python = myst.PythonCodeBlockParser(doctest_optionflags=FLAGS)
python.codeblock_parser = myst.CodeBlockParser("python", run_block)
pages = Sybil([python, myst.CodeBlockParser("output", compare_output)])
docstrings = Sybil(
    [rest.DocTestParser(FLAGS), rest.PythonCodeBlockParser()],
    document_types={".py": PythonDocStringDocument},
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run(document: Document) -> int:
    """How many examples ran; each raises what differs, with its line."""
    examples = list(document.examples())
    for example in examples:
        example.evaluate()
    return len(examples)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_page(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a page may write files
    languages = re.findall(r"^[ >]*```+ *(\{?[\w-]+\}?.*)$", path.read_text(), re.MULTILINE)
    assert not {x for x in languages if re.match("py(?!thon$)", x, re.IGNORECASE)}, "call it python, or it won't be run"
    blocks = [x for x in languages if x == "python" or x.startswith("{code-cell}")]
    assert run(pages.parse(path)) >= len(blocks)


@pytest.mark.parametrize("path", [p for p in MODULES if re.search(r">>> |code-block::", p.read_text())], ids=name)
def test_docstrings(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(docstrings.parse(path)) > 0


def test_docstrings_have_no_fences() -> None:
    """They are reStructuredText: a Markdown fence would neither be shown as code nor be run."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [
        name(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, documented) and "```" in (ast.get_docstring(node) or "")
    ]
    assert not found


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("```python\nx = 1\n```\n```python\nassert x == 1\n```\n", False),
        ("```python\nassert False\n```\n", True),
        ("```python\nprint(1 + 1)\n```\n\n```output\n2\n```\n", False),
        ("```python\nprint(1 + 1)\n```\n\n```output\n3\n```\n", True),
        ("```python\n>>> 1 + 1\n2\n```\n", False),
        ("```python\n>>> 1 + 1\n3\n```\n", True),
        ("```{code-cell} python\nassert False\n```\n", True),
        ("```console\nnot python\n```\n", False),
    ],
)
def test_a_wrong_page_is_noticed(text: str, wrong: bool, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    if wrong:
        with pytest.raises(AssertionError):  # the block's own, or sybil's
            run(pages.parse(page))
    else:
        run(pages.parse(page))
