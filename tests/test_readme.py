"""The README's own code runs, and is as short as it says."""

import re
from pathlib import Path

import pytest
import torch

import pvae

README = (Path(pvae.__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(block):
    names: dict[str, object] = {}
    exec(block, names)
    assert names["vae"].sample(2).shape == (2, 1, 28, 28)


def test_bring_your_own_head_and_guide_in_15_lines_each():
    (own,) = [block for block in BLOCKS if "StudentT" in block]
    classes = re.findall(r"^class .*?(?=^\S)", own, flags=re.DOTALL | re.MULTILINE)
    assert len(classes) == 2
    for text in classes:
        assert len([line for line in text.splitlines() if line]) <= 15


def test_bring_your_own_learns_and_is_a_distribution():
    (own,) = [block for block in BLOCKS if "StudentT" in block]
    names: dict = {}
    exec(own, names)
    assert names["losses"][-1] < names["losses"][0] - 50
    # the probabilities of every image of two pixels sum to 1
    head, h = names["ZeroInflatedBernoulli"](), torch.randn(2, 1, 2)
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2).reshape(4, 1, 1, 2)
    assert head(h).log_prob(images).exp().sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("marker", ["run", "test"])
def test_the_two_commands_are_one_line_each(marker):
    (command,) = re.findall(rf"<!-- {marker} -->\n```sh\n(.*?)```", README, flags=re.DOTALL)
    assert command.count("\n") == 1
