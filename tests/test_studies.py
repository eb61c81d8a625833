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
from studies import figure1

RUNS = ["--steps", "2", "--seeds", "2", "--windows", "2", "--context", "8"]
in_processes = torch.multiprocessing.start_processes  # raises if one of them does


@pytest.fixture
def study(cache, monkeypatch, tmp_path):  # noqa: F811
    """study(rows): does those rows of the small model, untrained, in tmp_path/runs.jsonl; returns the file's lines."""
    pytest.importorskip("peft"), pytest.importorskip("transformers"), pytest.importorskip("matplotlib")
    monkeypatch.setattr(figure1, "RATES", (1, 2))

    def run(rows, *options):
        options = [*RUNS, "--rows", rows, "--runs", str(tmp_path / "runs.jsonl"), "--cache", str(cache), *options]
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
        before, state = train_toy.evaluate(base, task.val, task), [p.clone() for p in base.parameters()]
        model = figure1.build(base, row, 1, task, names, tmp_path)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == want
        start = train_toy.evaluate(model, task.val, task)
        assert (abs(start - before) < 1e-4) != row.startswith("cut")
        train_toy.train(model, task, 2, 0.05, 0, "")
        assert train_toy.evaluate(model, task.val, task) != start
        assert all(torch.equal(p, was) for p, was in zip(base.parameters(), state, strict=True))

    def test_each_omega_is_what_its_name_says(self):
        """random with the diagonal, the largest of |U^T G V|, and for top-k random positions on an oblong weight."""
        svd = svft.compute_svd(torch.randn(6, 9))
        G = torch.randn(6, 9)
        diagonal, gradient, top_k = (
            figure1.omega_of(m, [2], svd, 3, iter([G])) for m in ("diagonal", "gradient", "top-k")
        )
        assert {(i, i) for i in range(6)} < set(map(tuple, diagonal.T.tolist())) and diagonal.shape == (2, 24)
        scores = {(i, j): abs(float(svd.U[:, i] @ G @ svd.Vh[j])) for i in range(6) for j in range(6)}
        assert set(map(tuple, gradient.T.tolist())) == set(sorted(scores, key=scores.get)[-24:])
        assert torch.equal(top_k, svft.omega_random(6, 6, 24, seed=3))

    def test_the_small_models_bands_have_as_many_entries_as_lora(self):
        """Within 5%, for r = 1, 2, 4, 8."""
        shapes = [layer.weight.shape for layer in train_toy.GPT2().modules() if isinstance(layer, torch.nn.Linear)]
        for r, band in {1: (1, 2), 2: (3, 4), 4: (8,), 8: (16,)}.items():
            assert {f"LoRA {r}", f"banded {','.join(map(str, band))}"} < figure1.SMALL.keys()
            entries = sum(svft.omega_banded(128, 128, *band).shape[1] for _ in shapes)
            assert abs(entries / (r * sum(map(sum, shapes))) - 1) < 0.05


class TestTheFileOfRuns:
    def test_finished_runs_are_not_done_again(self, study, tmp_path, capsys):
        """Every rate with seed 0, the best with the other seeds. A line that was cut short is done again, and another
        setting is another run; names and dates are no part of a setting."""
        first = study("base; banded 1,2")
        assert [(run["lr"], run["seed"]) for run in map(json.loads, first[1:])][:2] == [(8e-2, 0), (16e-2, 0)]
        assert len(first) == 4 and json.loads(first[3])["seed"] == 1
        (tmp_path / "runs.jsonl").write_text("\n".join(first).replace("the small GPT-2", "another name")[:-9])
        assert (second := study("base; banded 1,2"))[:3] == [
            line.replace("the small GPT-2", "another name") for line in first[:3]
        ]
        assert len(second) == 5 and json.loads(second[4])["val"] == json.loads(first[3])["val"]
        assert study("base; banded 1,2") == second and len(study("base", "--windows", "3")) == 6

    @pytest.mark.skipif(sys.platform != "linux", reason="a fork is safe on Linux alone")
    def test_two_processes_append_to_one_file(self, study):
        """Each has rows of its own, and no line is lost."""
        in_processes(lambda rank: study(("full", "plain")[rank]), nprocs=2, start_method="fork")
        rows = [json.loads(line)["row"] for line in study("base")]
        assert sorted(rows) == ["base", "full", "full", "full", "plain", "plain", "plain"]

    def test_the_committed_files_hold_whole_runs_and_none_twice(self):
        """Each line can be read, and is another run."""
        for file in figure1.RUNS.glob("*.jsonl"):
            runs = [run for group in figure1.read(file).values() for run in group.values()]
            assert len(runs) == len(file.read_text().splitlines()) > 0 and len({run["val"] for run in runs}) > 1


