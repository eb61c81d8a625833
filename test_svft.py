r"""The executable spec of svft.py: each test's name is a law, its docstring the claim and where it comes from.

    pytest -v test_svft.py                          the quick profile
    SVFT_PROFILE=thorough pytest test_svft.py       ten times the examples, always the same ones (as in CI)
    pytest -m mutation test_svft.py                 the spec's own proof: every one-line breakage of svft.py
                                                    in the table at the end must make the test named there fail
    python test_svft.py                             prints the spec as text: section, law, claim

How to read a failure: hypothesis prints "Falsifying example: test_...(...)" with the smallest case that it found.
Where it shows sizes and a seed, these rebuild every tensor: paste it as @example(...) above the test to keep it.
Where it shows a layer, run the test again: the case is kept in .hypothesis and comes first.

Oracles are written differently from svft.py: numpy, float64, a double loop over (i, j) for U M V^T.
Where a case is drawn, the tolerance comes from the dtype's rounding and the size of what is summed (`rounding`);
a fixed case in float64 or float32 has a fixed one.
"""

import argparse
import base64
import contextlib
import copy
import doctest
import functools
import inspect
import io
import json
import logging
import math
import multiprocessing
import os
import pickle
import re
import socket
import subprocess
import sys
import time
import types
import warnings
import weakref
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import svft
import train_toy
from svft import SVD, SVFTLinear, compute_svd, omega_banded, omega_plain, omega_random, omega_top_k

HERE = Path(__file__).parent
COMMON = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.register_profile("quick", max_examples=15, **COMMON)
settings.register_profile("thorough", max_examples=150, derandomize=True, **COMMON)
FIRST = dict(phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False)  # the first failure is enough
settings.register_profile("mutation", settings.get_profile("thorough"), **FIRST)
settings.load_profile(os.environ.get("SVFT_PROFILE", "quick"))
DEVICES = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
devices = pytest.mark.parametrize("device", DEVICES)


# ---------------------------------------------------------------- strategies and oracles


def in_words(value):
    """A readable id of a dtype, a shape or a flag."""
    return re.sub(r"torch\.|[ ()']", "", str(value))


sizes = st.integers(1, 7)
seeds = st.integers(0, 2**31)
leading = st.lists(st.integers(0, 3), max_size=3).map(tuple)  # leading dimensions of an input, empty ones too
svds = st.sampled_from([{}, {"full_matrices": True}]) | st.builds(dict, rank=st.integers(1, 8))  # thin, full, or cut


def size_of_M(d1, d2, full_matrices=False, rank=8):  # (r1, r2)
    return (d1, d2) if full_matrices else (min(d1, d2, rank),) * 2


class Conv1D(nn.Module):
    """GPT-2's linear layer as Hugging Face lays it out: the weight is (in, out)."""

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


def rounding(dtype, *factors):
    """An allowance for rounding: 50 ulps of a sum as large as the product of the factors' norms."""
    return 50 * torch.finfo(dtype).eps * math.prod(1 + float(np.linalg.norm(np.asarray(f))) for f in factors)


def near(got, want, tolerance, cell=""):
    got, want = (np.asarray(t.detach().cpu().double() if isinstance(t, torch.Tensor) else t) for t in (got, want))
    assert got.shape == want.shape, f"{cell} shape {got.shape}, want {want.shape}"
    worst = float(np.abs(got - want).max()) if got.size else 0.0
    assert worst <= tolerance, f"{cell} off by {worst:.3g}, allowed {tolerance:.3g}"


def snapshot(model):
    """All that 'exactly as it was' means: structure, identity, bits, requires_grad, mode."""
    tensors = {n: (id(p), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    return {n: (id(m), m.training) for n, m in model.named_modules()}, tensors


def assert_untouched(model, before):
    modules, tensors = snapshot(model)
    assert modules == before[0] and tensors.keys() == before[1].keys()
    for name, (identity, grad, values) in tensors.items():
        assert (identity, grad) == before[1][name][:2] and torch.equal(values, before[1][name][2]), name


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


# ---------------------------------------------------------------- Section 3.1


class TestSVD_Section_3_1:
    @pytest.mark.filterwarnings("ignore:rank. .* cuts through equal")
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
        near(S, values[: len(S)], tolerance)
        near(np.linalg.norm(W - (U[:, : len(S)] * S) @ Vh[: len(S)]), np.linalg.norm(values[len(S) :]), tolerance)

    @given(n=sizes, extra=st.integers(0, 3), wide=st.booleans(), signs=st.lists(st.sampled_from([-1, 1]), min_size=7))
    def test_signs_are_canonical_however_the_weight_was_factored(self, n, extra, wide, signs):
        """(-u_i, -v_i) serve as well as (u_i, v_i): each u_i's largest entry is made positive (D2)."""
        rng, S, s = np.random.RandomState(n), np.arange(n, 0, -1.0), np.array(signs[:n])
        U, V = (np.linalg.qr(rng.standard_normal((rows, n)))[0] for rows in (n + extra, n))
        weights = (U * s * S) @ (V * s).T, (U * S) @ V.T  # one weight, whatever s is
        got, want = (compute_svd(torch.from_numpy(W.T if wide else W)) for W in weights)
        assert (got.U.gather(0, got.U.abs().argmax(0, keepdim=True)) > 0).all()
        near(got.U, want.U, 1e-10)
        near(got.Vh, want.Vh, 1e-10)

    def test_where_the_largest_entries_are_equal_the_first_decides_whatever_the_rounding(self):
        """A symmetric Toeplitz weight has u_i = +-u_(n-1-i): the last bit must not choose the sign (D2)."""
        torch.manual_seed(0)
        i = torch.arange(64)
        W = torch.randn(64, dtype=torch.float64)[(i[:, None] - i).abs()]
        for _ in range(4):  # as other roundings would have it
            near(compute_svd(W + 1e-14 * torch.randn_like(W)).U, compute_svd(W).U, 1e-6)

    def test_a_rank_that_cuts_through_equal_singular_values_is_warned_of(self):
        """Which of the equal ones are kept is chance: another machine may keep others."""
        W = torch.diag(torch.tensor([5, 4, 3 + 1e-9, 3, 2, 1], dtype=torch.float64))  # equal but for rounding
        with pytest.warns(UserWarning, match="rank: 3 cuts through equal singular values"):
            compute_svd(W, rank=3)
        with warnings.catch_warnings(action="error"):
            compute_svd(W, rank=2), compute_svd(W, rank=4), compute_svd(W)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=in_words)
    def test_it_is_computed_in_float64_and_kept_in_float32_or_better(self, dtype):
        """Half precision is cast up, never decomposed as it is; a float64 weight keeps float64 factors (D2)."""
        torch.manual_seed(1)
        W = torch.randn(6, 4).to(dtype)
        svd, wide = compute_svd(nn.Parameter(W)), torch.float64 if dtype == torch.float64 else torch.float32
        assert {(t.dtype, t.requires_grad) for t in svd} == {(wide, False)}
        near(svd.S, np.linalg.svd(W.double().numpy(), compute_uv=False), 4 * torch.finfo(svd.S.dtype).eps * 10)
        for got, exact in zip(compute_svd(W.float()), compute_svd(W.double()), strict=True):
            assert torch.equal(got, exact.float())  # the float64 result, rounded once

    @pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e-10, 1e20, 1e30, 1e200], ids="{:g}".format)
    def test_a_weights_scale_does_not_matter(self, scale):
        """c W0 has the factors of W0 and c Sigma; its own SVD is accepted, that of another weight is refused."""
        dtype = torch.float64 if scale in (1e-200, 1e200) else torch.float32
        base = plain_layer(6, 4, dtype=dtype)
        W, other = torch.randn(2, 6, 4, dtype=dtype)
        base.weight.data = W * scale
        svd, scaled = compute_svd(W), compute_svd(base.weight)
        near(scaled.U, svd.U, 1e-5)
        near(scaled.S / scale, svd.S, 1e-5)
        layer = SVFTLinear(base, svd=scaled)
        layer.m.data.copy_(scale * torch.linspace(-1, 1, len(layer.m), dtype=dtype))
        near(layer.merge().weight / scale, W + svd.U @ (layer.M() / scale) @ svd.Vh, 1e-5)
        with pytest.raises(ValueError, match="svd: got factors"):
            SVFTLinear(base, svd=compute_svd(other * scale))


class TestOmega_Section_3_1:
    @given(r1=sizes, r2=sizes, d=st.integers(0, 9), above=st.none() | st.integers(0, 9))
    def test_banded_is_its_definition(self, r1, r2, d, above):
        """M_ij = 0 if j < i - z1 or j > i + z2; the experiments use z1 = z2 = d. A wider band holds a narrower one."""
        z2 = d if above is None else above
        want = [[i, j] for i in range(r1) for j in range(r2) if not (j < i - d or j > i + z2)]
        assert omega_banded(r1, r2, d, above).T.tolist() == want
        assert all(position in omega_banded(r1, r2, d + 1, z2 + 1).T.tolist() for position in want)

    @given(r1=sizes, r2=sizes)
    def test_plain_is_the_diagonal(self, r1, r2):
        """SVFT^P trains (i, i) alone, which is the band of d = 0 (D9)."""
        assert omega_plain(r1, r2).T.tolist() == [[i, i] for i in range(min(r1, r2))]
        assert torch.equal(omega_plain(r1, r2), omega_banded(r1, r2, 0))

    @given(n=st.integers(1, 30), d=st.integers(0, 29), more=st.integers(-3, 3))
    def test_counts_are_those_of_table_7(self, n, d, more):
        """n for plain; n d + (n - d)(d + 1) for banded, which is n (2d + 1) - d (d + 1): a layer trains as many."""
        d, shape = min(d, n - 1), (n, n + more) if more > 0 else (n - more, n)
        layer = SVFTLinear(plain_layer(*shape), "banded", d)
        assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == n * (2 * d + 1) - d * (d + 1)
        assert omega_banded(n, n, d).shape[1] == n * d + (n - d) * (d + 1) == n * (2 * d + 1) - d * (d + 1)
        assert omega_plain(n, n).shape[1] == n

    @given(r1=sizes, r2=sizes, seed=st.integers(0, 2**32 - 1), data=st.data())
    def test_random_draws_k_distinct_positions_in_order(self, r1, r2, seed, data):
        """Without replacement (D3): k entries are k coefficients."""
        k = data.draw(st.integers(1, r1 * r2))
        omega = omega_random(r1, r2, k, seed=seed)
        pairs = list(map(tuple, omega.T.tolist()))
        assert omega.dtype == torch.int64 and len(set(pairs)) == k and pairs == sorted(pairs)
        assert all(0 <= i < r1 and 0 <= j < r2 for i, j in pairs)
        assert torch.equal(omega, omega_random(r1, r2, k, seed=seed))

    def test_random_is_the_same_on_every_machine_and_uniform(self):
        """Pinned draws: numpy promises that RandomState's stream never changes. Each cell is drawn equally often, to 6 standard deviations."""
        assert omega_random(4, 4, 5, seed=0).T.tolist() == [[0, 1], [1, 2], [2, 0], [2, 1], [3, 1]]
        assert not torch.equal(omega_random(9, 9, 20, seed=0), omega_random(9, 9, 20, seed=1))
        hits = torch.zeros(3, 4)
        for seed in range(600):
            hits[tuple(omega_random(3, 4, 4, seed=seed))] += 1
        assert hits.sum() == 2400 and (hits - 200).abs().max() < 70  # 6 standard deviations of 11.5

    @given(d=sizes, seed=seeds, data=st.data())
    def test_top_k_takes_the_largest_alignments_of_either_sign(self, d, seed, data):
        """The k largest |u_i . v_j| (D4), against a sorted list of all, after joint sign flips too; -0.8 beats 0.6."""
        rng, k = np.random.RandomState(seed), data.draw(st.integers(1, d * d))
        U, V = (np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in "UV")
        largest = sorted(np.ndindex(d, d), key=lambda ij: -abs(U[:, ij[0]] @ V[:, ij[1]]))[:k]
        for s in (np.ones(d), rng.choice([-1.0, 1.0], d)):
            got = omega_top_k(torch.from_numpy(U * s), torch.from_numpy((V * s).T), k)
            assert got.T.tolist() == sorted(map(list, largest))
        assert omega_top_k(torch.eye(2), torch.tensor([[0.6, -0.8], [0.8, 0.6]]), 2).tolist() == [[0, 1], [1, 0]]

    def test_top_k_of_a_rectangular_weight_is_refused_with_the_reason(self):
        """u_i has d1 entries and v_j has d2: there is no u_i . v_j unless d1 = d2 (D5)."""
        with pytest.raises(ValueError, match=r"7 x 5.*want d1 = d2.*'banded' or 'random'"):
            SVFTLinear(plain_layer(7, 5), "top_k")

    def test_random_and_top_k_take_as_many_entries_as_the_band(self):
        """R_d and T_d name a budget: k equals the banded count for that d, unless k is given."""
        for pattern in ("random", "top_k"):
            assert len(SVFTLinear(plain_layer(6, 6), pattern, 2).m) == omega_banded(6, 6, 2).shape[1] == 24, pattern
            assert len(SVFTLinear(plain_layer(6, 6), pattern, 2, k=7).m) == 7, pattern

    def test_omega_may_be_a_tensor_or_a_function_of_the_svd(self):
        """Any Omega fits Eq. (2): LoRA-XS is the top-left block, SVF the diagonal."""
        block = torch.cartesian_prod(torch.arange(2), torch.arange(2)).T
        layer = SVFTLinear(plain_layer(5, 4), block)
        assert torch.equal(layer.omega, block) and layer.pattern == "custom"
        R, svd = torch.randn(2, 2, dtype=torch.float64), compute_svd(layer.weight)
        layer.m.data.copy_(R.flatten())
        near(layer.delta_weight(), svd.U[:, :2] @ R @ svd.Vh[:2], 1e-12)  # LoRA-XS: U_r R V_r^T
        scaled = SVFTLinear(plain_layer(5, 4), lambda svd: omega_plain(len(svd.S), len(svd.S)))
        scaled.m.data.copy_(svd.S * (R[0, 0] - 1))
        near(scaled.merged_weight(), (svd.U * svd.S * R[0, 0]) @ svd.Vh, 1e-12)  # SVF: U diag(sigma z) V^T


# ---------------------------------------------------------------- Eq. (1) and Eq. (2)


# fmt: off
H200 = [  # one NVIDIA H200, torch 2.11.0+cu130, 2026-11-26, banded d = 2: dtype (float32 without TF32, or bfloat16), d1, d2,
    # tokens, training or not; then milliseconds (of the kernels, of the wall) for dense, gather, fused
    ("half", 768, 768, 1024, 1, (0.051, 0.622), (0.060, 0.710), (0.055, 0.714)),
    ("half", 3072, 768, 1024, 1, (0.079, 0.843), (0.088, 0.900), (0.072, 0.857)),
    ("half", 768, 3072, 1024, 1, (0.085, 0.787), (0.087, 0.878), (0.067, 0.876)),
    ("half", 2304, 768, 1024, 1, (0.070, 0.826), (0.081, 0.943), (0.067, 0.885)),
    ("half", 4096, 4096, 1024, 1, (0.978, 1.090), (0.561, 0.942), (0.536, 0.996)),
    ("half", 14336, 4096, 1024, 1, (2.214, 2.442), (0.995, 1.180), (0.777, 0.995)),
    ("full", 768, 768, 1024, 1, (0.264, 0.914), (0.358, 1.002), (0.280, 0.904)),
    ("full", 3072, 768, 1024, 1, (0.650, 0.868), (0.706, 0.954), (0.463, 0.904)),
    ("full", 768, 3072, 1024, 1, (0.810, 0.939), (0.738, 0.978), (0.442, 0.881)),
    ("full", 2304, 768, 1024, 1, (0.521, 0.741), (0.606, 0.946), (0.406, 0.841)),
    ("half", 768, 768, 8192, 1, (0.098, 0.792), (0.191, 0.890), (0.161, 0.954)),
    ("half", 3072, 768, 8192, 1, (0.220, 0.865), (0.376, 0.908), (0.291, 0.908)),
    ("half", 768, 3072, 8192, 1, (0.224, 0.819), (0.375, 0.906), (0.238, 0.821)),
    ("half", 2304, 768, 8192, 1, (0.181, 0.905), (0.315, 0.955), (0.244, 0.843)),
    ("half", 4096, 4096, 8192, 1, (1.871, 2.022), (3.258, 3.485), (2.627, 2.913)),
    ("half", 14336, 4096, 8192, 1, (5.372, 5.734), (6.919, 7.373), (4.640, 5.072)),
    ("full", 768, 768, 8192, 1, (0.793, 0.955), (2.009, 2.337), (1.558, 1.720)),
    ("full", 3072, 768, 8192, 1, (2.691, 2.960), (4.463, 4.714), (2.817, 3.174)),
    ("full", 768, 3072, 8192, 1, (2.873, 3.246), (4.550, 4.876), (2.779, 3.165)),
    ("full", 2304, 768, 8192, 1, (2.102, 2.489), (3.717, 4.018), (2.435, 2.799)),
    ("half", 768, 768, 32768, 1, (0.221, 1.050), (0.619, 1.152), (0.502, 1.092)),
    ("half", 3072, 768, 32768, 1, (0.675, 1.088), (1.314, 1.500), (0.982, 1.206)),
    ("half", 768, 768, 64, 1, (0.045, 0.986), (0.048, 1.027), (0.046, 0.976)),
    ("half", 3072, 768, 64, 1, (0.060, 0.962), (0.055, 1.034), (0.050, 0.976)),
    ("half", 768, 768, 1, 0, (0.021, 0.145), (0.025, 0.176), (0.025, 0.294)),
    ("half", 3072, 768, 1, 0, (0.028, 0.281), (0.024, 0.309), (0.025, 0.354)),
    ("half", 768, 768, 64, 0, (0.021, 0.148), (0.022, 0.163), (0.024, 0.180)),
    ("half", 3072, 768, 64, 0, (0.028, 0.151), (0.024, 0.166), (0.026, 0.184)),
    ("half", 768, 768, 8192, 0, (0.038, 0.282), (0.085, 0.305), (0.081, 0.336)),
    ("half", 3072, 768, 8192, 0, (0.086, 0.156), (0.198, 0.218), (0.173, 0.201)),
]
# fmt: on


