"""The documentation against the code: settings, links, and the files that it names."""

import re
from pathlib import Path

import pytest

from api.settings.config import Settings, read_settings

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
_ROW = re.compile(r"^\| `--(?P<flag>[\w-]+)`[^|]*\|[^|]*\| (?P<default>[^|]+) \|", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")
_SOURCE_FILE = re.compile(r"`((?:api|engine|kernels|precompile|bench|tests|clients)/[\w./]+)`")


def field_of(flag: str) -> str:
    """The field that a flag sets. A switch whose default is on has a flag that begins with no-."""
    name = flag.replace("-", "_")
    return name if name in Settings.model_fields else name.removeprefix("no_")


def shown(default: object) -> str:
    """A default as docs/settings.md writes it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default in (None, []) else f"`{default}`"


def documented_defaults() -> dict[str, str]:
    """The default that docs/settings.md has for each flag."""
    rows = _ROW.findall((ROOT / "docs/settings.md").read_text())
    defaults = dict(rows)
    assert len(defaults) == len(rows), "a flag is listed twice"
    return defaults


def test_docs_list_each_flag_of_help_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--help"])
    flags = set(re.findall(r"^  --([\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert set(documented_defaults()) == flags


def test_docs_have_the_default_of_each_flag() -> None:
    defaults = {
        flag: shown(Settings.model_fields[field_of(flag)].default) for flag in documented_defaults()
    }
    assert documented_defaults() == defaults


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    missing = [
        link for link in _LINK.findall(page.read_text()) if not (page.parent / link).exists()
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_source_files_that_a_page_names_exist(page: Path) -> None:
    missing = [
        path for path in _SOURCE_FILE.findall(page.read_text()) if not (ROOT / path).exists()
    ]
    assert not missing
