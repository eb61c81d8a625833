r"""The executable spec of svft.py: each test's name is a law, its docstring the claim and where it comes from.

    pytest -v test_svft.py                       the laws by name, with 15 cases each where cases are drawn
    SVFT_PROFILE=thorough pytest test_svft.py    ten times the cases, always the same ones
    python test_svft.py                          the spec as text: section, law, claim, table of bad input

How to read a failure: hypothesis prints "Falsifying example: test_...(...)" with the smallest case that it found.
Where it shows sizes and a seed, these rebuild every tensor: paste it as @example(...) above the test to keep it.
Where it shows a layer, run the test again: the case is kept in .hypothesis and comes first.

Oracles are written differently from svft.py: numpy, float64, a double loop over (i, j) for U M V^T. The tolerance of a
drawn case comes from the dtype's rounding and the size of what is summed (`rounding`), that of a fixed case is fixed.
A tag such as (D2) names a row of the deviations table in paper_notes.md. Attacks and integrations are in tests/.
"""

import contextlib
import copy
import csv
import inspect
import itertools
import math
import os
import re
import shutil
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import svft
from svft import SVD, SVFTLinear, compute_svd, omega_banded, omega_plain, omega_random, omega_top_k

# ---------------------------------------------------------------- one example by hand


class TestByHand:
    """W0 = diag(3, 1): then U = V = I and Sigma = (3, 1), so Delta W *is* M, and every number can be read."""

    def layer(self, **how):
        base = nn.Linear(2, 2, dtype=torch.float64)
        base.weight.data, base.bias.data = torch.tensor([[3.0, 0], [0, 1]]).double(), torch.tensor([10.0, 20]).double()
        layer = SVFTLinear(base, "banded", d=1, **how)
        layer.m.data.copy_(torch.tensor([1.0, 2, 4, 0]))  # m_11, m_12, m_21, m_22
        return layer

    def test_delta_W_is_M(self):
        """Eq. (2): 1 u1 v1^T + 2 u1 v2^T + 4 u2 v1^T = [[1, 2], [4, 0]]; the weight becomes [[4, 2], [4, 1]]."""
        layer = self.layer()
        assert layer.U.tolist() == layer.Vh.tolist() == [[1, 0], [0, 1]] and layer.S.tolist() == [3, 1]
        assert layer.delta_weight().tolist() == layer.M().tolist() == [[1, 2], [4, 0]]
        assert layer.merged_weight().tolist() == layer.merge().weight.tolist() == [[4, 2], [4, 1]]

    def test_forward_is_Eq_1(self):
        """On every path, at x = (1, 1): W0 x = (3, 1), M x = (3, 4), b = (10, 20), so h = (16, 25)."""
        for path in ("dense", "gather", "fused", "auto"):
            layer = self.layer(path=path)
            assert layer(torch.ones(2).double()).tolist() == [16, 25], path
            with svft.disabled(layer):
                assert layer(torch.ones(2).double()).tolist() == [13, 21], path

    def test_the_gradient_is_U_T_G_V_on_Omega(self):
        """h_1 alone, at x = (5, 7): G = dL/dW has (5, 7) as its first row, so dL/dm = (5, 7, 0, 0)."""
        layer = self.layer()
        layer(torch.tensor([5.0, 7]).double())[0].backward()
        assert layer.m.grad.tolist() == [5, 7, 0, 0]

    def test_the_rank_is_two_and_so_are_its_bounds(self):
        """M = [[1, 2], [4, 0]] has rank 2; Omega holds (1, 2) and (2, 1), which share nothing; min(k, d1, d2) = 2."""
        layer = self.layer()
        assert layer.check_rank() == (2, 2, 2)
        layer.m.data.copy_(torch.tensor([1.0, 2, 0, 0]))
        assert layer.check_rank() == (1, 2, 2)


# ---------------------------------------------------------------- strategies and oracles

HERE = Path(__file__).parent
COMMON = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.register_profile("quick", max_examples=15, **COMMON)
settings.register_profile("thorough", max_examples=150, derandomize=True, **COMMON)
FIRST = dict(phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False)  # the first failure is enough
settings.register_profile("mutation", settings.get_profile("thorough"), **FIRST)
settings.load_profile(os.environ.get("SVFT_PROFILE", "quick"))


