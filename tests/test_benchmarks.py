"""That the benchmarks run, and that the documents say what they have found."""

from pathlib import Path

import pytest
from benchmarks.__main__ import compare
from benchmarks._contenders import contenders
from benchmarks._study import show
from benchmarks._tasks import neural_cde
from benchmarks.table import updated


DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(
    "path", [*DOCS.glob("*.md"), DOCS.parent / "README.md"], ids=lambda path: path.name
)
def test_documents(path):
    # Otherwise run `python -m benchmarks.table docs/...`.
    text = path.read_text()
    assert updated(text) == text


def test_show(capsys):
    show([dict(name="a", span=3.0), dict(name="b", error=None)])
    assert (
        capsys.readouterr().out == "\nname  span  error\na     3     -\nb     -     -\n"
    )
    show([dict(suite="first", n=1), dict(suite="second", m=2)], hide=("m",))
    assert capsys.readouterr().out == "\nfirst\nn\n1\n\nsecond\n\n\n"


def test_compare(capsys):
    task = neural_cde(8)
    rows = compare(task, contenders(task, "quick"), repeats=2)
    assert {row["what"] for row in rows} == {"value", "gradient"}
    for row in rows:
        assert row["chosen"] and row["error"] < 1e-6 and row["median_ms"] > 0
    assert task.name in capsys.readouterr().out
