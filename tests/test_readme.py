"""README and docs/: their code runs, what they name exists, and they tell every name."""

import re
from pathlib import Path

import pytest
import torch
from test_house import HOUSE, ROOMS

import pvae
from pvae.builder import ACTIVATIONS, GUIDES, LIKELIHOODS, NETS, PRIORS
from pvae.data import NAMES, OBSERVATIONS
from pvae.objectives import OBJECTIVES

ROOT = Path(pvae.__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])


def run_blocks(page: Path) -> dict:
    """Runs the page's python blocks one after another; returns the names that they define."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), names)
    return names


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))  # its code saves a file
        torch.manual_seed(0)
        return run_blocks(PAGES[0])


def test_the_readme_runs(readme):
    assert pvae.VAE in {type(value) for value in readme.values()}
    assert readme["images"].shape == (16, 1, 28, 28)
    assert readme["vae"].sample(2).shape == (2, 1, 28, 28)


SLOW_PAGES = ("pass-on",)  # it exports a pair and starts a process without Pyro


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW_PAGES else []
        )
        for page in PAGES[1:]
    ],
)
def test_the_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_bring_your_own_head_and_guide_in_15_lines_each():
    classes = re.findall(r"^class .*?(?=^\S)", README, flags=re.DOTALL | re.MULTILINE)
    assert len(classes) == 2
    for text in classes:
        assert len([line for line in text.splitlines() if line]) <= 15


def test_bring_your_own_learns_and_is_a_distribution(readme):
    first, *_, last = (row["validation_elbo"] for row in readme["trainer"].history)
    assert last > first > -500  # 784 pixels of one bit each cost 543 nats
    # the probabilities of all images of two pixels sum to 1
    head, h = readme["ZeroInflatedBernoulli"](), torch.randn(2, 1, 2)
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2).reshape(4, 1, 1, 2)
    assert head(h).log_prob(images).exp().sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("marker", ["run", "test"])
def test_the_two_commands_are_one_line_each(marker):
    (command,) = re.findall(rf"<!-- {marker} -->\n```sh\n(.*?)```", README, flags=re.DOTALL)
    assert command.count("\n") == 1


def test_the_map_shows_the_house():
    (drawn,) = re.findall(r"```text\n(examples.*?)```", README, flags=re.DOTALL)
    lines = drawn.splitlines()
    assert len(lines) <= 15
    rooms = [name for line in lines for name in re.split(r"\s{2,}", line)[0].split()]
    assert sorted(rooms) == sorted(["examples", "benchmarks", *HOUSE, *ROOMS])


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub makes from a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        found = (page.parent / path) if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@each_page
def test_what_a_page_names_is_there(page):
    """Files are named by their path, tests as `test_file.py::test_name`."""
    text = page.read_text()
    for name in re.findall(r"\b((?:pvae|examples|benchmarks|tests)/[\w/]+\.py)\b", text):
        assert (ROOT / name).exists(), name
    for file, test in re.findall(r"\b(test_\w+\.py)::(test_\w+)", text):
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), test


@pytest.mark.parametrize(
    "table",
    [NETS, LIKELIHOODS, GUIDES, PRIORS, OBJECTIVES, ACTIVATIONS, OBSERVATIONS, NAMES],
    ids=lambda table: next(iter(table)),
)
def test_every_name_is_told(table):
    told = (ROOT / "docs" / "swaps.md").read_text()
    assert [name for name in table if f"`{name}`" not in told] == []


@each_page
def test_lines_are_no_longer_than_100(page):
    """Tables, HTML comments and code blocks may have longer lines."""
    prose = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    assert [x for x in prose.splitlines() if len(x) > 100 and not x.startswith("|")] == []
