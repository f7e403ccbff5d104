"""The arrows between the rooms: who may import whom."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diablo_theory

PACKAGE = Path(diablo_theory.__file__).parent
GROUND = {"blocks", "ops", "errors", "files"}
ALLOWED = {
    "blocks": set(),
    "errors": set(),
    "files": {"errors"},
    "ops": {"blocks", "files"},
    "tuner": GROUND,
    "theory": GROUND,
    "quantise": {"errors", "theory"},
    "methods": {"blocks", "errors", "tuner"},
    "finetune": GROUND | {"methods", "progress", "provenance", "quantise", "reading", "records", "__version__"},
    "bench": {"blocks", "ops", "methods", "finetune", "tuner"},
    "speed": {"blocks", "provenance", "theory"},
    "counting": {"errors", "finetune", "methods", "reporting"},
    "diagnose": {"errors", "finetune", "theory"},
    "reading": {"errors"},
    "records": {"errors", "files"},
    "reporting": {"errors", "files", "reading", "records"},
    "progress": set(),
    "provenance": {"__version__", "ops"},
    "sweeps": {"errors", "files", "__version__"},
    "tune": {"errors", "files", "methods", "finetune", "progress", "records", "reporting"},
    "reproduce": {"errors", "files", "bench", "finetune", "methods", "progress", "provenance", "reading", "reporting"}
    | {"sweeps", "theory", "tune", "__version__"},
    "cli": None,
    "__main__": {"cli"},
    "__init__": {"tuner"},
}


def imports(file):
    """Rooms of this package that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "diablo_theory":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diablo_theory."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("diablo_theory."))


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_rooms_import_only_what_they_may(file):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = ALLOWED[room]
    if allowed is not None:
        assert set(imports(file)) - {room} <= allowed


@pytest.mark.parametrize("file", sorted((PACKAGE / "theory").glob("*_checks.py")), ids=lambda file: file.stem)
def test_checks_stand_on_their_own(file):
    """What several checks share is in measures.py or below it; only checks.py knows them all."""
    assert not re.findall(r"from diablo_theory\.theory(?: import .*|\.)\w*_checks", file.read_text())


def test_help_is_quick_because_it_loads_no_torch():
    code = "import sys, diablo_theory.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_readme_lists_every_room():
    readme = (PACKAGE.parent / "README.md").read_text()
    rooms = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    missing = {room for room in rooms - {"__init__.py", "__main__.py"} if room.removesuffix(".py") not in readme}
    assert not missing


def test_deviations_in_the_code_and_in_the_readme_are_the_same():
    pattern = re.compile(r"DEVIATION\(([a-z0-9-]+)\)")
    tagged = {tag for file in PACKAGE.rglob("*.py") for tag in pattern.findall(file.read_text())}
    readme = (PACKAGE.parent / "README.md").read_text()
    listed = set(re.findall(r"^- `([a-z0-9-]+)`:", readme.split("## Deviations")[1], flags=re.MULTILINE))
    assert tagged
    assert tagged == listed
