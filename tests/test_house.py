"""The architecture: imports run downward only, and the rooms stand apart."""

import ast
from pathlib import Path

import pytest

import pvae

PACKAGE = Path(pvae.__file__).parent

# from the roof down: each imports only what stands below it
HOUSE = [
    "cli",
    "report",
    "train",
    "crosscheck",
    "plots",
    "run",
    "evaluate",
    "captured",
    "checkpoint",
    "memory",
    "optim",
    "data",
    "vae",
]
# the ground floor: rooms that do not import one another
ROOMS = ["programs", "objectives", "closed_form", "conditional", "heads", "priors", "nets", "files"]
TORCH_ONLY = ["closed_form", "conditional", "nets"]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; `from pvae import a` counts as pvae.a."""
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


def test_every_file_has_its_place():
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert files == {*HOUSE, *ROOMS}


@pytest.mark.parametrize("name", HOUSE)
def test_imports_run_downward(name):
    below = {*HOUSE[HOUSE.index(name) + 1 :], *ROOMS}
    assert ours(PACKAGE / f"{name}.py") <= below


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_stand_apart(name):
    assert ours(PACKAGE / f"{name}.py") == set()


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_the_oracle_and_the_nets_know_no_pyro(name):
    roots = {module.split(".")[0] for module in imported(PACKAGE / f"{name}.py")}
    assert roots <= {"torch", "math", "collections", "dataclasses", "itertools", "typing"}
