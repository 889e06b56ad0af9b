"""The README's Python runs as it stands, each block by itself."""

import re
from pathlib import Path

import pytest
from fresh_python import python

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)

# By a line of the block, what shows that it did what the text around it says.
CHECKS = {
    "anneal_gains(model": 'assert model.blocks[0].attention.gains()["identity_gain"] == 0.0',
    "FiniteNetwork(width": "assert measured.paths == 200 and compare(predicted, measured).agrees",
}


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{number}" for number in range(len(BLOCKS))])
def test_a_python_block_runs_in_a_fresh_interpreter(block, tmp_path):
    checks = [check for line, check in CHECKS.items() if line in block]
    program = tmp_path / "block.py"
    program.write_text("\n".join([block, *checks]))
    python(program, cwd=tmp_path)


def test_every_check_has_its_block():
    assert len(BLOCKS) >= 3
    assert all(sum(line in block for block in BLOCKS) == 1 for line in CHECKS)


def test_files_it_shows_exist():
    text = README.read_text()
    paths = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert paths
    assert [path for path in paths if not (README.parent / path).exists()] == []
