r"""The proof that the tests notice: each row of MUTATIONS breaks svft.py in one place, and the law named there must fail.

    pytest -m mutation              about five minutes on one core; `pytest` alone leaves it out

The rows pin lines of svft.py, so they follow the code and are no part of its spec. A row whose text is no longer in
svft.py, or whose law has another name now, fails. A law that could not run at all would look like one that noticed:
so the same laws must first pass on an unbroken copy.
"""

import ast
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

# fmt: off
MUTATIONS = [  # svft.py has this; change it to this; and the law whose name has this in it fails
    # -- the SVD
    ('    if lying:\n        U, Vh = Vh.T, U.T', '    if lying:\n        U, Vh = Vh.T, U.T.flip(0)', 'factors_are_orthonormal_and_reproduce'),
    ('    U = U * sign\n', '    U = U + 0 * sign\n', 'signs_are_canonical'),
    ('Vh[:r1] *= sign[:, :r2].T', 'Vh[:r1] += 0 * sign[:, :r2].T', 'factors_are_orthonormal_and_reproduce'),
    ('    size = U.abs()', '    size = U', 'signs_are_canonical'),
    ('(1 - 1e-6) * size.amax(0)', 'size.amax(0)', 'largest_entries_are_equal'),
    ('t.cpu()).double()', 't.cpu()).float()', 'computed_in_float64'),
    ('return torch.promote_types(dtype, torch.float32)', 'return torch.float32', 'computed_in_float64'),
    ('weight.shape if full_matrices else (r, r)', '(r, r)', 'factors_are_orthonormal_and_reproduce'),
    ('(t if t.is_cuda else t.cpu())', '(t)', 'no_path_mixes_devices'),
    ('    S = S / top\n', '    S = S / top * top\n    top = 1\n', 'weights_scale_does_not_matter'),
    # -- Omega
    ('((i - d <= j) & (j <= i + above))', '((i - d < j) & (j <= i + above))', 'banded_is_its_definition'),
    ('((i - d <= j) & (j <= i + above))', '((i - above <= j) & (j <= i + d))', 'banded_is_its_definition'),
    ('return omega_banded(r1, r2, 0)', 'return omega_banded(r1, r2, 1)', 'plain_is_the_diagonal'),
    ('replace=False))', 'replace=True))', 'random_draws_k_distinct'),
    ('np.random.RandomState(_check_int("seed", seed, 0, 2**32 - 1))', 'np.random.RandomState()', 'random_draws_k_distinct'),
    ('flat = np.sort(random', 'flat = np.array(random', 'random_draws_k_distinct'),
    ('alignment = (_exact(U).T @ _exact(Vh).T).abs()', 'alignment = (_exact(U).T @ _exact(Vh).T)', 'top_k_takes_the_largest'),
    ('alignment = (_exact(U).T @ _exact(Vh).T).abs()', 'alignment = (_exact(U) @ _exact(Vh)).abs()', 'top_k_takes_the_largest'),
    ('k = omega_banded(r1, r2, d).shape[1]', 'k = d', 'as_many_entries_as_the_band'),
    ('queue += [row_of[column] for column in new]', 'queue += []', 'term_rank_is_the_largest'),
    ('row_of[free] = row\n', 'row_of[free] = start\n', 'term_rank_is_the_largest'),
    ('return min(_check_omega(omega, d1, d2).shape[1], d1, d2)', 'return min(d1, d2)', 'rank_is_at_most_term_rank'),
    ('if not found[0] <= found[1] <= found[2]:', 'if False:', 'a_rank_above_its_bound'),
    # -- the layer
    ('self.m = nn.Parameter(torch.zeros(', 'self.m = nn.Parameter(1e-3 * torch.ones(', 'training_starts_at_W0'),
    ('return nn.Parameter(t.to(W0.device, dtype), requires_grad=False)', 'return nn.Parameter(t.to(W0.device, dtype))', 'only_m_trains'),
    ('return nn.Parameter(t.to(W0.device, dtype)', 'return nn.Parameter(t.to(dtype)', 'no_path_mixes_devices'),
    ('W = _exact(weight.detach())', 'W = _exact(weight)', 'computed_in_float64'),
    ('Y.addcmul_(S, Z.to(Y.dtype))', 'Y.add_(Z.to(Y.dtype))', 'every_path_equals'),
    ('+= S * Z[: len(S)].to(Y.dtype)', '+= Z[: len(S)].to(Y.dtype)', 'every_path_equals'),
    ('return F.embedding_bag(j, Z', 'return F.embedding_bag(i, Z', 'every_path_equals'),
    ('per_sample_weights=m)', 'per_sample_weights=m.detach())', 'every_path_equals'),
    ('return h + (y.T @ self.U.T).view_as(h)', 'return h - (y.T @ self.U.T).view_as(h)', 'every_path_equals'),
    ('F.linear(y.T, self.U, self.bias)', 'F.linear(y.T, self.U)', 'every_path_equals'),
    ('W = self._turned(self.weight + self._turned(W))', 'W = self._turned(self.weight + W)', 'every_path_equals'),
    ('y = self._M_times(z, add_sigma=path == "fused")', 'y = self._M_times(z)', 'every_path_equals'),
    ('{**state, "_disabled": False}', 'state', 'inside_disabled'),
    ('return _exact(self.U) @ Y', 'return (_exact(self.U) @ Y).detach()', 'gradients_pass'),
    ('m = m.to(_wide(m.dtype))\n    return F.embedding_bag(j, Z.to(m.dtype)', 'm = m.to(Z.dtype)\n    return F.embedding_bag(j, Z.to(m.dtype)', 'compute_the_update_in_float32'),
    ('if Z.device.type != "cpu" or Z.shape[1] == 0:', 'if Z.device.type != "cpu" and Z.shape[1] == 0:', 'primitive_gathers'),
    ('column = 12 * len(layer.m) if', 'column = 0 * len(layer.m) if', 'auto_knows'),
    ('else r1 * r2\n', 'else 12 * len(layer.m)\n', 'an_H200_recorded'),
    ('tokens = 2048 if torch.compiler.is_compiling() else', 'tokens =', 'a_whole_model_compiles'),
    ('half = torch.mm(layer.U[:0], layer.U.T[:, :0]).dtype in HALF', 'half = layer.U.dtype in HALF', 'auto_knows'),
    ('if half or len(layer.S) < min(d1, d2):', 'if half:', 'auto_knows'),
    ('if half or len(layer.S) < min(d1, d2):', 'if half or len(layer.S) < min(r1, d2):', 'auto_knows'),
    ('n = min(self.out_features, self.in_features)', 'n = min(self.U.shape[1], self.in_features)', 'bad_argument_is_refused'),
    # -- merge, inject, disabled
    ('W = (W0 + delta).to(self.U.dtype)', 'W = W0.to(self.U.dtype) + delta.to(self.U.dtype)', 'merge_rounds_once'),
    ('if lost > 0.1:', 'if lost > 2:', 'warns_with_the_figure'),
    ('return plain.train(self.training)', 'return plain', 'type_layout_dtype'),
    ('nn.Parameter(self.bias.clone(), requires', 'nn.Parameter(self.bias, requires', 'type_layout_dtype'),
    ('plain.weight = nn.Parameter(self._turned(W).contiguous()', 'plain.weight = nn.Parameter(W.contiguous()', 'merged_layer_computes'),
    ('return entries.intersection(".".join(parts[start:]) for start in range(len(parts)))', 'return {e for e in entries if name.endswith(e)}', 'targets_are_matched'),
    ('entries if regex.fullmatch(name)', 'entries if regex.match(name)', 'targets_are_matched'),
    ('if _is_linear(module) and not any(module is h for h in heads)}', 'if _is_linear(module)}', 'all_linear_takes'),
    ('and p.ndim == 3 and', 'and p.ndim == 9 and', 'stack_of_weights'),
    ('part not in ("_orig_mod", "_checkpoint_wrapped_module")', 'part not in ("_orig_mod",)', 'names_are_the_models_own'),
    ('".".join(parts[1:] if len(parts) > 1 and parts[0] == "module" else parts)', '".".join(parts)', 'names_are_the_models_own'),
    ('requires_grad_(id(parameter) in trained and', 'requires_grad_(parameter.ndim == 1 and', 'freezes_everything_but_the_ms'),
    ('(seed + zlib.crc32(name.encode()))', '(seed + 0)', 'another_omega_for_each_layer'),
    ('            layer._disabled = was', '            layer._disabled = False', 'inside_disabled'),
    ('if len(names := owners[id(base.weight)]) > 1:', 'if len(names := owners[id(base.weight)]) > 9:', 'refused_and_named'),
    ('if id(base) in bypassed:', 'if False:', 'refused_and_named'),
    ('if base.forward != class_forward or any(', 'if any(', 'refused_and_named'),
    ('{"FSDPModule", "FullyShardedDataParallel"} or any(', 'set() or any(', 'two_processes_equal_one'),
    # -- files
    ('            raise ValueError("other sizes, another dtype, or altered")', '            pass', 'with_a_wrong_bit'),
    ('return _check_svd(svd, weight)', 'return svd', 'file_of_other_factors'),
    ('{tuple(weight.shape)} {r1} {r2}', '{tuple(weight.shape)}', 'changes_the_file'),
    ('        if folder not in _unwritable:', '        if True:', 'warned_of_once'),
    ('if not difference <= 1e-3 * size:', 'if False:', 'flipped_signs_are_refused'),
    ('size = np.abs(entry["probes"]).max()', 'size = np.linalg.norm(entry["probes"])', 'forged_or_foreign'),
    ('if m.shape == layer.m.shape:', 'if True:', 'what_is_saved_is_what'),
    ('if converted := [', 'if converted := 0 * [', 'saving_warns_where'),
    ('    if r1 < len(S) and S[r1 - 1]', '    if False and S[r1 - 1]', 'cuts_through_equal'),
    ('and np.isfinite(probes).all())', ')', 'forged_or_foreign'),
    ('_check_finite("m", m.to(layer.m.dtype))', 'pass', 'forged_or_foreign'),
    ('    _for_each(entries, lambda name, entry: _check_shape(modules[name], entry["shape"]))', '    pass', 'does_not_belong_to'),
    ('len(layer.S)]\n', 'shape.tolist()[2]]\n', 'does_not_belong_to'),
    ('    if missing := sorted(layers.keys() - entries.keys()):', '    if missing := []:', 'does_not_belong_to'),
    ('        layer.omega = torch.from_numpy(entry["omega"])', '        torch.from_numpy(entry["omega"])', 'what_is_saved_is_what'),
    ('random = np.random.RandomState(0)\n    U, Vh', 'random = np.random.RandomState(1)\n    U, Vh', 'earlier_commit'),
    ('    _check_omega(layer.omega, layer.U.shape[1], layer.Vh.shape[0])', '    pass', 'no_longer_belong_together'),
    ('return _check_svd(svd, W0, layer.U.dtype), W0', 'return svd, W0', 'no_longer_belong_together'),
    ('_check_svd(svd, W0, layer.U.dtype), W0', '_check_svd(svd, W0, layer.m.dtype), W0', 'to_their_own_rounding'),
    ('difference.norm() <= limit * scale.norm()', 'difference.norm() <= limit', 'to_their_own_rounding'),
    ('error = float(difference.norm() / scale.norm())', 'error = float(difference.norm())', 'bad_argument_is_refused'),
    ('    _check_finite("m", _exact(layer.m.detach()))', '    pass', 'bad_m_is_refused'),
    ('+ 1e-12 * exact[0]', '+ 0 * exact[0]', 'equal_singular_values_are_warned'),
    ('if other := [', 'if other := 0 * [', 'saving_warns_where'),
    ('if zero := [', 'if zero := 0 * [', 'saving_warns_where'),
    ('os.path.realpath(path)', 'path', 'keeps_the_link'),
    ('raise OSError(error.errno, error.strerror, str(path)) from error', 'raise', 'full_disk'),
    ('        temporary.unlink(missing_ok=True)', '        pass', 'full_disk'),
    ('    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")', '    temporary = path', 'kill_9'),
]
# fmt: on


