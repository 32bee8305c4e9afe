"""The site: notebooks run, pages need no network, and the reference has every public name."""

import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pvae

ROOT = Path(pvae.__file__).parent.parent
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.md"))
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[n.stem for n in NOTEBOOKS])


def cells(notebook: Path) -> list[str]:
    """Returns the code of each cell of a notebook."""
    cell = r"^```\{code-cell\} python\n(?::[^\n]*\n+)*(.*?)^```"
    return re.findall(cell, notebook.read_text(), flags=re.DOTALL | re.MULTILINE)


@each_notebook
def test_notebooks_are_readable(notebook):
    assert len(cells(notebook)) == notebook.read_text().count("{code-cell}") >= 5
    assert max(map(len, notebook.read_text().splitlines())) <= 100


@pytest.mark.slow
@each_notebook
def test_notebooks_run_in_a_minute(notebook, tmp_path, monkeypatch):
    """The cells run without Jupyter; the minute is processor time of one thread."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    start = time.process_time()
    for number, code in enumerate(cells(notebook), 1):
        exec(compile(code, f"{notebook.name}, cell {number}", "exec"), names)
    assert time.process_time() - start < 60


def test_every_example_is_in_the_gallery():
    """The gallery also names `mnist_svi.py` and `swap.py`, which other pages explain."""
    told = (ROOT / "examples" / "README.md").read_text()
    assert [p.name for p in ROOT.glob("examples/*.py") if f"`{p.name}`" not in told] == []


def test_one_command_builds_the_site():
    """The documented command is the one of the fixture `site`, except for the output folder."""
    command = "-m sphinx -W -b html docs docs/_build/html"
    assert command in (ROOT / "CONTRIBUTING.md").read_text()
    assert command in (DOCS / "conf.py").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Builds the site from a copy of docs/, so that no generated file is left in the repository."""
    pytest.importorskip("sphinx", reason="the site needs the extra [docs]")
    copy = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, copy / "docs", ignore=shutil.ignore_patterns("_build", "_api"))
    for name in ("README.md", "CONTRIBUTING.md", "examples", "pvae"):
        (copy / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "docs", "built/html"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return copy / "built" / "html"


@pytest.mark.slow
def test_every_page_is_there_and_needs_no_network(site):
    """Links may lead to other sites, but all that a page loads is part of the built site."""
    pages = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.glob("*.md")}
    pages |= {path.relative_to(DOCS).with_suffix(".html") for path in NOTEBOOKS}
    assert [page for page in pages if not (site / page).exists()] == []
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe|link)[^>]*?(?:src|href)=\"(http[^\"]*)", page.read_text()
        )
        assert loaded == [], page.name


@pytest.mark.slow
def test_notebooks_have_pictures_and_no_errors(site):
    for notebook in NOTEBOOKS:
        text = (site / "notebooks" / f"{notebook.stem}.html").read_text()
        assert 'class="output' in text
        assert "data:image/png" in text or "_images/" in text
        assert "Traceback" not in text


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site):
    """The names are functions and classes, each in the module that defines it."""
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    told = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    public = set()
    for found in pkgutil.walk_packages(pvae.__path__, "pvae."):
        if not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            public |= {
                f"{found.name}.{name}"
                for name, value in vars(module).items()
                if not name.startswith("_")
                and (inspect.isfunction(value) or inspect.isclass(value))
                and value.__module__ == found.name
            }
    assert len(public) > 200
    assert sorted(public - told) == []
