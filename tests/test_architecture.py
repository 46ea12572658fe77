"""The rooms of the package and the arrows between them: what may import what, read from the source."""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dicomcast"
MAPPINGS = ROOT / "mappings"
MODULES = sorted([*PACKAGE.rglob("*.py"), *MAPPINGS.glob("*.py")])

EDGES = {"errors", "clock", "decimals"}  # import nothing of ours
BELOW_APP = EDGES | {"settings", "wire", "dicom", "mapping", "fhir", "state", "sync", "web", "sandbox"}
# Room: what of dicomcast it may import besides itself. `dicom.values` is that module alone.
ARROWS: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "clock": set(),
    "decimals": set(),
    "settings": {"errors"},
    "wire": {"errors", "clock", "settings"},
    "dicom": {"errors", "clock", "decimals", "wire"},
    "mapping": {"errors", "decimals", "dicom.values"},
    "fhir": {"errors", "clock", "decimals", "wire"},
    "state": {"errors", "clock"},
    "sync": {"errors", "clock", "decimals", "settings", "wire", "dicom", "mapping", "fhir", "state"},
    "web": {"errors", "clock", "settings", "state", "sync"},
    "sandbox": {"errors", "clock", "dicom.values", "dicom.files", "mapping"},
    "app": BELOW_APP,
    "authoring": EDGES | {"settings", "dicom", "fhir", "mapping", "app"},
    "operations": BELOW_APP | {"app"},
    "reporting": EDGES | {"settings", "state", "app"},
    "demo": {"errors", "clock", "settings", "sandbox", "app", "dicom.files"},
    "cli": BELOW_APP | {"app", "authoring", "operations", "reporting", "demo"},
    "__main__": {"cli"},
    "mappings": {"mapping"},
}
EMPTY_NAMES = {"util", "utils", "helper", "helpers", "common", "base", "manager", "managers", "misc"}
CORE_LINES = 7_200
# What a running worker executes. Beside it are the sandbox, the rules themselves, which are data, what authors and
# operators ask for, and migrations, which repeat what the tables say.
BESIDE = {"sandbox", "demo", "mappings", "authoring", "operations", "reporting", "cli"}
NO_CORE = {
    PACKAGE / "dicom" / "files.py",
    PACKAGE / "state" / "jobs.py",
    PACKAGE / "state" / "operators.py",
    PACKAGE / "state" / "reports.py",
    PACKAGE / "sync" / "rehearsal.py",
    *(PACKAGE / "state" / "migrations").rglob("*.py"),
}


def room(module: Path) -> str:
    if module.is_relative_to(MAPPINGS):
        return "mappings"
    return module.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(source: str, package: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Line and dotted name below `dicomcast` of all that a module of `package` imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name.removeprefix("dicomcast.")) for name in names if name.startswith("dicomcast."))


def forbidden(source: str, package: Sequence[str], place: str) -> list[str]:
    """`line: name` of every import that has no arrow from the room `place`."""
    allowed = ARROWS[place] | {place, "__version__"}
    return [
        f"{line}: {name}"
        for line, name in imports(source, package)
        if not any(name == target or name.startswith(f"{target}.") for target in allowed)
    ]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(ROOT)))
def test_arrows_point_from_the_edge_inwards(module: Path) -> None:
    assert room(module) in ARROWS, "a new room: give it a place in ARROWS"
    package = module.relative_to(ROOT).parent.parts
    assert forbidden(module.read_text(encoding="utf-8"), package, room(module)) == []


def test_arrows_form_no_circle() -> None:
    reached: set[str] = set()
    waiting = {name: {target.split(".")[0] for target in targets} for name, targets in ARROWS.items()}
    while free := [name for name, targets in waiting.items() if targets <= reached]:
        reached |= set(free)
        waiting = {name: targets for name, targets in waiting.items() if name not in reached}
    assert not waiting


def test_every_way_to_import_is_seen() -> None:
    source = """
import dicomcast.sync
from dicomcast import __version__, errors, state
from dicomcast.dicom import feed, values
from dicomcast.dicom.values import Json
from ..fhir import service
from . import steps
def later():
    from dicomcast import web
"""
    found = ["2: sync", "3: state", "4: dicom.feed", "6: fhir.service", "9: web"]
    assert sorted(forbidden(source, ("dicomcast", "mapping"), "mapping")) == found


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(ROOT)))
def test_module_has_a_purpose_and_a_name_of_the_field(module: Path) -> None:
    assert ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    assert not EMPTY_NAMES & set(module.relative_to(ROOT).with_suffix("").parts)


def code_lines(source: str) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documented |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for at, line in lines if at not in documented)


def test_core_can_be_read_in_an_afternoon() -> None:
    core = [module for module in MODULES if room(module) not in BESIDE and module not in NO_CORE]
    assert sum(code_lines(module.read_text(encoding="utf-8")) for module in core) <= CORE_LINES
