r"""The proof that the tests notice: each row of MUTATIONS breaks svft.py in one place, and the law named there must fail.

    pytest -m mutation              about five minutes on one core; `pytest` alone leaves it out

The rows pin lines of svft.py, so they follow the code and are no part of its spec. A row whose text is no longer in
svft.py, or whose law has another name now, fails. A law that could not run at all would look like one that noticed:
so the same laws must first pass on an unbroken copy.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

# fmt: off
MUTATIONS = [  # svft.py has this; change it to this; and the law whose name has this in it fails
    # -- the SVD
    ('        U, Vh = Vh.T, U.T\n', '        U, Vh = Vh.T, U.T.flip(0)\n', 'factors_are_orthonormal_and_reproduce'),
    ('    U = U * sign\n', '    U = U + 0 * sign\n', 'signs_are_canonical'),
    ('Vh[: len(S)] *= sign.T[: len(S)]', 'Vh[: len(S)] += 0 * sign.T[: len(S)]', 'factors_are_orthonormal_and_reproduce'),
    ('(1 - 1e-6) * size.amax(0)', 'size.amax(0)', 'largest_entries_are_equal'),
    ('t.cpu()).double()', 't.cpu()).float()', 'computed_in_float64'),
    ('return torch.promote_types(dtype, torch.float32)', 'return torch.float32', 'computed_in_float64'),
    ('(t if t.is_cuda else t.cpu())', '(t)', 'no_path_mixes_devices'),
    # -- Omega
    ('.triu(-d).tril(above)', '.triu(-above).tril(d)', 'banded_is_its_definition'),
    ('return omega_banded(r1, r2, 0)', 'return omega_banded(r1, r2, 1)', 'plain_is_the_diagonal'),
    ('replace=False))', 'replace=True))', 'random_draws_k_distinct'),
    ('np.random.RandomState(seed % 2**32)', 'np.random.RandomState()', 'random_draws_k_distinct'),
    ('alignment = (_exact(U).mT @ _exact(Vh).mT).abs()', 'alignment = (_exact(U).mT @ _exact(Vh).mT)', 'top_k_takes_the_largest'),
    ('k = omega_banded(r1, r2, d).shape[1]', 'k = d', 'as_many_entries_as_the_band'),
    ('queue += [row_of[column] for column in new]', 'queue += []', 'term_rank_is_the_largest'),
    ('return min(_check_omega(omega, d1, d2).shape[1], d1, d2)', 'return min(d1, d2)', 'rank_is_at_most_term_rank'),
    ('_require(found[0] <= found[1] <= found[2],', '_require(True,', 'a_rank_above_its_bound'),
    # -- the layer
    ('self.m = nn.Parameter(torch.zeros(', 'self.m = nn.Parameter(1e-3 * torch.ones(', 'training_starts_at_W0'),
    ('return nn.Parameter(t.to(W0.device, dtype), requires_grad=False)', 'return nn.Parameter(t.to(W0.device, dtype))', 'counts_are_those_of_table_7'),
    ('return nn.Parameter(t.to(W0.device, dtype)', 'return nn.Parameter(t.to(dtype)', 'no_path_mixes_devices'),
    ('W = _exact(weight.detach())', 'W = _exact(weight)', 'computed_in_float64'),
    ('.addcmul_(S, (Z if square', '.add_((Z if square', 'every_path_equals'),
    ('(Y if square else Y[: len(S)])', 'Y', 'every_path_equals'),
    ('return F.embedding_bag(j, Z', 'return F.embedding_bag(i, Z', 'every_path_equals'),
    ('per_sample_weights=m)', 'per_sample_weights=m.detach())', 'every_path_equals'),
    ('self.bias) + (self._M_times(z).T @ U.T)', 'self.bias) - (self._M_times(z).T @ U.T)', 'every_path_equals'),
    ('F.linear(self._M_times(z, add_sigma=True).T, U, self.bias)', 'F.linear(self._M_times(z, add_sigma=True).T, U)', 'every_path_equals'),
    ('W = self._layout(self._layout(W0) + self._layout(W))', 'W = self._layout(self._layout(W) + W0)', 'every_path_equals'),
    ('return _exact(layer.U.detach()) @ Y', 'return (_exact(layer.U.detach()) @ Y).detach()', 'delta_weight_is_the_sum'),
    ('m = m.to(_wide(m.dtype))\n    return F.embedding_bag(j, Z.to(m.dtype)', 'm = m.to(Z.dtype)\n    return F.embedding_bag(j, Z.to(m.dtype)', 'sparse_step_loses_nothing'),
    ('if Z.device.type != "cpu" or Z.shape[1] == 0:', 'if Z.device.type != "cpu" and Z.shape[1] == 0:', 'M_is_gathered_on_the_cpu'),
    ('column = 12 * len(layer.m) if', 'column = 0 * len(layer.m) if', 'auto_knows'),
    ('else r1 * r2\n', 'else 100 * r1 * r2\n', 'an_H200_recorded'),
    ('tokens = 2048 if torch.compiler.is_compiling() else', 'tokens =', 'a_whole_model_compiles'),
    ('torch.mm(layer.U[:0], layer.U.T[:, :0]).dtype in HALF', 'layer.U.dtype in HALF', 'auto_knows'),
    ('"fused": whole,', '"fused": True,', 'auto_knows'),
    ('"auto": kept or whole,', '"auto": True,', 'bad_argument_is_refused'),
    ('U, Vh = self.U.detach(), self.Vh.detach()', 'U, Vh = self.U, self.Vh', 'only_m_trains'),
    # -- merge, inject, disabled
    ('    _check_alone(layer)\n    W0', '    W0', 'would_come_out_wrong'),
    ('W = (W0 + delta).to(layer.U.dtype)', 'W = W0.to(layer.U.dtype) + delta.to(layer.U.dtype)', 'merge_rounds_once'),
    ('if 0.1 < lost <', 'if 2 < lost <', 'warns_with_the_figure'),
    ('return plain.train(layer.training)', 'return plain', 'type_layout_dtype'),
    ('nn.Parameter(layer.bias.clone(), requires', 'nn.Parameter(layer.bias, requires', 'type_layout_dtype'),
    ('    weight = layer._layout(W)\n', '    weight = W\n', 'merged_layer_computes'),
    ('wanted.intersection(_ends(name))', '{end for end in wanted if name.endswith(end)}', 'targets_are_matched'),
    ('if re.fullmatch(target_modules, name)', 'if re.match(target_modules, name)', 'targets_are_matched'),
    ('for name in linear if id(modules[name]) not in outputs}', 'for name in linear}', 'all_linear_takes'),
    ('if p.ndim == 3 and', 'if p.ndim == 9 and', 'stack_of_weights'),
    ('(_orig_mod|_checkpoint_wrapped_module)', '(_orig_mod)', 'names_are_the_models_own'),
    ('while list(model._modules) in (["module"], ["_orig_mod"]):', 'while False:', 'names_are_the_models_own'),
    ('requires_grad_(id(parameter) in trained)', 'requires_grad_(parameter.ndim == 1)', 'freezes_all_but_m'),
    ('options.get("seed", 0) + zlib.crc32(name.encode())', 'options.get("seed", 0)', 'another_omega_for_each_layer'),
    ('if not layer._disabled]', 'if True]', 'inside_disabled'),
    ('_require(not shared,', '_require(True,', 'refused_and_named'),
    ('_require(id(base) not in out,', '_require(True,', 'refused_and_named'),
    ('    extra |= {"forward"} if layer', '    extra |= set() if layer', 'refused_and_named'),
    ('        _check_alone(layer)  # FSDP', '        # FSDP', 'two_processes_equal_one'),
    # -- files
    ('_read(file, SVD._fields.__contains__)', 'np.load(file, mmap_mode="r", allow_pickle=True)', 'a_short_or_foreign_file'),
    ('        _check_svd(svd, weight)\n        return svd', '        return svd', 'file_of_other_factors'),
    ('min(weight[:rank].shape), full_matrices', '', 'changes_the_file'),
    ('cannot write in {str(folder)!r}; going', 'cannot write {file}; going', 'full_disk'),
    ('_require(error <= 1e-2 * size,', '_require(True,', 'flipped_signs_are_refused'),
    (' and np.isfinite(probes).all()', '', 'forged_or_foreign'),
    (' and shape[2] <= shape[:2].min()', '', 'forged_or_foreign'),
    ('    _check_finite(entry["m"].to(layer.m.dtype), "m")\n', '', 'forged_or_foreign'),
    ('    _require(own == sizes,', '    _require(True,', 'does_not_belong_to'),
    ('layer.in_features, len(layer.S), len', 'layer.in_features, entry.sizes()[2], len', 'another_rank_or_number_of_entries'),
    (' | layers.keys() - files.keys())', ')', 'does_not_belong_to'),
    ('        layers[name].omega.copy_(entry["omega"])\n', '', 'what_is_saved_is_what'),
    ('random = np.random.RandomState(0)\n    U, Vh', 'random = np.random.RandomState(1)\n    U, Vh', 'earlier_commit'),
    ('    _check_omega(layer.omega, layer.U.shape[1], len(layer.Vh))\n', '', 'no_longer_belong_together'),
    ('    _check_svd(SVD(layer.U, layer.S, layer.Vh), W0', '    (lambda *_: 0)(SVD(layer.U, layer.S, layer.Vh), W0', 'no_longer_belong_together'),
    ('W0.to(layer.U.dtype))', 'W0)', 'half_precision_merge_rounds_once'),
    ('    _check_finite(_exact(layer.m.detach()), "m")\n', '', 'would_come_out_wrong'),
    ('+ 1e-12 * exact[0]', '+ 0 * exact[0]', 'equal_singular_values_are_warned'),
    ('    _warn(other, ', '    _warn([], ', 'saving_warns_where'),
    ('    _warn(zero, ', '    _warn([], ', 'saving_warns_where'),
    ('os.path.realpath(path)', 'path', 'keeps_the_link'),
    ('raise OSError(error.errno, error.strerror, str(file)) from error', 'raise', 'full_disk'),
    ('        temporary.unlink(missing_ok=True)', '        pass', 'full_disk'),
    ('    temporary = file.with_name(f".{os.getpid()}.{time.monotonic_ns()}.tmp")', '    temporary = file', 'kill_9'),
    ('        layers[name].pattern = entry["pattern"]\n', '', 'what_is_saved_is_what'),
    ('fit = len({*names}) == len(names) and all(map(known, names))', 'fit = all(map(known, names))', 'forged_or_foreign'),
    ('[(pattern.dtype.kind, pattern.shape)]', '[("U", ())]', 'forged_or_foreign'),
    ('(ADAPTER & module._modules.keys() or name', '(name', 'lies_in_another_adapter'),
]
# fmt: on


def select(parts):
    """pytest's options for the laws, in either tier, whose names have these parts in them: one law for each part."""
    files = set()
    for part in parts:
        paths = (ROOT / "test_svft.py", *ROOT.glob("tests/test_*.py"))
        found = [path for path in paths for _ in re.findall(rf"def test_\w*{part}", path.read_text(encoding="utf-8"))]
        assert len(found) == 1, f"the table is out of date: {part!r} is part of a name in {found}"
        files.add(str(found[0].relative_to(ROOT)))
    return ["-k", " or ".join(parts), *files]


