"""Which package may import which, what modules may be called, what the wheel must list."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("planner", "profiles", "launcher")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, in functions as well: `ftplan.planner.plan`, `json`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(path)}, line {node.lineno}: relative import"
            assert node.module is not None
            if node.module == "ftplan":
                yield from (f"ftplan.{alias.name}" for alias in node.names)
            else:
                yield node.module


def package(module: str) -> str:
    """`ftplan.planner` for our own modules, `json` for others."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "ftplan" else parts[0]


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("planner", {"ftplan.planner", "msgspec"}),
        ("profiles", {"ftplan.planner", "ftplan.profiles", "msgspec"}),
    ],
)
def test_a_lower_package_imports_no_higher_one(folder: str, allowed: set[str]) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        foreign = {package(module) for module in imported(path)}
        assert foreign <= allowed | set(sys.stdlib_module_names), where(path)


def test_the_planner_reads_no_file_clock_or_environment() -> None:
    """Specifications and data in, numbers and reasons out."""
    effects = {"os", "pathlib", "io", "subprocess", "time", "datetime", "socket", "shutil"}
    for path in sorted((ROOT / "planner").rglob("*.py")):
        assert not effects & {package(module) for module in imported(path)}, where(path)
        calls = [
            node.func.id
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        assert not {"open", "print", "input"} & set(calls), where(path)


@pytest.mark.parametrize("path", MODULES, ids=where)
def test_no_module_takes_a_standard_librarys_name(path: Path) -> None:
    """Launched by its path, it would shadow the real one."""
    if path.stem not in ("__init__", "__main__"):
        assert path.stem not in sys.stdlib_module_names
    assert path.parent.name not in sys.stdlib_module_names


def package_of(folder: Path) -> str:
    relative = folder.relative_to(ROOT).parts
    return "ftplan" if relative == ("launcher", "_root") else ".".join(("ftplan", *relative))


def test_the_wheel_lists_every_package() -> None:
    """A forgotten one is missing from the wheel, while an editable install hides it."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        setuptools = tomllib.load(file)["tool"]["setuptools"]
    on_disk = {
        package_of(path.parent)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert sorted(setuptools["packages"]) == sorted(on_disk)
    for name, folder in setuptools["package-dir"].items():
        assert package_of(ROOT / folder) == name


def test_every_folder_of_modules_is_a_package() -> None:
    for path in MODULES:
        assert (path.parent / "__init__.py").is_file(), where(path)


def test_the_wheel_carries_every_data_file() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                matching = patterns.get(package_of(path.parent), [])
                assert any(path.match(pattern) for pattern in matching), where(path)
