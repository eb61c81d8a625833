"""Forged, damaged and foreign files, killed and racing processes, special files, odd layers and odd input.

In a table each row is a line of source, which is its id too. In each case svft.py refuses by name, and what was there
before, model or file, is there afterwards, bit for bit.
"""

import contextlib
import copy
import io
import os
import pickle
import re
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import svft
from svft import compute_svd, omega_plain
from test_svft import adapted, assert_untouched, mlp, plain_layer, randomize, refused, snapshot

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="a fork is safe on Linux alone")
in_processes = torch.multiprocessing.start_processes  # raises if one of them does


def npz(arrays):
    np.savez(buffer := io.BytesIO(), **arrays)
    return buffer.getvalue()


class MakeFile(type(Path())):
    """A pickle of this path makes the file when it is read carelessly."""

    def __reduce__(self):
        return Path.touch, (Path(self),)


# ---------------------------------------------------------------- the SVD cache


class TestCacheFiles:
    def test_a_short_or_foreign_file_never_gives_other_factors(self, tmp_path, svd_calls):
        """It is computed again and replaced, and nothing in it is run."""
        W = plain_layer(6, 4, dtype=torch.float32).weight
        svd = compute_svd(W, cache_dir=tmp_path)
        (path,) = tmp_path.iterdir()
        whole, pickled = path.read_bytes(), pickle.dumps(MakeFile(tmp_path / "owned"))
        for content in (b"not a zip file" * 99, pickled, *(whole[:length] for length in range(0, len(whole), 29))):
            path.write_bytes(content)
            svd_calls.clear()
            assert all(map(torch.equal, compute_svd(W, cache_dir=tmp_path), svd)) and svd_calls, content
            assert path.read_bytes() == whole, content
        assert list(tmp_path.iterdir()) == [path]

    @needs_fork
    def test_several_processes_may_race_for_one_folder(self, tmp_path, caplog):
        """Each writes its own temporary file and renames it: all end with the same factors, and one file a weight."""
        weights = [torch.randn(40, 30, generator=torch.Generator().manual_seed(s)) for s in range(8)]

        def race(rank):
            torch.set_num_threads(1)
            for W in weights:
                assert all(map(torch.equal, compute_svd(W, cache_dir=tmp_path), compute_svd(W))) and not caplog.records

        in_processes(race, nprocs=2, start_method="fork")
        assert len(list(tmp_path.iterdir())) == 8

    @pytest.mark.filterwarnings("ignore:.*still zero")
    def test_long_work_says_about_every_ten_seconds_how_long_the_rest_takes(self, tmp_path, caplog, monkeypatch):
        """At WARNING, so that it is seen. 24 layers of 6 s are a line for every two but the last; less than ten seconds
        say nothing. Both where layers are injected and where they are loaded."""
        now, real = [0.0], torch.linalg.svd
        monkeypatch.setattr(svft.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: now.append(now.pop() + 6) or real(*a, **k))
        svft.inject(nn.Sequential(nn.Linear(2, 2)), ["0"])
        assert not caplog.records
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(24)))
        svft.save_adapter(svft.inject(copy.deepcopy(model), "all-linear"), tmp_path / "a.npz")
        svft.load_adapter(model, tmp_path / "a.npz")
        said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert said[:11] == said[11:] and "2 of 24" in said[0] and "132 s" in said[0] and "22 of 24" in said[-1]


# ---------------------------------------------------------------- forged and damaged adapter files


