"""studies/: what a row trains, the file of runs, the tables and the figure, and bench."""

import functools
import json
import re
import sys

import numpy as np
import pytest
import torch
from test_train_toy import CPU, cache  # noqa: F401

import svft
import train_toy
from studies import bench, figure1

SHORT = ["--steps", "2", "--seeds", "2", "--windows", "2", "--context", "8"]


@pytest.fixture
def study(cache, monkeypatch, tmp_path):  # noqa: F811
    """study(rows): does those rows of the small model, untrained, in tmp_path/runs.jsonl; returns the file's lines."""
    pytest.importorskip("peft"), pytest.importorskip("transformers"), pytest.importorskip("matplotlib")
    monkeypatch.setattr(figure1, "RATES", (1, 2))

    def run(rows, *options):
        options = [*SHORT, "--rows", rows, "--runs", str(tmp_path / "runs.jsonl"), "--cache", str(cache), *options]
        assert figure1.main(options) == 0
        return (tmp_path / "runs.jsonl").read_text().splitlines()

    return run


class TestRows:
    PER_LAYER = {  # what a row trains in a layer d2 -> d1, n = min(d1, d2)
        "LoRA 2": lambda d1, d2, n: 2 * (d1 + d2),
        "DoRA 2": lambda d1, d2, n: 2 * (d1 + d2) + d1,
        "VeRA 5": lambda d1, d2, n: 5 + d1,
        "BOFT 4": lambda d1, d2, n: d1 + 4 * d2,  # full blocks on the input side, and a scale for each output
        "plain": lambda d1, d2, n: n,
        **dict.fromkeys(["banded 1,2", "random 1,2", "top-k 1,2", "diagonal 1,2", "gradient 1,2"], lambda d1, d2, n: 4 * n - 4),
        **dict.fromkeys(["kept 8", "cut 8"], lambda d1, d2, n: 64),
    }  # fmt: skip

    @pytest.mark.parametrize("row", PER_LAYER)
    def test_a_row_starts_at_W0_and_trains_its_own_parameters_alone(self, row, tmp_path):
        """As many as the formula says, and the base model stays as it is. "cut" alone starts elsewhere."""
        pytest.importorskip("peft")
        torch.manual_seed(0)
        base = train_toy.GPT2(64, 16, 1, 2, 16)
        task = train_toy.Task(torch.randint(64, (4000,)).tolist(), 8, 2, CPU)
        names = [name for name, layer in base.named_modules() if isinstance(layer, torch.nn.Linear)]
        want = sum(self.PER_LAYER[row](*base.get_submodule(n).weight.shape, 16) for n in names)
        before = train_toy.evaluate(base, task.val, task)
        model = figure1.build(base, row, 1, task, names, tmp_path)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == want
        start = train_toy.evaluate(model, task.val, task)
        assert (abs(start - before) < 1e-4) != row.startswith("cut")
        train_toy.train(model, task, 2, 0.05, 0, "")
        assert train_toy.evaluate(model, task.val, task) != start and train_toy.evaluate(base, task.val, task) == before

    def test_each_omega_is_what_its_name_says(self):
        """random with the diagonal, the largest of |U^T G V|, and for top-k random positions on an oblong weight."""
        svd, G = svft.compute_svd(torch.randn(6, 9)), torch.randn(6, 9)
        omegas = [figure1.omega_of(m, [2], svd, 3, iter([G])) for m in ("diagonal", "gradient", "top-k")]
        diagonal, gradient, top_k = (set(map(tuple, omega.T.tolist())) for omega in omegas)
        assert {(i, i) for i in range(6)} < diagonal and [omega.shape for omega in omegas] == 3 * [(2, 24)]
        scores = {(i, j): abs(float(svd.U[:, i] @ G @ svd.Vh[j])) for i in range(6) for j in range(6)}
        assert gradient == set(sorted(scores, key=scores.get)[-24:])
        assert top_k == set(map(tuple, svft.omega_random(6, 6, 24, seed=3).T.tolist())) != diagonal