class TestTheLayer_Eq_1:
    @devices
    @given(layer=layers(), lead=leading, seed=seeds)
    def test_every_path_equals_W0_plus_U_M_Vt_in_value_and_gradient(self, layer, lead, seed, device):
        """h = W0 x + U M V^T x + b, with Delta W summed over (i, j). An x of another width is an error on every path."""
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
        U, Vh = (t.detach().cpu().numpy() for t in (layer.U, layer.Vh))
        with pytest.raises(ValueError, match=rf"x: got shape .*{2 * len(W0.T)}.*, want \(..., {len(W0.T)}\)"):
            layer(torch.cat([x_there, x_there], -1))  # a reshape could hide it
        near(layer.m.grad, [U[:, i] @ G @ Vh[j] for i, j in layer.omega.T.tolist()], tolerance)  # (U^T G V) on Omega

    @given(layer=layers())
    def test_delta_weight_is_the_sum_of_rank_one_terms(self, layer):
        """Eq. (2): Delta W = sum of m_ij u_i v_j^T; M() holds m on Omega and zero elsewhere."""
        delta = delta_by_double_loop(layer)
        near(layer.delta_weight(), delta, rounding(torch.float64, delta))
        near(layer.merged_weight(), weight_of(layer.base[0]) + delta, rounding(torch.float64, layer.S, delta))
        assert torch.equal(layer.M()[tuple(layer.omega)], layer.m) and int((layer.M() != 0).sum()) == len(layer.m)
        near(layer.U @ layer.M() @ layer.Vh, delta, rounding(torch.float64, delta))

    @pytest.mark.parametrize("path", ["dense", "gather", "fused"])
    @pytest.mark.parametrize("how", [{}, {"full_matrices": True}], ids=["thin", "full"])
    def test_gradients_pass_gradcheck(self, path, how):
        """Finite differences agree, for m, for x, and through M(), delta_weight() and merged_weight()."""
        layer, call = SVFTLinear(plain_layer(4, 3), "banded", 1, path=path, **how), torch.func.functional_call
        m, x = torch.randn_like(layer.m).requires_grad_(), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda m, x: call(layer, {"m": m}, (x,)), (m, x))
        for matrix in (layer.M, layer.delta_weight, layer.merged_weight):
            layer.forward = matrix
            assert torch.autograd.gradcheck(lambda m: call(layer, {"m": m}, ()), (m,))

    @devices
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=in_words)
    def test_training_starts_at_W0(self, dtype, device):
        """m = 0 (D6) leaves the output bit-identical on dense and gather; on fused, to the rounding of U and Vh (D14)."""
        paths = ("dense", "gather", "fused")
        for d1, kind, path in [(d1, kind, path) for d1 in (9, 1) for kind in ("linear", "conv1d") for path in paths]:
            base = plain_layer(d1, 7, kind, dtype).to(device)  # d1 = 1: a vector in disguise, for BLAS
            layer = SVFTLinear(base, path=path)
            for shape in [(7,), (5, 7), (2, 3, 7), (0, 7), (1, 1, 1, 7)]:
                x = torch.randn(shape, device=device).to(dtype)
                tolerance = rounding(dtype, base.weight.detach().cpu().double(), x.cpu().double())
                near(layer(x), base(x), tolerance if path == "fused" else 0, (d1, kind, path, shape))
                assert layer(x).dtype == dtype
            layer.m.data += 1
            assert not torch.equal(layer(x), base(x)), (d1, kind, path)

    @pytest.mark.parametrize("path", ["dense", "gather", "fused"])
    def test_only_m_trains(self, path):
        """After optimiser steps U, S, Vh, W0 and bias are bit-identical, and m has moved and has a gradient."""
        layer = SVFTLinear(plain_layer(6, 5, dtype=torch.float32), path=path)
        before = copy.deepcopy(layer)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (layer(torch.randn(4, 5)) - 1).square().mean().backward()
            optimizer.step()
        assert layer.m.grad.abs().min() > 0 and (layer.m != before.m).all()
        for name, now in layer.named_parameters():
            if name != "m":
                assert torch.equal(now, before.get_parameter(name)) and not now.requires_grad and now.grad is None, name

    @pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
    def test_auto_takes_the_path_with_the_fewest_multiply_adds(self, train):
        """Counted by torch's own FlopCounterMode; leading dimensions count as tokens (D11)."""
        from torch.utils.flop_counter import FlopCounterMode

        shapes = [(64, 64), (128, 32), (32, 128)]
        for shape, tokens, keep in [(s, T, keep) for s in shapes for T in (1, 16, 4096) for keep in (True, False)]:
            layer = SVFTLinear(plain_layer(*shape, dtype=torch.float32), "plain", keep_weight=keep)
            counts = {}
            for path in ("auto", "dense", "fused"):
                layer.path, x = path, torch.randn(4, -(-tokens // 4), shape[1], requires_grad=train)
                with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
                    layer(x).sum().backward() if train else layer(x)
                counts[path] = counter.get_total_flops()
            assert counts["auto"] == min(counts.values()) < max(counts.values()), (shape, tokens, keep, counts)

    @pytest.mark.parametrize("keep", [True, False], ids=["W0-kept", "W0-freed"])
    def test_auto_knows_what_a_dense_band_costs_and_where_fused_would_round_or_cut(self, keep):
        """A sparse multiply-add weighs as 12 on the CPU (D11). Half precision or a cut: fused only without W0 (D14, D8)."""

        def path_taken(layer, tokens, amp=False):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
                return svft._cheapest_path(layer, torch.empty(tokens, layer.in_features))

        square = plain_layer(64, 64, dtype=torch.float32)
        assert [path_taken(SVFTLinear(square, "banded", d, keep_weight=keep), 80) for d in (0, 8)] == ["fused", "dense"]
        half = [(SVFTLinear(square, keep_weight=keep), True), (SVFTLinear(square.bfloat16(), keep_weight=keep), False)]
        for layer, amp in half:
            assert [path_taken(layer, T, amp) for T in (2, 9999)] == ["gather" if keep else "fused", "dense"]
        cut = SVFTLinear(plain_layer(64, 64), rank=9)
        assert [path_taken(cut, T) for T in (2, 9999)] == ["gather", "gather"]

    def test_auto_is_within_a_quarter_of_the_fastest_path_that_an_H200_recorded(self):
        """In every row within 1.25 of the fastest path that auto may take, by the kernels' time and the wall's (D11)."""

        def path_taken(dtype, d1, d2, T):
            n = min(d1, d2)
            with torch.device("meta"):
                layer = types.SimpleNamespace(weight=torch.empty(d1, d2), S=torch.empty(n), m=torch.empty(5 * n - 6))
                layer.U, layer.Vh = torch.empty(d1, n, dtype=dtype), torch.empty(n, d2, dtype=dtype)
                return svft._cheapest_path(layer, torch.empty(T, d2))

        worst = 0.0
        for mode, d1, d2, T, train, dense, gather, fused in H200:
            dtype, times = torch.bfloat16, {"dense": dense, "gather": gather}
            if mode == "full":  # in half precision fused would round W0 (D14)
                dtype, times["fused"] = torch.float32, fused
            with torch.set_grad_enabled(bool(train)):
                path = path_taken(dtype, d1, d2, T)
            ratio = max(times[path][clock] / min(t[clock] for t in times.values()) for clock in (0, 1))
            assert ratio <= 1.25, (mode, d1, d2, T, train, path, ratio)
            worst = max(worst, ratio)
        assert worst > 1.05  # some row was no tie
        assert path_taken(torch.float32, 1024, 1024, 1536) == "dense"  # at 12 k a column fused would look cheaper

    def test_the_primitive_gathers_on_the_cpu_and_multiplies_a_dense_M_elsewhere(self, monkeypatch):
        """embedding_bag on the CPU; on any other device M as a dense matrix, in the other factor's dtype (D11)."""
        real, gathered = svft.F.embedding_bag, []
        spy = lambda *a, **k: gathered.append(a[1].device.type) or real(*a, **k)  # noqa: E731
        monkeypatch.setattr(svft.F, "embedding_bag", spy)
        for device in ("cpu", "meta"):
            layer = SVFTLinear(plain_layer(6, 5, dtype=torch.float32), path="gather").to(device)
            assert layer(torch.ones(3, 5, device=device)).shape == (3, 6)
        assert gathered == ["cpu"]


# ---------------------------------------------------------------- The lemma, section 3.2


class TestLemma_a_structure:
    @given(n=st.integers(2, 6), seed=seeds)
    def test_a_diagonal_M_keeps_the_singular_vectors_up_to_order_and_sign(self, n, seed):
        """W0 + U M V^T = U (Sigma + M) V^T: its singular values are |Sigma + M|, its vectors W0's, re-ordered."""
        layer, rng = SVFTLinear(plain_layer(n, n, seed=seed), "plain"), np.random.RandomState(seed)
        target = rng.permutation(np.arange(1.0, n + 1)) * rng.choice([-1, 1], n)  # distinct, not zero, any order
        layer.m.data.copy_(torch.from_numpy(target) - layer.S)
        U, S, Vh = np.linalg.svd(layer.merged_weight().detach().numpy())
        order = np.argsort(-np.abs(target))
        near(S, np.abs(target)[order], 1e-9)
        near(np.abs(layer.U.detach().numpy()[:, order].T @ U), np.eye(n), 1e-6)
        near(np.abs(layer.Vh.detach().numpy()[order] @ Vh.T), np.eye(n), 1e-6)

    def test_where_sigma_plus_M_is_zero_the_papers_sign_formula_loses_a_vector(self):
        """With sign(0) = 0, sign(Sigma + M) V^T is no orthonormal basis there; the rank of the new weight falls too."""
        layer = SVFTLinear(plain_layer(4, 4), "plain")
        layer.m.data[1] = -layer.S[1]
        basis = torch.sign(layer.S + layer.m)[:, None] * layer.Vh
        assert torch.linalg.matrix_rank(layer.merged_weight()) == torch.linalg.matrix_rank(basis) == 3

    def test_a_banded_M_need_not_keep_them(self):
        """Off-diagonal entries mix directions: some new u is no old u."""
        layer = randomize(SVFTLinear(plain_layer(5, 5), "banded", 1))
        U = torch.linalg.svd(layer.merged_weight())[0]
        assert (layer.U.T @ U).abs().amax(0).min() < 0.99


class TestLemma_b_expressivity:
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

    @pytest.mark.parametrize("shape", [(6, 3), (3, 6)], ids=in_words)
    def test_with_the_thin_svd_of_a_rectangular_weight_it_fails(self, shape):
        """Only P - W0 in span(U) x span(V) is reached; the best M leaves the rest, the projection's residual (D1)."""
        P, layer = self.reached_for(shape)
        gap = P - layer.weight
        outside = gap - layer.U @ layer.U.T @ gap @ layer.Vh.T @ layer.Vh
        assert outside.norm() > 0.1 * gap.norm()
        near(P - layer.merged_weight(), outside, rounding(torch.float64, gap))


class TestLemma_c_rank:
    @given(layer=layers(), data=st.data())
    def test_rank_is_at_most_term_rank_is_at_most_min_k_d1_d2_and_a_random_M_attains_it(self, layer, data):
        """For every m, zeros and repeated values too. In general position rank(M) is the term rank (D10)."""
        rank, term, bound = layer.check_rank()
        (d1, d2), k, values = layer.delta_weight().shape, len(layer.m), st.sampled_from([0.0, 1.0, -1.0, 2.0])
        assert rank == term <= bound == svft.rank_bound(layer.omega, (d1, d2)) == min(k, d1, d2)
        layer.m.data.copy_(torch.tensor(data.draw(st.lists(values, min_size=k, max_size=k))))
        rank = np.linalg.matrix_rank(delta_by_double_loop(layer), tol=1e-9)
        assert layer.check_rank() == (rank, term, bound) and rank <= term

    @given(r1=st.integers(1, 5), r2=st.integers(1, 5), seed=seeds, data=st.data())
    def test_term_rank_is_the_largest_matching(self, r1, r2, seed, data):
        """Against brute force over all ways to give each row a column or none; indices near 2**40 count the same."""
        omega = omega_random(r1, r2, data.draw(st.integers(1, r1 * r2)), seed=seed)
        allowed = set(map(tuple, omega.T.tolist()))

        def best(row, used):
            if row == r1:
                return 0
            free = [j for j in range(r2) if (row, j) in allowed and j not in used]
            return max([best(row + 1, used), *(1 + best(row + 1, used | {j}) for j in free)])

        assert svft.term_rank(omega) == svft.term_rank(2**40 * omega + 7) == best(0, frozenset())
        moved_on_twice = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 0, 1]])  # row 0 gives way to row 1, then to row 2
        assert svft.term_rank(moved_on_twice) == 3

    def test_entries_piled_up_in_one_row_have_rank_one(self):
        """Where lemma (c) says 4, the term rank says 1, and so it is."""
        layer = randomize(SVFTLinear(plain_layer(5, 5), torch.tensor([[2, 2, 2, 2], [0, 1, 3, 4]])))
        assert layer.check_rank() == (1, 1, 4)

    def test_a_rank_above_its_bound_raises(self, monkeypatch):
        """check_rank compares what it found; it does not assume the lemma."""
        layer = randomize(SVFTLinear(plain_layer(4, 4)))
        monkeypatch.setattr(svft, "term_rank", lambda omega: 1)
        with pytest.raises(RuntimeError, match="ascend"):
            layer.check_rank()

    @given(layer=layers())
    def test_norm_and_inner_product_carry_over_from_M(self, layer):
        """U and V are orthonormal: ||Delta W||_F = ||m||, and <Delta W, W0> = <M, Sigma>."""
        delta, m, W0 = layer.delta_weight().detach(), layer.m.detach(), torch.from_numpy(weight_of(layer.base[0]))
        near(delta.norm(), m.norm(), rounding(torch.float64, m))
        diagonal = [float(m[t] * layer.S[i]) for t, (i, j) in enumerate(layer.omega.T.tolist()) if i == j]
        near((delta * W0).sum(), sum(diagonal), rounding(torch.float64, m, layer.S))


# ---------------------------------------------------------------- numbers of the paper: trainable parameters


def block(hidden, cross, kv, up):
    """One block's weights, (d1, d2): q, k, v, o of its attention and gate, up, down of its MLP."""
    q, k, gate = (cross, hidden), (kv, hidden), (up, hidden)
    return dict(q=q, k=k, v=k, o=q[::-1], gate=gate, up=gate, down=gate[::-1])


MODELS = {
    "Gemma-2B": (18, block(2048, 2048, 256, 16384)),
    "Gemma-7B": (28, block(3072, 4096, 4096, 24576)),
    "LLaMA-3-8B": (32, block(4096, 4096, 1024, 14336)),
    "DeBERTaV3-base": (12, block(768, 768, 768, 3072)),
    "ViT-B": (12, block(768, 768, 768, 3072)),
    "ViT-L": (24, block(1024, 1024, 1024, 4096)),
}
EVERY = "q k v o up down gate"


def trained_by_svft(model, modules, d, rank=10**9):
    """What an omega has, from shapes alone; random and top-k of a given d have the same number."""
    number, shapes = MODELS[model]
    sizes = [min(*shapes[name], rank) for name in modules.split()]
    return number * sum(omega_banded(n, n, d).shape[1] for n in sizes)


def trained_by_lora(model, modules, r):
    number, shapes = MODELS[model]
    return number * sum(r * sum(shapes[name]) for name in modules.split())


# fmt: off
COUNTS = [
    # table, setting, count, as the paper prints it
    ("1", trained_by_svft, ("Gemma-2B", EVERY, 0), 193_536, "0.19M"),
    ("1", trained_by_svft, ("Gemma-2B", EVERY, 16), 6_352_416, "6.35M"),
    ("5", trained_by_svft, ("Gemma-2B", EVERY, 8), 3_281_040, "3.3M"),
    ("1", trained_by_lora, ("Gemma-2B", "q k v up down", 1), 820_224, "0.82M"),
    ("1", trained_by_lora, ("Gemma-2B", "q k v up down", 32), 26_247_168, "26.2M"),
    ("1", trained_by_svft, ("Gemma-7B", EVERY, 16), 19_816_384, "19.8M"),
    ("1", trained_by_lora, ("Gemma-7B", "q k v up down", 32), 68_812_800, "68.8M"),
    ("1", trained_by_svft, ("LLaMA-3-8B", "up down o gate", 12), 13_087_232, "13.1M"),
    ("1", trained_by_lora, ("LLaMA-3-8B", "q k v up down", 1), 1_769_472, "1.77M"),
    ("1", trained_by_lora, ("LLaMA-3-8B", "q k v up down", 32), 56_623_104, "56.6M"),
    ("3", trained_by_svft, ("DeBERTaV3-base", "q k v o up down", 0), 55_296, "0.06M"),
    ("3", trained_by_svft, ("DeBERTaV3-base", "q k v o up down", 2), 276_048, "0.28M"),
    ("4", trained_by_svft, ("ViT-B", "q v", 0), 18_432, "18.5K"),
    ("4", trained_by_svft, ("ViT-B", "q k v o up down", 2), 276_048, "0.28M"),
    ("9", trained_by_svft, ("ViT-B", "q k v o up down", 4), 496_224, "0.50M"),
    ("9", trained_by_svft, ("ViT-B", "q k v o up down", 8), 934_848, "0.93M"),
    ("4", trained_by_svft, ("ViT-L", "q v", 0), 49_152, "49.2K"),
    ("4", trained_by_svft, ("ViT-L", "q k v o up down", 2), 736_416, "0.74M"),
    ("9", trained_by_svft, ("ViT-L", "q k v o up down", 4), 1_324_224, "1.32M"),
    ("9", trained_by_svft, ("ViT-L", "q k v o up down", 8), 2_496_384, "2.50M"),
    ("10", trained_by_svft, ("Gemma-2B", EVERY, 64, 128), 1_556_352, "1.55M"),
    ("10", trained_by_svft, ("Gemma-2B", EVERY, 0, 1536), 147_456, "0.15M"),
    ("10", trained_by_svft, ("Gemma-2B", EVERY, 2, 1536), 736_524, "0.74M"),
]
SLIPS = [
    # table, setting, what its text gives, what the paper prints, what would give the printed number
    ("1", trained_by_svft, ("Gemma-7B", EVERY, 0), 602_112, 430_000, 5 * 28 * 3072),
    ("2", trained_by_svft, ("Gemma-7B", EVERY, 0), 602_112, 510_000, 6 * 28 * 3072),
    ("2", trained_by_svft, ("Gemma-7B", EVERY, 8), 10_221_792, 9_800_000, None),
    ("1", trained_by_lora, ("Gemma-7B", "q k v up down", 1), 2_150_400, 820_000, 820_224),
    ("1", trained_by_svft, ("LLaMA-3-8B", "up down o gate", 0), 524_288, 480_000, None),
    ("4", trained_by_svft, ("ViT-B", "q k v up down", 2), 230_040, 280_000, 276_048),
]
# fmt: on


