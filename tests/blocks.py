"""Examples in documents. `python tests/blocks.py README.md` prints the first one."""

import re
import sys
import textwrap
from pathlib import Path


_FENCE = re.compile(r"^( *)```python\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks(path: Path) -> list[str]:
    """All Python blocks. Those that follow another one go on from there."""
    return [textwrap.dedent(match[2]) for match in _FENCE.finditer(path.read_text())]


if __name__ == "__main__":
    print(blocks(Path(sys.argv[1]))[0])
