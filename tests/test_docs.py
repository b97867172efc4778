"""The documents are true: their examples run, and all that is public is in them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import diffrax_deer
import matplotlib
import pytest

from .blocks import blocks


matplotlib.use("Agg")
root = Path(__file__).parent.parent
pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


@pytest.mark.parametrize(
    "path",
    [path for path in pages if len(blocks(path)) > 0],
    ids=lambda path: path.name,
)
def test_examples(path, monkeypatch, tmp_path):
    # One after the other, as they are read.
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, block in enumerate(blocks(path), 1):
        exec(compile(block, f"{path.name}, example {number}", "exec"), namespace)


def test_all_examples_are_found():
    for path in pages:
        assert path.read_text().count("```python\n") == len(blocks(path))


def test_public_names():
    documented = []
    for path in (root / "docs" / "api").glob("*.md"):
        documented += re.findall(r"^::: diffrax_deer\.(\S+)$", path.read_text(), re.M)
    public = [
        name
        for name, value in vars(diffrax_deer).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("d")
    ]
    assert len(public) > 30
    assert sorted(documented) == sorted(public)


def test_version():
    pyproject = (root / "pyproject.toml").read_text()
    citation = (root / "CITATION.cff").read_text()
    [version] = re.findall(r'^version = "(.*)"$', pyproject, re.M)
    assert diffrax_deer.__version__ == version
    assert f"\nversion: {version}\n" in citation


def test_dependencies():
    """What is imported is what is declared."""
    [declared] = re.findall(
        r"^dependencies = \[(.*)\]$", (root / "pyproject.toml").read_text(), re.M
    )
    declared = set(re.findall(r'"([a-z]+)', declared))
    imported = set()
    for path in (root / "diffrax_deer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).split(".")[0])
    # For `Report.plot`, which says so, and what only type checkers import.
    optional = {"matplotlib", "typing_extensions"}
    assert imported - set(sys.stdlib_module_names) - optional == declared


def test_first_example_of_a_document():
    command = [sys.executable, root / "tests" / "blocks.py", root / "README.md"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == blocks(root / "README.md")[0].strip()
