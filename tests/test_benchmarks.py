"""That the benchmarks run, and that the documents say what they have found."""

from pathlib import Path
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import pytest
from benchmarks.__main__ import compare
from benchmarks._contenders import contenders
from benchmarks._hlo import program
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


def test_loops():
    def fn(x):
        x = lax.fori_loop(0, 50, lambda i, x: jnp.sin(x) @ x, x)
        goes_on = lambda x: jnp.sum(x) < 9
        grow = lambda x: lax.cond(x[0, 0] > 3, lambda: x + 1, lambda: jnp.exp(x) @ x)
        return lax.while_loop(goes_on, grow, x)

    compiled: Any = jax.jit(fn).lower(jnp.ones((30, 30))).compile().as_text()
    first, second = program(compiled).loops
    assert (first.trips, first.waits) == (50, 0)
    # Whether to go on, and how.
    assert (second.trips, second.waits) == (None, 2)
    assert first.kernels > 0 and second.kernels > 0


def test_compare(capsys):
    task = neural_cde(8)
    rows = compare(task, contenders(task, "quick"), repeats=2)
    assert {row["what"] for row in rows} == {"value", "gradient"}
    for row in rows:
        assert row["chosen"] and row["error"] < 1e-6 and row["median_ms"] > 0
    assert task.name in capsys.readouterr().out
