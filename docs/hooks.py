"""Formulas become MathML when the site is built, which browsers show by themselves."""

import html
import re

from latex2mathml.converter import convert


_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def _render(match: re.Match) -> str:
    # Within \( and \), or \[ and \].
    formula = html.unescape(match[2]).strip()[2:-2]
    return convert(formula, display="block" if match[1] == "div" else "inline")


def on_page_content(content: str, **kwargs) -> str:
    return _FORMULA.sub(_render, content)