PATHS = ("dense", "gather", "fused")
devices = pytest.mark.parametrize("device", ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
W0_kept_or_freed = pytest.mark.parametrize("keep", [True, False], ids=["W0-kept", "W0-freed"])

sizes, seeds = st.integers(1, 7), st.integers(0, 2**31)
leading = st.lists(st.integers(0, 3), max_size=3).map(tuple)  # leading dimensions of an input, empty ones too
svds = st.sampled_from([{}, {"full_matrices": True}]) | st.builds(dict, rank=st.integers(1, 8))  # thin, full, or cut


def size_of_M(d1, d2, full_matrices=False, rank=8):  # (r1, r2)
    return (d1, d2) if full_matrices else (min(d1, d2, rank),) * 2


class Conv1D(nn.Module):
    """GPT-2's linear layer as Hugging Face lays it out: the weight is (in, out)."""

    __module__ = "transformers.pytorch_utils"  # the home by which svft.py knows it

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


def plain_layer(d1, d2, kind="linear", dtype=torch.float64, seed=0, bias=True):
    torch.manual_seed(seed)
    return (Conv1D(d1, d2) if kind == "conv1d" else nn.Linear(d2, d1, bias=bias)).to(dtype)


@st.composite
def layers(draw, dtype=torch.float64):
    """An SVFTLinear of any sizes, base, SVD, pattern and path, with a random m that is nowhere zero."""
    d1, d2, seed, how = draw(sizes), draw(sizes), draw(seeds), draw(svds)
    base = plain_layer(d1, d2, draw(st.sampled_from(["linear", "conv1d"])), dtype, seed)
    r1, r2 = size_of_M(d1, d2, **how)
    custom = omega_random(r1, r2, draw(st.integers(1, r1 * r2)), seed=seed)
    pattern = draw(st.sampled_from(["plain", "banded", "random", custom]))
    whole = r1 >= min(d1, d2)  # a cut SVD cannot replace W0 (D8)
    path = draw(st.sampled_from(["auto", "dense", "gather"] + ["fused"] * whole))
    keep = path == "gather" or not whole or draw(st.booleans())
    layer = SVFTLinear(base, pattern, draw(st.integers(0, 3)), seed=seed, path=path, keep_weight=keep, **how)
    layer.m.data.copy_(torch.randn_like(layer.m) + 0.1)
    layer.base = [base]  # in a list, so that it is no submodule
    return layer


def weight_of(base):  # (d1, d2), numpy float64
    W = base.weight.detach().double()
    return (W.T if type(base).__name__ == "Conv1D" else W).numpy()


def delta_by_double_loop(layer):
    """Eq. (2), term by term: the sum over (i, j) in Omega of m_ij u_i v_j^T, in numpy."""
    U, Vh, m = (t.detach().double().numpy() for t in (layer.U, layer.Vh, layer.m))
    delta = np.zeros((U.shape[0], Vh.shape[1]))
    for (i, j), m_ij in zip(layer.omega.T.tolist(), m, strict=True):
        delta += m_ij * np.outer(U[:, i], Vh[j])
    return delta


def gradient_by_double_loop(layer, G):
    """What m gets from G = dL/dW (d1, d2): (U^T G V) on Omega, which is u_i^T G v_j for each (i, j)."""
    U, Vh = (t.detach().cpu().double().numpy() for t in (layer.U, layer.Vh))
    return [U[:, i] @ np.asarray(G) @ Vh[j] for i, j in layer.omega.T.tolist()]


def rounding(dtype, *factors):
    """An allowance for rounding: 50 ulps of a sum as large as the product of the factors' norms."""
    return 50 * torch.finfo(dtype).eps * math.prod(1 + float(np.linalg.norm(np.asarray(f))) for f in factors)


def near(got, want, tolerance, cell=""):
    got, want = (np.asarray(t.detach().cpu().double() if isinstance(t, torch.Tensor) else t) for t in (got, want))
    assert got.shape == want.shape, f"{cell} shape {got.shape}, want {want.shape}"
    worst = float(np.abs(got - want).max()) if got.size else 0.0
    assert worst <= tolerance, f"{cell} off by {worst:.3g}, allowed {tolerance:.3g}"


def snapshot(model):
    """All that "exactly as it was" means: structure, identity, mode, path, requires_grad, and every bit."""

    def bits(t):  # NaN equals itself here; a tensor on meta has none
        return None if t.is_meta else t.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()

    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    every = model.named_modules(remove_duplicate=False)
    modules = {name: (id(m), m.training, getattr(m, "path", None)) for name, m in every}
    return modules | {name: (id(t), t.requires_grad, bits(t)) for name, t in tensors}


def assert_untouched(model, before):
    now = snapshot(model)
    assert not [name for name in now.keys() | before.keys() if now.get(name) != before.get(name)]


@contextlib.contextmanager
def refused(model, error, text):
    """What is inside raises this error, its text matches, and the model is bit for bit what it was."""
    before = snapshot(model)
    with pytest.raises(error, match=text):
        yield
    assert_untouched(model, before)


def randomize(model, scale=1.0, seed=0):
    """Give every m in model random values, so that nothing can pass by doing nothing."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, SVFTLinear):
            module.m.data.copy_(scale * torch.randn(module.m.shape, generator=g))
    return model


def mlp(seed=0, dtype=torch.float32, width=6):
    torch.manual_seed(seed)
    into, inner, out = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 4)
    return nn.Sequential(into, nn.Tanh(), inner, nn.Tanh(), out).to(dtype)


def adapted(model):
    """The names of the layers that are adapted."""
    return [name for name, module in model.named_modules() if isinstance(module, SVFTLinear)]


def steps(model, seeds=range(4), optimizer=None):
    """Train on one random batch for each seed."""
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for seed in seeds:
        optimizer.zero_grad()
        (model(torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))) - 1).square().mean().backward()
        optimizer.step()
    return model


# ---------------------------------------------------------------- the paper: sections 3.1 and 3.2


class TestSVD_Section_3_1:
    """W0 = U Sigma V^T is computed once, in float64, and two machines find the same factors."""

    @given(d1=sizes, d2=sizes, rank=st.sampled_from([0, 1, 7]), seed=seeds, how=svds)
    def test_factors_are_orthonormal_and_reproduce_the_weight(self, d1, d2, rank, seed, how):
        """W0 = U Sigma V^T, U^T U = V^T V = I, also where Sigma has zeros; a cut leaves out the smallest values only."""
        A, B = np.random.RandomState(seed).standard_normal((2, 7, rank))
        W, (r1, r2) = A[:d1] @ B[:d2].T, size_of_M(d1, d2, **how)
        U, S, Vh = (t.numpy() for t in compute_svd(torch.from_numpy(W), **how))
        assert (U.shape, S.shape, Vh.shape) == ((d1, r1), (min(r1, r2),), (r2, d2))
        tolerance, values = rounding(torch.float64, W), np.linalg.svd(W, compute_uv=False)
        near(U.T @ U, np.eye(r1), tolerance)
        near(Vh @ Vh.T, np.eye(r2), tolerance)
        assert (np.take_along_axis(U, np.abs(U).argmax(0)[None], 0) > 0).all()  # of extra columns too (D2)
        near(S, values[: len(S)], tolerance)
        near(np.linalg.norm(W - (U[:, : len(S)] * S) @ Vh[: len(S)]), np.linalg.norm(values[len(S) :]), tolerance)

    @given(n=sizes, extra=st.integers(0, 3), wide=st.booleans(), signs=st.lists(st.sampled_from([-1, 1]), min_size=7))
    def test_signs_are_canonical_however_the_weight_was_factored(self, n, extra, wide, signs):
        """(-u_i, -v_i) serve as well as (u_i, v_i): the largest entry of each u_i is made positive (D2)."""
        rng, S, s = np.random.RandomState(n), np.arange(n, 0, -1.0), np.array(signs[:n])
        U, V = (np.linalg.qr(rng.standard_normal((rows, n)))[0] for rows in (n + extra, n))
        weights = (U * s * S) @ (V * s).T, (U * S) @ V.T  # one weight, whatever s is
        got, want = (compute_svd(torch.from_numpy(W.T if wide else W)) for W in weights)
        assert (got.U.gather(0, got.U.abs().argmax(0, keepdim=True)) > 0).all()
        near(got.U, want.U, 1e-10)
        near(got.Vh, want.Vh, 1e-10)

    def test_where_the_largest_entries_are_equal_the_first_decides_whatever_the_rounding(self):
        """Each u of a symmetric Toeplitz weight is its own mirror image, up to sign. The last bit must not choose (D2)."""
        torch.manual_seed(0)
        i = torch.arange(64)
        W = torch.randn(64, dtype=torch.float64)[(i[:, None] - i).abs()]
        for _ in range(4):  # as other roundings would have it
            near(compute_svd(W + 1e-14 * torch.randn_like(W)).U, compute_svd(W).U, 1e-6)

    @dtypes
    def test_it_is_computed_in_float64_and_kept_in_float32_or_better(self, dtype):
        """Half precision is cast up, never decomposed as it is; a float64 weight keeps float64 factors (D2)."""
        torch.manual_seed(1)
        W = torch.randn(6, 4).to(dtype)
        svd, wide = compute_svd(nn.Parameter(W)), torch.float64 if dtype == torch.float64 else torch.float32
        assert {(t.dtype, t.requires_grad) for t in svd} == {(wide, False)}
        near(svd.S, np.linalg.svd(W.double().numpy(), compute_uv=False), rounding(wide, W.double()))
        for got, exact in zip(compute_svd(W.float()), compute_svd(W.double()), strict=True):
            assert torch.equal(got, exact.float())  # the float64 result, rounded once

    @pytest.mark.parametrize("scale", [1e-100, 1e-30, 1e-10, 1e20, 1e30, 1e100], ids="{:g}".format)
    def test_the_scale_of_a_weight_does_not_matter(self, scale):
        """c W0 has the factors of W0 and c Sigma; its own SVD is accepted, that of another weight is refused."""
        dtype = torch.float64 if scale in (1e-100, 1e100) else torch.float32
        base = plain_layer(6, 4, dtype=dtype)
        W, other = torch.randn(2, 6, 4, dtype=dtype)
        base.weight.data = W * scale
        svd, scaled = compute_svd(W), compute_svd(base.weight)
        near(scaled.U, svd.U, 1e-5)
        near(scaled.S / scale, svd.S, 1e-5)
        layer = SVFTLinear(base, svd=scaled)
        layer.m.data.copy_(scale * torch.linspace(-1, 1, len(layer.m), dtype=dtype))
        near(layer.merge().weight / scale, W + svd.U @ (layer.M() / scale) @ svd.Vh, 1e-5)
        with pytest.raises(ValueError, match="svd: got U, S, Vh"):
            SVFTLinear(base, svd=compute_svd(other * scale))


class TestOmega_Section_3_1:
    """Omega says where M may be non-zero: pairs (i, j), each once, sorted."""

    @given(r1=sizes, r2=sizes, d=st.integers(0, 9), above=st.none() | st.integers(0, 9))
    def test_banded_is_its_definition(self, r1, r2, d, above):
        """M_ij = 0 if j < i - z1 or j > i + z2; the experiments use z1 = z2 = d. The edges of M cut the band."""
        z2 = d if above is None else above
        want = [[i, j] for i in range(r1) for j in range(r2) if not (j < i - d or j > i + z2)]
        assert omega_banded(r1, r2, d, above).T.tolist() == want

    @given(r1=sizes, r2=sizes)
    def test_plain_is_the_diagonal(self, r1, r2):
        """SVFT^P trains (i, i) alone, also of a wide or tall M. So it is the band of d = 0 (D9)."""
        assert omega_plain(r1, r2).T.tolist() == [[i, i] for i in range(min(r1, r2))]

    @given(n=st.integers(1, 30), d=st.integers(0, 29), more=st.integers(-3, 3))
    def test_counts_are_those_of_table_7(self, n, d, more):
        """A d1 x d2 layer with n = min(d1, d2) > d trains n values if plain, n d + (n - d)(d + 1) if banded."""
        d, shape = min(d, n - 1), (n, n + more) if more > 0 else (n - more, n)
        for pattern, count in (("plain", n), ("banded", n * d + (n - d) * (d + 1))):
            layer = SVFTLinear(plain_layer(*shape), pattern, d)
            assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == count

    @given(r1=sizes, r2=sizes, seed=st.integers(0, 2**32 - 1), data=st.data())
    def test_random_draws_k_distinct_positions_in_order(self, r1, r2, seed, data):
        """Without replacement (D3): k entries are k coefficients. One seed gives one Omega."""
        k = data.draw(st.integers(1, r1 * r2))
        omega = omega_random(r1, r2, k, seed=seed)
        pairs = list(map(tuple, omega.T.tolist()))
        assert omega.dtype == torch.int64 and len(set(pairs)) == k and pairs == sorted(pairs)
        assert all(0 <= i < r1 and 0 <= j < r2 for i, j in pairs)
        assert torch.equal(omega, omega_random(r1, r2, k, seed=seed))

    def test_random_is_the_same_on_every_machine_and_uniform(self):
        """Pinned: numpy promises never to change the stream of RandomState. Each position is drawn equally often."""
        assert omega_random(4, 4, 5).T.tolist() == [[0, 1], [1, 2], [2, 0], [2, 1], [3, 1]]
        assert not any(torch.equal(omega_random(9, 9, 20), omega_random(9, 9, 20, seed=seed)) for seed in (1, 2**31))
        assert torch.equal(omega_random(9, 9, 20, seed=-1), omega_random(9, 9, 20, seed=2**32 - 1))  # it wraps around
        hits = torch.zeros(3, 4)
        for seed in range(600):
            hits[tuple(omega_random(3, 4, 4, seed=seed))] += 1
        assert hits.sum() == 2400 and (hits - 200).abs().max() < 70  # 6 standard deviations of 11.5

    @given(d=sizes, seed=seeds, data=st.data())
    def test_top_k_takes_the_largest_alignments_of_either_sign(self, d, seed, data):
        """The k largest |u_i . v_j| (D4), against a sorted list of all, after joint sign flips too; of equal ones the first."""
        rng, r = np.random.RandomState(seed), data.draw(st.integers(1, d))
        U, V = (np.linalg.qr(rng.standard_normal((d, r)))[0] for _ in "UV")  # as rank=r leaves them
        k = data.draw(st.integers(1, r * r))
        largest = sorted(np.ndindex(r, r), key=lambda ij: -abs(U[:, ij[0]] @ V[:, ij[1]]))[:k]
        for s in (np.ones(r), rng.choice([-1.0, 1.0], r)):
            got = omega_top_k(torch.from_numpy(U * s), torch.from_numpy((V * s).T), k)
            assert got.T.tolist() == sorted(map(list, largest))
        assert omega_top_k(torch.eye(99), torch.eye(99), 101).T.tolist()[:3] == [[0, 0], [0, 1], [0, 2]]

    def test_random_and_top_k_take_as_many_entries_as_the_band_and_the_rest_ignore_d(self):
        """R_d and T_d name a budget: k equals the banded count for that d, unless k is given. Plain and a given Omega
        ignore even a d that no band could have."""
        for pattern in ("random", "top_k"):
            assert len(SVFTLinear(plain_layer(6, 6), pattern, 2).m) == 24, pattern  # 4 + 5 + 6 + 5 + 4
            assert len(SVFTLinear(plain_layer(6, 6), pattern, 2, k=7).m) == 7, pattern
        assert torch.equal(SVFTLinear(plain_layer(6, 6), "random").omega, omega_random(6, 6, 24))
        assert all(len(SVFTLinear(plain_layer(6, 4), pattern, -1).m) == 4 for pattern in ("plain", omega_plain(4, 4)))

    def test_omega_may_be_a_tensor_or_a_function_of_the_svd(self):
        """Any Omega fits Eq. (2): LoRA-XS is the top-left block, SVF the diagonal."""
        block = torch.cartesian_prod(torch.arange(2), torch.arange(2)).T.contiguous()
        layer = SVFTLinear(plain_layer(5, 4), block)
        assert torch.equal(layer.omega, block) and layer.omega.data_ptr() != block.data_ptr() and "custom" in str(layer)
        R, svd = torch.randn(2, 2, dtype=torch.float64), compute_svd(layer.weight)
        layer.m.data.copy_(R.flatten())
        near(layer.delta_weight(), svd.U[:, :2] @ R @ svd.Vh[:2], 1e-12)  # LoRA-XS: U_r R V_r^T
        scaled = SVFTLinear(plain_layer(5, 4), lambda svd: omega_plain(len(svd.S), len(svd.S)))
        scaled.m.data.copy_(svd.S * (R[0, 0] - 1))
        near(scaled.merged_weight(), (svd.U * svd.S * R[0, 0]) @ svd.Vh, 1e-12)  # SVF: U diag(sigma z) V^T


class TestTheLayer_Eq_1_and_2:
    """h = W0 x + U M V^T x + b, the same on all paths; m alone trains, and it starts at zero."""

    @devices
    @given(layer=layers(), lead=leading, seed=seeds)
    def test_every_path_equals_W0_plus_U_M_Vt_in_value_and_gradient(self, layer, lead, seed, device):
        """h = W0 x + U M V^T x + b, with Delta W summed over (i, j); dL/dx, and dL/dm = (U^T G V) on Omega."""
        torch.manual_seed(seed)
        W0, delta, b = weight_of(layer.base[0]), delta_by_double_loop(layer), layer.base[0].bias.detach().numpy()
        x, g = (torch.randn(*lead, d, dtype=torch.float64) for d in W0.T.shape)
        tolerance = rounding(torch.float64, W0, delta, x, g)
        x_there = x.to(device, copy=True).requires_grad_()
        h = layer.to(device)(x_there)
        near(h, x.numpy() @ (W0 + delta).T + b, tolerance)
        h.backward(g.to(device))
        near(x_there.grad, g.numpy() @ (W0 + delta), tolerance)
        G = g.reshape(-1, len(W0)).numpy().T @ x.reshape(-1, len(W0.T)).numpy()  # dL/dW, (d1, d2)
        near(layer.m.grad, gradient_by_double_loop(layer, G), tolerance)

    @given(layer=layers())
    def test_delta_weight_is_the_sum_of_rank_one_terms(self, layer):
        """Eq. (2): Delta W = sum of m_ij u_i v_j^T; M() holds m on Omega and zero elsewhere. All carry
        gradients to m, and to nothing else, whatever requires_grad says: a penalty on Delta W trains m alone."""
        delta, tolerance = delta_by_double_loop(layer), rounding(torch.float64, layer.S, layer.m.detach())
        near(layer.delta_weight(), delta, tolerance)
        near(layer.merged_weight(), weight_of(layer.base[0]) + delta, tolerance)
        assert torch.equal(layer.M()[tuple(layer.omega)], layer.m) and int((layer.M() != 0).sum()) == len(layer.m)
        G = torch.randn(delta.shape, dtype=torch.float64)
        names, parameters = zip(*layer.requires_grad_(True).named_parameters(), strict=True)
        for W in (layer.delta_weight(), layer.merged_weight(), layer.U.detach() @ layer.M() @ layer.Vh.detach()):
            gradients = torch.autograd.grad((W * G).sum(), parameters, allow_unused=True)
            near(gradients[names.index("m")], gradient_by_double_loop(layer, G), rounding(torch.float64, G))
            assert [name for name, g in zip(names, gradients, strict=True) if g is not None] == ["m"]

    @devices
    @dtypes
    def test_training_starts_at_W0(self, dtype, device):
        """m = 0 (D6) leaves the output bit-identical on dense and gather; on fused, to the rounding of U and Vh (D14)."""
        for d1, kind, path in [(d1, kind, path) for d1 in (9, 1) for kind in ("linear", "conv1d") for path in PATHS]:
            base = plain_layer(d1, 7, kind, dtype).to(device)  # d1 = 1: a vector in disguise, for BLAS
            layer = SVFTLinear(base, path=path)
            for shape in [(7,), (5, 7), (2, 3, 7), (0, 7), (1, 1, 1, 7)]:
                x = torch.randn(shape, device=device).to(dtype)
                tolerance = rounding(dtype, base.weight.detach().cpu().double(), x.cpu().double())
                near(layer(x), base(x), tolerance if path == "fused" else 0, (d1, kind, path, shape))
                assert layer(x).dtype == dtype
            layer.m.data += 1
            assert not torch.equal(layer(x), base(x)), (d1, kind, path)

    @pytest.mark.parametrize("path", PATHS)
    def test_only_m_trains_and_no_gradient_reaches_W0_U_S_or_Vh_whatever_requires_grad_says(self, path):
        """Each entry of m moves, and no bit of the rest, weight decay or not. If all of the model is unfrozen, the
        biases and the plain layers train too, and U, S and Vh are still the SVD of W0."""
        model = svft.inject(mlp(), ["0", "2"], path=path)
        for unfrozen in (False, True):
            if unfrozen:
                model.requires_grad_(True)
            before = copy.deepcopy(model)
            steps(model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1))
            for name, now in model.named_parameters():
                factor = name in ("0.weight", "2.weight") or name.endswith(("U", "S", "Vh"))
                trains = not factor and (unfrozen or name.endswith("m"))
                moved = now != before.get_parameter(name)
                assert moved.all() if trains else now.grad is None and not moved.any(), (name, unfrozen)

    @pytest.mark.parametrize("path", PATHS)
    def test_an_input_may_have_any_strides(self, path):
        """Attention hands over transposed views: h is that of a contiguous copy."""
        layer, x = randomize(SVFTLinear(plain_layer(6, 4), path=path)), torch.randn(4, 3, 2).double().permute(2, 1, 0)
        near(layer(x), layer(x.contiguous()), 1e-12)

    def test_an_empty_batch_works_with_any_number_of_threads(self):
        """With one thread embedding_bag takes no columns, with more it refuses them."""
        for threads in (1, 2, torch.get_num_threads()):
            torch.set_num_threads(threads)
            assert SVFTLinear(plain_layer(9, 7, dtype=torch.float32), path="gather")(torch.ones(0, 7)).shape == (0, 9)


class TestLemma_a_structure:
    """If M is diagonal, the new weight has the singular vectors of W0, up to order and sign."""

    @given(n=st.integers(2, 6), seed=seeds)
    def test_a_diagonal_M_keeps_the_singular_vectors_up_to_order_and_sign(self, n, seed):
        """W0 + U M V^T = U (Sigma + M) V^T: its singular values are |Sigma + M|, its vectors those of W0, re-ordered."""
        layer, rng = SVFTLinear(plain_layer(n, n, seed=seed), "plain"), np.random.RandomState(seed)
        target = rng.permutation(np.arange(1.0, n + 1)) * rng.choice([-1, 1], n)  # distinct, not zero, any order
        layer.m.data.copy_(torch.from_numpy(target) - layer.S)
        U, S, Vh = np.linalg.svd(layer.merged_weight().detach().numpy())
        order = np.argsort(-np.abs(target))
        near(S, np.abs(target)[order], 1e-9)
        near(np.abs(layer.U.detach().numpy()[:, order].T @ U), np.eye(n), 1e-6)
        near(np.abs(layer.Vh.detach().numpy()[order] @ Vh.T), np.eye(n), 1e-6)

    def test_where_sigma_plus_M_is_zero_the_sign_formula_of_the_paper_loses_a_vector(self):
        """With sign(0) = 0, sign(Sigma + M) V^T is no orthonormal basis there; the rank of the new weight falls too."""
        layer = SVFTLinear(plain_layer(4, 4), "plain")
        layer.m.data[1] = -layer.S[1]
        basis = torch.sign(layer.S + layer.m)[:, None] * layer.Vh
        assert torch.linalg.matrix_rank(layer.merged_weight()) == torch.linalg.matrix_rank(basis) == 3

    def test_a_banded_M_need_not_keep_the_singular_vectors(self):
        """Off-diagonal entries mix directions: some new u is no old u."""
        layer = randomize(SVFTLinear(plain_layer(5, 5), "banded", 1))
        U = torch.linalg.svd(layer.merged_weight())[0]
        assert (layer.U.T @ U).abs().amax(0).min() < 0.99


class TestLemma_b_expressivity:
    """With the full SVD and every (i, j) in Omega, some M reaches any target P."""

    def reached_for(self, shape, seed=0, **how):
        """A random P, and a layer with every (i, j) in Omega and the least-squares M, which is U^T (P - W0) V."""
        base, (r1, r2) = plain_layer(*shape, seed=seed), size_of_M(*shape, **how)
        layer = SVFTLinear(base, torch.cartesian_prod(torch.arange(r1), torch.arange(r2)).T, **how)
        P = torch.randn(*shape, dtype=torch.float64)
        layer.m.data.copy_((layer.U.T @ (P - base.weight.detach()) @ layer.Vh.T).flatten())
        return P, layer

    @given(d1=sizes, d2=sizes, seed=seeds)
    def test_with_the_full_svd_every_target_is_reached(self, d1, d2, seed):
        """M = U^T (P - W0) V gives W0 + U M V^T = P for every P, when M is d1 x d2 (D1)."""
        P, layer = self.reached_for((d1, d2), seed, full_matrices=True)
        near(layer.merged_weight(), P, rounding(torch.float64, P, layer.weight.detach()))

    @pytest.mark.parametrize("shape", [(6, 3), (3, 6)], ids=str)
    def test_with_the_thin_svd_of_a_rectangular_weight_it_fails(self, shape):
        """Only P - W0 in span(U) x span(V) is reached; the best M leaves what lies outside of that span (D1)."""
        P, layer = self.reached_for(shape)
        gap = P - layer.weight
        outside = gap - layer.U @ layer.U.T @ gap @ layer.Vh.T @ layer.Vh
        assert outside.norm() > 0.1 * gap.norm()
        near(P - layer.merged_weight(), outside, rounding(torch.float64, gap))


class TestLemma_c_rank:
    """rank(Delta W) = rank(M) <= min(k, d1, d2); the term rank of Omega is the sharper bound."""

    @given(layer=layers(), data=st.data())
    def test_rank_is_at_most_term_rank_is_at_most_min_k_d1_d2_and_a_random_M_attains_it(self, layer, data):
        """For every m, zeros and repeated values too. In general position rank(M) is the term rank (D10)."""
        rank, term, bound = layer.check_rank()
        (d1, d2), k, values = layer.delta_weight().shape, len(layer.m), st.sampled_from([0.0, 1.0, -1.0, 2.0])
        assert rank == term <= bound == svft.rank_bound(layer.omega, (d1, d2)) == min(k, d1, d2)
        layer.m.data.copy_(torch.tensor(data.draw(st.lists(values, min_size=k, max_size=k))))
        rank = np.linalg.matrix_rank(delta_by_double_loop(layer), tol=1e-9)
        assert layer.check_rank() == (rank, term, bound) and rank <= term

    def test_term_rank_is_the_largest_matching(self):
        """Against all ways to give each row a column of its own: every Omega of a 3 x 3 M, and some of a 5 x 4 one.
        Indices near 2**40 count the same."""
        every = [[ij for t, ij in enumerate(np.ndindex(3, 3)) if chosen >> t & 1] for chosen in range(1, 2**9)]
        some = [omega_random(5, 4, k, seed=seed) for k in range(1, 21) for seed in range(5)]
        for omega in [*(torch.tensor(pairs).T for pairs in every), *some]:
            pairs = {*map(tuple, omega.T.tolist())}
            best = max(sum(ij in pairs for ij in enumerate(columns)) for columns in itertools.permutations(range(5)))
            assert svft.term_rank(omega) == svft.term_rank(2**40 * omega + 7) == best, pairs

    def test_entries_piled_up_in_one_row_have_rank_one(self):
        """Four entries share a row: lemma (c) allows rank 4, the term rank says 1, and so it is."""
        layer = randomize(SVFTLinear(plain_layer(5, 5), torch.tensor([[2, 2, 2, 2], [0, 1, 3, 4]])))
        assert layer.check_rank() == (1, 1, 4)

    def test_a_rank_above_its_bound_raises(self, monkeypatch):
        """check_rank compares what it found; it does not assume the lemma. NaN or inf raises ValueError."""
        layer = randomize(SVFTLinear(plain_layer(4, 4)))
        for name in ("term_rank", "rank_bound"):
            with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="rank"):
                patch.setattr(svft, name, lambda *_: 1)
                layer.check_rank()
        layer.m.data[0] = math.inf
        with pytest.raises(ValueError, match="m: got NaN or inf"):
            layer.check_rank()

    @given(layer=layers())
    def test_norm_and_inner_product_carry_over_from_M(self, layer):
        """U and V are orthonormal: ||Delta W||_F = ||m||, and <Delta W, W0> = <M, Sigma>."""
        delta, m, W0 = layer.delta_weight().detach(), layer.m.detach(), torch.from_numpy(weight_of(layer.base[0]))
        near(delta.norm(), m.norm(), rounding(torch.float64, m))
        diagonal = [float(m[t] * layer.S[i]) for t, (i, j) in enumerate(layer.omega.T.tolist()) if i == j]
        near((delta * W0).sum(), sum(diagonal), rounding(torch.float64, m, layer.S))


# ---------------------------------------------------------------- a whole model


class TestInject:
    """inject replaces the targets by SVFTLinear, in place, and freezes all but m."""

    def test_targets_are_matched_by_whole_names_or_their_ends(self):
        """A list holds names or their ends at a dot, a string is one regular expression; each must match (D13)."""
        model = nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"c_fc": nn.Linear(4, 3)}) for _ in "ab")})
        model["head"] = nn.Linear(3, 2)
        both = ["h.0.c_fc", "h.1.c_fc"]
        for targets, names in [
            (["c_fc"], both),
            (iter(["1.c_fc", "head"]), ["h.1.c_fc", "head"]),
            (r"h\.\d+\.c_fc", both),
            (r".*(c_fc|head)", [*both, "head"]),
        ]:
            assert adapted(svft.inject(copy.deepcopy(model), targets)) == names, targets
        for targets in (r".*c_f", ("fc",), "c_fc", ["c_fc", "absent"]):
            with refused(model, ValueError, r"h\.0\.c_fc"):
                svft.inject(model, targets)

    def test_all_linear_takes_every_linear_layer_but_the_output_embedding_and_heads_that_are_drawn_anew(self):
        """nn.Linear and Conv1D, wherever they stand (D13). Each new model draws another head: a file with an adapted one
        would load nowhere else. One warning names such heads, a list takes them. Of the output embedding no word."""
        model = nn.ModuleDict({"wte": nn.Embedding(5, 4), "fc": Conv1D(3, 4), "deep": nn.Sequential(nn.Linear(3, 4))})
        model["lm_head"], model["score"], model["qa_outputs"] = nn.Linear(4, 5), nn.Linear(4, 2), nn.Linear(4, 2)
        model["classifier"] = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        model.get_output_embeddings = lambda: model["lm_head"]  # as a model of transformers has it
        with pytest.warns(UserWarning) as caught:
            assert adapted(svft.inject(nn.Sequential(model), "all-linear")) == ["0.fc", "0.deep.0"]
        (text,) = (str(warning.message) for warning in caught)
        assert all(f"'0.{name}'" in text for name in ("score", "qa_outputs", "classifier.0", "classifier.2"))
        assert caught[0].filename == __file__ and "lm_head" not in text
        assert "score" in adapted(svft.inject(model, ["score"]))

    @pytest.mark.filterwarnings("error::UserWarning")
    def test_a_stack_of_weights_is_warned_of_and_stays_as_it_is(self):
        """The experts of a mixture are 3-d Parameters: an entry that names them too reaches the linear layers alone."""
        model = nn.ModuleDict({"shared": nn.ModuleDict({"down_proj": nn.Linear(4, 3)}), "experts": nn.Module()})
        model["experts"].down_proj = nn.Parameter(torch.randn(2, 3, 4))
        model["experts"] = torch.compile(model["experts"])  # whose own name is left out
        model["conv"] = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3))  # no stack, nor is what follows
        model.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        svft.inject(copy.deepcopy(model), ["shared.down_proj"])  # no warning here
        for targets in (["down_proj"], r".*down_proj", "all-linear"):
            with pytest.warns(UserWarning, match=r"\['experts.down_proj'\]"):
                assert adapted(svft.inject(copy.deepcopy(model), targets)) == ["shared.down_proj"]
        with pytest.warns(UserWarning), refused(model, ValueError, "got .'experts.down_proj'., which matches no layer"):
            svft.inject(model, ["shared.down_proj", "experts.down_proj"])
        del model["shared"]
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"'experts.down_proj'"):
            svft.inject(model, ["down_proj"])

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, torch.OutOfMemoryError])
    def test_an_error_or_ctrl_c_in_the_last_layer_leaves_the_model_as_it_was(self, error):
        """All layers are made before the first is replaced; the error keeps its type and names the layer."""

        def pattern(svd):
            if len(svd.U) == 4:
                raise error("stop")
            return omega_plain(5, 5)

        model = mlp()
        with refused(model, error, "stop" if error is KeyboardInterrupt else "layer '4': stop"):
            svft.inject(model, ["0", "2", "4"], pattern)

    def test_it_freezes_all_but_m_and_keeps_the_m_of_an_earlier_inject(self, tmp_path):
        """What trains is decided by identity: another parameter called m is frozen. Loading into a live model freezes nothing."""
        model = mlp()
        wrapper = nn.ModuleDict({"module": model})  # as DDP is one
        wrapper.register_parameter("m", nn.Parameter(torch.ones(1)))
        assert svft.inject(wrapper, ["0", "2"]) is wrapper and "banded d=2" in str(model[0])  # the default
        model[2].m.requires_grad_(False)  # what the user has frozen stays frozen
        svft.inject(model, ["4"], "random", 1)
        assert [n for n, p in wrapper.named_parameters() if p.requires_grad] == ["module.0.m", "module.4.m"]
        model[2].requires_grad_(True)
        svft.save_adapter(randomize(model), tmp_path / "a.npz")
        assert svft.load_adapter(model, tmp_path / "a.npz")[2].weight.requires_grad

    def test_random_draws_another_omega_for_each_layer_from_one_seed(self):
        """The seed of a layer is seed + CRC-32 of its name, so layers of equal shape do not share an Omega."""
        for seed, how in ((0, {}), (3, {"seed": 3})):
            model = svft.inject(nn.Sequential(*(nn.Linear(8, 8) for _ in "ab")), ["0", "1"], "random", **how)
            assert not torch.equal(model[0].omega, model[1].omega)
            for name, layer in model.named_children():
                assert torch.equal(layer.omega, omega_random(8, 8, 34, seed=seed + zlib.crc32(name.encode())))

    def test_W0_and_bias_are_shared_with_the_base_and_every_tensor_is_contiguous(self):
        """The base does not change. safetensors and FSDP2 want contiguous tensors, whatever was given."""
        base = plain_layer(6, 6).eval()
        base.bias.data = base.bias.data.float()  # of a dtype of its own
        svd = SVD(*(torch.stack([t, t], -1)[..., 0] for t in compute_svd(base.weight)))  # with gaps
        before, layer = snapshot(base), SVFTLinear(base, omega_plain(6, 6).T.contiguous().T, svd=svd)
        assert layer.weight.data_ptr() == base.weight.data_ptr() and layer.bias.data_ptr() == base.bias.data_ptr()
        assert not layer.training and SVFTLinear(base, keep_weight=False).weight is None
        assert all(t.is_contiguous() for t in (*layer.parameters(), *layer.buffers()))
        assert layer.bias.dtype == layer.merge().bias.dtype == torch.float32
        assert_untouched(base, before)


SPOILT = [  # what was done to the adapted model m before it is merged; what the error says
    ("m[4].m.data[0] = math.nan", "m: got NaN or inf"),
    ("m[4].m.data[0] = 1e38", "merged weight: got NaN or inf"),  # an overflow, when rounded to float16
    ("m[4] = SVFTLinear(mlp()[4], 'plain', rank=2); m[4].omega[1, 1] = 3", "omega: got"),  # M is 2 x 2, Vh is 2 x 6
    ("m[4].weight.data += 1", "W0"),  # as if it had been loaded again from elsewhere
    ("m[4].register_forward_hook(print)", "hook"),  # the plain layer would not have it
]


class TestMerge:
    """merge turns each SVFTLinear into a plain layer with the weight W0 + U M V^T."""

    @given(layer=layers(), lead=leading)
    def test_the_merged_layer_computes_what_the_adapted_one_did(self, layer, lead):
        """h = (W0 + U M V^T) x + b as one plain matrix; merging changes neither the layer nor a second merge."""
        x = torch.randn(*lead, layer.in_features, dtype=torch.float64)
        merged, again = layer.merge(), svft.merge(layer)
        near(merged(x), layer(x), rounding(torch.float64, layer.S, layer.m.detach(), x))
        assert torch.equal(merged.weight, again.weight) and merged.weight.is_contiguous()
        assert np.abs(weight_of(merged) - weight_of(layer.base[0])).max() > 1e-9  # and it did change

    @devices
    @pytest.mark.parametrize("kind", ["linear", "conv1d"])
    @dtypes
    def test_type_layout_dtype_device_bias_and_mode_are_kept(self, kind, dtype, device):
        """A plain layer of the type of the base, frozen, with memory of its own."""
        base = plain_layer(6, 6, kind, dtype).to(device).eval()
        np.random.random()  # as a script does that draws its batches
        states = lambda: (torch.get_rng_state().tolist(), str(np.random.get_state()))  # noqa: E731
        before, svd = states(), compute_svd(base.weight.detach() if kind == "linear" else base.weight.detach().T)
        layer = randomize(SVFTLinear(base, svd=svd))
        merged = layer.merge()
        assert states() == before  # the checks draw from a generator of their own, and no weight is drawn
        assert type(merged) is type(base) and merged.extra_repr() == base.extra_repr()
        assert merged.weight.shape == base.weight.shape and merged.weight.is_contiguous()
        assert (merged.weight.dtype, merged.weight.device) == (dtype, base.weight.device)
        assert torch.equal(merged.bias, base.bias) and merged.bias.data_ptr() != base.bias.data_ptr()
        assert not (merged.training or merged.weight.requires_grad or merged.bias.requires_grad)
        assert layer.train().merge().training and SVFTLinear(plain_layer(3, 2, bias=False)).merge().bias is None

    @W0_kept_or_freed
    def test_a_half_precision_merge_rounds_once(self, keep):
        """The nearest bfloat16 to W0 + Delta W, on the fused path too; to U Sigma V^T + Delta W where W0 is freed."""
        layer = randomize(SVFTLinear(plain_layer(8, 8, dtype=torch.bfloat16), path="fused", keep_weight=keep))
        U, S, Vh = (t.detach().double() for t in (layer.U, layer.S, layer.Vh))
        exact = torch.from_numpy(delta_by_double_loop(layer)) + (layer.weight.double() if keep else (U * S) @ Vh)
        got = layer.merge().weight
        other = torch.nextafter(got, torch.where(exact > got.double(), math.inf, -math.inf).to(got))
        assert ((got.double() - exact).abs() <= (other.double() - exact).abs() * (1 + 1e-4)).all()

    @pytest.mark.filterwarnings("error")
    def test_it_warns_with_the_figure_where_rounding_swallows_the_update(self):
        """bfloat16 has 8 bits: an update far below the last bit of W0 is mostly lost, and merge says how much."""
        layer = randomize(SVFTLinear(plain_layer(32, 32, dtype=torch.bfloat16)), 1e-4)
        with pytest.warns(UserWarning, match=r"loses \d\d+% of the update") as caught:
            layer.merge(), svft.merge(copy.deepcopy(nn.Sequential(layer)))
        assert [warning.filename for warning in caught] == 2 * [__file__]  # at the caller's line
        randomize(layer, 1.0).merge()
        randomize(SVFTLinear(plain_layer(32, 32, dtype=torch.float32)), 1e-4).merge()
        for keep in (True, False):
            SVFTLinear(plain_layer(32, 32, dtype=torch.bfloat16), keep_weight=keep).merge()  # m = 0: nothing to lose

    @pytest.mark.parametrize("change, text", SPOILT, ids=[row[0] for row in SPOILT])
    def test_what_would_come_out_wrong_is_refused_and_the_model_left_alone(self, change, text):
        """The error names the layer and what may have happened to it. Nothing is merged."""
        m = randomize(svft.inject(mlp(dtype=torch.float16), ["0", "2", "4"]))
        exec(change, dict(globals(), m=m))
        with refused(m, ValueError, f"layer '4': .*{text}"):
            svft.merge(m)

    def test_merging_twice_equals_merging_once(self):
        """A whole model is merged in place, and what trains beside m still trains. The second merge finds nothing."""
        model, x = randomize(svft.inject(mlp(), ["0", "2"])), torch.randn(3, 5)
        want, head = model(x), model[4].requires_grad_(True)
        places = nn.ModuleDict({"model": model, "layer": model[2]})  # one layer in two of them
        assert svft.merge(places) is places and not adapted(places) and places["layer"] is model[2]
        assert head.weight.requires_grad
        near(model(x), want, 1e-5)
        before = snapshot(model)
        assert_untouched(svft.merge(model), before)


class TestDisabledAndSummary:
    """disabled gives the base model back for a while; summary is a table of what is adapted."""

    @W0_kept_or_freed
    def test_inside_disabled_the_model_is_the_base_model(self, keep):
        """Blocks nest: the outer one still holds when the inner one ends, also by an exception."""
        base, x = mlp(), torch.randn(3, 5)
        base[2] = Conv1D(6, 6)
        model = randomize(svft.inject(copy.deepcopy(base), ["0", "2", "4"], keep_weight=keep))
        out, want, tolerance = model(x), base(x), 0 if keep else 1e-5
        with svft.disabled(model) as outer:
            with contextlib.suppress(ZeroDivisionError), svft.disabled(model):
                near(model(x), want, tolerance)
                1 / 0  # noqa: B018
            near(outer(x), want, tolerance)
            assert (svft.merge(copy.deepcopy(model))(x) - want).abs().max() > 1e-3  # merging is not disabled
        assert torch.equal(model(x), out) and (out - want).abs().max() > 1e-3

    @W0_kept_or_freed
    def test_summary_lists_layers_shapes_patterns_counts_and_shares(self, keep):
        """The bytes are all that a layer holds; |M| / |Sigma| is |Delta W| / |W0|; the share is of the base model."""
        model = randomize(svft.inject(mlp(), ["0", "4"], "banded", 1, keep_weight=keep))
        header, first, second, layers, last = (re.split(r"\s{2,}", line) for line in svft.summary(model).splitlines())
        assert header == ["layer", "shape", "pattern", "k", "path", "bytes", "|M|/|Sigma|"]
        held = 4 * (30 * keep + 6 + 30 + 5 + 25 + 13) + 8 * 2 * 13  # W0, b, U, S, Vh, m; omega
        ratio = np.linalg.norm(delta_by_double_loop(model[0])) / np.linalg.norm(weight_of(mlp()[0]))
        assert first == ["0", "6 x 5", "banded d=1", "13", "auto", str(held), f"{ratio:.2g}"]
        assert layers == [f"2 layers, {held + int(second[5]):,} bytes"]
        assert last == [f"trained: 23 parameters, {23 / 106:.3%} of the base model's 106"]  # 36 + 42 + 28

    def test_a_model_of_many_layers_or_without_parameters_has_a_summary(self):
        """0 layers, 0 of 0 parameters: no division by zero. Layers stand in the order of the model."""
        model = svft.inject(nn.Sequential(*(nn.Linear(2, 2) for _ in range(11))), "all-linear", "plain")
        head, *rows = svft.summary(model).splitlines()[:12]
        assert [row.split()[0] for row in rows] == [str(i) for i in range(11)]
        assert {row.index("auto") for row in rows} == {head.index("path")}  # it stands under its head
        assert svft.summary(nn.Tanh()).endswith("trained: 0 parameters, 0.000% of the base model's 0")


class TestDtypesAndAutocast:
    """U and Vh have the dtype of the weight; m, S and the sparse step are float32 or better (D12)."""

    @pytest.mark.parametrize("path, keep", [*((path, True) for path in PATHS), ("dense", False), ("fused", False)])
    @pytest.mark.parametrize("kind", ["float16", "bfloat16", "autocast"])
    def test_half_precision_agrees_with_float64_to_its_own_rounding(self, kind, path, keep):
        """A layer in half precision, or one in float32 under autocast, where each product runs in half precision.
        The output is half, m and its gradient are float32. fused rounds W0 (D14), and is allowed when asked for."""
        amp, dtype = kind == "autocast", torch.float16 if kind == "float16" else torch.bfloat16
        base, x = plain_layer(48, 40, dtype=torch.float32 if amp else dtype), torch.randn(3, 40).to(dtype)
        layer = randomize(SVFTLinear(base, path=path, keep_weight=keep, svd=compute_svd(base.weight.detach().double())))
        delta, b = delta_by_double_loop(layer), base.bias.detach().double().numpy()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            h = layer(x)
            near(layer.delta_weight(), delta, 1e-5 * np.abs(delta).max())  # in float32, autocast or not
        want = x.double().numpy() @ (weight_of(base) + delta).T + b
        for got in (h, layer.merge()(x.to(base.weight.dtype))):
            near(got, want, 16 * torch.finfo(dtype).eps * np.abs(want).max())
        h.float().sum().backward()
        assert (layer.U.dtype, layer.S.dtype, layer.m.dtype) == (base.weight.dtype, torch.float32, torch.float32)
        assert h.dtype == dtype and layer.m.grad.dtype == torch.float32 and (layer.m.grad != 0).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("path, keep", [("dense", True), ("gather", True), ("dense", False), ("fused", False)])
    def test_the_sparse_step_loses_nothing_in_half_precision(self, path, keep, dtype):
        """By hand: U = I and v_1 = (1, 1) / sqrt(2). The first row of M, plus Sigma where W0 is freed, is
        (1 + e, -1) s: at x = (1, 0) it gives e s v_11, of which nothing is left if 1 + e is rounded to 1."""
        base, e = nn.Linear(2, 2, bias=False), torch.finfo(dtype).eps / 8
        base.weight.data = torch.tensor([[3.0, 3], [1, -1]])
        layer = SVFTLinear(base.to(dtype), path=path, keep_weight=keep)
        s = 1.0 if keep else layer.S[0].item()
        layer.m.data.copy_(torch.tensor([s * (1 + e) if keep else s * e, -s, 0, 0]))
        if keep:
            layer.weight.data.zero_()
        h, want = layer(torch.tensor([1.0, 0]).to(dtype))[0], e * s * float(layer.Vh[0, 0])
        near(h, want, 2 * torch.finfo(dtype).eps * want)

    def test_no_switch_of_torch_changes_a_check_or_a_merge(self):
        """TF32, set_float32_matmul_precision and autocast touch float32 products alone: checks and merges are float64."""
        base, seen = plain_layer(9, 7, dtype=torch.float32), []
        svd = compute_svd(base.weight)

        def merged():
            return [randomize(SVFTLinear(base, svd=svd, keep_weight=keep)).merge().weight for keep in (True, False)]

        class Products(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if func in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul, torch.linalg.svd):
                    seen.append(args[0].dtype)
                return func(*args, **(kwargs or {}))

        want = [*svd, *merged()]
        with contextlib.ExitStack() as undo, torch.autocast("cpu", dtype=torch.bfloat16), Products():
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("medium")  # allows TF32 too
            assert all(map(torch.equal, [*compute_svd(base.weight), *merged()], want))
        assert len(seen) > 8 and set(seen) == {torch.float64}

    def test_M_Delta_W_and_the_merged_weight_are_float32_at_least(self):
        """Also where a later .to(dtype) has made m half; never float64, in which they are computed."""
        layer = SVFTLinear(plain_layer(6, 4)).bfloat16()
        assert {W.dtype for W in (layer.M(), layer.delta_weight(), layer.merged_weight())} == {torch.float32}


def multiply_adds(layer, x):
    """For each path that the layer can take, what FlopCounterMode counts, with backward where gradients are on."""
    counts = {}
    for path in (*PATHS, "auto"):
        with contextlib.suppress(ValueError), FlopCounterMode(display=False) as counter:
            layer.path = path  # or ValueError
            h = layer(x)
            if h.requires_grad:
                h.sum().backward()
            counts[path] = counter.get_total_flops() // 2
    return counts


def path_taken(layer, tokens, grad=False):
    """The path that `auto` takes: the one of as many multiply-adds."""
    x = torch.empty(tokens, layer.in_features, dtype=layer.U.dtype, device=layer.U.device, requires_grad=grad)
    counts = multiply_adds(layer, x)
    (taken,) = [path for path in counts if path != "auto" and counts[path] == counts["auto"]]
    return taken


def on_meta(d1, d2, dtype):
    """A layer of any size on a device that computes nothing, banded, d = 2."""
    layer, n = SVFTLinear(nn.Linear(2, 2, dtype=dtype)).to("meta"), min(d1, d2)
    shapes = {"weight": (d1, d2), "bias": (d1,), "U": (d1, n), "S": (n,), "Vh": (n, d2), "m": (5 * n - 6,)}
    for name, shape in shapes.items():
        setattr(layer, name, nn.Parameter(layer.get_parameter(name).new_empty(shape), requires_grad=name == "m"))
    layer.omega = layer.omega.new_empty(2, 5 * n - 6)
    layer.out_features, layer.in_features = d1, d2
    return layer


def held_for_backward(layer, x):
    """Bytes that forward leaves for backward, beyond the layer's own tensors and the input x."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers(), x)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage()) or t, lambda t: t):
        layer(x)
    return sum({t.data_ptr(): t.nbytes() for t in kept if t.data_ptr() not in own}.values())


class TestCost:
    """`auto` takes the path with the fewest multiply-adds (D11). Memory is counted; no test looks at a clock."""

    @pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
    def test_auto_takes_the_path_with_the_fewest_multiply_adds(self, train):
        """Counted by torch, forward and backward. Leading dimensions count as tokens."""
        shapes = [(64, 64), (128, 32), (32, 128)]
        for shape, tokens, keep in [(s, T, keep) for s in shapes for T in (1, 16, 4096) for keep in (True, False)]:
            layer = SVFTLinear(plain_layer(*shape, dtype=torch.float32), "plain", keep_weight=keep)
            x = torch.randn(4, -(-tokens // 4), shape[1], requires_grad=train)
            with torch.set_grad_enabled(train):
                counts = multiply_adds(layer, x)
            assert counts["auto"] == min(counts.values()) < max(counts.values()), (shape, tokens, keep, counts)

    @W0_kept_or_freed
    def test_auto_knows_what_a_dense_band_costs_and_where_fused_would_round_or_cut(self, keep):
        """A sparse multiply-add counts as 12 dense ones on the CPU. fused would round W0 if half (D14), and cut it to a rank (D8)."""
        square = plain_layer(64, 64, dtype=torch.float32)
        assert path_taken(SVFTLinear(square, "banded", 0, keep_weight=keep), 80) == "fused"
        assert path_taken(SVFTLinear(square, "banded", 8, keep_weight=keep), 80) == "dense"
        few, last = ("gather", 42) if keep else ("fused", 65)  # it and dense count alike at 42.7, at 65.4 tokens
        for base, amp in ((square, True), (plain_layer(64, 64, dtype=torch.bfloat16), False)):
            layer = SVFTLinear(base, keep_weight=keep)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
                assert (path_taken(layer, last), path_taken(layer, last + 1)) == (few, "dense")
        cut = SVFTLinear(square, rank=9)
        with refused(cut, ValueError, "path: got 'fused'"):
            cut.path = "fused"
        assert {path_taken(cut, tokens) for tokens in (2, 9999)} == {"gather"}

    def test_auto_is_within_a_quarter_of_the_fastest_path_that_an_H200_recorded(self):
        """All 42 cells of studies/runs/h200-paths.csv, by kernel and by wall time; d = 2. In bfloat16 fused is left out."""
        cells, ratios = {}, []
        with open(HERE / "studies" / "runs" / "h200-paths.csv", newline="") as file:
            for row in csv.DictReader(file):
                cell = cells.setdefault((row["mode"], *(int(row[name]) for name in ("d1", "d2", "T", "training"))), {})
                cell[row["form"].partition(",")[0]] = float(row["kernel_ms"]), float(row["wall_ms"])
        for (mode, d1, d2, T, training), times in cells.items():
            half = mode == "bf16"  # there fused would round W0
            layer, may_take = on_meta(d1, d2, torch.bfloat16 if half else torch.float32), PATHS[: 2 if half else 3]
            with torch.set_grad_enabled(bool(training)):
                path = path_taken(layer, T, grad=True)
            ratios += [times[path][clock] / min(times[p][clock] for p in may_take) for clock in (0, 1)]
            assert max(ratios[-2:]) <= 1.25, (mode, d1, d2, T, training, path)
        assert len(cells) == 42 and max(ratios) > 1.05  # some cell was no tie

    def test_M_is_gathered_on_the_cpu_and_multiplied_as_a_dense_matrix_elsewhere(self, monkeypatch):
        """On the CPU embedding_bag reads the rows that M needs; a GPU multiplies a dense r1 x r2 matrix faster (D11)."""
        real, gathered = nn.functional.embedding_bag, []
        spy = lambda *a, **k: gathered.append(a[1].device.type) or real(*a, **k)  # noqa: E731
        monkeypatch.setattr(nn.functional, "embedding_bag", spy)
        layer, products = on_meta(30, 20, torch.float32), 7 * (30 * 20 + 30 * 20 + 20 * 20)  # 7 tokens: W0, U, V^T
        with torch.no_grad():
            assert multiply_adds(layer, torch.empty(7, 20, device="meta"))["gather"] == products + 7 * 20 * 20
            layer = SVFTLinear(plain_layer(30, 20, dtype=torch.float32))
            assert multiply_adds(layer, torch.ones(7, 20))["gather"] == products and set(gathered) == {"cpu"}

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
    def test_what_forward_keeps_for_backward_does_not_grow_with_k(self, path, kind):
        """gather and fused: one (n, T) float32 tensor; dense: one d1 x d2 matrix, and in bf16 V^T in float32 (D11).
        Autocast adds the bf16 copies that it makes of what is multiplied, of a plain layer's weight and input too."""
        d1, d2, T = 96, 64, 40
        n, dtype = min(d1, d2), torch.bfloat16 if kind == "bfloat16" else torch.float32
        dense = {"float32": 4 * d1 * d2, "bfloat16": 2 * d1 * d2 + 4 * n * d2, "autocast": 2 * d1 * d2}
        copies = {"dense": d1 * n + T * d2, "gather": d1 * n + n * d2 + d1 * d2, "fused": d1 * n + n * d2 + n * T}
        limit = (dense[kind] if path == "dense" else 4 * n * T) + 2 * copies[path] * (kind == "autocast")
        limit += 2 * n * T * (path == "fused" and kind == "bfloat16")  # what U is multiplied by, in bfloat16
        for d in (0, 16):
            layer = randomize(SVFTLinear(plain_layer(d1, d2, dtype=dtype), "banded", d, path=path))
            x = torch.randn(T, d2).to(dtype).requires_grad_()
            small = 16 * len(layer.m) + 64 * d1  # embedding_bag's own index lists: some bytes an entry and a row
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                assert 0 < held_for_backward(layer, x) <= limit + small, d

    def test_inject_holds_the_factors_of_one_layer_at_a_time(self, monkeypatch):
        """All that LAPACK got and gave for one layer is gone before it gets the next one."""
        svd, made, alive = torch.linalg.svd, [], []

        def watched(W, **options):
            alive.append(sum(t() is not None for t in made))
            result = svd(W, **options)
            made.extend(weakref.ref(t if t._base is None else t._base) for t in (W, *result))
            return result

        monkeypatch.setattr(torch.linalg, "svd", watched)
        model = svft.inject(nn.Sequential(*(nn.Linear(12, 8) for _ in range(3))), ["0", "1", "2"], rank=4)
        assert alive == [0, 0, 0] and len(made) == 12 and not any(t() is not None for t in made)
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
        assert sum(kept.values()) == 4 * sum(t.numel() for t in model.parameters())  # no view of something larger


# ---------------------------------------------------------------- files: the SVD cache, the adapter


@pytest.fixture
def svd_calls(monkeypatch):
    """How often LAPACK was called."""
    calls, real = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(a[0].shape) or real(*a, **k))
    return calls


class TestCacheOfSVDs:
    """With cache_dir the SVD of a weight is computed once; a wrong file is as good as none."""

    def test_a_second_call_computes_nothing_and_whatever_changes_the_result_changes_the_file(self, tmp_path, svd_calls):
        """Bytes, shape, dtype, rank and full_matrices: each has its own file, which numpy opens. A hit has equal bits."""
        W, folder = plain_layer(6, 4, dtype=torch.float32).weight.detach(), tmp_path / "made" / "on demand"
        nudged = W.clone()
        nudged[0, 0] = torch.nextafter(nudged[0, 0], torch.tensor(9.0))
        weights = (W, nudged, W.T, W.reshape(3, 8), W.half(), W.half().view(torch.bfloat16), W.double(), 0 * W)
        options = ({}, {"rank": 1}, {"rank": 2}, {"full_matrices": True})
        for count, (weight, how) in enumerate(((weight, how) for weight in weights for how in options), 1):
            first, second = (compute_svd(weight, cache_dir=name, **how) for name in (folder, str(folder)))
            assert all(map(torch.equal, first, second)), (weight.dtype, how)
            assert (first.U.shape[1], len(first.Vh)) == size_of_M(*weight.shape, **how)
            assert len(svd_calls) == len(list(folder.iterdir())) == count, (weight.dtype, how)  # no temporary file
        assert all({"U", "S", "Vh"} <= {*np.load(file, allow_pickle=False)} for file in folder.iterdir())
        assert all(rows >= columns for rows, columns in svd_calls)  # LAPACK is slower on a wide matrix
        compute_svd(W, cache_dir=folder, rank=9)  # all of it again, as load_adapter asks for it
        assert len(svd_calls) == len(list(folder.iterdir())) == count

    def test_a_file_of_other_factors_or_with_a_wrong_bit_is_computed_again(self, tmp_path, svd_calls):
        """U and V must be orthonormal, W V = U S, U^T W = S V^T, S sorted, sizes and dtype right: else it is replaced."""
        W = plain_layer(6, 4, dtype=torch.float32).weight
        svd = compute_svd(W, cache_dir=tmp_path)
        (path,) = tmp_path.iterdir()
        whole, recomputed = path.read_bytes(), 0
        others = {
            "not orthonormal": svd._replace(U=svd.U * 1.0001),
            "one value off by 1e-3": svd._replace(Vh=svd.Vh + 1e-3 * torch.eye(4)),
            "of another weight": compute_svd(torch.randn(6, 4)),
        }
        for name, factors in others.items():
            np.savez(path, **{part: t.numpy() for part, t in factors._asdict().items()})
            svd_calls.clear()
            for _ in "twice":  # the second time it is in the file again
                assert all(map(torch.equal, compute_svd(W, cache_dir=tmp_path), svd)), name
            assert len(svd_calls) == 1, name
        for place in range(0, len(whole), 29):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            svd_calls.clear()
            assert all(map(torch.equal, compute_svd(W, cache_dir=tmp_path), svd)), place
            recomputed += len(svd_calls)
        assert recomputed > len(whole) / 29 / 2 and list(tmp_path.iterdir()) == [path]

    @devices
    def test_cached_factors_are_on_the_device_of_the_weight_and_every_process_finds_them(self, tmp_path, device):
        """Whether computed or read from the file. Its name follows from the weight and the options alone."""
        W = torch.arange(24.0, device=device).view(6, 4)
        for _ in "twice":
            assert {t.device for t in compute_svd(W, cache_dir=tmp_path)} == {W.device}
        (file,) = tmp_path.iterdir()
        assert file.name == "a8018b5c145b84b52497ad6c7a281a17c38fdf7c4f4e21182246d02bc1fe13cf.npz"


@pytest.fixture
def saved(tmp_path):
    """A base model, the same model adapted, and its adapter file."""
    base = mlp()
    model = randomize(svft.inject(copy.deepcopy(base), ["0", "2", "4"], "random", 1, seed=7), 0.01)
    svft.save_adapter(model, tmp_path / "adapter.npz")
    return base, model, tmp_path / "adapter.npz"


# tests/earlier.npz has format "svft 3", and every later version must read it. It was made, once for the format, by
#   model = svft.inject(earlier_base(), ["0"], "banded", 1); model[0].m.data = torch.arange(1.0, 8)
#   svft.save_adapter(model, "tests/earlier.npz")
def earlier_base():
    base = nn.Sequential(nn.Linear(3, 4))
    base[0].weight.data = torch.sin(torch.arange(12.0) ** 2).view(4, 3)
    return base


UNFIT = [  # a change of the base model m that the adapter was trained on; what the error says
    ("m[2].weight.copy_(mlp(seed=1)[2].weight)", "layer '2': m: got"),
    ("m[2].weight.add_(torch.eye(6), alpha=0.01)", "layer '2': m: got"),
    ("m.append(SVFTLinear(nn.Linear(4, 3)))", "'5'"),
    ("del m[4]", "'4'"),
    ("m[2] = nn.Embedding(6, 6)", "layer '2': base: got"),
    ("m.append(nn.Linear(6, 6)); m[5].weight = m[2].weight", "layer '2': "),  # tied
    ("m[4] = nn.Linear(6, 5)", "layer '4': d1, d2, rank, k: got"),
    ("svft.inject(m, ['4'], 'banded', 1, rank=3)", "layer '4': d1, d2, rank, k: got"),
    ("svft.inject(m, ['4'], 'plain')", "layer '4': d1, d2, rank, k: got"),
]
UNTRUE = [  # what was done to the adapted model m before it is saved; what the warning says
    ("m[4].requires_grad_(True)", "'4.weight', '4.bias'"),
    ("m[2].bias.requires_grad_(True)", "'2.bias'"),
    ("randomize(m, 0)", "'0', '2'. have an m that is still zero"),
    ("m[2].m.data.zero_()", "'2'"),
]


class TestAdapterFile:
    """A file holds Omega and m. load_adapter brings the same update back, or refuses and changes nothing."""

    @given(layer=layers() | layers(dtype=torch.float32), injected=st.booleans(), seed=seeds)
    def test_what_is_saved_is_what_is_loaded(self, tmp_path, layer, injected, seed):
        """Round trip into a plain model, which is injected, and into one with another Omega that has run: there m stays
        the same Parameter, which an optimizer may hold. The pattern keeps its name. m trains, and nothing else."""
        base = layer.base.pop()
        assume(layer.U.shape[1] == layer.Vh.shape[0])  # the full SVD of a rectangular weight is refused
        svft.save_adapter(nn.ModuleDict({"x": layer}), tmp_path / "a.npz")
        r, x = len(layer.S), torch.ones(2, layer.in_features, dtype=layer.U.dtype)
        fresh = randomize(SVFTLinear(base, omega_random(r, r, len(layer.m), seed=seed), rank=r)) if injected else base
        fresh(x).sum().backward()
        loaded = svft.load_adapter(nn.ModuleDict({"x": fresh}), tmp_path / "a.npz", cache_dir=tmp_path)["x"]
        assert all(map(torch.equal, (loaded.m, loaded.omega, loaded.S), (layer.m, layer.omega, layer.S)))
        assert loaded.m is fresh.m if injected else len(list(tmp_path.iterdir())) > 1  # the SVD is in the cache
        near(loaded.merged_weight(), layer.merged_weight(), rounding(torch.float32, layer.S, layer.m.detach()))
        loaded(x).sum().backward()
        assert [name for name, p in loaded.named_parameters() if p.grad is not None] == ["m"]
        assert str(loaded).partition(", path=")[0] == str(layer).partition(", path=")[0]  # sizes, pattern and k

    def test_the_file_is_an_npz_archive_that_anyone_can_open(self, saved):
        """NAME/omega, NAME/m, NAME/probes, NAME/shape and NAME/pattern for each layer, and format: no pickle."""
        _, model, path = saved
        with np.load(path, allow_pickle=False) as file:
            parts = {f"{name}/{part}" for name in "024" for part in ("omega", "m", "probes", "shape", "pattern")}
            assert set(file) == {"format", *parts} and str(file["format"]) == "svft 3"
            assert file["4/shape"].tolist() == [4, 6, 4] and str(file["2/pattern"]) == "random"
            assert np.array_equal(file["2/m"], model[2].m.detach()) and np.array_equal(file["2/omega"], model[2].omega)
            rng = np.random.RandomState(0)
            a, b = rng.standard_normal((16, 4)), rng.standard_normal((16, 6))
            near(file["4/probes"], [a[p] @ delta_by_double_loop(model[4]) @ b[p] for p in range(16)], 1e-7)

    def test_a_file_of_an_earlier_commit_loads_with_any_seed_and_number_of_threads(self, tmp_path):
        """The basis is computed from W0, and the seed of the probes is part of the format. Another format is refused."""
        path = tmp_path / "earlier.npz"
        shutil.copy(HERE / "tests" / "earlier.npz", path)
        before = torch.get_num_threads()
        for threads in (3, 1):
            torch.manual_seed(threads)
            torch.set_num_threads(threads)
            loaded = svft.load_adapter(earlier_base(), path)[0]
            torch.set_num_threads(before)
            assert torch.equal(loaded.m, torch.arange(1.0, 8.0)) and torch.equal(loaded.omega, omega_banded(3, 3, 1))
        np.savez(path, **{**np.load(path), "format": "svft 2"})
        with pytest.raises(ValueError, match="earlier.npz: got no whole adapter file"):
            svft.load_adapter(earlier_base(), path)

    def test_training_resumes_where_it_stopped(self, tmp_path):
        """Stop, save, load, go on: the same numbers as without the stop, with the state_dict of the optimizer."""
        model, resumed = (svft.inject(mlp(), ["0", "2", "4"]) for _ in "ab")
        optimizer, again = (torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, resumed))
        svft.save_adapter(steps(model, range(3), optimizer), tmp_path / "a.npz")
        torch.save(optimizer.state_dict(), tmp_path / "o.pt")
        steps(model, range(3, 6), optimizer)
        svft.load_adapter(resumed, tmp_path / "a.npz")
        again.load_state_dict(torch.load(tmp_path / "o.pt"))
        steps(resumed, range(3, 6), again)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))

    def test_what_the_check_cannot_see_loads(self, tmp_path):
        """A scaled base has the same U and V, so the saved update comes out. m = 0 fits any base of its shapes."""
        model = randomize(svft.inject(mlp(), ["2"]))
        svft.save_adapter(model, tmp_path / "a.npz")
        scaled = mlp()
        scaled[2].weight.data *= 2
        near(svft.load_adapter(scaled, tmp_path / "a.npz")[2].delta_weight(), model[2].delta_weight(), 1e-5)
        with pytest.warns(UserWarning, match="have an m that is still zero"):
            svft.save_adapter(svft.inject(mlp(), ["0"]), tmp_path / "a.npz")
        assert svft.load_adapter(mlp(seed=3), tmp_path / "a.npz")[0].m.count_nonzero() == 0

    def test_the_same_values_in_another_dtype_load_and_rounded_ones_are_refused(self, tmp_path):
        """bfloat16 rounds U and Vh by 0.2%, and the probes must agree to 1%. A base that is itself rounded has other
        singular vectors: load in the dtype of training, merge, then convert."""
        half, path = mlp(width=96).bfloat16(), tmp_path / "a.npz"
        model = randomize(svft.inject(copy.deepcopy(half), ["2"]))
        svft.save_adapter(model, path)
        delta = delta_by_double_loop(model[2])
        near(svft.load_adapter(half.float(), path)[2].delta_weight(), delta, 0.02 * np.abs(delta).max())
        with pytest.raises(ValueError, match="layer '2': m: got .*dtype"):
            svft.load_adapter(mlp(width=96), path)

    @pytest.mark.parametrize("into", ["plain", "injected"])
    @pytest.mark.parametrize("change, text", UNFIT, ids=[row[0] for row in UNFIT])
    def test_a_model_it_does_not_belong_to_is_refused_and_left_alone(self, saved, into, change, text, svd_calls):
        """M is a set of coordinates: on another basis it is another update. Names and sizes are checked before any SVD."""
        m, _, path = saved
        with torch.no_grad():
            exec(change, dict(globals(), m=m))
        if into == "injected":
            svft.inject(m, "all-linear", "banded", 1)
        svd_calls.clear()
        with refused(m, (ValueError, TypeError), text):
            svft.load_adapter(m, path)
        assert change.startswith("m[2].weight") or not svd_calls

    def test_flipped_signs_are_refused(self, saved):
        """Another valid SVD of the same weight: one (u_i, v_i) negated. The update would be another one."""
        base, model, path = saved
        svd, s = compute_svd(base[2].weight), torch.tensor([1.0, 1, -1, 1, 1, 1])
        fresh = svft.inject(base, ["0", "4"], "random", 1, seed=7)
        fresh[2] = SVFTLinear(fresh[2], model[2].omega, svd=SVD(svd.U * s, svd.S, svd.Vh * s[:, None]))
        near(fresh[2].merged_weight(), base[2].merged_weight(), 1e-6)  # at m = 0 no one can tell
        with refused(fresh, ValueError, "layer '2': m: got"):
            svft.load_adapter(fresh, path)

    @pytest.mark.filterwarnings("error")
    def test_equal_singular_values_are_warned_of_and_a_rotated_subspace_is_refused(self, tmp_path):
        """Equal values leave the vectors free to rotate, rank-deficient weights too. A state_dict holds the vectors."""
        base, path = nn.Sequential(nn.Linear(6, 6)), tmp_path / "a.npz"
        W, R = torch.linalg.qr(torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0)))[0]
        base[0].weight.data.copy_(W)  # all its singular values are 1
        rotated = SVD(W @ R, torch.ones(6), R.T)  # W = W I I^T = (W R) I (R^T): two SVDs of one weight
        model = randomize(nn.Sequential(SVFTLinear(base[0], "banded", 1, svd=rotated)))
        with pytest.warns(UserWarning, match=r"'0'.*singular values"):
            svft.save_adapter(model, path)
        target = svft.inject(copy.deepcopy(base), ["0"], "banded", 1)
        with refused(target, ValueError, "layer '0': m: got .*singular values"):
            svft.load_adapter(target, path)
        target.load_state_dict(model.state_dict())
        near(target[0].merged_weight(), model[0].merged_weight(), 1e-6)
        base[0].weight.data = torch.arange(1.0, 7)[:, None] + torch.diag(torch.arange(3.0, -3, -1).relu())  # of rank 4
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            with pytest.warns(UserWarning, match="singular values"):
                svft.save_adapter(randomize(svft.inject(copy.deepcopy(base).to(dtype), ["0"])), path)
        small = nn.Linear(99, 99).requires_grad_(False).apply(lambda layer: layer.weight.mul_(1e-7))
        svft.save_adapter(randomize(svft.inject(nn.Sequential(small), ["0"])), path)  # no warning here

    @pytest.mark.parametrize("change, text", UNTRUE, ids=[row[0] for row in UNTRUE])
    def test_saving_warns_where_the_file_will_not_bring_back_what_was_trained(self, tmp_path, change, text):
        """A head that trains too is not in the file. An m that is still zero was perhaps not in the optimizer."""
        m = randomize(svft.inject(mlp(), ["0", "2"]))
        exec(change, dict(globals(), m=m))
        with pytest.warns(UserWarning, match=text) as caught:
            svft.save_adapter(m, tmp_path / "a.npz")
        assert [warning.filename for warning in caught] == [__file__]

    def test_the_name_of_a_layer_may_hold_a_slash(self, tmp_path):
        """NAME/m splits at the last slash: ModuleDict allows any name without a dot. A head that was adapted by name loads
        as well, from a file of any name. What the file does not name is frozen."""
        fresh = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a/b", "score", "rest")})
        model = randomize(svft.inject(copy.deepcopy(fresh), ["a/b", "score"], "random"))
        svft.save_adapter(model, tmp_path / "adapter.v1")
        loaded = svft.load_adapter(svft.inject(fresh, ["a/b"]), tmp_path / "adapter.v1")  # one is adapted already
        assert all(torch.equal(loaded[n].m, model[n].m) and str(loaded[n]) == str(model[n]) for n in adapted(model))
        assert [name for name, p in loaded.named_parameters() if p.requires_grad] == ["a/b.m", "score.m"]


