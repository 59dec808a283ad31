"""Imports go one way: api imports engine, engine imports kernels, and within api and engine each
folder imports only the folders below it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path.relative_to(ROOT)
    for package in ("api", "engine", "kernels")
    for path in ROOT.glob(f"{package}/**/*.py")
)
FORBIDDEN = {
    "kernels": {"engine", "api", "transformers", "fastapi", "pydantic", "asyncio"},
    "engine": {"api", "fastapi", "starlette", "pydantic", "uvicorn", "triton"},
    "api": {"torch", "transformers", "kernels", "triton"},
}
# From the lowest layer up: a folder imports those listed before it, never those after it. Files
# outside these folders import any of them; `api.vast` may import those files, too.
LAYERS = {
    "engine": (
        "core",
        "device",
        "text",
        "linear",
        "experts",
        "fusion",
        "attention",
        "loading",
        "sampling",
        "step",
    ),
    "api": (
        "http",
        "settings",
        "telemetry",
        "generation",
        "tgi",
        "chat",
        "anthropic",
        "openai",
        "responses",
        "vast",
    ),
}
TORCH_FREE = ("engine.core", "engine.async_engine")
"""The part of the engine that `api` may import, and that tests drive without a device."""


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of each module and member that a file imports when it runs."""
    return _imports(ast.parse((ROOT / path).read_text()))


def _imports(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom) and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child)


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def folder_of(path: Path) -> str | None:
    """Return `core` for `engine/core/request.py`, and None for `engine/engine.py`."""
    return path.parts[1] if len(path.parts) > 2 else None


def starts_with(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def test_every_folder_has_its_layer() -> None:
    found = {path.parts[:2] for path in FILES if len(path.parts) > 2 and path.parts[0] in LAYERS}
    assert found == {(package, folder) for package, layers in LAYERS.items() for folder in layers}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    assert not (FORBIDDEN[path.parts[0]] | {"precompile"}) & packages(path)


@pytest.mark.parametrize(
    "path", [p for p in FILES if folder_of(p) and p.parts[0] in LAYERS], ids=str
)
def test_a_folder_imports_only_folders_below_it(path: Path) -> None:
    package, folder = path.parts[0], folder_of(path)
    assert folder is not None
    layers = LAYERS[package]
    below = tuple(f"{package}.{name}" for name in layers[: layers.index(folder) + 1])
    inner = [name for name in imports(path) if starts_with(name, (package,))]
    assert folder == "vast" or all(starts_with(name, below) for name in inner)


@pytest.mark.parametrize("path", [p for p in FILES if folder_of(p) != "vast"], ids=str)
def test_only_the_process_imports_the_vast_worker(path: Path) -> None:
    imported = any(starts_with(name, ("api.vast",)) for name in imports(path))
    assert not imported or path == Path("api/process.py")


@pytest.mark.parametrize("path", [p for p in FILES if folder_of(p) == "core"], ids=str)
def test_the_engine_s_core_needs_no_torch_and_no_numpy(path: Path) -> None:
    assert not packages(path) & {"torch", "transformers", "numpy", "kernels"}


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "engine"], ids=str)
def test_only_the_way_to_the_event_loop_imports_asyncio(path: Path) -> None:
    assert "asyncio" not in packages(path) or path.name in ("async_engine.py", "outbox.py")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_environment_is_read_in_one_file(path: Path) -> None:
    """`api/__main__.py` reads one variable before that file may be imported."""
    source = (ROOT / path).read_text()
    reads = any(word in source for word in ("os.environ", "os.getenv", "getenv("))
    assert not reads or path in (Path("api/settings/config.py"), Path("api/__main__.py"))


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "api"], ids=str)
def test_the_http_side_imports_only_the_torch_free_part_of_the_engine(path: Path) -> None:
    """`api/process.py` is the exception: it imports the whole engine to run it."""
    inner = [name for name in imports(path) if starts_with(name, ("engine",))]
    assert path.name == "process.py" or all(starts_with(name, TORCH_FREE) for name in inner)