class TestTablesAndFigure:
    def test_drawing_needs_neither_model_nor_peft(self, monkeypatch, tmp_path, capsys):
        """Mean and spread over the seeds at the best rate; a star at an edge; an infinite loss is the worst."""
        pytest.importorskip("matplotlib")
        setting = json.loads(next(figure1.RUNS.glob("small.jsonl")).read_text().splitlines()[0])
        runs = [("base", 0, 0, 3), ("full", 1, 0, 1), ("full", 1, 1, 1.2), ("full", 0.5, 0, 2), ("full", 2, 0, None)]
        runs += [("plain", 0.1, 0, 2), ("plain", 0.2, 0, 1.5), ("plain", 0.2, 1, 1.9), ("LoRA 4", 0.1, 0, 2.5)]
        lines = [setting | dict(row=row, lr=lr, seed=seed, val=loss, test=loss) for row, lr, seed, loss in runs]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
        for name in ("peft", "transformers"):
            monkeypatch.setitem(sys.modules, name, None)
        assert figure1.main(["--draw", "--runs", str(tmp_path / "a.jsonl")]) == 0
        said = capsys.readouterr().out
        shares = 100 * (3 - np.array([1.5, 1.9])) / (3 - 1.1)
        assert re.search(
            rf"\| plain +\|.*\| +0.2 \* \| +2 \|.*\| +{shares.mean():.1f} \+- {shares.std(ddof=1):.1f} \|", said
        ), said
        assert re.search(r"\| full +\|.*\| +1 \| +2 \| 1\.1000 \+- 0\.1414 ", said) and "| LoRA 4 " in said
        picture = (tmp_path / "a.svg").read_text()
        assert all(f">{text}<" in picture for text in ("0", "100", "SVFT plain", "LoRA", "full fine-tuning"))

    @pytest.mark.parametrize(
        "options, text", [(["--rows", "LoRA 3"], "--rows: got ['LoRA 3'], want among"), ([], '".[studies]"')]
    )
    def test_a_mistake_or_a_missing_package_gets_one_line(self, options, text, monkeypatch, tmp_path, capsys):
        """Exit code 2, before any work."""
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(SystemExit):
            figure1.main([*options, "--runs", str(tmp_path / "none.jsonl")])
        error = capsys.readouterr().err.strip()
        assert text in error and len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [[], ["--amp"]], ids=["float32", "amp"])
def test_bench_prints_steps_and_ratios(options, monkeypatch, capsys):
    """On small shapes: each method's step; every path and auto over the frozen linear, and auto over the fastest."""
    hf, _ = pytest.importorskip("transformers"), pytest.importorskip("peft")
    from studies import bench

    monkeypatch.setattr(bench, "BLOCK", [(96, 32), (32, 32)])
    monkeypatch.setattr(hf, "GPT2Config", functools.partial(hf.GPT2Config, vocab_size=64, n_embd=32, n_head=2))
    medians = bench.medians
    monkeypatch.setattr(bench, "medians", lambda calls, budget: medians(calls, 0))
    assert bench.main(["--quick", "--context", "16", "--device", "cpu", *options]) == 0
    said = capsys.readouterr().out
    assert all(
        word in said for word in ("tokens/s", "PEFT's LoRA r = 8", "auto / fastest", "at worst", torch.__version__)
    )
    assert said.count("| full fine-tuning ") == 1 and said.count("| 96 x 32, 256, ") == 3
