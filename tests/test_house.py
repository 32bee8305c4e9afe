"""The architecture: imports run downward only, and the rooms stand apart."""

import ast
from pathlib import Path

import pytest

import pvae

PACKAGE = Path(pvae.__file__).parent

# from the roof down: each module imports only modules below it
HOUSE = [
    "compare",
    "evaluation",
    "cli",
    "study",
    "page",
    "explorer",
    "report",
    "train",
    "compatible",
    "crosscheck",
    "results",
    "tables",
    "plots",
    "run",
    "keeping",
    "evaluate",
    "captured",
    "checkpoint",
    "memory",
    "averaging",
    "optim",
    "data",
    "reading",
    "streaming",
    "builder",
    "vae",
]
# the ground floor: rooms, which import no other room except `kinds`
ROOMS = [
    "kinds",
    "programs",
    "objectives",
    "schedule",
    "stopping",
    "closed_form",
    "conditional",
    "heads",
    "priors",
    "flows",
    "nets",
    "files",
    "processes",
    "untrusted",
]
TORCH_ONLY = ["closed_form", "conditional", "kinds", "nets"]


def imported(path: Path) -> set[str]:
    """Returns every module that a file imports anywhere; `from pvae import a` gives pvae.a."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("pvae.")}


def files(name: str) -> list[Path]:
    """Returns a module's file, or a package's files without `__main__`, which imports a roof."""
    package = PACKAGE / name
    if not package.is_dir():
        return [PACKAGE / f"{name}.py"]
    return [path for path in package.glob("*.py") if path.stem != "__main__"]


def test_every_file_has_its_place():
    found = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    found |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert found == {*HOUSE, *ROOMS}


@pytest.mark.parametrize("name", HOUSE)
def test_imports_run_downward(name):
    below = {*HOUSE[HOUSE.index(name) + 1 :], *ROOMS}
    for path in files(name):
        assert ours(path) - {name} <= below


def test_a_package_is_ordered_too():
    """The imports among the files of `pvae.evaluate` make no circle."""
    uses = {
        path.stem: {n.split(".")[2] for n in imported(path) if n.startswith("pvae.evaluate.")}
        for path in files("evaluate")
    }
    while uses:
        lowest = {name for name, used in uses.items() if not used & set(uses)}
        assert lowest, f"a circle among {sorted(uses)}"
        uses = {name: used for name, used in uses.items() if name not in lowest}


def test_what_python_m_runs_only_hands_over():
    statements = ast.parse((PACKAGE / "evaluate" / "__main__.py").read_text()).body
    assert [type(statement) for statement in statements] == [ast.ImportFrom, ast.If]


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_stand_apart(name):
    assert ours(PACKAGE / f"{name}.py") <= {"kinds"} - {name}


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_the_oracle_and_the_nets_know_no_pyro(name):
    modules = imported(PACKAGE / f"{name}.py")
    roots = {module.split(".")[0] for module in modules if not module.startswith("pvae.kinds")}
    assert roots <= {"torch", "math", "collections", "dataclasses", "itertools", "typing"}