# fmt: off
KINDS = ["bool", "'i4'", "'i8'", "'f2'", "'f4'", "'f8'", "complex", "'>f4'", "'>i8'", "str", "bytes", "object"]
FORGERIES = [  # what is done to an array a of a good file; what this array does not allow is left out
    *(f"a.astype({kind})" for kind in KINDS), "a[..., :-1]", "a[None]", "a[..., None]",
    "np.append(a[..., :-1], a[..., -1:] * np.inf, -1)", "a + [[0], [1]]", "a + [[1], [0]]",  # one value, or outside of M
    "a - [0, 0, 1]", "a + [0, 0, 1]", "a * [1, 1, 0]", "a - [0, 1, 1]",  # ranks and widths that are none, or another's
]
OTHER_UPDATES = [  # of m and the probes: only the basis can tell that the file is wrong
    "a[..., ::-1].copy()", "a * 0 + a.flat[0]", "a * 0", "-a", "(a * 1.02).astype(a.dtype)", "a * 1e200", "a + 6", "a + 2**62",
]
FOREIGN = [  # what is done to all the arrays f of a good file
    "del f['format']",
    "f['format'] = np.array('svft 2')",
    "f['format'] = np.array(['svft 3'] * 2)",
    "[f.pop(name) for name in [*f] if name != 'format']",
    "del f['2/m']",
    "f['more'] = f['2/m']",  # of no layer
    "f['2/pattern'] = np.array('x' * 100)",
    "f['2/more'] = f['2/m']",
    "f['2/m'], f['2/omega'] = f['2/m'][:0], f['2/omega'][:, :0]",
    "f['2/m'], f['2/probes'] = f['2/m'] * np.float64(1e42), f['2/probes'] * 1e42",  # too large for the layer
    "f.update({'5' + name[1:]: f[name] for name in [*f] if name[0] == '2'})",  # of a layer that is not there
    "f.update({'1' + name[1:]: f[name] for name in [*f] if name[0] == '2'})",  # of one that cannot be adapted
]
# fmt: on


def forged(path):
    """(what was done, the content, whether it has to be refused) for each way to spoil the good file in path."""
    whole, good, code = path.read_bytes(), dict(np.load(path)), MakeFile(path.parent / "owned")
    torch.save(code, pickled := io.BytesIO())
    np.save(array := io.BytesIO(), -good["2/m"])
    with zipfile.ZipFile(twice := io.BytesIO(whole), "a") as file, warnings.catch_warnings(action="ignore"):
        file.writestr("2/m.npy", array.getvalue())  # numpy would take one of the two
    contents = b"hello", pickle.dumps(code), *(file.getvalue() for file in (pickled, array, twice))
    names = "text", "a pickle", "a pickle in a zip", "one array", "two m"
    yield from zip(names, contents, 5 * [True], strict=True)
    for change in FOREIGN:
        exec(change, {"f": (f := dict(good)), "np": np})
        yield change, npz(f), True
    for place in (place for place in good if place.startswith("0/")):
        for source in FORGERIES + OTHER_UPDATES:
            with contextlib.suppress(TypeError, ValueError, IndexError, OverflowError), np.errstate(all="ignore"):
                array = eval(source, {"a": good[place], "np": np})
                yield f"{place}: {source}", npz({**good, place: array}), not np.array_equal(array, good[place])
    for place in range(0, len(whole), 29):
        yield f"the first {place} bytes", whole[:place], True
        flipped = bytes([whole[place] ^ 1 << place % 8])
        yield f"a bit of byte {place}", whole[:place] + flipped + whole[place + 1 :], False  # a date's may stay unseen


