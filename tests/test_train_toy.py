"""train_toy.py: the recipe, the small model, the text, and what a mistake on the command line gets."""

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import svft
import train_toy
from test_svft import near

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache with an untrained model in it, in the place of the pre-trained one."""
    with monkeypatch.context() as patch:
        patch.setattr(train_toy, "train", lambda *a, **k: 1.0)
        train_toy.pretrained(tmp_path / "cache", CPU)
    return tmp_path / "cache"


@pytest.fixture
def saved_base(tiny, tmp_path):
    """saved_base(kind): the options for a folder with a tiny model and its tokenizer, and a text."""
    hf, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "to": 3, "be": 4, "or": 5, "not": 6}, "<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 400)

    def save(kind):
        tiny(kind)[0].save_pretrained(tmp_path / kind)
        hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path / kind)
        return [
            "--base",
            str(tmp_path / kind),
            "--data",
            str(tmp_path / "text.txt"),
            "--cache",
            str(tmp_path / "cache"),
        ]

    return save


def losses(said):
    return list(map(float, re.search(r"validation loss +([\d.]+) -> ([\d.]+) nats per (?:byte|token)", said).groups()))


class TestTheRecipe:
    def test_it_fine_tunes_and_says_what_it_did(self, cache, tmp_path, capsys):
        """A few steps of the default command: the loss falls, the merged model equals the adapted one, the adapter
        loads. The rate is README's rule for d = 8, and the output says that inject has another d."""
        assert train_toy.main(["--steps", "12", "--cache", str(cache), "--save", str(tmp_path / "a.npz")]) == 0
        said = capsys.readouterr().out
        before, after = losses(said)
        assert after < before - 0.05
        k = sum(svft.omega_banded(128, 128, 8).shape[1] for _ in range(16))
        assert re.search(rf"trained +{k:,} parameters, 4.00% of the model's 842,496", said), said
        assert "d = 8 (inject has 2, with which" in said and f"learning rate {2.5 * (k / 16) ** (-2 / 3):.3g}" in said
        assert "2.5 k^(-2/3)" in (ROOT / "README.md").read_text(encoding="utf-8")
        difference, size = re.search(r"merged - adapted +at most (\S+), of logits up to (\S+)", said).groups()
        assert float(difference) < 1e-4 * float(size)
        model = svft.load_adapter(train_toy.pretrained(cache, CPU), tmp_path / "a.npz")
        assert sum(m.m.count_nonzero() > 0 for m in model.modules() if isinstance(m, svft.SVFTLinear)) == 16

    @pytest.mark.parametrize("kind, layers", [("gpt2", 8), ("llama", 14)])
    def test_a_saved_model_with_its_tokenizer_is_fine_tuned(self, tiny, saved_base, kind, layers, tmp_path, capsys):
        """--base FOLDER: GPT-2's own targets, or all linear layers. The adapter loads into the model."""
        options = [*saved_base(kind), "--steps", "3", "--lr", "0.01", "--save", str(tmp_path / "a.npz")]
        assert train_toy.main(options) == 0
        assert len(losses(capsys.readouterr().out)) == 2
        model = svft.load_adapter(tiny(kind)[0], tmp_path / "a.npz")
        assert sum(isinstance(module, svft.SVFTLinear) for module in model.modules()) == layers
        (tmp_path / kind / "tokenizer.json").unlink()
        with pytest.raises(SystemExit):
            train_toy.main(options)
        assert "want a model with its tokenizer" in capsys.readouterr().err

    def test_the_rate_rises_for_a_tenth_of_the_steps_then_falls_to_zero(self, monkeypatch):
        """As a cosine; one step alone has the whole rate."""
        rates = []
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]))
        for steps in (40, 10, 1):
            rates.clear()
            train_toy.train(nn.Embedding(200, 200), train_toy.Task(list(range(200)), 1, 1, CPU), steps, 2.0, 0, "")
            warm = max(1, steps // 10)
            fall = [1 + math.cos(math.pi * (i + 1) / (steps - warm)) for i in range(steps - warm)]
            near(rates, [2.0 * (i + 1) / warm for i in range(warm)] + fall, 1e-12)

    def test_progress_is_told_about_every_ten_seconds(self, monkeypatch, capsys):
        """How far it is, and how long the rest takes; nothing where all is done sooner."""
        monkeypatch.setattr(train_toy.time, "perf_counter", itertools.count(step=6).__next__)
        assert list(train_toy.progress("abcd", "reading")) == list("abcd")
        assert capsys.readouterr().err.splitlines() == ["reading: 2/4, 0:00:12 left", "reading: 4/4, 0:00:00 left"]

    @pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
    def test_under_torchrun_two_processes_train_as_one_does(self, cache, capsys):
        """Each takes half of every batch, and the losses are those of one process. One of them prints."""
        options = ["--steps", "2", "--context", "16", "--device", "cpu", "--cache", str(cache)]
        command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train_toy.py", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        two = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
        assert two.returncode == 0, two.stderr
        assert train_toy.main(options) == 0
        one = capsys.readouterr().out
        assert "2 processes, 4 sequences each" in two.stdout and "one process" in one
        assert two.stdout.count("validation loss") == 1 and losses(two.stdout) == pytest.approx(losses(one), abs=0.002)


class TestModelAndText:
    def test_the_small_model_is_gpt2s_architecture_at_any_size(self, tiny):
        """With transformers' weights it computes transformers' logits; the default one has 842,496 parameters."""
        theirs, targets = tiny("gpt2")
        ours = train_toy.GPT2(50, 32, 2, 2, 16)
        turned = tuple(f"{name}.weight" for name in targets)  # a Conv1D's
        state = {name: t.T if name.endswith(turned) else t for name, t in theirs.transformer.state_dict().items()}
        ours.load_state_dict(state)
        tokens = torch.randint(50, (2, 7))
        near(ours(tokens), theirs(tokens).logits, 1e-5)
        assert sum(p.numel() for p in train_toy.GPT2().parameters()) == 842_496

    def test_of_each_ten_blocks_eight_train_one_validates_one_tests(self):
        """Nothing is in two splits, and no paragraph of the text stands in it twice."""
        task = train_toy.Task(list(range(1000)), 4, 2, CPU)
        splits = [set(part.tolist()) for part in (task.train, task.val, task.test)]
        assert [len(part) for part in splits] == [800, 100, 100] and set.union(*splits) == set(range(1000))
        assert {90, 199} <= splits[2] and {80, 189} <= splits[1]
        paragraphs = [" ".join(text.split()) for text in train_toy.read_topics().split("\n\n")]
        assert len(set(paragraphs)) == len(paragraphs) > 1000

    def test_the_evaluation_is_the_mean_over_the_windows(self):
        """Whole windows alone, all of one weight, whatever the batch; at most as many as the task allows."""
        model, task = (
            train_toy.GPT2(64, 16, 1, 2, 16),
            train_toy.Task(torch.arange(6400).remainder(64).tolist(), 7, 3, CPU),
        )
        windows = [task.val[i : i + 8] for i in range(0, 640 - 7, 7)]
        each = [nn.functional.cross_entropy(model(w[None, :-1])[0], w[1:]) for w in windows]
        near(train_toy.evaluate(model, task.val, task), torch.stack(each).mean(), 1e-5)
        task.windows = 46
        near(train_toy.evaluate(model, task.val, task), torch.stack(each[::2]).mean(), 1e-5)

    @pytest.mark.parametrize("content", [b"", slice(-500), b"a foreign file"], ids=["empty", "short", "foreign"])
    def test_a_damaged_cache_is_made_again(self, cache, monkeypatch, content):
        """Noticed, and the model is trained anew, once."""
        (file,) = cache.glob("gpt2-*.pt")
        calls = []
        monkeypatch.setattr(train_toy, "train", lambda *a, **k: calls.append(a))
        file.write_bytes(file.read_bytes()[content] if isinstance(content, slice) else content)
        for _ in "twice":
            train_toy.pretrained(cache, CPU)
        assert len(calls) == 1 and list(cache.iterdir()) == [file]


class TestMistakes:
    MISTAKES = {
        "--data absent.txt": "--data: cannot read 'absent.txt'",
        "--data short.txt": "--data short.txt: too little text: got 12 tokens",
        "--data empty.txt": "--data empty.txt: too little text: got 0 tokens",
        "--data latin1.txt": "--data: cannot read 'latin1.txt' as UTF-8",
        "--steps 0": "--steps, --batch, --context: want 1 or more",
        "--batch half": "--batch: invalid int value: 'half'",
        "--lr nan": "--lr: got nan",
        "--lr 0": "--lr: got 0.0",
        "--pattern diagonal": "invalid choice: 'diagonal'",
        "--pattern top_k": "top_k",
        "--pattern plain --d 2": "--d: got it with --pattern plain",
        "--d -1": "got (-1, -1), want at least 0",
        "--targets c_attn absent": "absent",
        "--device tpu": "--device: got 'tpu'",
        "--save no/such/folder/a.npz": "--save: got no/such/folder/a.npz",
        "--save .": "--save: got .",
        "--cache short.txt": "short.txt",
        "--context 4096": "--context: got 4096, want at most the model's 128",
        "--base no/such/folder": "--base: got 'no/such/folder', want a model with its tokenizer",
        "--unknown": "--unknown",
    }

    @pytest.mark.parametrize("arguments", MISTAKES)
    def test_a_mistake_gets_one_line_before_the_long_work(self, arguments, tmp_path, monkeypatch, capsys):
        """Exit code 2 and one error: line that names the option; no traceback, nothing trained or left behind."""
        if "--base" in arguments:
            pytest.importorskip("transformers")
        monkeypatch.chdir(tmp_path)
        for name, content in {"short": b"a short text", "empty": b"", "latin1": b"\xe9" * 9999}.items():
            Path(f"{name}.txt").write_bytes(content)
        before = set(tmp_path.rglob("*"))
        monkeypatch.setattr(train_toy, "train", lambda *a: pytest.fail("it trained"))
        monkeypatch.setattr(train_toy, "CACHE", tmp_path / "cache")
        with pytest.raises(SystemExit) as caught:
            train_toy.main(arguments.split())
        lines = capsys.readouterr().err.strip().splitlines()
        assert caught.value.code == 2 and ": error: " in lines[-1] and self.MISTAKES[arguments] in lines[-1], lines
        assert len(lines) == 1 or lines[0].startswith("usage: ") and len(lines) == 2
        assert not {path for path in set(tmp_path.rglob("*")) - before if path.suffix in (".pt", ".npz")}

    def test_base_without_transformers_gets_one_line(self, monkeypatch, capsys):
        """It says how to get the package."""
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(SystemExit):
            train_toy.main(["--base", "gpt2"])
        assert 'want the transformers package (pip install ".[gpt2]")' in capsys.readouterr().err

    def test_a_run_that_diverges_gets_one_line(self, cache, capsys):
        """The loss is no number any more, and nothing can be drawn from such a model."""
        with pytest.raises(SystemExit):
            train_toy.main(["--steps", "4", "--context", "1", "--lr", "1e30", "--cache", str(cache)])
        assert "--lr: got 1e+30, want a smaller one: the loss became nan" in capsys.readouterr().err

    def test_ctrl_c_ends_with_130_and_leaves_nothing_half_written(self, tmp_path, monkeypatch, capsys):
        """The shell's own code for it, in the middle of the pre-training."""

        def interrupted(optimizer):
            raise KeyboardInterrupt

        monkeypatch.setattr(torch.optim.AdamW, "zero_grad", interrupted)
        assert train_toy.main(["--cache", str(tmp_path / "cache")]) == 130
        assert capsys.readouterr().err.strip() == "interrupted; nothing is half-written"
        assert list((tmp_path / "cache").iterdir()) == []