class TestTrainableParameters_Tables_1_to_10:
    @pytest.mark.parametrize("row", COUNTS, ids=[f"table-{c[0]}-{c[2][0]}-{c[1].__name__[11:]}-{c[4]}" for c in COUNTS])
    def test_a_count_of_the_paper_follows_from_shapes_alone(self, row):
        """Exactly our number, which is within one unit of the last digit that is printed."""
        _, count, setting, want, printed = row
        assert count(*setting) == want
        digits, unit = printed[:-1], {"M": 1e6, "K": 1e3}[printed[-1]]
        assert abs(want / unit - float(digits)) < 10.0 ** -len(digits.partition(".")[2])

    @pytest.mark.parametrize("row", SLIPS, ids=[f"table-{s[0]}-{s[2][0]}-{s[4]}" for s in SLIPS])
    def test_a_slip_of_the_paper_is_a_slip(self, row):
        """The text gives another number than the table prints. Other modules explain some; one is Gemma-2B's."""
        _, count, setting, want, printed, explained = row
        assert count(*setting) == want and abs(want - printed) > 0.04 * printed
        assert explained is None or abs(explained - printed) < 0.015 * printed


# ---------------------------------------------------------------- dtypes, devices, and the places people run it

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=in_words)


class TestDtypesAndTransformations:
    @HALF
    @pytest.mark.parametrize("path", ["dense", "gather", "auto"])
    def test_half_precision_layers_compute_the_update_in_float32(self, path, dtype):
        """W0 and the bases stay half, m and the sparse step are float32 (D12): small values of m come out whole."""
        layer = randomize(SVFTLinear(plain_layer(48, 40, dtype=dtype), path=path), 1e-4)
        x, delta = torch.randn(3, 40).to(dtype), delta_by_double_loop(layer)
        assert (layer.U.dtype, layer.S.dtype, layer.m.dtype) == (dtype, torch.float32, torch.float32)
        assert layer(x).dtype == dtype
        near(layer.delta_weight(), delta, 1e-5 * float(layer.m.abs().max()))
        layer.weight.data.zero_(), layer.bias.data.zero_()  # out of the sum's way: the update itself must come through
        want = x.double().numpy() @ delta.T
        near(layer(x), want, 8 * torch.finfo(dtype).eps * np.abs(want).max())
        layer(x).float().sum().backward()
        assert layer.m.grad.dtype == torch.float32 and (layer.m.grad != 0).all()
        Y = svft._sparse_times(layer.omega, layer.m, 40, layer.Vh)  # the sparse step, before anything is rounded
        near(Y, layer.M() @ layer.Vh.float(), 1e-6 * float(Y.detach().abs().max()))

    @pytest.mark.parametrize("path", ["dense", "gather", "fused", "auto"])
    def test_autocast_agrees_with_float32_to_its_own_rounding(self, path):
        """Each product runs in autocast's dtype: output in bfloat16, gradient of m in float32. W0 kept or freed."""
        for keep in [True] if path == "gather" else [True, False]:
            base = plain_layer(40, 24, dtype=torch.float32)
            layer, x = randomize(SVFTLinear(base, path=path, keep_weight=keep), 0.1), torch.randn(6, 24)
            want = x.double().numpy() @ (weight_of(base) + delta_by_double_loop(layer)).T + base.bias.detach().numpy()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = layer(x)
                assert layer.delta_weight().dtype == layer.merged_weight().dtype == torch.float32
            assert h.dtype == torch.bfloat16
            near(h, want, 8 * 2**-8 * np.abs(want).max(), keep)
            h.float().sum().backward()
            assert layer.m.grad.dtype == torch.float32 and layer.m.grad.abs().sum() > 0

    @HALF
    @pytest.mark.parametrize("keep", [True, False], ids=["W0-kept", "W0-freed"])
    def test_fused_in_half_precision_is_allowed_when_asked_for(self, dtype, keep):
        """W0 comes back to the rounding of U and Vh (D14); an m far below Sigma's last bit is not lost on the CPU."""
        base, x = plain_layer(48, 40, dtype=dtype), torch.randn(3, 40).to(dtype)
        layer, b = randomize(SVFTLinear(base, path="fused", keep_weight=keep)), base.bias.detach().double().numpy()
        want = x.double().numpy() @ (weight_of(base) + delta_by_double_loop(layer)).T + b
        near(layer(x), want, 16 * torch.finfo(dtype).eps * np.abs(want).max())
        layer.m.data.fill_(1e-6), layer.bias.data.zero_()
        z = (layer.Vh @ x.T).float()  # as the layer rounds it
        y = layer._M_times(z, add_sigma=True) - layer.S[:, None] * z
        near(y, layer.M() @ z, 0.3 * float((layer.M() @ z).abs().max()))  # float32 keeps most of an m of 1e-6
        near(layer.merge()(x), layer(x), 32 * torch.finfo(dtype).eps * np.abs(want).max())

    def test_no_switch_of_torchs_changes_a_check_or_a_merge(self):
        """TF32, set_float32_matmul_precision and autocast touch float32 products alone: checks and merges are float64."""
        base, seen = plain_layer(9, 7, dtype=torch.float32), []
        svd, precision = compute_svd(base.weight), torch.get_float32_matmul_precision()

        def merged():
            return [randomize(SVFTLinear(base, svd=svd, keep_weight=keep)).merge().weight for keep in (True, False)]

        class Products(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if func in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul, torch.linalg.svd):
                    seen.append(args[0].dtype)
                return func(*args, **(kwargs or {}))

        want = [*svd, *merged()]
        try:
            torch.set_float32_matmul_precision("medium")  # allows TF32 too
            with torch.autocast("cpu", dtype=torch.bfloat16), Products():
                assert all(map(torch.equal, [*compute_svd(base.weight), *merged()], want))
        finally:
            torch.set_float32_matmul_precision(precision)
        assert len(seen) > 8 and set(seen) == {torch.float64}

    @given(layer=layers())
    def test_a_copy_a_pickle_and_a_state_dict_carry_the_layer(self, layer):
        """The same output bits, whatever the other layer held, another Omega too, and in whatever way it is loaded."""
        layer.base = None
        state, x = layer.state_dict(), torch.randn(3, layer.in_features, dtype=torch.float64)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), layer(x)) and other.m is not layer.m
        ways = {
            "whole": lambda other: other.load_state_dict(state),
            "assign": lambda other: other.load_state_dict(state, assign=True),
            "from meta": lambda other: other.to("meta").load_state_dict(state, assign=True),
            "after to_empty": lambda other: other.to_empty(device="cpu").load_state_dict(state),
            "in parts": lambda other: [other.load_state_dict({n: state[n]}, strict=False) for n in reversed(state)],
        }
        for way, load in ways.items():
            other = copy.deepcopy(layer)
            other.omega.copy_(omega_random(*layer.M().shape, len(layer.m), seed=5))
            for p in other.parameters():
                p.data.normal_()
            assert not torch.equal(other(x), layer(x))
            load(other)
            assert torch.equal(other(x), layer(x)), way

    @pytest.mark.parametrize("path", ["auto", "dense", "gather", "fused"])
    def test_a_whole_model_compiles_and_exports_for_inputs_of_any_length(self, path):
        """One exported program; a few compiled graphs, not one for each length or each path that auto could take."""
        torch._dynamo.reset()
        lengths = (2, 5, 9, 14, 20, 30, 50, 80, 120, 200, 300, 500, 1900)  # uncompiled, auto would change path at three
        model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 19), nn.Linear(19, 4))
        model = randomize(svft.inject(model, "all-linear", "plain", path=path), 0.1)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        stats = torch._dynamo.utils.counters["stats"]
        stats.clear()
        with torch.no_grad():
            for tokens in lengths:
                near(compiled(torch.ones(tokens, 5)), model(torch.ones(tokens, 5)), 1e-5)
        assert 1 <= stats["unique_graphs"] <= 3
        for tokens in lengths:
            x = torch.randn(tokens, 5)
            near(compiled(x), model(x), 1e-5)
            want, got = (torch.autograd.grad(f(x).square().sum(), model[0].m)[0] for f in (model, compiled))
            near(got, want, 1e-4 * float(want.abs().max()))
        assert 2 <= stats["unique_graphs"] <= 6
        any_length = {"input": {0: torch.export.Dim("length", min=2, max=4096)}}
        program = torch.export.export(model, (torch.randn(7, 5),), dynamic_shapes=any_length).module()
        for tokens in lengths:
            near(program(torch.ones(tokens, 5)), model(torch.ones(tokens, 5)), 1e-5)

    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
    def test_gradient_checkpointing_changes_nothing(self, reentrant):
        """The recomputed forward gives the same gradient."""
        model, x = randomize(svft.inject(mlp(), ["0", "2", "4"])), torch.randn(3, 5, requires_grad=True)
        want = torch.autograd.grad(model(x).sum(), [model[0].m, x])
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        assert torch.equal(model[0].m.grad, want[0]) and torch.equal(x.grad, want[1])

    def test_torch_func_and_inference_mode_work(self):
        """functional_call with grad, per-sample gradients through vmap, and inference mode."""
        layer, x = randomize(SVFTLinear(plain_layer(5, 4), path="gather")), torch.randn(6, 4, dtype=torch.float64)
        grad = torch.func.grad(lambda m, x: torch.func.functional_call(layer, {"m": m}, (x,)).square().sum())
        want = torch.autograd.grad(layer(x).square().sum(), layer.m)[0]
        near(grad(layer.m.detach(), x), want, 1e-10)
        with warnings.catch_warnings(action="ignore"):  # no batching rule for embedding_bag: torch falls back to a loop
            each = torch.func.vmap(grad, in_dims=(None, 0))(layer.m.detach(), x[:, None])
        near(each.sum(0), want, 1e-10)
        with torch.inference_mode():
            near(layer(x), layer.merge()(x), 1e-10)

    def test_no_path_mixes_devices(self):
        """A small GPT-2 on a fake GPU, injected, run and merged. LAPACK works on CUDA, else on the CPU, as for MPS."""
        if torch.cuda.is_available():
            pytest.skip("the laws themselves run on this GPU, which shows a mix-up")
        if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
            pytest.skip("this torch cannot register a backend in Python")
        script = "import test_svft; test_svft.run_on_a_fake_gpu()"  # in its own process: autograd must start with it
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=HERE)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def run_on_a_fake_gpu():
    """Fake tensors of a backend that torch lets Python register: once it passes for CUDA, once it does not."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Fake(FakeTensorMode):  # svft's checks ask tensors for scalars: answer 'all is well'
        def dispatch(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                return True if args[0].dtype == torch.bool else 0.01 if args[0].dtype.is_floating_point else 1
            if func is torch.ops.aten.nonzero.default:  # omega_banded's: as many positions as a band of d = 1 has
                with self:
                    return torch.zeros(3 * args[0].shape[0] - 2, 2, dtype=torch.int64, device="cpu")
            return super().dispatch(func, types, args, kwargs or {})

    def check(dtype):
        with torch.device("meta"):
            model = train_toy.GPT2(train_toy.Config(vocabulary=16, context=4, layers=1, heads=2, width=8))
            model.h[0].attn.c_proj = Conv1D(8, 8)  # as in transformers' GPT-2
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=dtype, device=gpu)))
        h, tokens = model.h[0], torch.zeros(2, 4, dtype=torch.int64, device=gpu)
        svd = SVD(*(t.cpu() for t in compute_svd(h.mlp.c_fc.weight)))  # given from elsewhere
        assert SVFTLinear(h.mlp.c_fc, "plain", svd=svd).U.device.type == gpu
        for targets, pattern in (
            (["attn.c_proj"], "top_k"),
            (["c_fc"], "random"),
            (["c_attn", "mlp.c_proj"], "banded"),
        ):
            svft.inject(model, targets, pattern, 1)
        for path in ("auto", "dense", "gather", "fused"):
            for layer in (h.attn.c_attn, h.attn.c_proj, h.mlp.c_fc, h.mlp.c_proj):
                layer.path = path
            y = model(tokens)
            y.float().sum().backward()
            assert y.device.type == h.attn.c_proj.m.grad.device.type == gpu
        with svft.disabled(model):
            assert model(tokens).device.type == gpu
        merged = svft.merge(model).h[0].attn.c_proj
        assert merged.weight.device.type == gpu and type(merged) is Conv1D

    gpu = "fakegpu"
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(gpu)
    with Fake(), pytest.raises(RuntimeError, match="same device"):
        torch.zeros(2, device=gpu) + torch.zeros(2)
    real, served = torch.linalg.svd, set()
    torch.linalg.svd = lambda W, **options: served.add((W.device.type, W.dtype)) or real(W, **options)
    for where, dtype in [(w, t) for w in (gpu, "cpu") for t in (torch.float32, torch.bfloat16)]:
        torch.Tensor.is_cuda = property(lambda t, where=where: t.device.type == where == gpu)
        served.clear()
        with Fake():
            check(dtype)
        assert served == {(where, torch.float64)}, dtype


# ---------------------------------------------------------------- a whole model


class TestMerge:
    @given(layer=layers(), lead=leading)
    def test_the_merged_layer_computes_what_the_adapted_one_did(self, layer, lead):
        """h = (W0 + U M V^T) x + b as one plain matrix; merging changes neither the layer nor a second merge."""
        x = torch.randn(*lead, layer.in_features, dtype=torch.float64)
        merged, again = layer.merge(), layer.merge()
        near(merged(x), layer(x), rounding(torch.float64, layer.S, layer.m.detach(), x))
        assert torch.equal(merged.weight, again.weight)
        assert np.abs(weight_of(merged) - weight_of(layer.base[0])).max() > 1e-9  # and it did change

    @devices
    @pytest.mark.parametrize("kind", ["linear", "conv1d"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=in_words)
    def test_type_layout_dtype_device_bias_and_mode_are_kept(self, kind, dtype, device):
        """A plain layer of the base's own type, frozen, with memory of its own."""
        for train in (True, False):
            base = plain_layer(6, 6, kind, dtype).to(device).train(train)
            layer = randomize(SVFTLinear(base))
            merged = layer.merge()
            assert type(merged) is type(base) and merged.training == train
            assert merged.weight.shape == base.weight.shape and merged.weight.is_contiguous()
            assert (merged.weight.dtype, merged.weight.device) == (dtype, base.weight.device)
            assert torch.equal(merged.bias, base.bias) and merged.bias.data_ptr() != base.bias.data_ptr()
            assert merged.extra_repr() == base.extra_repr() and not merged.weight.requires_grad
            assert layer.train(not train).merge().training != train  # the mode is the layer's own, now
        assert SVFTLinear(plain_layer(3, 2, bias=False)).merge().bias is None

    def test_a_half_precision_merge_rounds_once(self):
        """W0 + Delta W is summed in float32 and then rounded: the nearest bfloat16, entry by entry."""
        layer = randomize(SVFTLinear(plain_layer(8, 8, dtype=torch.bfloat16)))
        exact = layer.weight.double() + layer.U.double() @ layer.M().double() @ layer.Vh.double()
        got = layer.merge().weight
        other = torch.nextafter(got, torch.where(exact > got.double(), math.inf, -math.inf).to(got))
        assert ((got.double() - exact).abs() <= (other.double() - exact).abs() * (1 + 1e-4)).all()

    @pytest.mark.filterwarnings("error")
    def test_it_warns_with_the_figure_where_rounding_swallows_the_update(self):
        """bfloat16 has 8 bits: an update far below W0's last bit is mostly lost, and merge says how much."""
        layer = randomize(SVFTLinear(plain_layer(32, 32, dtype=torch.bfloat16)), 1e-4)
        with pytest.warns(UserWarning, match=r"merge: rounding .32, 32. to torch.bfloat16 loses \d\d+% of the update"):
            layer.merge()
        randomize(layer, 1.0).merge()
        randomize(SVFTLinear(plain_layer(32, 32, dtype=torch.float32)), 1e-4).merge()
        SVFTLinear(plain_layer(32, 32, dtype=torch.bfloat16)).merge()  # m = 0: nothing to lose

    @pytest.mark.parametrize("bad, named", [(math.nan, "m"), (math.inf, "m"), (1e38, "merged weight")])
    def test_a_model_with_a_bad_m_is_refused_and_left_alone(self, bad, named):
        """NaN, inf, or an overflow when rounded: the error names the layer and nothing is merged."""
        model = randomize(svft.inject(mlp(dtype=torch.float16), ["0", "2", "4"]))
        before, m = snapshot(model), model[4].m.data
        good, m[0] = m[0].clone(), bad
        with pytest.raises(ValueError, match=f"layer '4': {named}: got NaN or inf"):
            svft.merge(model)
        if named == "m":
            with pytest.raises(ValueError, match="m: got NaN or inf"):
                model[4].check_rank()
        m[0] = good  # else NaN would not equal itself
        assert_untouched(model, before)

    def test_merging_twice_equals_merging_once(self):
        """The second merge finds nothing to do; a model may also be merged where a layer stands under two names."""
        model, x = randomize(svft.inject(mlp(), ["2"])), torch.randn(3, 5)
        model.alias = model[2]
        want = model[:5](x)
        assert svft.merge(model) is model and type(model[2]) is nn.Linear and model.alias is model[2]
        near(model[:5](x), want, 1e-5)
        before = snapshot(model)
        assert_untouched(svft.merge(model), before)


