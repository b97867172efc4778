"""What XLA has compiled a function to: its loops, and what each of them launches."""

import dataclasses
import re


# What is no kernel, but only says how others are put together.
_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "tuple",
}


@dataclasses.dataclass
class Loop:
    """A loop, or the program as a whole.

    **Attributes:**

    - `origin`: where in the traced program it comes from.
    - `trips`: how often it runs, or `None` if that is not known before.
    - `kernels`: how many are launched every time, without those of loops within. Of the
        branches of a conditional, those of the longest.
    - `waits`: how often every time the host waits for a value that the device has
        found: which branch to take, or whether to go on.
    - `loops`: those within.
    """

    origin: str
    trips: int | None
    kernels: int = 0
    waits: int = 0
    loops: list["Loop"] = dataclasses.field(default_factory=list)

    @property
    def is_backwards(self) -> bool:
        return "transpose(" in self.origin


def program(text: str) -> Loop:
    """Of `jax.jit(f).lower(x).compile().as_text()`."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header is not None:
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("  "):
            lines.append(line)
    out = Loop("", 1)
    _add(out, computations, entry)
    return out


def _add(loop: Loop, computations: dict[str, list[str]], name: str) -> None:
    for line in computations[name]:
        # After its name and its type comes what it does.
        found = re.search(r" = .*?[\]})] ([a-z][a-z\d-]*)\(", line)
        operation = "" if found is None else found[1]
        called = lambda key: _one(rf"{key}=%?([\w.-]+)", line)
        origin = _one(r'op_name="([^"]*)"', line)
        if operation in _FREE:
            continue
        elif operation == "while":
            trips = _one(r'known_trip_count":\{"n":"(\d+)"', line)
            inner = Loop(origin, int(trips) if trips else None)
            inner.waits += 0 if trips else 1
            _add(inner, computations, called("condition"))
            _add(inner, computations, called("body"))
            loop.loops.append(inner)
        elif operation == "conditional":
            several = _one(r"branch_computations=\{([^}]*)\}", line)
            names = re.findall(r"[\w.-]+", several)
            if len(names) == 0:
                names = [called("true_computation"), called("false_computation")]
            branches = []
            for branch in names:
                branches.append(Loop("", 1))
                _add(branches[-1], computations, branch)
            longest = max(branches, key=lambda branch: branch.kernels)
            loop.kernels += longest.kernels
            loop.waits += 1 + longest.waits
            loop.loops += [inner for branch in branches for inner in branch.loops]
        elif operation == "call":
            _add(loop, computations, called("to_apply"))
        else:
            loop.kernels += 1


def _one(pattern: str, line: str) -> str:
    found = re.search(pattern, line)
    return "" if found is None else found[1]