class TestAdapterFiles:
    @pytest.mark.parametrize("into", ["plain", "injected"])
    def test_a_forged_or_foreign_file_is_refused_by_name_or_is_still_the_same_adapter(self, saved, into, svd_calls):
        """A damaged one too: none is executed, none half applied. A fault of the file alone is seen before any SVD."""
        base, want, path = saved
        model, said = svft.inject(base, ["0", "2", "4"], d=1) if into == "injected" else base, []
        before = snapshot(model)
        for name, content, changed in forged(path):
            path.write_bytes(content)
            svd_calls.clear()
            try:
                loaded = svft.load_adapter(copy.deepcopy(model), path)
            except (ValueError, TypeError) as error:
                assert re.search("(adapter.npz: got|layer '[0-5]': ).*want", str(error)), (name, error)
                assert not svd_calls or name.partition(": ")[2] in OTHER_UPDATES or "1e42" in name, (name, error)
                said.append(name)
            else:
                assert not changed, name
                assert all(map(torch.equal, loaded.state_dict().values(), want.state_dict().values())), name
        assert len(said) > 220 and not (path.parent / "owned").exists()
        assert_untouched(model, before)

    def test_a_live_layer_of_another_rank_or_number_of_entries_is_refused(self, tmp_path):
        """An optimizer would go on with the old m. Also where Omega fits, and where k is the same."""
        svft.save_adapter(randomize(svft.inject(mlp(), ["2"], omega_plain(3, 3), rank=3)), tmp_path / "a.npz")
        for how in ({"pattern": omega_plain(3, 3), "rank": 4}, {"pattern": "banded", "rank": 3}):
            model = randomize(svft.inject(mlp(), ["2"], **how))
            with refused(model, ValueError, "layer '2': d1, d2, rank, k: got .*for another k load into a plain model"):
                svft.load_adapter(model, tmp_path / "a.npz")

    def test_of_a_checkpoint_passed_by_mistake_the_names_alone_are_read(self, saved, monkeypatch):
        """A file of gigabytes is refused at once: no array of it is opened."""
        base, _, path = saved
        np.savez(path, format="svft 3", **{name: p.detach().numpy() for name, p in base.named_parameters()})
        opened, real = [], zipfile.ZipFile.open
        monkeypatch.setattr(zipfile.ZipFile, "open", lambda *a, **k: opened.append(a[1]) or real(*a, **k))
        with pytest.raises(ValueError, match="adapter.npz: got"):
            svft.load_adapter(base, path)
        assert set(opened) <= {"format.npy"}

    def test_the_file_is_small(self, tmp_path):
        """A wide band is little more than 4 bytes for each trained number, and random positions are 7."""
        for pattern, d, limit in (("banded", 8, 4.2), ("random", 8, 7)):
            model = randomize(svft.inject(nn.Sequential(nn.Linear(512, 512, bias=False)), ["0"], pattern, d))
            svft.save_adapter(model, tmp_path / "a.npz")
            assert 4 < (tmp_path / "a.npz").stat().st_size / len(model[0].m) < limit, pattern