class TestInject:
    def test_targets_are_matched_by_whole_names_or_their_ends(self):
        """PEFT's rules (D13): a list holds names, or their ends at a dot; a string is a regular expression for whole
        names. Every entry must match. If one does not, the error says which names there are, and nothing changes."""
        model = nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"c_fc": nn.Linear(4, 3)}) for _ in "ab")})
        model["head"] = nn.Linear(3, 2)
        before, (first, second) = snapshot(model), ("h.0.c_fc", "h.1.c_fc")
        for targets, names in [
            (["c_fc"], [first, second]),
            (["h.1.c_fc"], [second]),
            (["0.c_fc", "head"], [first, "head"]),
            (r"h\.\d+\.c_fc", [first, second]),
            (r".*(c_fc|head)", [first, second, "head"]),
        ]:
            adapted = svft.inject(copy.deepcopy(model), targets)
            assert [n for n, m in adapted.named_modules() if isinstance(m, SVFTLinear)] == names, targets
        for targets in (r".*c_f", ("fc",), "c_fc", ["c_fc", "absent"]):
            with pytest.raises(ValueError, match=r"matches nothing.*h\.0\.c_fc"):
                svft.inject(model, targets)
                pytest.fail(f"{targets} matched")
            assert_untouched(model, before)

    def test_all_linear_takes_every_linear_layer_but_the_output_embedding(self):
        """The third of PEFT's rules (D13): nn.Linear and Conv1D, wherever they stand; a head that is tied stays."""
        model = nn.ModuleDict({"wte": nn.Embedding(5, 4), "fc": Conv1D(3, 4), "deep": nn.Sequential(nn.Linear(3, 4))})
        model["head"] = nn.Linear(4, 5)
        model["head"].weight = model["wte"].weight
        with pytest.raises(ValueError, match=r"layer 'head': weight: got one shared by \['wte', 'head'\]"):
            svft.inject(copy.deepcopy(model), "all-linear")
        model.get_output_embeddings = lambda: model["head"]  # as a model of transformers has it
        svft.inject(model, "all-linear")
        assert [n for n, m in model.named_modules() if isinstance(m, SVFTLinear)] == ["fc", "deep.0"]

    def test_a_stack_of_weights_is_warned_of_and_stays_as_it_is(self):
        """The experts of a mixture are 3-d Parameters, as in transformers 5: an entry that names them takes half of
        what it seems to take. A convolution's weight, normed or not, and a single embedding are no such stack."""
        model = nn.ModuleDict({"shared": nn.ModuleDict({"down_proj": nn.Linear(4, 3)}), "experts": nn.Module()})
        model["experts"].down_proj = nn.Parameter(torch.randn(8, 3, 4))
        model["conv"] = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3))
        model.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        for targets in (["down_proj"], r".*down_proj", "all-linear"):
            with pytest.warns(UserWarning, match=r"\['experts.down_proj'\] are stacks of weights, no layers"):
                svft.inject(copy.deepcopy(model), targets)
        del model["shared"]
        with pytest.raises(ValueError, match=r"matches nothing; \['experts.down_proj'\] are stacks"):
            svft.inject(model, ["down_proj"])

    def test_names_are_the_models_own_inside_torchs_wrappers(self, tmp_path):
        """torch.compile, activation checkpointing and DDP put their names into a module's: they are left out when
        matching, in the seed of "random", and in files. So a file is the same whatever was wrapped."""
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        def model():
            torch.manual_seed(0)
            return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in "ab"))

        plain, inside, path, files = model(), model(), tmp_path / "a.npz", []
        inside[0], inside[1] = torch.compile(inside[0]), checkpoint_wrapper(inside[1])
        for wrapped in (plain, inside, nn.DataParallel(torch.compile(model()))):
            svft.save_adapter(randomize(svft.inject(wrapped, ["0.1", "1.0"], "random", 1)), path)
            files.append(path.read_bytes())
        assert files[0] == files[1] == files[2]
        x = torch.randn(3, 6)
        near(svft.load_adapter(model(), path)(x), plain(x), 1e-5)
        near(svft.load_adapter(nn.DataParallel(model()), path).module(x), plain(x), 1e-5)

    def test_two_layers_of_one_name_are_refused(self):
        """Two names may be one without the names of torch's wrappers: no file could keep them apart."""
        model = nn.ModuleDict({"a": nn.Linear(3, 3), "module": nn.ModuleDict({"a": nn.Linear(3, 3)})})
        with pytest.raises(ValueError, match="two layers named 'a'"):
            svft.inject(model, ["a"])
        direct = nn.Sequential(torch.compile(nn.Linear(3, 3)))  # keeps the forward of the layer that it was given
        with pytest.raises(ValueError, match="layer '0': base: got a part of another module"):
            svft.inject(direct, ["0"])

    def test_what_a_removed_hook_leaves_behind_is_accepted(self):
        """accelerate's remove_hook_from_module leaves the layer's own bound forward behind; a hook may be removed."""
        model = mlp()
        model[2].forward = model[2].forward
        model[2].register_forward_hook(print).remove()
        model[2].register_full_backward_hook(print).remove()
        assert isinstance(svft.inject(model, ["2"])[2], SVFTLinear)

    def test_the_work_grows_with_the_modules_not_with_their_square(self, monkeypatch):
        """Looking for targets and shared weights visits each module a fixed number of times: counted, not timed."""
        visits = {20: 0, 40: 0}

        def counted(self, *args, real=nn.Module.named_modules, **options):
            for item in real(self, *args, **options):
                visits[count] += 1
                yield item

        monkeypatch.setattr(nn.Module, "named_modules", counted)
        for count in visits:
            model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(count)))
            svft.inject(model, [str(i) for i in range(count)], "plain")
        assert visits[40] < 2.5 * visits[20]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, torch.OutOfMemoryError])
    def test_an_error_or_ctrl_c_in_the_last_layer_leaves_the_model_as_it_was(self, error):
        """All layers are made before the first is replaced; the error keeps its type and names the layer."""

        def pattern(svd):
            if len(svd.U) == 4:
                raise error("stop")
            return omega_plain(5, 5)

        model = mlp()
        before = snapshot(model)
        with pytest.raises(error, match="stop" if error is KeyboardInterrupt else "layer '4': stop"):
            svft.inject(model, ["0", "2", "4"], pattern)
        assert_untouched(model, before)

    def test_it_freezes_everything_but_the_ms_and_keeps_those_of_an_earlier_inject(self):
        """What trains is decided by identity: a parameter that happens to be called m is frozen."""
        model = mlp()
        model.register_parameter("m", nn.Parameter(torch.ones(1)))
        assert svft.inject(model, ["0"], "plain") is model
        svft.inject(model, ["4"], "random", 1, path="gather")
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.m", "4.m"]
        model[:5](torch.randn(2, 5)).sum().backward()
        assert model[0].m.grad.abs().sum() > 0 and model[4].m.grad.abs().sum() > 0
        assert (model[0].pattern, model[4].pattern, model[4].path) == ("plain", "random", "gather")

    def test_random_draws_another_omega_for_each_layer_from_one_seed(self):
        """Layers of equal shape do not share an Omega; the same seed gives the same ones, by the layer's name."""

        def omegas(*targets):
            model = svft.inject(nn.Sequential(*(nn.Linear(8, 8) for _ in "abc")), targets, "random", seed=3)
            return [model[int(name)].omega for name in targets]

        a, b = omegas("0", "1", "2"), omegas("0", "1", "2")
        assert not torch.equal(a[0], a[1]) and all(map(torch.equal, a, b)) and torch.equal(omegas("1")[0], a[1])

    def test_mode_and_memory_are_the_base_layers_and_its_own_tensors_are_contiguous(self):
        """W0 and b are not copied, and the base is not changed. safetensors and FSDP2 want contiguous parameters,
        however the SVD and Omega were laid out."""
        base = plain_layer(6, 6).eval()
        svd = SVD(*(t.T.contiguous().T if t.ndim == 2 else t for t in compute_svd(base.weight)))
        before, layer = snapshot(base), SVFTLinear(base, omega_plain(6, 6).T.contiguous().T, svd=svd)
        assert layer.weight.data_ptr() == base.weight.data_ptr() and layer.bias.data_ptr() == base.bias.data_ptr()
        assert not layer.training and SVFTLinear(base, keep_weight=False).weight is None
        assert all(t.is_contiguous() for t in (*layer.parameters(), *layer.buffers()))
        assert_untouched(base, before)


class TestDisabledAndSummary:
    @pytest.mark.parametrize("keep", [True, False], ids=["W0-kept", "W0-freed"])
    def test_inside_disabled_the_model_is_the_base_model(self, keep):
        """Blocks nest: the outer one still holds when the inner one ends, also by an exception."""
        base, x = mlp(), torch.randn(3, 5)
        model = randomize(svft.inject(copy.deepcopy(base), ["0", "2", "4"], keep_weight=keep))
        adapted, want, tolerance = model(x), base(x), 0 if keep else 1e-5
        with svft.disabled(model) as inside:
            assert inside is model
            with contextlib.suppress(ZeroDivisionError), svft.disabled(model):
                near(model(x), want, tolerance)
                1 / 0  # noqa: B018
            near(model(x), want, tolerance)
            assert (svft.merge(copy.deepcopy(model))(x) - want).abs().max() > 1e-3  # merging is not disabled
            kept = copy.deepcopy(model)
        assert torch.equal(model(x), adapted) and (adapted - want).abs().max() > 1e-3
        assert torch.equal(kept(x), adapted)  # a copy made inside is not disabled for ever

    def test_ctrl_c_on_entry_leaves_nothing_behind(self, monkeypatch):
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
        assert "threads" in svft.disabled.__doc__  # the flag is the layer's: all threads see it

    def test_summary_lists_layers_shapes_patterns_counts_and_shares(self):
        """A table to read: what is adapted, how, with how many parameters and bytes."""

        def rows(**options):
            table = svft.summary(svft.inject(mlp(), ["0", "4"], "banded", 1, **options))
            return [re.split(r"\s{2,}", line) for line in table.splitlines()]

        header, first, *_, last = rows()
        assert header == ["layer", "shape", "pattern", "k", "path", "bytes"]
        held = 4 * (6 * 5 + 6 + 6 * 5 + 5 + 5 * 5 + 13) + 8 * 2 * 13  # W0, b, U, S, Vh, m; omega
        assert first == ["0", "6 x 5", "banded d=1", "13", "auto", str(held)]
        total = sum(p.numel() for p in mlp().parameters())
        assert last == [f"trained: 23 parameters, {100 * 23 / total:.3f}% of the base model's {total}"]
        assert rows(keep_weight=False)[-1] == last


# ---------------------------------------------------------------- Hugging Face, DDP, FSDP2


@pytest.fixture(scope="module")
def hf():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason="pip install '.[gpt2]' accelerate, to run the Hugging Face tests")


def tiny(hf, kind):
    """A GPT-2 (Conv1D, square ones among them) or a Llama-style model with random weights, and the targets in it."""
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = dict(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)
        config = hf.GPT2Config(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        return hf.GPT2LMHeadModel(config).eval(), ["c_attn", "c_proj", "c_fc"]
    shape = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, max_position_embeddings=32)
    config = hf.LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
    return hf.LlamaForCausalLM(config).eval(), r".*\.(q|k|v|o|up|gate|down)_proj"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
class TestHuggingFace:
    def test_inject_generate_merge_save_and_load_again(self, hf, kind, tmp_path):
        """At m = 0 the same logits; adapted ones survive merge, save_pretrained and from_pretrained."""
        model, targets = tiny(hf, kind)
        if kind == "gpt2":  # its head is its embedding: adapting it would change both
            with pytest.raises(ValueError, match=r"'lm_head': .* shared by \['transformer.wte', 'lm_head'\]"):
                svft.inject(model, ["lm_head"])
        ids = torch.tensor([[1, 5, 9, 7]])
        start = model(ids).logits
        svft.inject(model, targets)
        assert len([m for m in model.modules() if isinstance(m, SVFTLinear)]) == (8 if kind == "gpt2" else 14)
        near(model(ids).logits, start, 1e-5)
        randomize(model, 0.3)
        want, text = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
        assert (want - start).abs().max() > 1e-2
        svft.merge(model).save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        near(model(ids).logits, want, 1e-4)
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert torch.equal(again.generate(ids, max_new_tokens=5, do_sample=False), text)
        assert not any(isinstance(m, SVFTLinear) for m in again.modules())

    def test_the_trainer_trains_it_with_gradient_checkpointing(self, hf, kind, tmp_path):
        """Trainer, gradient checkpointing and enable_input_require_grads: the m's move, nothing else does."""
        pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
        model, targets = tiny(hf, kind)
        svft.inject(model, targets)
        model.enable_input_require_grads()
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        texts = torch.randint(3, 50, (8, 12))
        how = dict(max_steps=3, per_device_train_batch_size=4, learning_rate=0.05, gradient_checkpointing=True)
        args = hf.TrainingArguments(tmp_path, **how, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True)
        hf.Trainer(model, args, train_dataset=[{"input_ids": ids, "labels": ids} for ids in texts]).train()
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
        assert all(m.m.abs().max() > 1e-3 for m in model.modules() if isinstance(m, SVFTLinear))
        svft.save_adapter(model, tmp_path / "a.npz")
        fresh = svft.load_adapter(tiny(hf, kind)[0], tmp_path / "a.npz")
        near(fresh(texts[:1]).logits, model.eval()(texts[:1]).logits, 1e-5)


FSDP_ON_THE_CPU = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)  # torch 2.6 does not have it
HAS_GLOO = torch.distributed.is_available() and torch.distributed.is_gloo_available()
needs_gloo = pytest.mark.skipif(not HAS_GLOO, reason="this torch has no gloo")
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="a fork is safe on Linux alone")
# autograd's threads for a GPU bar a fork
START = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"
# work(0, *args), work(1, *args), ... at once, each in a process of its own; raises if one of them does
in_processes = torch.multiprocessing.start_processes


def steps(model, seeds=range(4), shard=slice(None), optimizer=None):
    """Train on a batch of each seed, or on a part of each batch."""
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for seed in seeds:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))[shard]
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    return model


def one_of_two(rank, folder):
    """A process of a gloo group: DDP, then FSDP2. Each process takes its half of every batch."""
    torch.set_num_threads(1)  # a fork does not have the threads of the process that it was made from
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    half = slice(4 * rank, 4 * rank + 4)
    model = svft.inject(mlp(), ["0", "2", "4"])
    wrapper = steps(nn.parallel.DistributedDataParallel(model), shard=half)
    if rank == 0:
        svft.save_adapter(wrapper, folder / "ddp.npz")
    if FSDP_ON_THE_CPU:
        with_fsdp(half, folder / "fsdp.npz")
    torch.distributed.barrier()  # no process leaves while the other still reads from it
    torch.distributed.destroy_process_group()


def with_fsdp(half, path):
    from torch.distributed.fsdp import fully_shard

    model = svft.inject(mlp(width=64), ["0", "2", "4"])
    whole = {n: p.numel() for n, p in model.named_parameters()}
    for module in (model[0], model[2], model[4], model):
        fully_shard(module)
    for name, p in model.named_parameters():
        assert abs(p.to_local().numel() - whole[name] / 2) <= whole[name] / p.shape[0], name  # half, to one row
    svft.save_adapter(steps(model, shard=half), path)  # on every rank
    at_root = svft.inject(mlp(), ["0"])
    fully_shard(at_root)
    at_root(torch.randn(2, 5))  # the root's weights stay gathered after a forward: plain, for the time being
    for refused in (svft.merge, lambda m: svft.load_adapter(m, path), lambda m: svft.inject(m, ["2"])):
        for sharded in (model, at_root):
            with pytest.raises(TypeError, match="model: got a sharded one"):
                refused(sharded)


class TestDistributed:
    @needs_gloo
    def test_two_processes_equal_one_with_the_same_global_batch(self, tmp_path, monkeypatch):
        """DDP; FSDP2 with W0, U and V halved on each rank. The adapter that they save loads on one process."""
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # two processes on one GPU would not do
        in_processes(one_of_two, (tmp_path,), 2, start_method=START)
        for kind, width in (("ddp", 6), ("fsdp", 64))[: 1 + FSDP_ON_THE_CPU]:
            alone = steps(svft.inject(mlp(width=width), ["0", "2", "4"]))
            together = svft.load_adapter(mlp(width=width), tmp_path / f"{kind}.npz")
            for i in (0, 2, 4):
                assert alone[i].m.abs().max() > 1e-2
                near(together[i].m, alone[i].m, 1e-5)


# ---------------------------------------------------------------- memory, counted, not timed


def held_for_backward(layer, x):
    """Bytes that forward leaves for backward, beyond the layer's own tensors and the input x."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers(), x)}
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(size for place, size in seen.items() if place not in own)


class TestMemory:
    @pytest.mark.parametrize("path", ["dense", "gather", "fused"])
    @pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
    def test_what_forward_keeps_for_backward_does_not_grow_with_k(self, path, kind):
        """gather and fused: one (n, T) float32 tensor; dense: one d1 x d2 matrix, and in bf16 V^T in float32 (D11).

        Autocast adds the bf16 copies that it makes of what is multiplied, of a plain layer's weight and input too.
        """
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
        """All that LAPACK was given and gave for one layer is gone when the next one's turn comes."""
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

    def test_frozen_storage_of_gpt2s_block(self):
        """U and V add at most 1.35 times W0, and may replace it: 2.35 with W0 kept, 1.35 without."""
        shapes = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
        W0 = sum(d1 * d2 for d1, d2 in shapes)
        factors = sum((d1 + 1 + d2) * min(d1, d2) for d1, d2 in shapes)
        assert W0 + factors <= 2.35 * W0 and factors <= 1.35 * W0
        for keep in (True, False):  # and a real layer holds just that
            layer = SVFTLinear(nn.Linear(6, 18, bias=False), keep_weight=keep)
            frozen = sum(p.numel() for p in layer.parameters() if not p.requires_grad)
            assert frozen == 18 * 6 * keep + 18 * 6 + 6 + 6 * 6