def laws():
    """The laws of both tiers: name -> node id."""
    found = {}
    for file in (ROOT / "test_svft.py", *sorted((ROOT / "tests").glob("test_*.py"))):
        sections = [part for part in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(part, ast.ClassDef)]
        for section in sections:
            names = [part.name for part in section.body if isinstance(part, ast.FunctionDef)]
            found |= {n: f"{file.relative_to(ROOT)}::{section.name}::{n}" for n in names if n.startswith("test_")}
    return found


def law(part):
    """The node id of the one law whose name has this part in it."""
    found = [node for name, node in laws().items() if part in name]
    assert len(found) == 1, f"the table is out of date: {part!r} is part of {found}"
    return found[0]


def copy_project(folder, source):
    """All of the project in folder, with another svft.py."""
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*.md"), ROOT / "pyproject.toml"):
        shutil.copy(file, folder)
    for name in ("tests", "studies"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "svft.py").write_text(source, encoding="utf-8")


def run_in_a_fork(folder, nodes):
    """pytest's exit code for some laws of the copy in folder. A fork, so that torch need not be imported again."""
    child = os.fork()
    if child == 0:
        try:
            code = run(folder, nodes)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(folder, nodes):
    os.chdir(folder)
    sys.path[:0] = [str(folder)]
    own = {"svft", "train_toy", "test_svft", "conftest", "studies", *(f.stem for f in (ROOT / "tests").glob("*.py"))}
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]
    os.environ["SVFT_PROFILE"] = "mutation"  # derandomised: the same verdict each time; no time for the smallest case
    torch.set_num_threads(1)
    return int(pytest.main(["-qx", "--assert=plain", "-p", "no:cacheprovider", *nodes]))


@pytest.mark.mutation
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestMutationProof:
    def test_the_unbroken_copy_passes(self, tmp_path):
        """Every law that the table names, where nothing is broken."""
        copy_project(tmp_path, (ROOT / "svft.py").read_text(encoding="utf-8"))
        nodes = sorted({law(part) for *_, part in MUTATIONS})
        assert run_in_a_fork(tmp_path, nodes) == pytest.ExitCode.OK

    @pytest.mark.parametrize("old, new, part", MUTATIONS, ids=[f"{i + 1}-{m[2]}" for i, m in enumerate(MUTATIONS)])
    def test_a_one_line_breakage_is_caught(self, tmp_path, old, new, part):
        """svft.py with one thing changed: the law named must fail."""
        source = (ROOT / "svft.py").read_text(encoding="utf-8")
        assert source.count(old) == 1 and old != new, "the table is out of date"
        copy_project(tmp_path, source.replace(old, new))
        code = run_in_a_fork(tmp_path, [law(part)])
        assert code == pytest.ExitCode.TESTS_FAILED, f"survived, pytest returned {code}:\n{old}\n->\n{new}"
