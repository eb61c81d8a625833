"""train_toy.py: the recipe, the small model, the text, and what a mistake on the command line gets."""

import itertools
import math
import re
import signal
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
        patch.setattr(train_toy, "train", lambda *a: 1.0)
        train_toy.pretrained(tmp_path / "cache", CPU)
    return tmp_path / "cache"


def losses(said):
    return list(map(float, re.search(r"validation loss +([\d.]+) -> ([\d.]+) nats per (?:byte|token)", said).groups()))


class TestTheRecipe:
    def test_it_fine_tunes_and_says_what_it_did(self, cache, tmp_path, capsys):
        """The loss falls, the merged model equals the adapted one, the adapter loads. The rate is README's rule."""
        assert train_toy.main(["--steps", "12", "--cache", str(cache), "--save", str(tmp_path / "a.npz")]) == 0
        said, k = capsys.readouterr().out, svft.omega_banded(128, 128, 8).shape[1]
        before, after = losses(said)
        assert after < before - 0.05
        assert re.search(rf"trained +{16 * k:,} parameters, 4.00% of the model's 842,496", said), said
        assert "d = 8 (inject has 2, with which" in said and f"learning rate {2.5 * k ** (-2 / 3):.3g}" in said
        assert "2.5 k^(-2/3)" in (ROOT / "README.md").read_text(encoding="utf-8")
        difference, size = re.search(r"merged - adapted +at most (\S+), of logits up to (\S+)", said).groups()
        assert float(difference) < 1e-4 * float(size)
        model = svft.load_adapter(train_toy.pretrained(cache, CPU), tmp_path / "a.npz")
        assert [bool(m.any()) for name, m in model.named_parameters() if name.endswith(".m")] == 16 * [True]

    @pytest.mark.parametrize("kind, layers", [("gpt2", 8), ("llama", 14)])
    def test_a_saved_model_with_its_tokenizer_is_fine_tuned(self, tiny, kind, layers, tmp_path, capsys):
        """--base FOLDER: GPT-2's own targets, or all linear layers. Without a tokenizer it is refused."""
        hf, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
        known = {"<unk>": 0, "to": 3, "be": 4, "or": 5, "not": 6}
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, "<unk>"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tiny(kind)[0].save_pretrained(tmp_path)
        hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
        (tmp_path / "a.txt").write_text("to be or not to be, that is the question\n" * 400)
        options = ["--base", tmp_path, "--data", tmp_path / "a.txt", "--cache", tmp_path, "--save", tmp_path / "a.npz"]
        assert train_toy.main([*map(str, options), "--steps", "3", "--lr", "0.01"]) == 0
        assert len(losses(capsys.readouterr().out)) == 2
        loaded = svft.load_adapter(tiny(kind)[0], tmp_path / "a.npz")
        assert sum(isinstance(module, svft.SVFTLinear) for module in loaded.modules()) == layers
        (tmp_path / "tokenizer.json").unlink()
        with pytest.raises(SystemExit):
            train_toy.main([*map(str, options[:4])])
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
        """How far it is, and how long the rest takes."""
        monkeypatch.setattr(train_toy.time, "perf_counter", itertools.count(step=6).__next__)
        assert list(train_toy.progress("abcd", "reading")) == list("abcd")
        assert capsys.readouterr().err.splitlines() == ["reading: 2/4, 0:00:12 left", "reading: 4/4, 0:00:00 left"]

    @pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
    def test_under_torchrun_two_processes_train_as_one_does(self, cache, capsys):
        """Each takes half of every batch, and the losses are those of one process. One of them prints."""
        options = ["--steps", "2", "--context", "16", "--device", "cpu", "--cache", str(cache)]
        command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train_toy.py", *options]
        two = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
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

    def test_nothing_that_is_held_out_is_trained_on(self):
        """Of each ten blocks eight train, one validates, one tests; no paragraph of the text stands in it twice."""
        task = train_toy.Task(list(range(1000)), 4, 2, CPU)
        splits = [set(part.tolist()) for part in (task.train, task.val, task.test)]
        assert [len(part) for part in splits] == [800, 100, 100] and set.union(*splits) == set(range(1000))
        assert {80, 189} <= splits[1] and {90, 199} <= splits[2]
        paragraphs = [" ".join(text.split()) for text in train_toy.read_topics().split("\n\n")]
        assert len(set(paragraphs)) == len(paragraphs) > 1000

    def test_the_evaluation_is_the_mean_over_whole_windows(self):
        """All of one weight, whatever the batch; evenly spread, and at most as many as the task allows."""
        model, task = train_toy.GPT2(64, 16, 1, 2, 16), train_toy.Task([i % 64 for i in range(6400)], 7, 3, CPU)
        windows = [task.val[i : i + 8] for i in range(0, 640 - 7, 7)]
        each = [nn.functional.cross_entropy(model(w[None, :-1])[0], w[1:]).item() for w in windows]
        for task.windows, step in {100: 1, 46: 2}.items():
            assert train_toy.evaluate(model, task.val, task) == pytest.approx(sum(each[::step]) / len(each[::step]))

    @pytest.mark.parametrize("content", [slice(0), slice(-500), b"a foreign file"], ids=["empty", "short", "foreign"])
    def test_a_damaged_cache_is_made_again(self, cache, monkeypatch, content):
        """Noticed, and the model is trained anew, once."""
        (file,), calls = cache.glob("gpt2-*.pt"), []
        monkeypatch.setattr(train_toy, "train", lambda *a: calls.append(a))
        file.write_bytes(file.read_bytes()[content] if isinstance(content, slice) else content)
        for _ in "twice":
            train_toy.pretrained(cache, CPU)
        assert len(calls) == 1 and list(cache.iterdir()) == [file]


