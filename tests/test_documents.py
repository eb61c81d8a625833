"""README, notes and docstrings: what they show runs, and what they say is so."""

import doctest
import inspect
import re
import sys
from pathlib import Path

import pytest
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


SIZES = {  # (d1, d2) of all linear layers but the output head
    "GPT-2": 12 * [(2304, 768), (768, 768), (3072, 768), (768, 3072)],
    "SmolLM2-135M": 30 * [*2 * [(576, 576)], *2 * [(192, 576)], *2 * [(1536, 576)], (576, 1536)],
    "Llama-2-7B": 32 * [*4 * [(4096, 4096)], *2 * [(11008, 4096)], (4096, 11008)],
    "Llama-3-8B": 32 * [*2 * [(4096, 4096)], *2 * [(1024, 4096)], *2 * [(14336, 4096)], (4096, 14336)],
}


def stand_in(tiny):
    """from_pretrained, which makes a tiny model of the same kind."""
    make = {"gpt2": lambda: tiny("gpt2")[0], "meta-llama/Llama-2-7b-hf": lambda: tiny("llama")[0]}
    return staticmethod(lambda name, dtype=torch.float32: make[name]().to(dtype))


class TestTheReadme:
    def test_its_sizes_are_computed_from_the_shapes(self):
        """In bfloat16; the cache in float32; n^2 max(d1, d2) 4e-10 seconds an SVD."""
        for name, shapes in SIZES.items():
            W0 = sum(d1 * d2 for d1, d2 in shapes)
            UV = sum(min(shape) * sum(shape) for shape in shapes)
            cut = sum(min(1024, *shape) * sum(shape) for shape in shapes)
            seconds = sum(4e-10 * min(shape) ** 2 * max(shape) for shape in shapes)
            cells = [f"{size / 1e9:.2f} GB" for size in (2 * W0, 2 * UV, 2 * (W0 + UV), 2 * UV, 2 * (W0 + cut), 4 * UV)]
            time = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"
            assert f"| {name} | {' | '.join([*cells, time])} |" in README, name

    def test_its_python_runs(self, tiny, tmp_path, monkeypatch, capsys):
        """Block by block in one namespace, on tiny models of the same kinds. What `# ->` says that the summary prints
        follows from GPT-2's shapes."""
        transformers = pytest.importorskip("transformers")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", stand_in(tiny))
        names = {"batches": list(torch.randint(3, 50, (3, 2, 8)))}
        for block in python_blocks(README):
            if "fully_shard" not in block:
                exec(compile(block, "README.md", "exec"), names)
        layers = [layer for layer in names["model"].modules() if isinstance(layer, svft.SVFTLinear)]
        assert len(layers) == 14 and all(layer.weight is None for layer in layers)  # of the loop over blocks
        k, total = sum(svft.omega_banded(min(shape), min(shape), 2).shape[1] for shape in SIZES["GPT-2"]), 124_439_808
        said = f"trained: {k:,} parameters, {k / total:.3%} of the base model's {total:,}"
        assert f"# -> {said}\n" in README
        assert re.sub(r"[\d.,]+", "#", said) in re.sub(r"[\d.,]+", "#", capsys.readouterr().out)
        assert (tmp_path / "adapter.npz").is_file() and (tmp_path / "merged" / "config.json").is_file()