# ---------------------------------------------------------------- files: the SVD cache, the adapter


@pytest.fixture
def svd_calls(monkeypatch):
    """How often LAPACK was called."""
    calls, real = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(a[0].shape) or real(*a, **k))
    return calls


class MakeFile(type(Path())):
    """A pickle of this path makes the file when it is read carelessly."""

    def __reduce__(self):
        return Path.touch, (Path(self),)


def damaged(content, flips):
    """A file's bytes with one bit flipped, at places spread evenly over the file; then 40 lengths of it."""
    rng = np.random.RandomState(0)
    for part in np.array_split(np.arange(8 * len(content)), flips):
        place = int(rng.choice(part))
        altered = bytearray(content)
        altered[place // 8] ^= 1 << place % 8
        yield bytes(altered)
    for length in np.linspace(0, len(content) - 1, 40).astype(int):
        yield content[:length]


class TestSVDCache:
    def test_a_second_call_computes_nothing_and_whatever_changes_the_result_changes_the_file(self, tmp_path, svd_calls):
        """Bytes, shape, dtype, rank and full_matrices each have a file of their own, which numpy opens; a hit
        gives the bits that the miss gave."""
        W, folder = plain_layer(6, 4, dtype=torch.float32).weight.detach(), tmp_path / "made" / "on demand"
        nudged = W.clone()
        nudged[0, 0] = torch.nextafter(nudged[0, 0], torch.tensor(9.0))
        weights = (W, nudged, W.T, W.reshape(3, 8), W.half(), W.half().view(torch.bfloat16), W.double())
        options = ({}, {"rank": 1}, {"rank": 2}, {"full_matrices": True})
        for count, (weight, how) in enumerate(((weight, how) for weight in weights for how in options), 1):
            first, second = (compute_svd(weight, cache_dir=folder, **how) for _ in "ab")
            assert all(map(torch.equal, first, second)), (weight.dtype, how)
            assert len(svd_calls) == len(list(folder.iterdir())) == count, (weight.dtype, how)  # no temporary file
        for file in folder.iterdir():
            with np.load(file, allow_pickle=False) as arrays:
                assert file.suffix == ".npz" and sorted(arrays) == ["S", "U", "Vh"]

    def test_a_file_of_other_factors_or_with_a_wrong_bit_is_computed_again(self, tmp_path, svd_calls, caplog):
        """Factors are checked: orthonormal, W V = U S, U^T W = S V^T, S sorted. A file is checked bit by bit: 200
        flipped ones, 40 lengths, foreign files. Each is named, computed again and replaced; nothing in it is run."""
        W = plain_layer(6, 4, dtype=torch.float32).weight
        svd = compute_svd(W, cache_dir=tmp_path)
        (path,) = tmp_path.iterdir()
        whole = path.read_bytes()
        factors = {
            "not orthonormal": svd._replace(U=svd.U * 1.001),
            "another Sigma": svd._replace(S=svd.S * 1.001),
            "one value off by 1e-3": svd._replace(Vh=svd.Vh + 1e-3 * torch.eye(4)),
            "NaN": svd._replace(U=svd.U * math.nan),
            "Sigma unsorted": SVD(svd.U.flip(1), svd.S.flip(0), svd.Vh.flip(0)),
            "another dtype": SVD(*(t.double() for t in svd)),
            "cut": SVD(svd.U[:, :2], svd.S[:2], svd.Vh[:2]),
            "of another weight": compute_svd(torch.randn(6, 4)),
            "a vector for a matrix": svd._replace(U=svd.U[:, 0]),
        }
        contents = {
            name: svft._npz({n: t.numpy() for n, t in other._asdict().items()}) for name, other in factors.items()
        }
        contents |= {f"damage {number}": content for number, content in enumerate(damaged(whole, 200))}
        contents |= {"foreign": b"not a zip file" * 99, "one byte more": whole + b"x"}
        contents["a pickle"] = pickle.dumps(MakeFile(tmp_path / "owned"))
        for name, content in contents.items():
            path.write_bytes(content)
            svd_calls.clear()
            caplog.clear()
            got = compute_svd(W, cache_dir=tmp_path)
            assert len(svd_calls) == 1 and path.read_bytes() == whole, name
            assert all(map(torch.equal, got, svd)) and "computing it again" in caplog.text, name
        assert list(tmp_path.iterdir()) == [path]

    def test_a_folder_that_cannot_be_written_is_warned_of_once_and_done_without(self, tmp_path):
        """The cache is a convenience: its failure does not stop the work, and three layers are one warning."""
        (tmp_path / "file").write_text("in the way")
        with pytest.warns(UserWarning, match="cache_dir: cannot write in .*folder") as caught:
            model = svft.inject(mlp(), ["0", "2", "4"], cache_dir=tmp_path / "file" / "folder")
        assert len(caught) == 1 and torch.equal(model[0].U, svft.inject(mlp(), ["0"])[0].U)

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

    def test_long_work_says_once_how_long_it_will_take(self, caplog, monkeypatch):
        """One WARNING, with the time that remains, if it takes over ten seconds: of inject, as of all work on many layers."""
        now, real = [0.0], torch.linalg.svd
        monkeypatch.setattr(svft.time, "perf_counter", lambda: now[0])
        monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: now.append(now.pop() + 6) or real(*a, **k))
        svft.inject(nn.Sequential(*(nn.Linear(2, 2) for _ in range(5))), "all-linear")
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert warning == "2 of 5 layers in 12 s, about 18 s to go"


@pytest.fixture
def saved(tmp_path):
    """A base model, the same model adapted, and its adapter file."""
    base = mlp()
    model = randomize(svft.inject(copy.deepcopy(base), ["0", "2", "4"], "random", 1, seed=7))
    svft.save_adapter(model, tmp_path / "adapter.npz")
    return base, model, tmp_path / "adapter.npz"


OLD_FILE = (  # an adapter file of format "svft 2", zlib and base85: every later version must read it
    b"c-jl_W@gc4fB;2?hn1r4|Dk}3L4+YKzbH4cL@%$Pl954xVFpwkjGpWl>KhQr$WX>mt)7xvoLr=CrJ!yTYNoEEpbpeoQk0k%pI?-c3KDlq%qdO<"
    b"iWg@j7Ni3C8k#x^wF(pgu414Y%78cxh)aN20f>!&H~_^@drbT8!~Dbz^pk;per{@dBFs}Cpb9_W^;D(>QJyl=Q81^>V_XbqfDs4Hghr#QXTYHz"
    b"osSw=!b{alVS&XC4y;^QK+S<Fnu9l>(oBd7D03Z3;~yAM4fa51H~<k4HvsVhAU*)Z4;)ZEbs(YOJIqr&U{4hk<tL>U!+eGwwm5u7ToN!eqtt6$"
    b"bHaWv_PFrTUR<X+z+jrlf!u~P`=a^s4m)nvES)H=?4YNzi)rcteTSH%3s&l!6Fk7eSMiO7Md3irPfo^f{OSi}iv#6u@XH=(ySv$Z(p1R<T<2w~"
    b"{%lZi_{I9G#p;)}LrTczdHF%Q4tn#aExx`;$wAgdGxgE-XZz2*G;di@s)!bPp}*x$pynU2Ur8$zh|E96lqU-os5_X^=m2j<CS7LKqHYG%-N>1)"
    b"0h|aB1s}RTP;v4BT3&FY=(_?WkqQ@dji9VG2bzD_Q8Y3#F~Bk!x+YN41t&`&=0VYP4Xg=~kkNI5q7CLhRCkK7Fd#=_fHx}}NP-mzC4ttw1cx91"
    b"V2wux"
)
# fmt: off
UNFIT = {  # a change of the base model that the adapter was trained on; what the error says
    "another-base": (lambda m: m[2].weight.copy_(mlp(seed=1)[2].weight), r"layer '2': m: .*differs .* by \d"),
    "trained-on": (lambda m: m[2].weight.add_(torch.eye(6), alpha=0.01), r"layer '2': m: .*differs .* by 0\.\d+"),
    "in-bfloat16": (lambda m: m.bfloat16(), r"layer '\d': m: .*differs .* by 0\.\d+"),
    "layers-swapped": (lambda m: m.__setitem__(0, m[4]) or m.__setitem__(4, mlp()[0]), r"layer '0': weight: got .*4, 6"),
    "another-shape": (lambda m: m.__setitem__(4, nn.Linear(6, 5)), r"layer '4': weight: got shape and rank .5, 6, [45]., want .4, 6, 4"),
    "another-rank": (lambda m: svft.inject(m, ["4"], rank=3), r"layer '4': weight: got shape and rank .4, 6, 3., want .4, 6, 4"),
    "another-kind": (lambda m: m.__setitem__(2, nn.Embedding(6, 6)), "layer '2': base: got torch.nn.*Embedding"),
    "a-layer-less": (lambda m: m.__delitem__(4), r"got layers \['4'\], want only layers that the model has"),
    "a-layer-more": (lambda m: m.append(SVFTLinear(nn.Linear(4, 3))), r"got nothing for \['5'\], want an entry for every"),
}
UNTRUE = {  # what was done to an adapted model, to be saved; the warning
    "a-trained-head": (lambda m: m[4].requires_grad_(True), r"\['4.weight', '4.bias'\] train too and are not in the file"),
    "every-m-still-zero": (lambda m: randomize(m, 0), "every m is still zero: was the optimizer made before inject"),
    "one-m-still-zero": (lambda m: m[2].m.data.zero_(), r"m of \['2'\] is still zero"),
    "converted-after-inject": (lambda m: m.bfloat16(), r"\['0', '2'\] were converted after inject: only a model made alike"),
}
SPOILT = {  # what was done to layer 2; what the error says
    "omega-averaged": (lambda m: m.omega.copy_((9 * m.omega + m.omega.flip(1)) // 10), "omega: got unsorted or repeated positions"),
    "NaN": (lambda m: m.m[0].fill_(math.nan), "m: got NaN or inf"),
    "W0-merged-into": (lambda m: m.weight.add_(torch.eye(6), alpha=0.01), "svd: got factors .* W0"),
    "W0-tied": (lambda m: setattr(m, "weight", mlp(seed=1)[2].weight), "svd: got factors"),
    "rounded": (lambda m: m.bfloat16().float(), "svd: got factors with a relative error of 0.00"),
    "a-bfloat16-state": (lambda m: m.load_state_dict(copy.deepcopy(m).bfloat16().state_dict()), "svd: got factors with a relative error of 0.00"),
    "on-meta": (lambda m: m.to("meta"), r"layer: got weights on meta \(offloaded\?\)"),
}
# fmt: on


class TestAdapterFile:
    @given(layer=layers(dtype=torch.float32), injected=st.booleans(), seed=seeds)
    def test_what_is_saved_is_what_is_loaded(self, tmp_path, layer, injected, seed):
        """Round trip into a plain model, which is injected, and into one with another Omega that has run. Then the
        m's train and nothing else; an m of another size is a new Parameter, as autograd remembers the old size."""
        base = layer.base.pop()
        layer.base = None
        if layer.U.shape[1] != layer.Vh.shape[0]:
            return  # the full SVD of a rectangular weight is refused: below
        svft.save_adapter(nn.ModuleDict({"x": layer}), tmp_path / "a.npz")
        r, x = len(layer.S), torch.ones(2, layer.in_features)
        other = omega_random(r, r, 1 + seed % (r * r), seed=seed)
        fresh = randomize(SVFTLinear(base, other, rank=r)) if injected else base
        run = fresh(x).sum()  # kept, and with it what autograd remembers
        run.backward()
        loaded = svft.load_adapter(nn.ModuleDict({"x": fresh}), tmp_path / "a.npz", cache_dir=tmp_path)["x"]
        assert torch.equal(loaded.m, layer.m) and torch.equal(loaded.omega, layer.omega) and loaded.m.grad is None
        near(loaded.merged_weight(), layer.merged_weight(), rounding(torch.float32, layer.S, layer.m.detach()))
        loaded(x).sum().backward()
        assert loaded.m.grad.shape == layer.m.shape
        assert [name for name, p in loaded.named_parameters() if p.requires_grad] == ["m"]

    def test_the_file_is_an_npz_archive_that_anyone_can_open(self, saved):
        """NAME/omega, NAME/m, NAME/probes and NAME/shape for each layer, and format: documented, no pickle."""
        _, model, path = saved
        with np.load(path, allow_pickle=False) as file:
            parts = {f"{name}/{part}" for name in "024" for part in ("omega", "m", "probes", "shape")}
            assert set(file) == {"format", *parts}
            assert str(file["format"]) == "svft 2" and file["4/shape"].tolist() == [4, 6, 4]
            near(file["2/m"], model[2].m, 0)
            rng = np.random.RandomState(0)
            a, b = rng.standard_normal((16, 4)), rng.standard_normal((16, 6))
            near(file["4/probes"], [a[p] @ delta_by_double_loop(model[4]) @ b[p] for p in range(16)], 1e-5)

    def test_a_file_of_an_earlier_commit_loads_with_any_seed_and_number_of_threads(self, tmp_path):
        """The basis is computed again from W0, not drawn: the seed and the number of threads here do not matter. The
        probes' seed and the names of the arrays are part of the format. The 16 probes tell all 12 entries of Delta W
        as they were there."""
        base, path = nn.Sequential(nn.Linear(3, 4)), tmp_path / "old.npz"
        base[0].weight.data = torch.sin(torch.arange(12.0) ** 2).view(4, 3)
        path.write_bytes(content := zlib.decompress(base64.b85decode(OLD_FILE)))
        rng = np.random.RandomState(0)
        a, b = rng.standard_normal((16, 4)), rng.standard_normal((16, 3))
        equations = np.einsum("pi,pj->pij", a, b).reshape(16, 12)  # a^T Delta W b of each probe
        want = np.linalg.lstsq(equations, np.load(io.BytesIO(content))["0/probes"], rcond=None)[0].reshape(4, 3)
        before = torch.get_num_threads()
        for threads in (3, 1):
            torch.manual_seed(threads)
            torch.set_num_threads(threads)
            loaded = svft.load_adapter(copy.deepcopy(base), path)[0]
            torch.set_num_threads(before)
            assert torch.equal(loaded.m, torch.arange(1.0, 8.0)) and torch.equal(loaded.omega, omega_banded(3, 3, 1))
            near(loaded.delta_weight(), want, 1e-5)

    def test_training_resumes_where_it_stopped(self, tmp_path):
        """Stop, save, load, go on: the same numbers as without the stop, with the optimiser's own state_dict."""

        def start():
            model = svft.inject(mlp(), ["0", "2", "4"])
            return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)

        model, optimizer = start()
        svft.save_adapter(steps(model, range(3), optimizer=optimizer), tmp_path / "a.npz")
        torch.save(optimizer.state_dict(), tmp_path / "o.pt")
        steps(model, range(3, 6), optimizer=optimizer)
        resumed, optimizer = start()
        svft.load_adapter(resumed, tmp_path / "a.npz")
        optimizer.load_state_dict(torch.load(tmp_path / "o.pt"))
        steps(resumed, range(3, 6), optimizer=optimizer)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))

    def test_what_the_check_cannot_see_loads(self, tmp_path):
        """A scaled base has the same U and V, so the saved update comes out, as the notes say. An untrained adapter,
        m = 0, fits any base of its shapes."""
        model = randomize(svft.inject(mlp(), ["2"]))
        svft.save_adapter(model, tmp_path / "a.npz")
        scaled = mlp()
        scaled[2].weight.data *= 2
        near(svft.load_adapter(scaled, tmp_path / "a.npz")[2].delta_weight(), model[2].delta_weight(), 1e-5)
        with pytest.warns(UserWarning, match="every m is still zero"):
            svft.save_adapter(svft.inject(mlp(), ["0"]), tmp_path / "a.npz")
        assert svft.load_adapter(mlp(seed=3), tmp_path / "a.npz")[0].m.count_nonzero() == 0

    @pytest.mark.parametrize("into", ["plain", "injected"])
    @pytest.mark.parametrize("change", UNFIT)
    def test_a_model_it_does_not_belong_to_is_refused_and_left_alone(self, saved, into, change, svd_calls):
        """M is a set of coordinates: on another basis it is another update. Layer and relative difference are named.
        Names and sizes are checked before any SVD. A layer that the file does not have would keep what it has."""
        model, _, path = saved
        spoil, said = UNFIT[change]
        with torch.no_grad():
            spoil(model)
        if into == "injected":
            svft.inject(model, "all-linear")
        before = snapshot(model)
        svd_calls.clear()
        with pytest.raises((ValueError, TypeError), match=said):
            svft.load_adapter(model, path)
        assert "m: " in said or not svd_calls
        assert_untouched(model, before)

    @pytest.mark.parametrize("columns", [1, 3], ids=in_words)
    def test_flipped_signs_are_refused(self, saved, columns):
        """Another valid SVD of the same weight: a few (u_i, v_i) negated. The update would be another one."""
        base, model, path = saved
        svd = compute_svd(base[2].weight)
        s = torch.where(torch.arange(6) < columns, -1.0, 1.0)
        fresh = svft.inject(base, ["0", "4"], "random", 1, seed=7)
        fresh[2] = SVFTLinear(fresh[2], model[2].omega, svd=SVD(svd.U * s, svd.S, svd.Vh * s[:, None]))
        near(fresh[2].merged_weight(), base[2].merged_weight(), 1e-6)  # at m = 0 no one can tell
        before = snapshot(fresh)
        with pytest.raises(ValueError, match=r"layer '2': m: got an update that differs .* by [012]\.?\d*"):
            svft.load_adapter(fresh, path)
        assert_untouched(fresh, before)

    @pytest.mark.filterwarnings("error")
    def test_equal_singular_values_are_warned_of_and_a_rotated_subspace_is_refused(self, tmp_path):
        """Equal values leave the vectors free to rotate, rank-deficient weights too. A state_dict holds the vectors."""
        base, path = nn.Sequential(nn.Linear(6, 6)), tmp_path / "a.npz"
        W, R = torch.linalg.qr(torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0)))[0]
        base[0].weight.data.copy_(W)  # all its singular values are 1
        rotated = SVD(W @ R, torch.ones(6), R.T)  # W = W I I^T = (W R) I (R^T): two SVDs of one weight
        model = randomize(nn.Sequential(SVFTLinear(base[0], "banded", 1, svd=rotated)))
        with pytest.warns(UserWarning, match=r"\['0'\] have equal singular values: move a state_dict"):
            svft.save_adapter(model, path)
        for target in (copy.deepcopy(base), svft.inject(copy.deepcopy(base), ["0"], "banded", 1)):
            before = snapshot(target)
            with pytest.raises(ValueError, match="its singular values repeat: move a state_dict instead"):
                svft.load_adapter(target, path)
            assert_untouched(target, before)
        target.load_state_dict(model.state_dict())
        near(target[0].merged_weight(), model[0].merged_weight(), 1e-6)
        base[0].weight.data.copy_(torch.outer(torch.arange(1.0, 7), torch.ones(6)) + torch.eye(6)[:1])  # of rank 2
        for dtype in (torch.float32, torch.float64):
            with pytest.warns(UserWarning, match="equal singular values"):
                svft.save_adapter(randomize(svft.inject(copy.deepcopy(base).to(dtype), ["0"])), path)
        svft.save_adapter(randomize(svft.inject(nn.Sequential(nn.Linear(99, 99)), ["0"])), path)  # no warning here

    def test_the_full_svd_of_a_rectangular_weight_is_refused_with_the_way_out(self, tmp_path):
        """Its extra columns are an arbitrary choice of LAPACK's: only a state_dict keeps them. A square one has none."""
        square, lying = (svft.inject(nn.Sequential(nn.Linear(4, d1)), ["0"], full_matrices=True) for d1 in (4, 3))
        with pytest.raises(ValueError, match="layer '0': full_matrices: got the full SVD .*state_dict"):
            svft.save_adapter(randomize(lying), tmp_path / "a.npz")
        assert list(tmp_path.iterdir()) == []
        svft.save_adapter(randomize(square), tmp_path / "a.npz")

    @pytest.mark.parametrize("change", UNTRUE)
    def test_saving_warns_where_the_file_will_not_bring_back_what_was_trained(self, tmp_path, change):
        """A head that trains too: README shows how to keep it. An m that is still zero: its weight is read past
        forward, or the optimiser was made before inject. A layer converted after inject: its W0 and its factors were
        rounded one by one, and a plain model of neither dtype has these vectors."""
        act, said = UNTRUE[change]
        model = randomize(svft.inject(mlp(), ["0", "2"]))
        act(model)
        with pytest.warns(UserWarning, match=said):
            svft.save_adapter(model, tmp_path / "a.npz")

    @pytest.mark.parametrize("change", SPOILT)
    @pytest.mark.parametrize("act", [svft.merge, lambda m: svft.save_adapter(m, "a.npz")], ids=["merge", "save"])
    def test_a_layer_whose_parts_no_longer_belong_together_is_refused(self, act, change, tmp_path, monkeypatch):
        """Omega sorted, m finite, and U, S, Vh still the SVD of W0: else merge and save would give something else."""
        monkeypatch.chdir(tmp_path)
        model = randomize(svft.inject(mlp(), ["0", "2"]))
        spoil, said = SPOILT[change]
        with torch.no_grad():
            spoil(model[2])
        before = snapshot(model)[0]
        with pytest.raises(ValueError, match=f"layer '2': {said}"):
            act(model)
        assert snapshot(model)[0] == before and list(tmp_path.iterdir()) == []

    @pytest.mark.filterwarnings("ignore:save_adapter. .* were converted")
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=in_words)
    @pytest.mark.parametrize("order", ["convert-then-inject", "inject-then-convert"])
    @pytest.mark.parametrize("keep", [True, False], ids=["W0-kept", "W0-freed"])
    def test_half_precision_factors_are_checked_to_their_own_rounding(self, dtype, order, keep, tmp_path):
        """The same check, to the rounding of the dtype that the layer has. A model made alike can load the file."""

        def made():
            if order == "convert-then-inject":
                return svft.inject(mlp(width=200).to(dtype), ["0", "2", "4"], keep_weight=keep)
            return svft.inject(mlp(width=200), ["0", "2", "4"], keep_weight=keep).to(dtype)

        model = randomize(made())
        svft.save_adapter(model, tmp_path / "a.npz")
        svft.load_adapter(made(), tmp_path / "a.npz")
        if order == "convert-then-inject":
            svft.load_adapter(mlp(width=200).to(dtype), tmp_path / "a.npz")
        assert type(svft.merge(model)[2]) is nn.Linear

    def test_saving_through_a_link_keeps_the_link_and_bad_places_are_named(self, saved, tmp_path):
        """The file behind a symbolic link is replaced, not the link; a folder is no file."""
        _, model, path = saved
        was, link = path.read_bytes(), tmp_path / "link.npz"
        link.symlink_to(path)
        svft.save_adapter(randomize(model, seed=1), link)
        assert link.is_symlink() and path.read_bytes() != was
        with pytest.raises(OSError, match="path: got .*want a file in a folder that exists"):
            svft.save_adapter(model, tmp_path)

    def test_a_full_disk_names_the_file_and_keeps_the_old_one(self, saved, tmp_path):
        """OSError with the file's name; the last good file stays, no temporary one; the cache is done without."""
        resource = pytest.importorskip("resource", reason="no file-size limit there")
        base, model, path = saved
        was, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            with pytest.raises(OSError, match="adapter.npz") as error:
                svft.save_adapter(model, path)
            with pytest.warns(UserWarning, match="cannot write in .*cache") as caught:
                svft.inject(base, ["0", "2"], cache_dir=tmp_path / "cache")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert error.value.filename == str(path) and len(caught) == 1 and path.read_bytes() == was
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
        for patch in ((svft, "open", Half), (os, "fsync", die), (os, "replace", die), (os, "replace", rename_then_die)):
            with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
                in_processes(save, patch, start_method="fork")
            seen.append(path.read_bytes())
        assert seen[:3] == 3 * [was] and seen[3] != was
        svft.load_adapter(mlp(), path)