class TestMistakes:
    MISTAKES = {
        "--data absent.txt": "--data: cannot read 'absent.txt'",
        "--data short.txt": "--data short.txt: too little text: got 12 tokens",
        "--data latin1.txt": "--data: cannot read 'latin1.txt' as UTF-8",
        "--steps 0": "--steps, --batch, --context: want 1 or more",
        "--lr nan": "--lr: got nan",
        "--pattern diagonal": "invalid choice: 'diagonal'",
        "--pattern top_k": "top_k",
        "--pattern plain --d 2": "--d: got it with --pattern plain",
        "--targets c_attn absent": "absent",
        "--device tpu": "--device: got 'tpu'",
        "--save no/such/folder/a.npz": "--save: got no/such/folder/a.npz",
        "--save .": "--save: got .",
        "--cache short.txt": "short.txt",
        "--context 4096": "--context: got 4096, want at most the model's 128",
        "--base no/such/folder": "--base: got 'no/such/folder', want",
    }

    @pytest.mark.parametrize("arguments", MISTAKES)
    def test_a_mistake_gets_one_line_before_the_long_work(self, arguments, tmp_path, monkeypatch, capsys):
        """Exit code 2 and one line with "error:", after argparse's usage at most; nothing is trained."""
        monkeypatch.chdir(tmp_path)
        Path("short.txt").write_bytes(b"a short text")
        Path("latin1.txt").write_bytes(b"\xe9" * 9999)
        monkeypatch.setattr(train_toy, "train", lambda *a: pytest.fail("it trained"))
        monkeypatch.setattr(train_toy, "CACHE", tmp_path / "cache")
        with pytest.raises(SystemExit) as caught:
            train_toy.main(arguments.split())
        *usage, line = capsys.readouterr().err.strip().splitlines()
        assert caught.value.code == 2 and ": error: " in line and self.MISTAKES[arguments] in line
        assert usage in ([], ["usage: train_toy.py [options]"])

    def test_a_run_that_diverges_gets_one_line(self, cache, capsys):
        """The loss is no number any more, and nothing can be drawn from such a model."""
        with pytest.raises(SystemExit):
            train_toy.main(["--steps", "4", "--context", "1", "--lr", "1e30", "--cache", str(cache)])
        assert "--lr: got 1e+30, want a smaller one: the loss became nan" in capsys.readouterr().err

    def test_ctrl_c_ends_with_130_and_leaves_nothing_half_written(self, tmp_path, monkeypatch, capsys):
        """The shell's own code for it, here in the pre-training."""
        monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda self: signal.default_int_handler(2, None))
        assert train_toy.main(["--cache", str(tmp_path / "cache")]) == 130
        assert capsys.readouterr().err.strip() == "interrupted; nothing is half-written"
        assert not list((tmp_path / "cache").iterdir())