# ---------------------------------------------------------------- bad input: one message for each kind


BAD = [  # a call, with a small model as m; the error; what its text says
    ("compute_svd([[1.0]])", TypeError, "weight: got [[1.0]], want a dense matrix"),
    ("compute_svd(torch.ones(2, 2, dtype=torch.int64))", TypeError, "weight: got Tensor (2, 2) of torch.int64"),
    ("compute_svd(torch.ones(3))", ValueError, "weight: got Tensor (3,)"),
    ("compute_svd(torch.ones(2, 3, device='meta'))", ValueError, "weight: got Tensor (2, 3) of torch.float32 on meta"),
    ("compute_svd(torch.tensor([[1.0, -math.inf]]))", ValueError, "weight: got NaN or inf"),
    ("compute_svd(torch.ones(2, 3), rank=0)", ValueError, "rank: got 0, want at least 1"),
    ("compute_svd(torch.ones(2, 3), rank=2, full_matrices=True)", ValueError, "rank: got 2, want at least 1, and not"),
    ("omega_banded(3, 3, -1)", ValueError, "d, above: got (-1, -1), want at least 0"),
    ("omega_random(3, 3, 10)", ValueError, "Cannot take a larger sample"),
    ("inject(m, ['2'], 'random', k=0)", ValueError, "layer '2': omega: got Tensor (2, 0) of"),
    ("omega_top_k(torch.eye(2), torch.eye(2), 5)", ValueError, "k: got 5, want 1 to 4"),
    ("omega_top_k(torch.eye(2), torch.eye(2), 0)", ValueError, "k: got 0, want 1 to 4"),
    ("rank_bound(torch.tensor([[0], [5]]), (9, 5))", ValueError, "omega: got [0, 5] to [0, 5], want 0 <= i < 9, 0 <="),
    ("term_rank([[0], [0]])", TypeError, "omega: got [[0], [0]], want an int64 tensor"),
    ("term_rank(torch.tensor([[0], [-1]]))", ValueError, "omega: got [0, -1] to [0, -1], want 0 <= i"),
    ("term_rank(omega_plain(3, 3).T)", ValueError, "omega: got Tensor (3, 2) of"),
    ("term_rank(omega_plain(3, 3).flip(1))", ValueError, "omega: got unsorted or repeated positions"),
    ("term_rank(omega_plain(3, 3)[:, [0, 0, 1]])", ValueError, "omega: got unsorted or repeated positions"),
    ("inject(m, ['2'], torch.tensor([[5], [6]]))", ValueError, "layer '2': omega: got [5, 6] to [5, 6], want 0"),
    ("inject(m, ['2'], lambda svd: torch.tensor([[6], [5]]))", ValueError, "layer '2': omega: got [6, 5] to [6, 5], "),
    ("inject(m, ['2'], 'diagonal')", ValueError, "layer '2': pattern: got 'diagonal'"),
    ("inject(m, ['2', '4'], 'top_k')", ValueError, "layer '4': top_k: got a 4 x 6 weight, want d1 = d2"),
    ("inject(m, ['2'], k=3)", ValueError, "layer '2': k: got 3 with pattern 'banded'"),
    ("inject(m, ['2'], path='sparse')", ValueError, "layer '2': path: got 'sparse'"),
    ("inject(m, ['2'], path='gather', keep_weight=False)", ValueError, "layer '2': path: got 'gather'"),
    ("inject(m, ['2'], path='fused', rank=2)", ValueError, "layer '2': path: got 'fused', want one of ['auto', 'ga"),
    ("inject(m, ['2'], keep_weight=False, rank=2)", ValueError, "layer '2': path: got 'auto', want one of []"),
    ("inject(m, ['2'], svd=compute_svd(m[2].weight), cache_dir='svd')", ValueError, "layer '2': svd: got it with"),
    ("inject(m, ['2'], svd=compute_svd(m[2].weight), rank=2)", ValueError, "layer '2': svd: got it with rank="),
    ("inject(m, ['2'], svd=(*compute_svd(m[2].weight),))", TypeError, "layer '2': svd: got tuple, want an SVD(U, S, V"),
    ("inject(m, ['2'], svd=compute_svd(torch.randn(6, 6)), keep_weight=False)", ValueError, "in W0 V = U Sigma"),
    ("SVFTLinear(mlp().half()[2], svd=SVD(*(1.0005 * t for t in compute_svd(m[2].weight))))", ValueError, "svd: got"),
    ("inject(m, ['4'], svd=compute_svd(m[4].weight * (torch.arange(6) < 5)))", ValueError, "in W0^T U = V Sigma"),
    ("inject(m, ['2'], svd=SVD(m[2].weight, torch.ones(6), torch.eye(6)))", ValueError, "in U^T U = I"),
    ("inject(m, ['2'], svd=SVD(torch.eye(6), -torch.ones(6), torch.eye(6)))", ValueError, "in Sigma sorted, >= 0"),
    ("inject(m, [])", ValueError, "target_modules: got []"),
    ("inject(m, ['7'])", ValueError, "target_modules: got ['7'], which matches no layer"),
    ("inject(m, ['1'])", TypeError, "layer '1': base: got <class 'torch.nn.modules.activation.Tanh'>"),
    ("SVFTLinear(3)", TypeError, "base: got <class 'int'>, want exactly nn.Linear or Conv1D"),
    ("SVFTLinear(m[2], path='gather')(torch.ones(2, 12))", RuntimeError, "shapes cannot be multiplied"),
    ("load_adapter(m, 'absent.npz')", FileNotFoundError, "absent.npz"),
    ("save_adapter(m, 'a.npz')", ValueError, "model: got one without an SVFTLinear"),
    ("save_adapter(inject(mlp(), ['0']), 'no/a.npz')", OSError, "path: got 'no/a.npz', want a regular file"),
    ("save_adapter(inject(mlp(), ['0'], full_matrices=True), 'a.npz')", ValueError, "layer '0': full_matrices: got"),
]


class TestBadInput:
    """Each row is a call, its error and a part of its text. m is mlp(): its linear layers are '0', '2' and '4'."""

    @pytest.mark.parametrize("call, error, text", BAD, ids=[row[0] for row in BAD])
    def test_a_bad_argument_is_refused_by_name_and_nothing_changes(self, call, error, text, tmp_path, monkeypatch):
        """The error names the argument, what it got and what it wants, or is one of torch, numpy or Python that does. The
        model is bit-identical afterwards."""
        monkeypatch.chdir(tmp_path)
        m = mlp()
        with refused(m, error, re.escape(text)):
            eval(call, {**vars(svft), **globals(), "m": m})
        assert not list(tmp_path.iterdir())


if __name__ == "__main__":  # the spec as text
    for name, section in list(globals().items()):
        if name.startswith("Test"):
            title = re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name[4:])
            print("\n" + re.sub(r"(\d) (?=\d)", r"\1.", title) + "\n  " + inspect.getdoc(section))
            for law, test in vars(section).items():
                if law.startswith("test_"):
                    print(f"  {law[5:].replace('_', ' ')}\n      {' '.join(inspect.getdoc(test).split())}")
    for call, error, text in BAD:
        print(f"      {call}\n          {error.__name__}: {text}")