class TestThePlaceOfAFile:
    def test_a_default_device_changes_nothing(self, saved):
        """Where torch.set_default_device is another than the model's: saving, loading, running."""
        base, model, path = saved
        was, x = path.read_bytes(), torch.ones(2, 5)
        with torch.device("meta"):
            svft.save_adapter(model, path)
            assert torch.equal(svft.load_adapter(base, path)(x), model(x))
        assert path.read_bytes() == was

    def test_saving_through_a_link_keeps_the_link(self, saved, tmp_path):
        """The file behind a symbolic link is replaced or made, not the link."""
        _, model, path = saved
        was = path.read_bytes()
        for target in (path, tmp_path / "new.npz"):
            (tmp_path / "link").unlink(missing_ok=True)
            (tmp_path / "link").symlink_to(target)
            svft.save_adapter(randomize(model, seed=1), tmp_path / "link")
            assert (tmp_path / "link").is_symlink() and target.read_bytes() != was

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no special files there")
    def test_what_exists_and_is_no_regular_file_is_refused_and_stays(self, saved, tmp_path, monkeypatch):
        """A pipe, a folder, a link to a pipe: as root a rename would put a file in the place of a device."""
        _, model, _ = saved
        monkeypatch.chdir(tmp_path)
        os.mkfifo("pipe")
        os.symlink("pipe", "link")
        os.mkdir("folder")
        for name in ("pipe", "link", "folder"):
            before = sorted((p.name, p.lstat().st_mode) for p in tmp_path.iterdir())
            with pytest.raises(OSError, match=f"path: got '{name}', want a regular file"):
                svft.save_adapter(model, name)
            assert sorted((p.name, p.lstat().st_mode) for p in tmp_path.iterdir()) == before

    def test_a_full_disk_names_the_file_and_keeps_the_old_one(self, saved, tmp_path):
        """OSError with the file's name; the last good file stays, no temporary one. The cache is done without, as where
        its folder cannot be made: one warning for all layers."""
        resource = pytest.importorskip("resource", reason="no file-size limit there")
        base, model, path = saved
        was, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            with pytest.raises(OSError, match="adapter.npz") as error:
                svft.save_adapter(model, path)
            with pytest.warns(UserWarning, match="cannot write in") as caught:
                svft.inject(base, ["0", "2"], cache_dir=tmp_path / "cache")
                svft.inject(base, ["4"], cache_dir=path / "in the way")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert error.value.filename == str(path) and path.read_bytes() == was
        assert len({str(warning.message) for warning in caught}) == 2  # of which Python shows each once
        assert sorted(p.name for p in tmp_path.rglob("*")) == ["adapter.npz", "cache"]

    @needs_fork
    def test_kill_9_at_any_moment_leaves_no_half_file_under_the_real_name(self, saved):
        """In the middle of the write, after it, before and after the rename: the old file or the new one."""
        _, model, path = saved
        was, seen, rename = path.read_bytes(), [], os.replace
        model[0].m.data += 1

        def die(*_):
            os.kill(os.getpid(), 9)

        class Half(io.FileIO):
            def write(self, content):
                die(super().write(content[: len(content) // 2]))

        def save(rank, *patch):
            torch.set_num_threads(1)
            setattr(*patch)
            svft.save_adapter(model, path)

        rename_then_die = lambda a, b: die(rename(a, b))  # noqa: E731
        for patch in ((svft, "open", Half), (os, "replace", die), (os, "replace", rename_then_die)):
            with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
                in_processes(save, patch, start_method="fork")
            seen.append(path.read_bytes())
        assert seen[:2] == 2 * [was] and seen[2] != was
        svft.load_adapter(mlp(), path)


# ---------------------------------------------------------------- odd layers


class Conv1D(nn.Linear):
    """It has the name and the attribute of GPT-2's, and its weight lies the other way."""

    nf = 6


# fmt: off
ODD_LAYERS = [  # what was done to the small model m; the layer that cannot be taken; the error; what its text names
    ("m[2].weight.data.fill_(torch.nan)", "2", ValueError, "NaN"),
    ("m[2].weight = nn.Parameter(torch.ones(6, 6).to(torch.float8_e4m3fn), False)", "2", TypeError, "float8"),
    ("m[2].weight.__tensor_flatten__ = print", "2", TypeError, "weight: got"),  # as torchao's packed weights have it
    ("m[2].weight.data = torch.ones(6, 0)", "2", ValueError, r"\(6, 0\)"),
    ("m[2].to('meta')", "2", ValueError, "meta"),
    ("nn.utils.parametrizations.orthogonal(m[2])", "2", TypeError, "Parametrized"),
    ("nn.utils.spectral_norm(m[2])", "2", ValueError, "weight_orig"),
    ("m[2].register_forward_hook(print)", "2", ValueError, "hook"),
    ("m[2].register_state_dict_post_hook(lambda *a: None)", "2", ValueError, "hook"),
    ("m[2].forward = m[0].forward", "2", ValueError, "forward"),
    ("m[2].register_buffer('scale', torch.ones(6))", "2", (TypeError, ValueError), "scale|buffer"),
    ("m[2].norm = nn.LayerNorm(6)", "2", (TypeError, ValueError), "norm|module"),
    ("m.append(nn.Linear(6, 6)); m[5].weight = m[2].weight", "2", ValueError, "in two places"),
    ("m.append(m[2])", "2", ValueError, "in two places"),
    ("m[2] = Conv1D(6, 6)", "2", TypeError, "Conv1D"),
    ("m.append(nn.MultiheadAttention(6, 2))", "5", TypeError, "MultiheadAttention"),
    ("m.append(nn.MultiheadAttention(6, 2))", "5.out_proj", TypeError, "NonDynamicallyQuantizableLinear"),
    ("m.append(nn.TransformerEncoderLayer(6, 2, 8))", "5.linear1", ValueError, "its parent bypasses"),
    ("m[2] = nn.Sequential(torch.compile(nn.Linear(6, 6)))", "2.0", ValueError, "its parent bypasses"),
]
SPOILT = [  # what was done to the injected small model m; what the error of merge and save_adapter names
    ("m[2].to('meta')", "meta"),
    ("m[2].m = nn.Parameter(torch.ones(7))", "m: got"),
    ("m[2].omega.copy_(m[2].omega.flip(1))", "omega: got"),
    ("m[2].bfloat16().float()", "convert"),
    ("m[2].weight.data.add_(torch.eye(6), alpha=0.01)", "reload|changed"),
    ("m[2].U.data.mul_(1.01)", "U"),
]
# fmt: on


def rows(table):  # a row's id is its first entry, a line of source
    return [pytest.param(*row, id=row[0]) for row in table]


def after(change, m):
    """m after a line of source."""
    exec(change, {**vars(svft), **globals(), "m": m})
    return m


class TestOddLayers:
    @pytest.mark.parametrize("change, target, error, text", rows(ODD_LAYERS))
    def test_what_is_refused_and_named_is_what_all_linear_leaves_out(self, change, target, error, text):
        """Anything but exactly nn.Linear or Conv1D with a plain weight of its own; with the advice what to do. One such
        layer does not stop "all-linear" on a whole model: the one warning names it."""
        model = after(change, mlp())
        with refused(model, error, f"layer '{target}': .*({text}).*want"):
            svft.inject(model, [target])
        with pytest.warns(UserWarning, match=f"'{re.escape(target)}'") as caught:
            svft.inject(model, "all-linear")
        assert set(adapted(model)) == {"0", "2", "4"} - {target.split(".")[0]} and len(caught) == 1

    def test_all_linear_leaves_out_what_lies_in_another_adapter_and_names_eight_at_most(self):
        """As PEFT wraps a layer: the base and two small layers beside it. Adapting them would change what it does."""
        sizes = {"into": (6, 2), "out": (2, 6)}
        wrapped = [
            nn.ModuleDict({name: nn.Linear(*size) for name, size in {base: (6, 6), **sizes}.items()})
            for base in ["base_layer", "original_module"] * 2
        ]
        model = nn.Sequential(*wrapped, nn.Linear(6, 6))
        with pytest.warns(UserWarning, match="0.base_layer.* and 4 more") as caught:
            assert adapted(svft.inject(model, "all-linear")) == ["4"]
        assert len(caught) == 1 and len(re.findall(r"\d\.\w+", str(caught[0].message))) == 8

    def test_all_linear_with_nothing_left_names_what_there_is(self):
        """A subclass alone; a model that was injected already, where the error says just that."""
        with pytest.raises(ValueError, match="Conv1D|'0'"):
            svft.inject(nn.Sequential(Conv1D(3, 3)), "all-linear")
        with pytest.raises(ValueError, match="SVFTLinear"):
            svft.inject(svft.inject(mlp(), "all-linear"), "all-linear")

    @pytest.mark.parametrize("act", [svft.merge, lambda m: svft.save_adapter(m, "a.npz")], ids=["merge", "save"])
    @pytest.mark.parametrize("change, text", rows(SPOILT))
    def test_a_layer_whose_parts_no_longer_belong_together_is_refused(self, act, change, text, tmp_path, monkeypatch):
        """Else merge and save would give something else. The error names what may have happened."""
        monkeypatch.chdir(tmp_path)
        m = after(change, randomize(svft.inject(mlp(), ["0", "2"])))
        with refused(m, ValueError, f"layer '2': .*({text})"):
            act(m)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_rounded_factors_of_half_precision_still_belong_together(self, dtype, tmp_path):
        """The check is as fine as the dtype that the layer has, with W0 or without, converted before inject or after."""
        for keep, late in [(keep, late) for keep in (True, False) for late in (True, False)]:
            made = svft.inject(mlp(width=200).to(torch.float32 if late else dtype), ["0", "2", "4"], keep_weight=keep)
            model = randomize(made.to(dtype))
            model[2].U.requires_grad_(True)  # as if a whole block had been unfrozen
            model[2].m.data[0] = 0  # one entry of it, of which no one is warned
            svft.save_adapter(model, tmp_path / "a.npz")
            assert adapted(svft.merge(model)) == []

    def test_the_work_grows_with_the_modules_not_with_their_square(self, monkeypatch):
        """Looking for targets and shared weights visits each module a fixed number of times: counted, not timed."""
        real, visits = nn.Module.named_modules, []
        counted = lambda *a, **k: (visits.append(1) or item for item in real(*a, **k))  # noqa: E731
        monkeypatch.setattr(nn.Module, "named_modules", counted)
        small, large = (nn.Sequential(*(nn.Linear(1, 1) for _ in range(count))) for count in (20, 40))
        svft.inject(small, list(map(str, range(20))), "plain")
        needed = len(visits)
        svft.inject(large, list(map(str, range(40))), "plain")
        assert 20 <= needed < len(visits) - needed < 2.5 * needed


# ---------------------------------------------------------------- odd input

ODD_INPUT = [  # a call, with the small model as m; the error; what its text names
    ("compute_svd(torch.eye(3).to_sparse())", TypeError, "weight: got Tensor .*want a dense"),
    ("omega_banded(0, 3, 1)", ValueError, r"omega: got Tensor \(2, 0\)"),
    ("omega_banded(3, 3, 1, above=-2)", ValueError, "above: got .*-2"),
    ("omega_top_k(torch.ones(3), torch.eye(3), 1)", RuntimeError, "only supported on matrices"),
    ("term_rank(omega_plain(3, 3).int())", TypeError, "omega: got Tensor .*torch.int32.*want an int64"),
    ("inject(inject(mlp(), ['2']), ['2'])", TypeError, "layer '2': base: got .*SVFTLinear.*want exactly"),
    ("inject(m, ['2'], svd=compute_svd(torch.eye(4, 3)))", ValueError, "svd: got .*want shapes"),
    ("inject(m, ['2'], svd=SVD(torch.eye(6), torch.ones(6), m[2].weight))", ValueError, r"in V\^T V = I"),
    ("inject(m, ['2'], svd=SVD(torch.eye(6), torch.ones(7), torch.eye(6)))", ValueError, "svd: got .*want shapes"),
    ("inject(m, ['2'], svd=SVD(torch.eye(6), torch.tensor(1.0), torch.eye(6)))", ValueError, "svd: got .*want shapes"),
    ("inject(m, ['2'], svd=SVD(*(t.bfloat16() for t in compute_svd(m[2].weight))))", ValueError, "svd: got"),
    ("inject(m, ['2'], svd=SVD(torch.eye(6) * torch.nan, torch.ones(6), torch.eye(6)))", ValueError, "svd: got"),
    ("inject(m[2], '.*')", ValueError, "model itself"),
]


class TestOddInputAndCtrlC:
    def test_ctrl_c_on_entry_to_disabled_leaves_nothing_behind(self, monkeypatch):
        """An exception between the layers restores those that were reached."""
        model, x = randomize(svft.inject(mlp(), ["0", "2"])), torch.randn(3, 5)
        adapted = model(x)

        def interrupted(self, name, value, real=nn.Module.__setattr__):
            real(self, name, value)
            if name == "_disabled" and value:
                raise KeyboardInterrupt

        monkeypatch.setattr(nn.Module, "__setattr__", interrupted)
        with pytest.raises(KeyboardInterrupt), svft.disabled(model):
            pass
        assert torch.equal(model(x), adapted)

    @pytest.mark.parametrize("call, error, text", rows(ODD_INPUT))
    def test_an_odd_argument_is_refused_by_name_and_nothing_changes(self, call, error, text, tmp_path, monkeypatch):
        """The error names the argument, what it got and what it wants; the model is bit-identical afterwards."""
        monkeypatch.chdir(tmp_path)
        model = mlp()
        with refused(model, error, text):
            eval(call, {**vars(svft), **globals(), "m": model})
        assert list(tmp_path.iterdir()) == []
