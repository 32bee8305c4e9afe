"""The README's own code runs, and is as short as it says."""

import re
from pathlib import Path

import pytest

import pvae

README = (Path(pvae.__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(block):
    names: dict[str, object] = {}
    exec(block, names)
    assert names["vae"].sample(2).shape == (2, 1, 28, 28)


def test_bring_your_own_fits_in_25_lines():
    (own,) = [block for block in BLOCKS if "StudentT" in block]
    assert len([line for line in own.splitlines() if line]) <= 25


@pytest.mark.parametrize("marker", ["run", "test"])
def test_the_two_commands_are_one_line_each(marker):
    (command,) = re.findall(rf"<!-- {marker} -->\n```sh\n(.*?)```", README, flags=re.DOTALL)
    assert command.count("\n") == 1
