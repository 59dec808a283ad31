"""The direction of dependencies, read from the imports: api -> engine -> kernels."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path.relative_to(ROOT)
    for room in ("api", "engine", "kernels")
    for path in ROOT.glob(f"{room}/**/*.py")
)
# What must stay drivable without a device: pure bookkeeping.
TORCH_FREE = {
    f"engine/{name}.py"
    for name in (
        "async_engine",
        "block_pool",
        "config",
        "errors",
        "metrics",
        "request",
        "scheduler",
        "sequence",
    )
}
FORBIDDEN = {
    "kernels": {"engine", "api", "transformers", "fastapi", "pydantic", "asyncio"},
    "engine": {"api", "fastapi", "starlette", "pydantic", "uvicorn", "triton"},
    "api": {"torch", "transformers", "kernels", "triton"},
}


def imports(path: Path) -> Iterator[str]:
    """Packages and modules that a file imports when it runs, wherever in it."""
    return _imports(ast.parse((ROOT / path).read_text()))


def _imports(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom) and node.module:
        names = [node.module]
    for name in names:
        yield from {name, name.split(".")[0]}
    for child in ast.iter_child_nodes(node):
        yield from _imports(child)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    assert not (FORBIDDEN[path.parts[0]] | {"rehearsal"}) & set(imports(path))


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[1] != "vast"], ids=str)
def test_a_platform_s_words_are_known_to_who_starts_the_server_alone(path: Path) -> None:
    knows = any(name.startswith("api.vast") for name in imports(path))
    assert not knows or str(path) in ("api/__main__.py", "api/config.py")


@pytest.mark.parametrize("path", [p for p in FILES if str(p) in TORCH_FREE], ids=str)
def test_bookkeeping_needs_no_torch(path: Path) -> None:
    found = set(imports(path))
    assert not found & {"torch", "transformers", "numpy"}
    inner = {f"{name.replace('.', '/')}.py" for name in found if name.startswith("engine.")}
    assert inner <= TORCH_FREE


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "engine"], ids=str)
def test_only_the_async_shell_knows_asyncio(path: Path) -> None:
    assert "asyncio" not in set(imports(path)) or path.name == "async_engine.py"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_environment_is_read_in_one_file(path: Path) -> None:
    source = (ROOT / path).read_text()
    reads = any(word in source for word in ("os.environ", "os.getenv", "getenv("))
    assert not reads or path == Path("api/config.py")


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "api"], ids=str)
def test_the_http_side_imports_the_engine_by_its_torch_free_rooms(path: Path) -> None:
    """`__main__` alone loads the engine itself, when it is about to run it."""
    inner = {f"{n.replace('.', '/')}.py" for n in imports(path) if n.startswith("engine.")}
    assert inner <= TORCH_FREE or path.name == "__main__.py"
