"""The README's Python runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_python_examples_run_in_order(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["model"].blocks[0].attention.gains()["identity_gain"] == 0.0
    assert names["measured"].paths == 200
    assert "True" in capsys.readouterr().out  # compare(...).agrees


def test_files_it_shows_exist():
    text = README.read_text()
    paths = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert paths
    assert [path for path in paths if not (README.parent / path).exists()] == []
