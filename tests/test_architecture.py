"""The rooms of docs/architecture.md, and that imports between them run downwards only."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# What each room may import besides itself. "core" is the modules directly in kvtool/, except for
# inspection.py, which is a room of its own.
MAY_IMPORT = {
    "kernels": set(),
    "core": {"kernels"},
    "runtime": {"core", "kernels"},
    "calibrate": {"core", "kernels"},
    "convert": {"core", "kernels", "calibrate", "runtime"},
    "evaluate": {"core", "kernels", "runtime"},
    "inspection": {"core", "convert"},
    "server": {"core", "runtime"},
    "cli": {
        "core",
        "kernels",
        "runtime",
        "calibrate",
        "convert",
        "evaluate",
        "inspection",
        "server",
    },
}

LEAVES = {"kvtool._home.home"}  # which import nothing, and which any room may


def files_of(room: str) -> list[Path]:
    """The Python files of a room."""
    if room == "inspection":
        return [REPOSITORY / "kvtool" / "inspection.py"]
    if room == "core":
        # __main__ is the door to the command line.
        elsewhere = {"inspection.py", "__main__.py"}
        return [f for f in (REPOSITORY / "kvtool").glob("*.py") if f.name not in elsewhere]
    top = REPOSITORY / room
    files = list((top if top.is_dir() else REPOSITORY / "kvtool" / room).rglob("*.py"))
    assert files
    return files


def imported_modules(file: Path) -> set[str]:
    """Every module that *file* imports, at its top, in a function or for type checking only."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide which room they reach"
            # `from kvtool.cli import _console` imports the module kvtool.cli._console.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str | None:
    """The room that a dotted module name lies in; None for other packages."""
    parts = module.split(".")
    if parts[0] != "kvtool":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "core"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_downwards_only(room: str) -> None:
    wrong = [
        f"{file.relative_to(REPOSITORY)} imports {module}"
        for file in files_of(room)
        for module in sorted(imported_modules(file))
        if module not in LEAVES and room_of(module) not in {None, room} | MAY_IMPORT[room]
    ]
    assert not wrong


def test_a_conversion_reaches_calibration_for_statistics_and_the_runtime_for_verification() -> None:
    for file in files_of("convert"):
        for module in imported_modules(file):
            if room_of(module) == "calibrate":
                reached = module.split(".")[2]
                measuring = {"statistics", "statistics_file", "stream"}
                assert reached in {*measuring, "lessons"}, f"{file} imports {module}"
            if room_of(module) == "runtime":
                assert file.name == "verify.py", f"{file} imports {module}"


def test_every_room_is_described() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [room for room in MAY_IMPORT if room not in page] == []