def forged(path, base):
    """Forged and foreign files for the place of a good one: name -> content."""
    with np.load(path) as file:
        good = dict(file)
    parts = ("omega", "m", "probes", "shape")
    omega, m, probes, shape = (good[f"2/{part}"] for part in parts)
    k, code = len(m), MakeFile(path.parent / "owned")
    # fmt: off
    layer_2 = {  # one array of layer 2 is changed
        "omega": {
            "of floats": omega.astype(float), "of int32": omega.astype(np.int32), "turned": omega.T,
            "too short": omega[:, 1:], "unsorted": omega[:, ::-1], "repeated": omega[:, [0, *range(k - 1)]],
            "outside": omega + 6, "negative": omega - 6, "enormous": omega + 2**62,
        },
        "m": {
            "of integers": m.astype(np.int64), "of half": m.astype(np.float16), "complex": m.astype(complex),
            "of text": m.astype(str), "of objects": m.astype(object), "of another byte order": m.astype(">f4"),
            "with NaN": m * np.nan, "with inf": np.where(np.arange(k) == 3, np.inf, m),
            "a column": m[:, None], "a scalar": m[0], "of another update": m[::-1].copy(),
        },
        "probes": {
            "of inf": probes + np.inf, "of NaN": probes * np.nan, "of float32": probes.astype(np.float32),
            "too few": probes[:15], "of another update": 1.01 * probes, "of another update: zero": probes * 0,
            "of another update: their norm overflows": np.full(16, 1e200),
        },
        "shape": {
            "of floats": shape.astype(float), "of two": shape[:2], "negative": -shape, "with rank zero": shape * [1, 1, 0],
            "with a rank over n": shape + [0, 0, 1], "with another rank": shape - [0, 0, 1], "another layer's": shape - [0, 1, 1],
        },
    }
    changes = {  # arrays are changed, added, or left out: None
        "no format": {"format": None}, "another format": {"format": np.array("svft 3")},
        "a format of two": {"format": np.array(["svft 2"] * 2)}, "an object for a format": {"format": np.array({"a": 1})},
        "no layer at all": {name: None for name in good if name != "format"}, "a layer without m": {"2/m": None},
        "an array of no layer": {"more": m}, "one array more": {"2/more": m}, "no entries": {"2/omega": omega[:, :0], "2/m": m[:0]},
        "an unknown layer": {f"5/{part}": good[f"2/{part}"] for part in parts},
        "a layer that is none": {f"1/{part}": good[f"2/{part}"] for part in parts},
        "m too large for the layer of another update": {"2/m": m.astype(np.float64) * 1e39, "2/probes": probes * 1e39},
    }
    # fmt: on
    changes |= {f"{part} {name}": {f"2/{part}": a} for part, those in layer_2.items() for name, a in those.items()}
    with zipfile.ZipFile(archive := io.BytesIO(), "w") as file:
        file.writestr("format.npy", b"svft 2")
    torch.save(base.state_dict(), state := io.BytesIO())
    torch.save(code, pickled := io.BytesIO())
    np.save(array := io.BytesIO(), m)
    foreign = {"empty": b"", "text": b"hello", "nested lists": pickle.dumps([[]] * 99), "a pickle": pickle.dumps(code)}
    foreign |= {"a zip of something else": archive.getvalue(), "a state_dict": state.getvalue()}
    foreign |= {"a pickle in a zip": pickled.getvalue(), "one array": array.getvalue()}
    arrays = {name: {**good, **change} for name, change in changes.items()}
    return foreign | {
        name: svft._npz({n: a for n, a in those.items() if a is not None}) for name, those in arrays.items()
    }


class TestDamagedAdapterFiles:
    @pytest.mark.parametrize("into", ["plain", "injected"])
    def test_a_forged_or_foreign_file_is_refused_by_name_and_nothing_changes(self, saved, into, svd_calls):
        """54 of them: none is executed, none half applied. What can be seen in the file is seen before any SVD."""
        base, _, path = saved
        model = svft.inject(base, ["0", "2", "4"]) if into == "injected" else base
        good, before, contents = path.read_bytes(), snapshot(model), forged(path, mlp())
        assert len(contents) == 54
        for name, content in contents.items():
            path.write_bytes(content)
            svd_calls.clear()
            with pytest.raises((ValueError, TypeError), match="adapter.npz: got|layer '[1245]': ") as caught:
                svft.load_adapter(model, path)
                pytest.fail(f"loaded: {name}")
            assert "want" in str(caught.value), name
            assert "of another update" in name or not svd_calls, name
            assert_untouched(model, before)
        assert not (path.parent / "owned").exists()
        path.write_bytes(good)
        svft.load_adapter(model, path)

    def test_a_damaged_file_is_refused_or_is_still_the_same_adapter(self, saved):
        """160 flipped bits and 40 lengths: refused by name, but for bits that no content depends on, as a date's."""
        base, want, path = saved
        model, refused = svft.inject(base, ["0", "2", "4"]), 0
        start = snapshot(model)
        for content in damaged(path.read_bytes(), 160):
            path.write_bytes(content)
            try:
                loaded = svft.load_adapter(copy.deepcopy(model), path)
                assert all(map(torch.equal, loaded.state_dict().values(), want.state_dict().values()))
            except ValueError as error:
                assert re.search("adapter.npz: got|layer '[024]': m: got", str(error)), error
                refused += 1
        assert refused > 150
        assert_untouched(model, start)


# ---------------------------------------------------------------- bad input: one line each, with its reason


def changed(change):
    """The small model after a change that makes its middle layer unfit."""
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's old weight_norm
        change(model)
    return model


def with_weight(weight):
    new = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return changed(lambda model: setattr(model[2], "weight", new))


class Subclass(nn.Linear):
    pass


