"""A parser for Dockerfile.cuda: its stages and their instructions."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. `words` are its arguments; a RUN in shell form has its line as one word."""

    name: str
    words: list[str]
    flags: dict[str, str]


@dataclass(slots=True)
class Stage:
    """One stage. `base` is an image or the name of an earlier stage."""

    base: str
    name: str | None
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.name == name]

    def environment(self, name: str) -> dict[str, str]:
        """Return the names and values set by ENV, ARG or LABEL."""
        pairs = [word for instruction in self.all(name) for word in instruction.words]
        return dict(pair.partition("=")[::2] for pair in pairs)


def read_stages(path: Path = ROOT / "Dockerfile.cuda") -> list[Stage]:
    text = "\n".join(
        line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")
    )
    stages: list[Stage] = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            _add(stages, *line.strip().split(None, 1))
    return stages


def _add(stages: list[Stage], name: str, rest: str) -> None:
    if name == "FROM":
        base, *named = rest.split()
        stages.append(Stage(base, named[1] if named else None))
        return
    flags = {}
    while match := re.match(r"--([a-z-]+)=(\S+)\s+", rest):
        flags[match[1]] = match[2]
        rest = rest[match.end() :]
    if name == "HEALTHCHECK":
        rest = rest.removeprefix("CMD ")
    if rest.startswith("["):
        words = json.loads(rest)
    else:
        words = [rest] if name == "RUN" else shlex.split(rest)
    stages[-1].instructions.append(Instruction(name, words, flags))