class TestRunsAndFigure:
    def test_finished_runs_are_not_done_again(self, study, tmp_path):
        """The best rate has all seeds. A line cut short and another setting are done; a model's name is no setting."""
        first = study("base; banded 1,2")
        assert [json.loads(line)["seed"] for line in first] == [0, 0, 0, 1] and json.loads(first[2])["lr"] == 0.16
        kept = [line.replace("the small GPT-2", "another name") for line in first]
        (tmp_path / "runs.jsonl").write_text("\n".join(kept)[:-9])
        second = study("base; banded 1,2")
        assert second[:3] == kept[:3] and len(second) == 5
        assert json.loads(second[4])["val"] == json.loads(first[3])["val"]
        assert study("base; banded 1,2") == second and len(study("base", "--windows", "3")) == 6

    @pytest.mark.skipif(sys.platform != "linux", reason="a fork is safe on Linux alone")
    def test_two_processes_append_to_one_file(self, study):
        """Each has rows of its own, and no line is lost."""

        def one(rank):
            torch.set_num_threads(1)  # a fork does not have the threads of the process that made it
            study(("full", "plain")[rank])

        torch.multiprocessing.start_processes(one, nprocs=2, start_method="fork")
        rows = [json.loads(line)["row"] for line in study("base")]
        assert sorted(rows) == ["base", "full", "full", "full", "plain", "plain", "plain"]

    def test_the_committed_files_hold_whole_runs_and_none_twice(self):
        """Each line can be read, and is another run."""
        for file in figure1.RUNS.glob("*.jsonl"):
            runs = [run for group in figure1.read(file).values() for run in group.values()]
            assert len(runs) == len(file.read_text().splitlines()) > 0 and len({run["val"] for run in runs}) > 1

    def test_drawing_needs_neither_model_nor_peft(self, monkeypatch, tmp_path, capsys):
        """Mean and spread over the seeds at the best rate; a star at an edge; an infinite loss is the worst."""
        pytest.importorskip("matplotlib")
        whole = json.loads((figure1.RUNS / "small.jsonl").read_text().splitlines()[0]) | {"trained": 99}
        runs = [("base", 0, 0, 3), ("full", 1, 0, 1), ("full", 1, 1, 1.2), ("full", 0.5, 0, 2), ("full", 2, 0, None)]
        runs += [("plain", 0.1, 0, 2), ("plain", 0.2, 0, 1.5), ("plain", 0.2, 1, 1.9), ("LoRA 4", 0.1, 0, 2.5)]
        lines = [whole | dict(row=row, lr=lr, seed=seed, val=loss, test=loss) for row, lr, seed, loss in runs]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
        for name in ("peft", "transformers"):
            monkeypatch.setitem(sys.modules, name, None)
        assert figure1.main(["--draw", "--runs", str(tmp_path / "a.jsonl")]) == 0
        said = capsys.readouterr().out
        shares = 100 * (3 - np.array([1.5, 1.9])) / (3 - 1.1)
        spread = rf"{shares.mean():.1f} \+- {shares.std(ddof=1):.1f}"
        assert re.search(rf"\| plain +\|.*\| +0.2 \* \| +2 \|.*\| +{spread} \|", said), said
        assert re.search(r"\| full +\|.*\| +1 \| +2 \| 1\.1000 \+- 0\.1414 ", said) and "| LoRA 4 " in said
        picture = (tmp_path / "a.svg").read_text()
        assert all(f">{text}<" in picture for text in ("0", "100", "SVFT plain", "LoRA", "full fine-tuning"))

    def test_an_unknown_row_or_a_missing_package_gets_one_line(self, monkeypatch, capsys):
        """Exit code 2, before any work; with the command that gets the package."""
        for name in ("peft", "transformers"):
            monkeypatch.setitem(sys.modules, name, None)
        for program, options, text in [
            (figure1, ["--rows", "LoRA 3"], "--rows: got ['LoRA 3'], want among"),
            (figure1, [], 'pip install ".[studies]"'),
            (train_toy, ["--base", "gpt2"], 'pip install ".[gpt2]"'),
        ]:
            with pytest.raises(SystemExit):
                program.main(options)
            error = capsys.readouterr().err.strip()
            assert text in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("options", [[], ["--amp"]], ids=["float32", "amp"])
def test_bench_prints_steps_and_ratios(options, monkeypatch, capsys):
    """On small shapes: each method's step; every path and auto over the frozen linear, and auto over the fastest."""
    hf, _ = pytest.importorskip("transformers"), pytest.importorskip("peft")
    monkeypatch.setattr(bench, "BLOCK", [(96, 32), (32, 32)])
    monkeypatch.setattr(hf, "GPT2Config", functools.partial(hf.GPT2Config, vocab_size=64, n_embd=32, n_head=2))
    assert bench.main(["--quick", "--context", "16", "--device", "cpu", *options]) == 0
    said = capsys.readouterr().out
    words = ("tokens/s", "PEFT's LoRA r = 8", "auto / fastest", "at worst", torch.__version__)
    assert all(word in said for word in words)
    assert said.count("| full fine-tuning ") == 1 and said.count("| 96 x 32, 256, ") == 3
