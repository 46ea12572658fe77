"""What the README tells people to type is there: commands that CI runs as they stand, and verbs that exist."""

import re
from pathlib import Path

import pytest
import typer

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MARKED = re.compile(r"^<!-- command: (\S+) -->\n+```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELLS = {"sh", "bash", "shell", "console"}


def commands() -> dict[str, list[str]]:
    """Lines of the fenced block behind each marker `<!-- command: NAME -->`."""
    return {name: block.splitlines() for name, block in MARKED.findall(README.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("name", ["demo", "test", "demo-uv", "test-uv"])
def test_command_is_one_line(name: str) -> None:
    assert len(commands().get(name, [])) == 1, f"no one-line block behind <!-- command: {name} -->"


@pytest.mark.parametrize(("name", "last"), [("demo", "dicomcast demo"), ("test", "pytest")])
def test_command_needs_only_python(name: str, last: str) -> None:
    (line,) = commands()[name]
    assert "python3 -m venv" in line
    assert re.search(r"\bpip install\b", line)
    assert last in line.split("&&")[-1]


def test_uv_forms_are_what_ci_runs() -> None:
    assert commands()["demo-uv"] == ["uv run dicomcast demo"]
    assert commands()["test-uv"] == ["uv run --extra dev pytest"]


def test_every_verb_in_the_readme_exists() -> None:
    blocks = [text for language, text in BLOCK.findall(README.read_text(encoding="utf-8")) if language in SHELLS]
    named = set(re.findall(r"\bdicomcast ([a-z][a-z-]*)", "\n".join(blocks)))

    assert named <= set(verbs())
    assert named


def verbs(group: typer.core.TyperGroup | None = None, prefix: str = "") -> list[str]:
    """`sync`, `failures list` and so on."""
    from dicomcast.cli import app

    found = []
    for name, command in (group or typer.main.get_group(app)).commands.items():
        deeper = isinstance(command, typer.core.TyperGroup)
        found += [f"{prefix}{name}"] + (verbs(command, f"{prefix}{name} ") if deeper else [])  # type: ignore[arg-type]
    return found


def test_every_verb_and_every_setting_is_in_the_readme() -> None:
    from dicomcast import settings

    text = README.read_text(encoding="utf-8")

    assert [verb for verb in verbs() if f"dicomcast {verb}" not in text] == []
    assert [name for name, _, _ in settings.options() if f"| `{name}` |" not in text] == []