attention = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "e": nn.TransformerEncoderLayer(8, 2, 16)})
W = torch.eye(4, 3)
O = omega_plain(3, 3)  # noqa: E741
inject_2 = lambda model, **k: svft.inject(model, ["2"], **k)  # noqa: E731
# fmt: off
BAD = [
    # what is wrong; the call, given the small model (or the one made by `on`); the error; what its text names
    ("weight no tensor", lambda m: compute_svd([[1.0]]), TypeError, "weight: got list"),
    ("weight integer", lambda m: compute_svd(torch.ones(2, 2, dtype=torch.int64)), TypeError, "weight: got torch.int64"),
    ("weight a vector", lambda m: compute_svd(torch.ones(3)), ValueError, r"weight: got a tensor of shape \(3,\), want a matrix"),
    ("weight a convolution's", lambda m: compute_svd(torch.ones(2, 2, 3)), ValueError, r"weight: got a tensor of shape \(2, 2, 3\)"),
    ("weight empty", lambda m: compute_svd(torch.ones(0, 3)), ValueError, r"weight: got a tensor of shape \(0, 3\), want a matrix that holds values"),
    ("weight on meta", lambda m: compute_svd(torch.ones(2, 3, device="meta")), ValueError, "weight: got a meta tensor"),
    ("weight with NaN", lambda m: compute_svd(W * math.nan), ValueError, "weight: got NaN or inf"),
    ("weight with inf", lambda m: compute_svd(W / 0), ValueError, "weight: got NaN or inf"),
    ("rank zero", lambda m: compute_svd(W, rank=0), ValueError, "rank: got 0"),
    ("rank a float", lambda m: compute_svd(W, rank=2.0), TypeError, "rank: got 2.0, want an int"),
    ("rank of the full SVD", lambda m: compute_svd(W, rank=2, full_matrices=True), ValueError, "rank: got 2 with full"),
    ("r1 zero", lambda m: omega_plain(0, 3), ValueError, "r1: got 0"),
    ("r2 a string", lambda m: omega_plain(3, "3"), TypeError, "r2: got '3'"),
    ("d negative", lambda m: omega_banded(3, 3, -1), ValueError, "d: got -1"),
    ("d a float", lambda m: omega_banded(3, 3, 1.5), TypeError, "d: got 1.5"),
    ("d a bool", lambda m: omega_banded(3, 3, True), TypeError, "d: got True"),
    ("above negative", lambda m: omega_banded(3, 3, 1, above=-2), ValueError, "above: got -2"),
    ("k zero", lambda m: omega_random(3, 3, 0), ValueError, "k: got 0"),
    ("k over r1 r2", lambda m: omega_random(3, 3, 10), ValueError, "k: got 10, want 1 to 9"),
    ("seed negative", lambda m: omega_random(3, 3, 2, seed=-1), ValueError, "seed: got -1"),
    ("seed too large", lambda m: omega_random(3, 3, 2, seed=2**32), ValueError, "seed: got 4294967296"),
    ("top-k, k over r1 r2", lambda m: omega_top_k(torch.eye(2), torch.eye(2), 5), ValueError, "k: got 5, want 1 to 4"),
    ("top-k, rectangular", lambda m: omega_top_k(torch.ones(3, 2), torch.eye(2), 1), ValueError, "top_k: got a 3 x 2 weight"),
    ("top-k, U no matrix", lambda m: omega_top_k(torch.ones(3), torch.eye(3), 1), ValueError, r"U: got a tensor of shape \(3,\)"),
    ("top-k, Vh integer", lambda m: omega_top_k(torch.eye(2), torch.ones(2, 2).long(), 1), TypeError, "Vh: got torch.int64"),
    ("bound, shape of one", lambda m: svft.rank_bound(O, (3,)), ValueError, r"shape: got \(3,\)"),
    ("bound, Omega outside", lambda m: svft.rank_bound(O, (3, 2)), ValueError, "omega: got i, j from"),
    ("omega no tensor", lambda m: svft.term_rank([[0], [0]]), TypeError, "omega: got list"),
    ("omega int32", lambda m: svft.term_rank(O.int()), TypeError, "omega: got torch.int32"),
    ("omega (k, 2)", lambda m: svft.term_rank(O.T), ValueError, r"omega: got shape \(3, 2\), want \(2, k\)"),
    ("omega empty", lambda m: svft.term_rank(O[:, :0]), ValueError, r"omega: got shape \(2, 0\)"),
    ("omega unsorted", lambda m: svft.term_rank(O.flip(1)), ValueError, "omega: got unsorted or repeated"),
    ("omega repeated", lambda m: svft.term_rank(O[:, [0, 0, 1]]), ValueError, "omega: got unsorted or repeated"),
    ("omega with indices near 2**33, unsorted", lambda m: svft.term_rank(torch.tensor([[1, 1, 2], [2**33, 2**33 - 1, 0]])), ValueError, "omega: got unsorted"),
    ("omega negative", lambda m: svft.term_rank(O - 1), ValueError, "omega: got i, j from"),
    ("omega outside M", lambda m: inject_2(m, pattern=omega_plain(7, 7)), ValueError, "layer '2': omega: got i, j from"),
    ("pattern unknown", lambda m: inject_2(m, pattern="diagonal"), ValueError, "layer '2': pattern: got 'diagonal'"),
    ("pattern None", lambda m: inject_2(m, pattern=None), ValueError, "pattern: got None"),
    ("pattern returns no omega", lambda m: inject_2(m, pattern=lambda svd: 3), TypeError, "omega: got int"),
    ("pattern returns one outside", lambda m: inject_2(m, pattern=lambda svd: O + 5), ValueError, "omega: got i, j from"),
    ("k with banded", lambda m: inject_2(m, k=3), ValueError, "k: got 3 with pattern 'banded'"),
    ("k with a tensor", lambda m: inject_2(m, pattern=O, k=3), ValueError, "k: got 3 with pattern"),
    ("top-k in a rectangular layer", lambda m: svft.inject(m, ["2", "4"], "top_k"), ValueError, "layer '4': top_k: got"),
    ("path unknown", lambda m: inject_2(m, path="sparse"), ValueError, "path: got 'sparse'"),
    ("gather without W0", lambda m: inject_2(m, path="gather", keep_weight=False), ValueError, "path: got 'gather'"),
    ("fused with a truncated SVD", lambda m: inject_2(m, path="fused", rank=2), ValueError, "path: got 'fused' .*rank 2 of 6, want W0 kept and no 'fused'"),
    ("no W0 and a truncated SVD", lambda m: inject_2(m, keep_weight=False, rank=2), ValueError, "path: got 'auto' with keep_weight=False and rank 2 of 6"),
    ("an unknown option", lambda m: inject_2(m, ranks=2), TypeError, "layer '2': options: got .'ranks'., want"),
    ("plain with a negative d", lambda m: svft.inject(m, ["2"], "plain", -1), ValueError, "layer '2': d: got -1"),
    ("no folder to save in", lambda m: svft.save_adapter(m, "no/a.pt"), FileNotFoundError, "path: got 'no/a.pt', want"),
    ("svd with its options", lambda m: inject_2(m, svd=compute_svd(m[2].weight), rank=2), ValueError, "svd: got svd= together"),
    ("svd of another weight", lambda m: inject_2(m, svd=compute_svd(torch.randn(6, 6))), ValueError, "svd: got factors with"),
    ("svd of other shapes", lambda m: inject_2(m, svd=compute_svd(W)), ValueError, "svd: got shapes"),
    ("svd not orthonormal", lambda m: inject_2(m, svd=SVD(m[2].weight, torch.ones(6), torch.eye(6))), ValueError, "svd: got"),
    ("svd of a scalar S", lambda m: inject_2(m, svd=SVD(torch.eye(6), torch.tensor(1.0), torch.eye(6))), ValueError, "svd: got shapes"),
    ("svd with dtype=", lambda m: inject_2(m, dtype=torch.float32), TypeError, "layer '2': options: got .'dtype'."),
    ("svd in bfloat16", lambda m: inject_2(m, svd=SVD(*(t.bfloat16() for t in compute_svd(m[2].weight)))), ValueError, "svd: got factors"),
    ("svd with negative S", lambda m: inject_2(m, svd=(lambda v: SVD(-v.U, -v.S, v.Vh))(compute_svd(m[2].weight))), ValueError, "Sigma sorted, >= 0"),
    ("x a scalar", lambda m: SVFTLinear(m[2])(torch.tensor(1.0)), ValueError, "x: got shape"),
    ("weight sparse", lambda m: compute_svd(torch.eye(3).to_sparse()), TypeError, "weight: got a Tensor .torch.sparse_coo., want a plain dense"),
    ("bound, shape a number", lambda m: svft.rank_bound(O, 5), ValueError, "shape: got 5"),
    ("svd no triple", lambda m: inject_2(m, svd=torch.eye(6)), TypeError, "svd: got Tensor"),
    ("svd 1% too long", lambda m: inject_2(m, svd=(lambda v: v._replace(Vh=1.01 * v.Vh))(compute_svd(m[2].weight))), ValueError, "relative error of 0.02 in V.T V = I, want 2e-05"),
    ("svd with NaN", lambda m: inject_2(m, svd=SVD(torch.eye(6) * math.nan, torch.ones(6), torch.eye(6))), ValueError, "svd: got"),
    ("inject seed", lambda m: inject_2(m, seed=-1), ValueError, "seed: got -1"),
    ("model no module", lambda m: svft.inject({}, ["2"]), TypeError, "model: got dict"),
    ("targets a number", lambda m: svft.inject(m, 2), TypeError, "target_modules: got 2"),
    ("targets of numbers", lambda m: svft.inject(m, [2]), TypeError, r"target_modules: got \[2\]"),
    ("targets empty", lambda m: svft.inject(m, []), ValueError, r"target_modules: got \[\]"),
    ("targets an empty string", lambda m: svft.inject(m, ""), ValueError, "target_modules: got ''"),
    ("targets match nothing", lambda m: svft.inject(m, ["7"]), ValueError, r"\['7'\], which matches nothing; want among 0, 2, 4"),
    ("targets no regular expression", lambda m: svft.inject(m, "2("), ValueError, r"target_modules: got '2\('"),
    ("target no linear layer", lambda m: svft.inject(m, ["1"]), TypeError, "layer '1': base: got torch.nn.modules.activation.Tanh"),
    ("target the whole model", lambda m: svft.inject(m, ".*"), TypeError, "layer '': base: got .*Sequential"),
    ("target the model itself", lambda m: svft.inject(m[2], ".*"), ValueError, "got the model itself"),
    ("base a subclass", lambda m: SVFTLinear(Subclass(2, 2)), TypeError, "base: got .*Subclass with .*, want exactly nn.Linear"),
    ("base no module", lambda m: SVFTLinear(3), TypeError, "base: got builtins.int"),
    ("base a convolution", lambda m: SVFTLinear(nn.Conv1d(2, 2, 1)), TypeError, "base: got .*Conv1d"),
    ("merge no module", lambda m: svft.merge(3), TypeError, "model: got int"),
    ("disabled no module", lambda m: svft.disabled(3).__enter__(), TypeError, "model: got int"),
    ("summary no module", lambda m: svft.summary(3), TypeError, "model: got int"),
    ("nothing to save", lambda m: svft.save_adapter(m, "never.pt"), ValueError, "model: got one without an SVFTLinear"),
    ("no file to load", lambda m: svft.load_adapter(m, "never.pt"), FileNotFoundError, "never.pt"),
]
BAD_MODELS = [
    # what is wrong; the model; the target; the error; what its text names
    ("NaN", with_weight(torch.full((6, 6), math.nan)), "2", ValueError, "weight: got NaN"),
    ("integers", with_weight(torch.ones(6, 6).to(torch.int8)), "2", TypeError, "weight: got torch.int8"),
    ("float8", with_weight(torch.ones(6, 6).to(torch.float8_e4m3fn)), "2", TypeError, "weight: got torch.float8"),
    ("meta", mlp().to("meta"), "2", ValueError, "weight: got a meta tensor"),
    ("no inputs", with_weight(torch.ones(6, 0)), "2", ValueError, r"weight: got a tensor of shape \(6, 0\)"),
    ("parametrised", changed(lambda m: nn.utils.parametrizations.orthogonal(m[2])), "2", TypeError, "Parametrized"),
    ("weight-normed", changed(lambda m: nn.utils.parametrizations.weight_norm(m[2])), "2", TypeError, "Parametrized"),
    ("weight-normed, old way", changed(lambda m: nn.utils.weight_norm(m[2])), "2", TypeError, "base: got .*weight_g.*weight_v"),
    ("pruned", changed(lambda m: nn.utils.prune.l1_unstructured(m[2], "weight", 3)), "2", TypeError, "base: got"),
    ("a backward hook", changed(lambda m: m[2].register_full_backward_hook(print)), "2", ValueError, "got hooks"),
    ("a state_dict hook", changed(lambda m: m[2].register_state_dict_post_hook(lambda *a: None)), "2", ValueError, "got hooks"),
    ("another layer's forward", changed(lambda m: setattr(m[2], "forward", m[0].forward)), "2", ValueError, "got hooks or a forward"),
    ("a forward hook", changed(lambda m: m[2].register_forward_hook(print)), "2", ValueError, "got hooks"),
    ("a forward pre-hook", changed(lambda m: m[2].register_forward_pre_hook(print)), "2", ValueError, "got hooks"),
    ("a forward of its own", changed(lambda m: setattr(m[2], "forward", print)), "2", ValueError, "got hooks or a forward"),
    ("injected already", changed(lambda m: svft.inject(m, ["2"])), "2", TypeError, "got an SVFTLinear already"),
    ("under two names", changed(lambda m: m.append(m[2])), "2", ValueError, r"shared by \['2', '5'\]"),
    ("a tied weight", changed(lambda m: setattr(m[2], "weight", m.append(nn.Linear(6, 6))[5].weight)), "2", ValueError, r"shared by \['2', '5'\]"),
    ("an attention's own projection", attention, "a.out_proj", TypeError, "NonDynamicallyQuantizableLinear"),
    ("an encoder layer's inner one", attention, "e.linear1", ValueError, "got a part of another module"),
    ("an embedding", nn.ModuleDict({"wte": nn.Embedding(4, 3)}), "wte", TypeError, "base: got .*Embedding"),
    ("a bilinear layer", nn.ModuleDict({"b": nn.Bilinear(2, 2, 2)}), "b", TypeError, "base: got .*Bilinear"),
]
# fmt: on


def cases(table):
    return [pytest.param(*row[1:], id=row[0].replace(" ", "-")) for row in table]


def parts(model):  # also of a model on meta, which has no values
    found = [*model.named_modules(), *model.named_parameters()]
    return [(name, id(part), getattr(part, "requires_grad", None)) for name, part in found]


class TestBadInput:
    @pytest.mark.parametrize("call, error, text", cases(BAD))
    def test_a_bad_argument_is_refused_by_name_and_nothing_changes(self, call, error, text, tmp_path, monkeypatch):
        """The error names the argument, what it got and what it wants; the model is bit-identical afterwards."""
        monkeypatch.chdir(tmp_path)
        model = mlp()
        before = snapshot(model)
        with pytest.raises(error, match=text) as caught:
            call(model)
        assert error is FileNotFoundError or "want" in str(caught.value)
        assert list(tmp_path.iterdir()) == []
        assert_untouched(model, before)

    @pytest.mark.parametrize("model, target, error, text", cases(BAD_MODELS))
    def test_a_layer_that_cannot_be_adapted_is_refused_and_named(self, model, target, error, text):
        """Anything but exactly nn.Linear or Conv1D with a plain weight of its own; with the advice what to do."""
        before = parts(model)
        with pytest.raises(error, match=text) as caught:
            svft.inject(model, [target])
        assert f"layer {target!r}" in str(caught.value) and "want" in str(caught.value)
        assert parts(model) == before


# ---------------------------------------------------------------- train_toy.py: the other methods, the commands

OTHERS = {
    "LoRA": (lambda base: train_toy.LoRA(base, 3), lambda d1, d2: 3 * (d1 + d2)),
    "DoRA": (lambda base: train_toy.DoRA(base, 3), lambda d1, d2: 3 * (d1 + d2) + d1),
    "VeRA": (lambda base: train_toy.VeRA(base, 5, {}), lambda d1, d2: 5 + d1),
    "BOFT": (lambda base: train_toy.BOFT(base, 4, 2), lambda d1, d2: 2 * (d1 // 4) * 6),
}


def adapted(name, d1=16, d2=10, seed=0, kind="linear"):
    """W0 (d1, d2), the merged weight at the start, and a layer of another method whose trained values are random."""
    base = plain_layer(d1, d2, kind, seed=seed)
    W0, layer = base.weight.detach().clone(), OTHERS[name][0](base)
    start = layer.merged_weight().detach()
    with torch.no_grad():
        for p in layer.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, dtype=p.dtype)
    return W0.T if kind == "conv1d" else W0, start, layer


class TestTheOtherMethods:
    @pytest.mark.parametrize("kind", ["linear", "conv1d"])
    @pytest.mark.parametrize("name", OTHERS)
    def test_the_other_methods_start_at_W0_and_train_their_own_parameters_alone(self, name, kind):
        """As many as the formula says; W0 and the bias get no gradient. A Conv1D becomes an nn.Linear first."""
        W0, start, layer = adapted(name, kind=kind)
        near(start, W0, 1e-12)
        trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        assert sum(p.numel() for p in trained.values()) == OTHERS[name][1](16, 10)
        layer(torch.randn(4, 10, dtype=torch.float64)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
        assert all(p.grad is None for n, p in layer.named_parameters() if n not in trained)

    @pytest.mark.parametrize("name", OTHERS)
    def test_their_merged_weight_computes_what_the_layer_does(self, name):
        """x W^T + b with the method's own merged weight, which is not W0 any more."""
        W0, _, layer = adapted(name)
        x = torch.randn(3, 4, 10, dtype=torch.float64)
        near(layer(x), x @ layer.merged_weight().T + layer.base.bias, 1e-10)
        assert (layer.merged_weight() - W0).abs().max() > 0.01

    def test_each_other_method_is_its_formula(self):
        """LoRA: rank r. DoRA: rows of norm m. VeRA: rank r, shared A and B. BOFT: an orthogonal matrix times W0."""
        W0, _, lora = adapted("LoRA")
        assert torch.linalg.matrix_rank(lora.merged_weight() - W0) == 3
        _, _, dora = adapted("DoRA")
        near(dora.merged_weight().norm(dim=1), dora.m.abs(), 1e-10)
        shared = {}
        a, b = (train_toy.VeRA(plain_layer(16, 10, seed=s), 5, shared) for s in (1, 2))
        assert a.A is b.A and a.B is b.B and not a.A.requires_grad
        W0, _, boft = adapted("BOFT", 16, 16)
        R = boft.merged_weight() @ torch.linalg.inv(W0)
        near(R @ R.T, np.eye(16), 1e-9)
        assert int((R.abs() > 1e-9).sum(1).min()) == 8  # b 2^(m-1) features mixed


CPU = torch.device("cpu")


@pytest.fixture
def untrained(monkeypatch, tmp_path):
    """The script with its pre-training left out, and short evaluations: a cache folder with an untrained model in it."""
    monkeypatch.setattr(train_toy, "make_task", functools.partial(train_toy.make_task, windows=8))
    monkeypatch.setattr(train_toy, "BYTES", train_toy.BYTES._replace(sample=20))
    with monkeypatch.context() as patch:
        patch.setattr(train_toy, "train", lambda *a, **k: 0.0)
        train_toy.pretrained(tmp_path / "cache", CPU)
    return tmp_path / "cache"


@pytest.fixture
def base(hf, tmp_path):
    """Folders with a tiny GPT-2 (Conv1D layers) and a tiny Llama, each with a tokenizer, and a text: the arguments."""
    tokenizers = pytest.importorskip("tokenizers")
    known = {"<unk>": 0, "to": 3, "be": 4, "or": 5, "not": 6}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for kind in ("gpt2", "llama"):
        tiny(hf, kind)[0].save_pretrained(tmp_path / kind)
        hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path / kind)
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 400)
    common = ["--data", str(tmp_path / "text.txt"), "--cache", str(tmp_path / "cache")]
    return {kind: ["--base", str(tmp_path / kind), *common] for kind in ("gpt2", "llama")}


def as_torchrun_starts_it(rank, folder, cache, port):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    train_toy.RANK, train_toy.WORLD = rank, 2  # which the script has read already
    with open(folder / f"{rank}.txt", "w") as out, contextlib.redirect_stdout(out):
        assert train_toy.main(["--steps", "1", "--context", "8", "--device", "cpu", "--cache", str(cache)]) == 0