def run(folder, source, parts):
    """pytest's exit code for laws of a copy of the project with this svft.py, in a fork: torch is imported already."""
    options = select(parts)
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*.md"), ROOT / "pyproject.toml"):
        shutil.copy(file, folder)
    for name in ("tests", "studies"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "svft.py").write_text(source, encoding="utf-8")
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        os.chdir(folder)
        sys.path[:0] = [str(folder)]
        own = {path.stem for path in (*folder.glob("*.py"), *folder.glob("tests/*.py"), folder / "studies")}
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]
        os.environ["SVFT_PROFILE"] = "mutation"  # always the same cases, and no time for the smallest one
        torch.set_num_threads(1)
        code = int(pytest.main(["-qx", "--assert=plain", "-p", "no:cacheprovider", *options]))
    finally:
        os._exit(code)


@pytest.mark.mutation
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestMutationProof:
    def test_the_unbroken_copy_passes(self, tmp_path):
        """Every law that the table names, where nothing is broken."""
        source, parts = (ROOT / "svft.py").read_text(encoding="utf-8"), {part for *_, part in MUTATIONS}
        assert run(tmp_path, source, parts) == pytest.ExitCode.OK

    @pytest.mark.parametrize("old, new, part", MUTATIONS, ids=[f"{i + 1}-{m[2]}" for i, m in enumerate(MUTATIONS)])
    def test_a_one_line_breakage_is_caught(self, tmp_path, old, new, part):
        """svft.py with one thing changed: the law named must fail."""
        source = (ROOT / "svft.py").read_text(encoding="utf-8")
        assert source.count(old) == 1 and old != new, "the table is out of date"
        code = run(tmp_path, source.replace(old, new), [part])
        assert code == pytest.ExitCode.TESTS_FAILED, f"survived, pytest returned {code}:\n{old}\n->\n{new}"
