"""README, notes and docstrings: what they show runs, and what they say is so."""

import doctest
import inspect
import re
import sys
from pathlib import Path

import torch
from torch import nn

import svft

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTES = (ROOT / "paper_notes.md").read_text(encoding="utf-8")


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


class TestTheModule:
    def test_the_examples_in_the_docstrings_run(self):
        """Every public name has a docstring; doctest finds and runs what they show."""
        torch.manual_seed(0)
        failed, run = doctest.testmod(svft, extraglobs={"torch": torch, "nn": nn})
        assert failed == 0 and run >= 12
        assert all(inspect.getdoc(getattr(svft, name)) for name in svft.__all__)

    def test_it_stands_alone(self):
        """svft.py is pasted into projects: the standard library, torch and numpy; version and licence at its head."""
        source = inspect.getsource(svft)
        imported = set(re.findall(r"^(?:from|import) (\w+)", source, flags=re.M)) - {"__future__"}
        assert imported - set(sys.stdlib_module_names) == {"torch", "numpy"}
        public = {n for n, v in vars(svft).items() if getattr(v, "__module__", 0) == "svft" and n[0] != "_"}
        assert set(svft.__all__) == public
        assert f"svft.py {svft.__version__}" in source.splitlines()[0] and "Apache-2.0" in source.splitlines()[1]


class TestTheNotes:
    def test_their_python_runs(self):
        """Block by block in one namespace."""
        names = {}
        for block in python_blocks(NOTES):
            exec(compile(block, "paper_notes.md", "exec"), names)
        assert "W0" in names

    def test_the_deviation_tags_and_the_rows_of_the_table_are_the_same(self):
        """A tag in svft.py names a row of the deviations table, and every row has its tag."""
        rows = re.findall(r"^\| (D\d+) \|", NOTES, flags=re.M)
        tags = set(re.findall(r"\bD\d+\b", inspect.getsource(svft)))
        assert len(rows) == len(set(rows)) and set(rows) == tags == {f"D{i}" for i in range(1, len(rows) + 1)}

    def test_the_tests_that_a_document_names_exist(self):
        """`test_...` in the notes or README is a test, or a file of tests."""
        paths = (ROOT / "test_svft.py", *(ROOT / "tests").glob("test_*.py"))
        files = {path.stem: path.read_text(encoding="utf-8") for path in paths}
        named = set(re.findall(r"`(?:tests/)?(test_\w+)(?:\.py)?`", NOTES + README))
        assert named and not [n for n in named if n not in files and f"def {n}(" not in "".join(files.values())]