class TestTheTrainingScript:
    def test_the_small_model_is_gpt2s_architecture_at_any_size(self, hf):
        """With transformers' weights it computes transformers' logits; the default one has 842,496 parameters."""
        theirs = tiny(hf, "gpt2")[0]
        ours = train_toy.GPT2(train_toy.Config(50, 32, 2, 2, 16))
        turned = tuple(f"{name}.weight" for name in train_toy.TARGETS)  # a Conv1D's
        state = {name: t.T if name.endswith(turned) else t for name, t in theirs.transformer.state_dict().items()}
        ours.load_state_dict(state)
        tokens = torch.randint(50, (2, 7))
        near(ours(tokens), theirs(tokens).logits, 1e-5)
        assert sum(p.numel() for p in train_toy.GPT2(train_toy.Config()).parameters()) == 842_496

    METHODS = {"svft": "33,664", "lora": "65,536", "full": "842,496"}  # and what each trains

    @pytest.mark.parametrize("method, trained", METHODS.items(), ids=METHODS)
    def test_it_fine_tunes_and_says_what_it_did(self, untrained, method, trained, tmp_path, capsys):
        """A few steps of the default command, or of --method lora or full: the loss falls. SVFT's merged model equals
        the adapted one, and its adapter loads."""
        save = ["--save", str(tmp_path / "a.npz")] if method == "svft" else ["--context", "32"]
        assert train_toy.main(["--method", method, "--steps", "12", "--cache", str(untrained), *save]) == 0
        said = capsys.readouterr().out
        before, after = map(float, re.search(r"validation loss +([\d.]+) -> ([\d.]+) nats per byte", said).groups())
        assert after < before - 0.05
        assert re.search(rf"trained +{trained} parameters, [\d.]+% of the model's", said), said
        if method == "svft":
            found = re.search(r"merged - adapted +at most (\S+), of logits up to (\S+)", said)
            assert float(found[1]) < 1e-4 * float(found[2])
            model = svft.load_adapter(train_toy.pretrained(untrained, CPU), tmp_path / "a.npz")
            assert sum(m.m.count_nonzero() > 0 for m in model.modules() if isinstance(m, SVFTLinear)) == 16

    @needs_gloo
    def test_under_torchrun_two_processes_train_and_one_prints(self, untrained, tmp_path):
        """Data-parallel, one step of it, with what torchrun puts into the environment of its processes."""
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        in_processes(as_torchrun_starts_it, (tmp_path, untrained, port), 2, start_method=START)
        assert (tmp_path / "0.txt").read_text().count("validation loss") == 1
        assert (tmp_path / "1.txt").read_text() == ""

    def test_torchrun_refuses_what_cannot_work(self, monkeypatch, capsys):
        """More processes than GPUs, a device that is not shared so, a command that has no use for it: one line."""
        monkeypatch.setattr(train_toy, "WORLD", 2)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        for arguments, text in {
            "--device mps": "--device: got mps for 2 processes",
            "--device cuda": "--device: got cuda for 2 processes and 1 GPUs, want cpu, or a GPU for each",
            "compare": "runs in one process: start it with python",
        }.items():
            assert train_toy.main(arguments.split()) == 2 and text in capsys.readouterr().err

    def test_a_damaged_cache_is_made_again(self, untrained, monkeypatch):
        """Empty, short or altered: noticed, and the model is trained anew."""
        (file,) = untrained.glob("gpt2-*.npz")
        whole, calls = file.read_bytes(), []
        monkeypatch.setattr(train_toy, "train", lambda *a, **k: calls.append(1))
        for content in (b"", whole[:-500], whole[:20000] + b"x" * 99 + whole[20099:]):
            file.write_bytes(content)
            calls.clear()
            for _ in "twice":
                train_toy.pretrained(untrained, CPU)
            assert len(calls) == 1 and list(untrained.iterdir()) == [file]

    MISTAKES = [
        (["--data", "absent.txt"], "--data: cannot read 'absent.txt'"),
        (["--data", "short.txt"], "--data short.txt: too little text: got 12 bytes"),
        (["--data", "empty.txt"], "--data empty.txt: too little text: got 0 bytes"),
        (["--targets", ""], "target_modules: got [], want at least one name"),
        (["--steps", "0"], "--steps: got 0"),
        (["--lr", "nan"], "--lr: got nan"),
        (["--pattern", "diagonal"], "invalid choice: 'diagonal'"),
        (["--pattern", "top_k"], "top_k: got a"),
        (["--targets", "c_attn,absent"], "'absent'], which matches nothing"),
        (["--device", "tpu"], "--device: got 'tpu'"),
        (["--save", "no/such/folder/a.npz"], "--save: got"),
        (["--method", "lora", "--save", "a.npz"], "--save: got it with --method lora"),
        (["--method", "full", "--d", "2"], "--d: got it with --method full"),
        (["--method", "lora", "--d", "0"], "--d: got 0"),
        (["--context", "4096"], "--context: got 4096"),
        (["--base", "no/such/folder"], "--base: got 'no/such/folder', want a model with its tokenizer"),
        (["--unknown"], "--unknown"),
        (["compare", "--out", "short.txt"], "--out: cannot write"),
        (["compare", "--targets", "absent"], "'absent'], which matches nothing"),
        (["bench", "--device", "nope"], "--device: got 'nope'"),
    ]

    @pytest.mark.parametrize("arguments, text", MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
    def test_a_mistake_gets_one_line(self, hf, untrained, arguments, text, tmp_path, monkeypatch, capsys):
        """Exit code 2 and one line that names the option; no traceback, nothing trained."""
        monkeypatch.chdir(tmp_path)
        Path("short.txt").write_text("a short text")
        Path("empty.txt").write_text("")
        monkeypatch.setattr(train_toy, "train", None)
        cache = [] if arguments[0] == "bench" else ["--cache", str(untrained)]
        assert train_toy.main([*arguments, *cache]) == 2
        error = capsys.readouterr().err
        assert text in error and len(error.strip().splitlines()) == 1

    def test_a_run_that_diverges_gets_one_line(self, untrained, capsys):
        """The loss is no number any more, and nothing can be drawn from such a model."""
        assert train_toy.main(["--steps", "4", "--context", "1", "--lr", "1e30", "--cache", str(untrained)]) == 2
        assert "--lr: got 1e+30, want a smaller one: the loss became nan" in capsys.readouterr().err

    def test_ctrl_c_is_one_line_and_130(self, monkeypatch, capsys):
        """The shell's own code for it."""

        def interrupted(args):
            raise KeyboardInterrupt

        monkeypatch.setitem(train_toy.COMMANDS, "finetune", interrupted)
        assert train_toy.main([]) == 130 and "what was finished is kept" in capsys.readouterr().err

    @pytest.mark.parametrize("kind, layers", [("gpt2", 8), ("llama", 14)])
    def test_a_saved_model_with_its_tokenizer_is_fine_tuned(self, base, kind, layers, tmp_path, capsys):
        """--base FOLDER: GPT-2's own targets, or all linear layers; its adapter loads into the model."""
        file, short = tmp_path / "a.npz", ["--context", "16", "--steps", "3", "--lr", "0.01"]
        assert train_toy.main([*base[kind], *short, "--save", str(file)]) == 0
        assert "nats per token" in capsys.readouterr().out
        model, _ = train_toy.from_transformers(str(tmp_path / kind), CPU)
        assert svft.summary(svft.load_adapter(model, file)).count("custom") == layers
        (tmp_path / kind / "tokenizer.json").unlink()
        assert train_toy.main(base[kind]) == 2 and "want a model with its tokenizer" in capsys.readouterr().err

    COMPARE = ["compare", "--quick", "--steps", "2", "--seeds", "2"]

    def test_compare_goes_on_where_it_stopped(self, untrained, tmp_path, monkeypatch, capsys):
        """Every finished run is in the file, also one of another machine; a line that was cut short is ignored."""
        monkeypatch.setattr(train_toy, "SMALL", train_toy.entries("base; full; LoRA 1; banded 1,2"))
        arguments = [*self.COMPARE, "--out", str(tmp_path / "out"), "--cache", str(untrained)]
        assert train_toy.main(arguments) == 0
        first, runs = capsys.readouterr().out, tmp_path / "out" / "runs.jsonl"
        assert first.count("validation loss") == 7 and "recovered, %" in first and "\nSVFT banded 1,2 " in first
        with open(runs, "a") as file:
            file.write(json.dumps([["full", [], 0.1, 0], {}, {}]) + '\nrubbish\n[["full", ')
        assert train_toy.main(arguments) == 0
        second = capsys.readouterr().out
        assert "validation loss" not in second and second.strip() in first
        assert (tmp_path / "out" / "compare-quick.md").read_text().strip() in second

    def test_compare_draws_every_method_on_a_pretrained_model(self, base, tmp_path, monkeypatch, capsys):
        """--base: Conv1D layers too, or --targets of a Llama; the figure is drawn of what --minutes allowed."""
        rows = "base; full; LoRA 1; DoRA 1; VeRA 4; BOFT 4,2; plain; random 1,1; top-k 1,1"
        monkeypatch.setattr(train_toy, "LARGE", train_toy.entries(rows))
        arguments = ["compare", "--context", "16", "--steps", "2", "--seeds", "1", "--out", str(tmp_path / "out")]
        assert train_toy.main([*arguments, *base["gpt2"]]) == 0
        said = capsys.readouterr().out
        for row in ("full fine-tuning", "DoRA 1", "VeRA 4", "BOFT 4,2", "SVFT plain", "SVFT top-k 1,1"):
            assert f"| {row} " in said
        assert train_toy.main([*arguments, *base["gpt2"], "--minutes", "0"]) == 0  # all is there already
        assert train_toy.main([*arguments, *base["llama"], "--targets", "q_proj", "--minutes", "0"]) == 2
        assert "--minutes: got too few" in capsys.readouterr().err

    @pytest.mark.parametrize("steps", [-2, 0, 1, 4, 9], ids="{:+d} steps of two".format)
    def test_the_grid_of_learning_rates_goes_on_to_a_best_one_inside(self, steps):
        """Three rates, and one more as long as the best is at an edge, up to six; then the other seeds at the best."""
        study, entry = object.__new__(train_toy.Study), train_toy.Entry("LoRA", (4,))
        study.args = argparse.Namespace(quick=False, base=None, seeds=3)
        study.rows, study.results = [entry], {}
        middle = study.middle(entry)
        while todo := study.pending()[0]:
            loss = abs(np.log2(todo[0].lr / middle) - steps)
            study.results[todo[0]] = {"val": math.nan if todo[0].lr > 20 * middle else loss}
        seeds = {run.lr for run in study.results if run.seed == 1}
        want = middle * 2.0 ** min(steps, 4)
        assert seeds == {want} and len(study.results) == 2 + {-2: 5, 0: 3, 1: 4, 4: 6, 9: 6}[steps]

    def test_a_run_belongs_to_one_process_until_that_ends(self, tmp_path):
        """Of several processes with one --out; when one is killed, its run is free again."""
        pytest.importorskip("fcntl")
        run, ready = train_toy.Run(train_toy.Entry("plain"), 0.1, 0), multiprocessing.Event()

        def hold():
            with open(tmp_path / "runs.lock", "ab") as lock:
                train_toy.claim(lock, run) and ready.set()
                time.sleep(60)

        other = multiprocessing.get_context("fork").Process(target=hold)
        other.start()
        assert ready.wait(20)
        with open(tmp_path / "runs.lock", "ab") as lock:
            assert not train_toy.claim(lock, run) and train_toy.claim(lock, run._replace(seed=1))
            other.kill()
            other.join()
            assert train_toy.claim(lock, run)

    def test_the_figure_is_text_and_a_picture(self, tmp_path):
        """A bar for each point, by its number of parameters, # for SVFT; PNG and SVG where matplotlib is installed."""
        rows = [("LoRA", (1,), 800, 60.0), ("plain", (), 90, 40.0), ("BOFT", (2, 2), 400, 101.0)]
        points = [train_toy.Point(train_toy.Entry(m, size), n, "1", [1.0], [share]) for m, size, n, share in rows]
        lines = train_toy.text_plot(points).splitlines()[1:4]
        assert [line.split(" |")[0].split()[-1] for line in lines] == ["90", "400", "800"]
        assert lines[0].count("#") == 0 and lines[2].count("-") == 20  # from 40 to 100 in 60 characters
        pytest.importorskip("matplotlib")
        train_toy.plot(points, str(tmp_path / "figure"))
        assert (tmp_path / "figure.png").stat().st_size > 10_000 and (tmp_path / "figure.svg").exists()

    @pytest.mark.parametrize("options", [[], ["--amp"]], ids=["float32", "amp"])
    def test_bench_prints_steps_and_ratios(self, options, monkeypatch, capsys):
        """On small shapes: each method's step; every path over the frozen linear, what auto took, the worst cell."""
        monkeypatch.setattr(train_toy, "BLOCK", [(96, 32), (32, 32)])
        medians = train_toy.medians
        monkeypatch.setattr(train_toy, "medians", lambda calls, budget: medians(calls, 0))
        monkeypatch.setattr(train_toy, "WHOLE", train_toy.Config(64, 32, 1, 2, 32))
        assert train_toy.main(["bench", "--quick", "--context", "32", *options]) == 0
        said = capsys.readouterr().out
        words = ("tokens/s", "| SVFT banded 16 ", "dense", "auto/best", "at worst", torch.__version__)
        assert all(word in said for word in words)
        assert said.count("| full fine-tuning |") == 1 and said.count("| 96 x 32, 256, ") == 3


# ---------------------------------------------------------------- the documents


def code_blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


class TestDocuments:
    def test_the_examples_in_the_docstrings_run(self):
        """Every public name has a docstring; doctest finds and runs what they show."""
        torch.manual_seed(0)
        failed, run = doctest.testmod(svft, extraglobs={"torch": torch, "nn": nn})
        assert failed == 0 and run >= 12
        assert all(inspect.getdoc(getattr(svft, name)) for name in svft.__all__)

    def test_the_readmes_python_runs_and_prints_what_it_says(self, hf, tmp_path, monkeypatch):
        """Each block in turn, on a tiny random GPT-2 in the place of the real one; a line `# -> text` is printed, with
        the real one's numbers, which follow from its shapes. The second block warns of the head, and brings it back."""
        monkeypatch.chdir(tmp_path)
        first, second = code_blocks((HERE / "README.md").read_text(encoding="utf-8"), "python")
        config = tiny(hf, "gpt2")[0].config
        models = {"CausalLM": hf.GPT2LMHeadModel, "SequenceClassification": hf.GPT2ForSequenceClassification}
        for kind, model in models.items():
            made = staticmethod(lambda name, model=model: (torch.manual_seed(0), model(config).eval())[1])
            monkeypatch.setattr(getattr(hf, f"AutoModelFor{kind}"), "from_pretrained", made)
        names = {"batches": list(torch.randint(3, 50, (3, 2, 8)))}
        with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile(first, "README.md", "exec"), names)
        said, shown = re.findall(r"# -> (.*)", first), out.getvalue().splitlines()
        digits = re.compile(r"\d[\d.,]*")
        assert [digits.sub("#", line) for line in shown] == [digits.sub("#", line) for line in said]
        k, total = 48 * omega_banded(768, 768, 2).shape[1], 124_439_808
        assert said == [f"trained: {k:,} parameters, {k / total:.3%} of the base model's {total:,}"]
        merged = type(names["model"]).from_pretrained(tmp_path / "merged")
        near(merged(names["ids"]).logits, names["model"](names["ids"]).logits, 1e-4)
        randomize(names["fresh"])
        second = second.replace("...  #", "randomize(model).score.weight.data += 1  #")
        names |= {"randomize": randomize}
        with pytest.warns(UserWarning, match=r"\['score.weight'\] train too and are not in the file"):
            exec(compile(second, "README.md", "exec"), names)
        near(*(names[name](names["ids"]).logits for name in ("fresh", "model")), 1e-4)

    def test_the_checks_in_the_notes_hold(self):
        """The Python of paper_notes.md, block by block in one namespace."""
        names = {}
        for block in code_blocks((HERE / "paper_notes.md").read_text(encoding="utf-8"), "python"):
            exec(compile(block, "paper_notes.md", "exec"), names)
        assert "W0" in names

    def test_the_deviation_tags_and_the_rows_of_the_notes_are_the_same(self):
        """A tag in svft.py names a row of the deviations table, and every row has its tag."""
        notes = (HERE / "paper_notes.md").read_text(encoding="utf-8")
        rows = re.findall(r"^\| (D\d+) \|", notes, flags=re.M)
        tags = set(re.findall(r"\bD\d+\b", inspect.getsource(svft)))
        assert len(rows) == len(set(rows)) and set(rows) == tags == {f"D{i}" for i in range(1, len(rows) + 1)}

    def test_the_tests_that_the_notes_name_exist(self):
        """`test_...` in paper_notes.md is a test of this file."""
        notes, tests = (HERE / "paper_notes.md").read_text(encoding="utf-8"), Path(__file__).read_text(encoding="utf-8")
        named = set(re.findall(r"`(test_\w+)`", notes)) - {"test_svft"}
        assert len(named) >= 30 and not [name for name in named if f"def {name}(" not in tests]

    def test_the_module_stands_alone(self):
        """svft.py is pasted into projects: the standard library, torch and numpy, and nothing happens at import."""
        source = inspect.getsource(svft)
        imported = set(re.findall(r"^(?:from|import) (\w+)", source, flags=re.M)) - {"__future__"}
        assert imported - set(sys.stdlib_module_names) == {"torch", "numpy"}
        public = {n for n, v in vars(svft).items() if getattr(v, "__module__", 0) == "svft" and n[0] != "_"}
        assert set(svft.__all__) == public
        assert f"svft.py {svft.__version__}" in source.splitlines()[0] and "Apache-2.0" in source.splitlines()[1]


# ---------------------------------------------------------------- mutation proof: what this spec would catch

# fmt: off
MUTATIONS = [
    # svft.py has this; change it to this; and this test fails
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
    ('n = min(self.out_features, self.in_features)', 'n = min(self.U.shape[1], self.in_features)', 'refused_by_name'),
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
    ('{"FSDPModule", "FullyShardedDataParallel"} or any(', 'set() or any(', 'two_processes'),
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
    ('error = float(difference.norm() / scale.norm())', 'error = float(difference.norm())', 'refused_by_name'),
    ('    _check_finite("m", _exact(layer.m.detach()))', '    pass', 'bad_m_is_refused'),
    ('+ 1e-12 * exact[0]', '+ 0 * exact[0]', 'equal_singular_values'),
    ('if other := [', 'if other := 0 * [', 'saving_warns_where'),
    ('if zero := [', 'if zero := 0 * [', 'saving_warns_where'),
    ('os.path.realpath(path)', 'path', 'keeps_the_link'),
    ('raise OSError(error.errno, error.strerror, str(path)) from error', 'raise', 'full_disk'),
    ('        temporary.unlink(missing_ok=True)', '        pass', 'full_disk'),
    ('    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")', '    temporary = path', 'kill_9'),
]
# fmt: on


def run_in(folder, laws):
    """Run some laws of the copy in folder, in this process, which a fork has made; returns pytest's exit code."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for name in ("svft", "train_toy", "test_svft"):
        del sys.modules[name]
    os.environ["SVFT_PROFILE"] = "mutation"  # derandomised: the same verdict each time; no time for the smallest case
    torch.set_num_threads(1)
    return int(pytest.main(["-qx", "--assert=plain", "-p", "no:cacheprovider", *laws]))


@pytest.mark.mutation
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestMutationProof:
    @pytest.mark.parametrize("old, new, test", MUTATIONS, ids=[f"{i + 1}-{m[2]}" for i, m in enumerate(MUTATIONS)])
    def test_a_one_line_breakage_is_caught(self, tmp_path, old, new, test):
        """svft.py with one thing changed: the test named must fail."""
        source = (HERE / "svft.py").read_text(encoding="utf-8")
        (tmp_path / "svft.py").write_text(source.replace(old, new), encoding="utf-8")
        for name in ("test_svft.py", "train_toy.py"):
            (tmp_path / name).write_bytes((HERE / name).read_bytes())
        sections = {name: vars(section) for name, section in globals().items() if name.startswith("Test")}
        laws = [f"test_svft.py::{name}::{law}" for name, all_ in sections.items() for law in all_ if test in law]
        assert source.count(old) == 1 and old != new and laws, "the table is out of date"
        child = os.fork()  # torch need not be imported again
        if child == 0:
            try:
                code = run_in(tmp_path, laws)
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == pytest.ExitCode.TESTS_FAILED, f"survived, pytest returned {code}:\n{old}\n->\n{new}"


def print_the_spec():
    """Section, law, claim: what this file holds, for a reader."""
    for name, section in list(globals().items()):
        if name.startswith("Test"):
            print("\n" + re.sub(r"(\d) (?=\d)", r"\1.", name[4:].replace("_", " ")))
            for law, test in vars(section).items():
                if law.startswith("test_"):
                    print(f"  {law[5:].replace('_', ' ')}\n      {' '.join(inspect.getdoc(test).split())}")


if __name__ == "__main__":
    print_the_spec()
