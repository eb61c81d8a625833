# svft.py 0.1.0: SVFT (arXiv 2405.19597v1) in one file, to read beside the paper or to copy into a project.
# SPDX-License-Identifier: Apache-2.0. Written from the paper; its spec is test_svft.py, its notes paper_notes.md.
r"""SVFT: fine-tune a network by training a sparse matrix between the frozen singular vectors of its weights.

    W0 = U Sigma V^T                                  the SVD of a pre-trained weight: computed once, frozen
    h  = W0 x + U M V^T x  =  U (Sigma + M) V^T x     Eq. (1); M is zero outside a fixed set Omega
    Delta W = U M V^T = sum over (i, j) in Omega of m_ij u_i v_j^T     Eq. (2); only the m_ij are trained

Paper: Lingam et al., "SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors", NeurIPS 2024.

    paper      here        shape                      what it is
    d1, d2     out_features, in_features              W0 maps R^d2 to R^d1; n = min(d1, d2)
    W0         weight      (d1, d2)          frozen   the pre-trained weight; stored as the base layer stores it,
                                                      which in Hugging Face's Conv1D (GPT-2) is (d2, d1)
    U          U           (d1, r1)          frozen   left singular vectors u_i, one per column
    Sigma      S           (min(r1, r2),)    frozen   singular values, largest first
    V^T        Vh          (r2, d2)          frozen   right singular vectors v_j, one per row
    Omega      omega       (2, k) int64      fixed    positions (i, j) of the k trained entries, sorted
    m_ij       m           (k,)              trained  M's entries on Omega, zero at the start
    M          M()         (r1, r2)                   the same as a dense matrix
    d          d                                      half-width of the band |i - j| <= d
               x, T, z                                input; its number of tokens, one per row in code, (T, d2),
                                                      one per column in equations; z = V^T x, (r2, T)

r1 = r2 = n for the thin SVD, the default; min(r, n) with rank=r; r1 = d1 and r2 = d2 for the full SVD.

The product U M V^T x can be taken in two orders over one primitive, "sparse M times a dense matrix":

    dense    (W0 + U (M V^T)) x       builds a d1 x d2 update per forward, then costs what a trained weight does
    gather   W0 x + U (M (V^T x))     builds no d1 x d2 matrix; Eq. (1), left
    fused    U ((Sigma + M) (V^T x))  the same with Sigma folded in, so that W0 is not read; Eq. (1), right

Use:

    model = svft.inject(model, ["c_attn", "c_proj"], "banded", d=2, cache_dir="svd")  # trains the m's alone
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    ...                                                              # train as usual
    svft.save_adapter(model, "adapter.pt")                           # omega and m
    svft.load_adapter(fresh_model, "adapter.pt", cache_dir="svd")    # refuses a base that does not fit
    svft.merge(model)                                                # plain layers again

What it does not do: quantised weights, convolutions, embeddings, several adapters on one layer, second and
forward-mode derivatives, injection into weights that are sharded already. A tag such as D3 names a row of the
deviations table in paper_notes.md.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import logging
import math
import os
import re
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "0.1.0"
__all__ = [
    "SVD", "compute_svd", "omega_plain", "omega_banded", "omega_random", "omega_top_k", "rank_bound", "term_rank",
    "SVFTLinear", "inject", "merge", "disabled", "summary", "save_adapter", "load_adapter",
]  # fmt: skip

log = logging.getLogger(__name__)
FORMAT = "svft 1"  # of the cache and adapter files
HALF = (torch.float16, torch.bfloat16)
StrPath = str | os.PathLike


# ---------------------------------------------------------------- Section 3.1: the SVD, W0 = U Sigma V^T


class SVD(NamedTuple):
    """W0 = U diag(S) Vh: U (d1, r1); S (min(r1, r2),), largest first; Vh (r2, d2)."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def compute_svd(
    weight: Tensor,
    *,
    rank: int | None = None,
    full_matrices: bool = False,
    dtype: torch.dtype = torch.float64,
    cache_dir: StrPath | None = None,
) -> SVD:
    """The singular value decomposition of a weight, with canonical signs (D2).

    weight: (d1, d2), float16, bfloat16, float32 or float64. rank: the top r only; a layer then cuts its update,
    never W0 (D8). full_matrices: U (d1, d1) and Vh (d2, d2), as lemma (b) needs them (D1). dtype: what LAPACK
    runs in; float64 lets two machines agree. cache_dir: a folder that keeps one file per weight and options.
    Returns float32 factors (float64 for a float64 weight) on the weight's device. Runs on the CPU unless the
    weight is on CUDA. Raises TypeError or ValueError for an argument it cannot serve.

    >>> [tuple(t.shape) for t in compute_svd(torch.randn(6, 4), rank=3)]
    [(6, 3), (3,), (3, 4)]
    """
    _check_weight(weight)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: got {dtype}, want torch.float32 or torch.float64")
    if rank is not None and full_matrices:
        raise ValueError(f"rank: got {rank} with full_matrices=True, want one or the other")
    (d1, d2), n, weight = weight.shape, min(weight.shape), weight.detach()
    r = n if rank is None else min(_check_int("rank", rank, 1), n)
    r1, r2 = (d1, d2) if full_matrices else (r, r)
    file = None
    if cache_dir is not None:
        file = Path(cache_dir) / f"{_sha256(FORMAT, weight, r1, r2, dtype)}.pt"
        if (svd := _read_svd(file, weight, r1, r2)) is not None:
            return svd
    start = time.perf_counter()
    W = (weight if weight.is_cuda else weight.cpu()).to(dtype)  # (d1, d2)
    U, S, Vh = torch.linalg.svd(W if d1 >= d2 else W.T, full_matrices=full_matrices)  # LAPACK prefers it tall
    if d1 < d2:
        U, Vh = Vh.T, U.T
    out = torch.promote_types(weight.dtype, torch.float32)
    U, S, Vh = (t.to(weight.device, out).contiguous() for t in (U[:, :r1], S[: min(r1, r2)], Vh[:r2]))
    svd = _canonical(SVD(U, S, Vh))
    log.info("SVD of a %d x %d weight computed in %.2f s", d1, d2, time.perf_counter() - start)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(file, {name: t.cpu() for name, t in svd._asdict().items()})
        except (OSError, RuntimeError) as error:
            warnings.warn(f"cache_dir: cannot write {file} ({error}); going on without", stacklevel=2)
    return svd


def _canonical(svd: SVD) -> SVD:
    """(-u_i, -v_i) serve as well as (u_i, v_i): make each u_i's largest-magnitude entry positive (D2).

    The full SVD's extra rows of Vh have no u_i beside them and go by their own largest entry.
    """

    def sign(A: Tensor) -> Tensor:  # (r, d) -> (r, 1), of each row's largest-magnitude entry
        return torch.where(A.gather(1, A.abs().argmax(1, keepdim=True)) < 0, -1, 1)

    U, S, Vh = svd
    u = sign(U.T)  # (r1, 1)
    return SVD(U * u.T, S, Vh * torch.cat([u[: len(S)], sign(Vh[len(S) :])]))


def _read_svd(file: Path, weight: Tensor, r1: int, r2: int) -> SVD | None:
    """A cached SVD, or None: a missing, short, corrupt or foreign file is a miss, and will be replaced."""
    try:
        content = torch.load(file, map_location=weight.device, weights_only=True)  # executes nothing
        svd = SVD(*(content[name].contiguous() for name in SVD._fields))
        _check_svd(svd, weight)
        same = all(map(torch.equal, svd, _canonical(svd)))
        wanted = (r1, r2), torch.promote_types(weight.dtype, torch.float32)
        if ((svd.U.shape[1], svd.Vh.shape[0]), svd.U.dtype) != wanted or not same:
            raise ValueError("other signs, sizes or dtype")
        return svd
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever torch.load or a foreign content may raise
        log.warning("cache_dir: %s is no SVD of this weight (%s); computing it again", file, error)
        return None


def _check_svd(svd: SVD, W0: Tensor) -> None:
    """Refuse factors that are not an SVD of W0 (d1, d2): orthonormal, W0 V = U Sigma and W0^T U = V Sigma.

    Both sides are compared on 4 random vectors (Freivalds' check): O(d1 d2) where products cost O(n d1 d2).
    """
    if not (isinstance(svd, tuple) and len(svd) == 3 and all(isinstance(t, Tensor) for t in svd)):
        raise TypeError(f"svd: got {type(svd).__name__}, want an SVD(U, S, Vh) of tensors")
    shapes = [tuple(t.shape) for t in svd]
    r1, r2 = shapes[0][-1:], shapes[2][:1]
    if shapes != [(W0.shape[0], *r1), min(r1, r2), (*r2, W0.shape[1])] or not all(r1 + r2):
        raise ValueError(f"svd: got shapes {shapes}, want (d1, r1), (min(r1, r2),), (r2, d2) for {tuple(W0.shape)}")
    limit = 1e-2 if W0.dtype in HALF and svd[0].dtype in HALF else 2e-5
    dtype = torch.promote_types(W0.dtype, torch.float32)
    (U, S, Vh), W0 = (t.detach().to(W0.device, dtype) for t in svd), W0.detach().to(dtype)
    rng, n, top = np.random.RandomState(0), len(S), S.abs().max()
    g, h = (torch.from_numpy(rng.standard_normal((*r, 4))).to(U) for r in (r1, r2))  # (r1, 4), (r2, 4)
    with _no_autocast(U):
        Ug, Vg = U @ g, Vh.T @ h  # (d1, 4), (d2, 4)
        errors = [
            ("U^T U = I", U.T @ Ug - g, g.norm()),
            ("V^T V = I", Vh @ Vg - h, h.norm()),
            ("W0 V = U Sigma", W0 @ Vg - U[:, :n] @ (S[:, None] * h[:n]), top * h.norm()),
            ("W0^T U = V Sigma", W0.T @ Ug - Vh[:n].T @ (S[:, None] * g[:n]), top * g.norm()),
            ("Sigma sorted, >= 0", S - S.abs().sort(descending=True).values, top),
        ]
    for law, difference, scale in errors:
        if not bool(difference.norm() <= limit * scale):
            error = float(difference.norm() / scale)
            raise ValueError(f"svd: got factors with a relative error of {error:.1g} in {law}, want {limit:.0g}")


# ---------------------------------------------------------------- Section 3.1: Omega, where M may be non-zero
# Each omega_* returns an int64 tensor (2, k) on the CPU: row 0 the i, row 1 the j, sorted by (i, j), no pair twice.


def omega_plain(r1: int, r2: int) -> Tensor:
    """Plain, SVFT^P: the diagonal (i, i), which re-weights the singular values. k = min(r1, r2).

    >>> omega_plain(2, 3).tolist()
    [[0, 1], [0, 1]]
    """
    return omega_banded(r1, r2, 0)


def omega_banded(r1: int, r2: int, d: int, above: int | None = None) -> Tensor:
    """Banded, SVFT^B_d: all (i, j) with i - d <= j <= i + above (the paper's z1 and z2; above is d by default).

    Plain is the band with d = 0 (D9). A band wider than M is cut by its edges. For r1 = r2 = n > d,
    k = n (2d + 1) - d (d + 1), table 7.

    >>> omega_banded(3, 3, 1, above=0).T.tolist()
    [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2]]
    """
    r1, r2, d = _check_int("r1", r1, 1), _check_int("r2", r2, 1), _check_int("d", d, 0)
    above = d if above is None else _check_int("above", above, 0)
    i = np.arange(r1)[:, None]  # (r1, 1)
    j = i + np.arange(-min(d, r1 - 1), min(above, r2 - 1) + 1)  # (r1, width of the band)
    inside = (j >= 0) & (j < r2)
    return torch.from_numpy(np.stack([np.broadcast_to(i, j.shape)[inside], j[inside]]).astype(np.int64))


def omega_random(r1: int, r2: int, k: int, *, seed: int = 0) -> Tensor:
    """Random, SVFT^R: k distinct positions, uniformly, without replacement (D3).

    The stream of numpy's RandomState is frozen: one seed gives one Omega on every machine and version.

    >>> omega_random(100, 100, 500).unique(dim=1).shape
    torch.Size([2, 500])
    """
    r1, r2 = _check_int("r1", r1, 1), _check_int("r2", r2, 1)
    k, seed = _check_int("k", k, 1, r1 * r2), _check_int("seed", seed, 0, 2**32 - 1)
    flat = np.sort(np.random.RandomState(seed).choice(r1 * r2, k, replace=False))
    return torch.from_numpy(np.stack([flat // r2, flat % r2]).astype(np.int64))


def omega_top_k(U: Tensor, Vh: Tensor, k: int) -> Tensor:
    """Top-k, SVFT^T: the k positions with the strongest alignment |u_i . v_j| (D4); d1 = d2 only (D5).

    U: (d1, r1). Vh: (r2, d2). Of equal alignments the first in (i, j) order is taken.

    >>> omega_top_k(torch.eye(2), torch.tensor([[0.6, -0.8], [0.8, 0.6]]), 2).tolist()
    [[0, 1], [1, 0]]
    """
    _check_matrix("U", U), _check_matrix("Vh", Vh)
    if U.shape[0] != Vh.shape[1]:
        raise ValueError(
            f"top_k: got a {U.shape[0]} x {Vh.shape[1]} weight, want a square one: u_i . v_j is defined only for "
            "d1 = d2; use 'banded' or 'random' for this layer"
        )
    alignment = (U.T @ Vh.T).abs().flatten()  # (r1 r2,)
    k = _check_int("k", k, 1, alignment.numel())
    flat = alignment.sort(descending=True, stable=True).indices[:k].sort().values.cpu()
    return torch.stack([flat // Vh.shape[0], flat % Vh.shape[0]])


# ---------------------------------------------------------------- Section 3.2: how large can rank(M) be?


def rank_bound(omega: Tensor, shape: Sequence[int]) -> int:
    """Lemma (c): rank(Delta W) <= min(k, d1, d2), for a weight of shape (d1, d2).

    >>> rank_bound(omega_banded(4, 4, 1), (4, 8))
    4
    """
    if not isinstance(shape, Sequence) or len(shape) != 2:
        raise ValueError(f"shape: got {shape!r}, want (d1, d2)")
    d1, d2 = _check_int("d1", shape[0], 1), _check_int("d2", shape[1], 1)
    return min(_check_omega(omega, d1, d2).shape[1], d1, d2)


def term_rank(omega: Tensor) -> int:
    """The largest number of positions of which no two share a row or a column: a bipartite matching (D10).

    rank(M) <= term_rank(omega) <= rank_bound(omega, shape) for every M on Omega, and rank(M) = term_rank(omega)
    for M in general position. Where ten entries share a row, lemma (c) says 10 and the term rank says 1.

    >>> term_rank(torch.tensor([[0, 0, 0, 1], [0, 1, 2, 0]]))
    2
    """
    columns: dict[int, list[int]] = {}  # of each row
    for i, j in _check_omega(omega).T.tolist():
        columns.setdefault(i, []).append(j)
    row_of: dict[int, int] = {}  # the matching: column -> row
    for start in columns:  # search, breadth first, for a way from this row to a free column
        came: dict[int, tuple[int, int | None]] = {}  # column -> (row it was reached from, that row's own column)
        queue: list[tuple[int, int | None]] = [(start, None)]
        for i, own in queue:  # it grows meanwhile
            for j in columns[i]:
                if j not in came:
                    came[j] = i, own
                    if j in row_of:
                        queue.append((row_of[j], j))
            free = next((j for j in columns[i] if j not in row_of), None)
            if free is not None:
                break
        while free is not None:  # and back: each row on the way moves on to the column it led to
            row_of[free], free = came[free]
    return len(row_of)


# ---------------------------------------------------------------- Eq. (1): the layer


class SVFTLinear(nn.Module):
    """A frozen linear layer with a trained update: h = W0 x + U M V^T x + b, Eq. (1).

    base: exactly an nn.Linear or a Hugging Face Conv1D. It is not changed; its weight's memory is shared.
    pattern: "plain", "banded", "random", "top_k", an omega (2, k), or a function from the SVD to an omega.
    d: half-width of the band; "random" and "top_k" take as many entries as that band has, the paper's R_d and
    T_d, unless k says how many. seed: of "random". path: "dense", "gather", "fused", or "auto", which takes the
    cheapest for the tokens at hand (D11). keep_weight: False frees W0, and the factors stand in for it.
    svd: the weight's SVD, where it is known; without it, compute_svd(weight, **svd_options).

    m starts at zero (D6) and passes no gate (D7). It is float32 (float64 for a float64 weight), as is S; U and
    Vh have the weight's dtype (D12). At m = 0 dense and gather give base's output bit for bit; fused, and any path
    without W0, to float32 rounding; in float16, as long as V^T x does not overflow. A later .to(dtype) converts m
    too: convert first, then inject. Under autocast, fused and keep_weight=False stay in the factors' own dtype (D14).
    Raises TypeError or ValueError for a base or an argument that it cannot serve.

    >>> layer = SVFTLinear(nn.Linear(8, 6), "banded", d=1)
    >>> layer.m.shape, layer(torch.randn(3, 8)).shape
    (torch.Size([16]), torch.Size([3, 6]))
    """

    def __init__(
        self,
        base: nn.Module,
        pattern: str | Tensor | Callable[[SVD], Tensor] = "banded",
        d: int = 2,
        *,
        k: int | None = None,
        seed: int = 0,
        path: str = "auto",
        keep_weight: bool = True,
        svd: SVD | None = None,
        **svd_options: Any,
    ) -> None:
        super().__init__()
        if unknown := svd_options.keys() - {"rank", "full_matrices", "dtype", "cache_dir"}:
            raise TypeError(f"options: got {sorted(unknown)}, want those of SVFTLinear and compute_svd")
        W0 = _base_weight(base)  # (d1, d2)
        if svd is None:
            svd = compute_svd(W0, **svd_options)
        elif svd_options:
            raise ValueError(f"svd: got svd= together with {sorted(svd_options)}, want one or the other")
        else:
            _check_svd(svd, W0)
        omega, self.pattern = _make_omega(pattern, svd, d, k, seed)
        omega = omega.to(W0.device).contiguous()  # (2, k)

        def frozen(t: Tensor, dtype: torch.dtype = W0.dtype) -> nn.Parameter:
            return nn.Parameter(t.detach().to(W0.device, dtype), requires_grad=False)

        accurate = torch.promote_types(W0.dtype, torch.float32)
        self.out_features, self.in_features = W0.shape
        self.weight = frozen(base.weight) if keep_weight else None
        self.bias = None if base.bias is None else frozen(base.bias, base.bias.dtype)
        self.U, self.Vh = frozen(svd[0].contiguous()), frozen(svd[2].contiguous())  # (d1, r1), (r2, d2)
        self.S = frozen(svd[1].contiguous(), accurate)  # (min(r1, r2),)
        self.m = nn.Parameter(torch.zeros(omega.shape[1], dtype=accurate, device=W0.device))  # (k,)
        self.register_buffer("omega", omega)
        starts = torch.searchsorted(omega[0], torch.arange(self.U.shape[1], device=W0.device))
        self.register_buffer("_row_starts", starts, persistent=False)  # (r1,): where each row of M begins in m
        self.path = path
        self.svd_dtype = svd_options.get("dtype", torch.float64)  # for the adapter file
        self._transposed = type(base) is not nn.Linear
        self._shell = (copy.deepcopy(base, {id(p): None for p in base.parameters(recurse=False)}),)  # no submodule
        self._disabled = 0  # how many disabled() blocks hold
        self._check_path()
        self.train(base.training)

    def _times(self, Z: Tensor, m: Tensor, *, sigma: bool = False) -> Tensor:
        """M Z, or (Sigma + M) Z, of a dense Z (r2, c): (r1, c). Row i is the sum over j of m_ij Z_j.

        embedding_bag computes these sums in one go: nothing of size k x c is made (D11). float32 at least (D12).
        """
        m = m.to(torch.promote_types(m.dtype, torch.float32))
        Z = Z.to(m.dtype)
        Y = F.embedding_bag(self.omega[1], Z, self._row_starts, mode="sum", per_sample_weights=m)  # (r1, c)
        if sigma:  # on the first n rows; where these are all, not on a slice, which would cost a copy in backward
            head, Zn = (A if len(A) == len(self.S) else A[: len(self.S)] for A in (Y, Z))
            head.addcmul_(self.S[:, None].to(m.dtype), Zn)
        return Y

    def _dense(self, x: Tensor) -> Tensor:
        """(W0 + U (M V^T)) x + b."""
        if self.weight is None:
            W = self.merged_weight()  # (d1, d2)
            return self._base_product(x, W.T if self._transposed else W)
        delta = self.U @ self._times(self.Vh, self.m).to(self.U.dtype)  # (d1, d2)
        return self._base_product(x, self.weight + (delta.T if self._transposed else delta))

    def _gather(self, x: Tensor) -> Tensor:
        """W0 x + b + U (M (V^T x)): Eq. (1), left."""
        z = self.Vh @ x.reshape(-1, self.in_features).T  # (r2, T)
        y = self._times(z, self.m).to(z.dtype)  # (r1, T)
        return self._base_product(x, self.weight) + (y.T @ self.U.T).view(*x.shape[:-1], self.out_features)

    def _fused(self, x: Tensor, m: Tensor) -> Tensor:
        """U ((Sigma + M) (V^T x)) + b: Eq. (1), right."""
        z = self.Vh @ x.reshape(-1, self.in_features).T  # (r2, T)
        y = self._times(z, m, sigma=True)  # (r1, T)
        return F.linear(y.T, self.U, self.bias).view(*x.shape[:-1], self.out_features)

    def _base_product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x W^T + b by the base layer's own call, so that m = 0 changes no bit; weight in the base's layout."""
        if self._transposed:
            h = torch.addmm(self.bias, x.reshape(-1, self.in_features), weight)
            return h.view(*x.shape[:-1], self.out_features)
        return F.linear(x, weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d2) -> h (..., d1), in the base layer's dtype, or autocast's."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: got shape {tuple(x.shape)}, want (..., {self.in_features})")
        if self._disabled and self.weight is not None:
            return self._base_product(x, self.weight)
        self._check_path()
        autocast = None if self.U.dtype == torch.float64 else _autocast_dtype(x)
        if autocast is not None and (self.path == "fused" or self.weight is None):
            with _no_autocast(x):  # the factors stand in for W0: never in low precision (D14)
                return self.forward(x.to(self.U.dtype)).to(autocast)
        T, low = x.numel() // self.in_features, (autocast or self.U.dtype) in HALF
        path = self._cheapest(T, low) if self.path == "auto" else self.path
        if T == 0:  # embedding_bag refuses a Z without columns
            path = "dense"
        elif self._disabled:
            return self._fused(x, torch.zeros_like(self.m))
        if path == "dense":
            return self._dense(x)
        return self._fused(x, self.m) if path == "fused" else self._gather(x)

    def _cheapest(self, T: int, low: bool) -> str:
        """The path with the fewest multiply-adds for T tokens, forward, and backward where gradients are on.

        A multiply-add of the sparse step counts as 12, as much as it was measured to cost (a choice of ours, D11).
        """
        d1, d2, r1, r2 = self.out_features, self.in_features, self.U.shape[1], self.Vh.shape[0]
        passes, sparse = (2 if torch.is_grad_enabled() else 1), 12 * len(self.m)
        dense = (2 * passes - 1) * T * d1 * d2 + passes * (r1 * d1 + sparse) * d2
        factors = passes * T * (r1 * d1 + r2 * d2) + (2 * passes - 1) * T * sparse
        fused_serves = self._fits and not low
        other = factors if fused_serves else factors + passes * T * d1 * d2
        return "dense" if dense < other else "fused" if fused_serves else "gather"

    @property
    def _fits(self) -> bool:
        """Whether the factors can stand in for W0: all of them, and not in half precision (0.4% off)."""
        return len(self.S) == min(self.out_features, self.in_features) and self.U.dtype not in HALF

    def _check_path(self) -> None:
        """Refuse a path that the layer, as it is now, cannot serve."""
        got = f"path: got {self.path!r} with keep_weight={self.weight is not None}"
        if self.path not in ("auto", "dense", "gather", "fused"):
            raise ValueError(f"{got}, want 'auto', 'dense', 'gather' or 'fused'")
        if self.path == "gather" and self.weight is None:
            raise ValueError(f"{got}, want 'auto', 'dense' or 'fused': there is no W0")
        if (self.path == "fused" or self.weight is None) and not self._fits:
            n = min(self.out_features, self.in_features)
            why = f"{self.U.dtype} factors, {len(self.S)} of {n}, would change W0 (D8, D14)"
            hint = "convert before inject, or after merge"
            raise ValueError(f"{got}, want W0 kept and 'auto', 'dense' or 'gather' ({hint}): {why}")

    def M(self) -> Tensor:
        """M as a dense matrix (r1, r2), zero outside Omega; differentiable in m; float32 or float64."""
        m = self.m.to(torch.promote_types(self.m.dtype, torch.float32))
        shape = self.U.shape[1], self.Vh.shape[0]
        return m.new_zeros(shape).index_put((self.omega[0], self.omega[1]), m)

    def delta_weight(self) -> Tensor:
        """Delta W = U M V^T, (d1, d2), Eq. (2); differentiable in m; float32 or float64."""
        with _no_autocast(self.U):
            Y = self._times(self.Vh, self.m)  # (r1, d2)
            return self.U.to(Y.dtype) @ Y

    def merged_weight(self) -> Tensor:
        """W0 + Delta W, (d1, d2) whatever the base's layout; differentiable in m; float32 or float64."""
        if self.weight is not None:
            return self._W0() + self.delta_weight()
        self._check_path()
        with _no_autocast(self.U):
            return self.U @ self._times(self.Vh, self.m, sigma=True)

    def _W0(self) -> Tensor:  # (d1, d2)
        if self.weight is not None:
            return self.weight.T if self._transposed else self.weight
        self._check_path()
        n = len(self.S)
        with _no_autocast(self.U):
            return (self.U[:, :n] * self.S) @ self.Vh[:n]

    def check_rank(self) -> tuple[int, int, int]:
        """(rank, term rank, bound): rank(Delta W) = rank(M) <= term_rank(omega) <= min(k, d1, d2), lemma (c).

        The rank is numerical, in float64. Raises RuntimeError unless the three ascend, ValueError for NaN or inf.
        """
        _check_unsharded(self)
        _check_finite("m", self.m)
        rank = int(torch.linalg.matrix_rank(self.M().detach().cpu().double()))
        found = rank, term_rank(self.omega), rank_bound(self.omega, (self.out_features, self.in_features))
        if not found[0] <= found[1] <= found[2]:
            raise RuntimeError(f"check_rank: got rank, term rank, bound = {found}, want them ascending")
        return found

    @torch.no_grad()
    def merge(self, *, name: str = "") -> nn.Module:
        """A new plain layer of the base's own type with the weight W0 + Delta W, frozen; this one stays as it is.

        Computed in float32 (float64) and rounded once; warns, calling the layer by name, where that rounding
        swallows over 10% of the update. Raises ValueError where m or the merged weight has NaN or inf.
        """
        _check_unsharded(self)
        W0, delta = self._W0(), self.delta_weight()  # (d1, d2)
        W = (W0 + delta).to(self.U.dtype)  # (d1, d2)
        _check_finite("m", self.m), _check_finite("merged weight", W)
        lost = float((W.to(delta.dtype) - W0 - delta).norm() / delta.norm())  # NaN at m = 0
        if lost > 0.1:
            warnings.warn(f"merge {name!r}: rounding to {W.dtype} loses {lost:.0%} of the update", stacklevel=2)
        layer = copy.deepcopy(self._shell[0])
        layer.weight = nn.Parameter((W.T if self._transposed else W).contiguous(), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return layer.train(self.training)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        omega, errors = state_dict.get(prefix + "omega"), args[-1]
        bases = {name: state_dict[prefix + name] for name in ("weight", "U", "S", "Vh") if prefix + name in state_dict}
        if prefix + "m" in state_dict if omega is None else not torch.equal(omega.cpu(), self.omega.cpu()):
            errors.append(f"{prefix}omega: got other positions than this layer's, or none: m would not fit")
        elif len(bases) < 3 + (self.weight is not None) and not all(self._holds(*item) for item in bases.items()):
            errors.append(f"{prefix}weight: got some of W0 and its factors, want all or none: load a base, then inject")
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _holds(self, name: str, value: Tensor) -> bool:  # a part of a checkpoint in several files may well be the same
        own = getattr(self, name)
        return own is not None and torch.equal(_whole(own), _whole(value).to(own.dtype))

    def __setstate__(self, state: dict) -> None:  # of a copy or a pickle, which no disabled() block holds
        super().__setstate__({**state, "_disabled": 0})

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, pattern={self.pattern}, k={len(self.m)}, path={self.path}"


def _make_omega(pattern: Any, svd: SVD, d: int, k: int | None, seed: int) -> tuple[Tensor, str]:
    """The omega that pattern, d, k and seed stand for, and its name in tables."""
    U, _, Vh = svd
    r1, r2, d = U.shape[1], Vh.shape[0], _check_int("d", d, 0)
    name = pattern if isinstance(pattern, str) else "custom"
    if k is not None and name not in ("random", "top_k"):
        raise ValueError(f"k: got {k} with pattern {pattern!r}, want k only with 'random' and 'top_k'")
    if name in ("plain", "banded"):
        return (omega_plain(r1, r2), name) if name == "plain" else (omega_banded(r1, r2, d), f"banded d={d}")
    if name in ("random", "top_k"):
        k = omega_banded(r1, r2, d).shape[1] if k is None else k
        return (omega_random(r1, r2, k, seed=seed) if name == "random" else omega_top_k(U, Vh, k)), name
    if not isinstance(pattern, Tensor) and not callable(pattern):
        names = "'plain', 'banded', 'random', 'top_k', an omega, or a function of the SVD"
        raise ValueError(f"pattern: got {pattern!r}, want {names}")
    return _check_omega(pattern if isinstance(pattern, Tensor) else pattern(svd), r1, r2).clone(), name


# ---------------------------------------------------------------- A whole model


def inject(
    model: nn.Module,
    target_modules: str | Sequence[str],
    pattern: str | Tensor | Callable[[SVD], Tensor] = "banded",
    d: int = 2,
    **options: Any,
) -> nn.Module:
    """Replace the targets in model by SVFTLinear, freeze all else, and return model: in place.

    target_modules: a list whose entries match a module's whole name or its end at a dot, or one regular
    expression that matches whole names, as in PEFT (D13). options: SVFTLinear's. "random" draws another Omega
    for each layer, from seed plus the CRC-32 of its name. The m's of an earlier inject stay trainable.
    Raises TypeError, ValueError or RuntimeError, naming the layer; the model is then exactly as it was.

    >>> model = inject(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), ["0", "2"], "plain")
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.m', '2.m']
    """
    _check_unsharded(model)
    targets = _find_targets(model, target_modules)
    seed = _check_int("seed", options.pop("seed", 0), 0, 2**32 - 1)
    layers: dict[str, nn.Module] = {}
    for name in _tracked(targets, options.get("cache_dir")):
        with _naming(name):
            own_seed = (seed + zlib.crc32(name.encode())) % 2**32
            layers[name] = SVFTLinear(targets[name], pattern, d, seed=own_seed, **options)
    return _freeze(_replace(model, layers))


def merge(model: nn.Module) -> nn.Module:
    """Replace every SVFTLinear in model by its merged plain layer, in place, and return model.

    Merging twice equals merging once. On an error, which names the layer, the model is exactly as it was. A
    model that is itself an SVFTLinear cannot be replaced in place: its merged layer is returned.

    >>> merge(inject(nn.Sequential(nn.Linear(4, 4)), ["0"]))
    Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
    )
    """
    layers: dict[str, nn.Module] = {}
    _check_unsharded(model)
    for name, layer in _svft_layers(model).items():
        with _naming(name):
            layers[name] = layer.merge(name=name)
    return layers[""] if "" in layers else _replace(model, layers)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside `with disabled(model):` every SVFTLinear computes W0 x, as its base does where W0 is kept; blocks nest.

    >>> model = inject(nn.Sequential(nn.Linear(4, 4)), ["0"])
    >>> with disabled(model):
    ...     before = model(torch.ones(4))
    """
    layers = _svft_layers(model).values()
    for layer in layers:
        layer._disabled += 1
    try:
        yield model
    finally:
        for layer in layers:
            layer._disabled -= 1


def summary(model: nn.Module) -> str:
    """A table of the SVFTLinear layers: name, d1 x d2, pattern, k, path, bytes held; then totals and % trained.

    The share is of the parameters that the model had without the layers' own U, S, Vh and m, as papers count it.
    """
    rows, held, layers = [("layer", "shape", "pattern", "k", "path", "bytes")], 0, _svft_layers(model)
    for name, layer in layers.items():
        size = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
        shape = f"{layer.out_features} x {layer.in_features}"
        rows.append((name, shape, layer.pattern, f"{len(layer.m):,}", layer.path, f"{size:,}"))
        held += size
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    own = {id(p) for layer in layers.values() for p in (layer.U, layer.S, layer.Vh, layer.m)}
    total = sum(p.numel() for p in model.parameters() if id(p) not in own)
    total += sum(layer.out_features * layer.in_features for layer in layers.values() if layer.weight is None)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines.append(f"{len(layers)} layers, {held:,} bytes")
    share = 100 * trained / max(total, 1)
    lines.append(f"trained: {trained:,} parameters, {share:.3f}% of the base model's {total:,}")
    return "\n".join(lines)


def _svft_layers(model: nn.Module) -> dict[str, SVFTLinear]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module")
    return {name: module for name, module in model.named_modules() if isinstance(module, SVFTLinear)}


def _replace(model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    """Put each layer in place of the module of its name, under every name that this module has."""
    old = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in old:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, old[id(module)])
    return model


def _freeze(model: nn.Module) -> nn.Module:
    trained = {id(layer.m) for layer in _svft_layers(model).values()}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
    return model


# ---------------------------------------------------------------- Saving and loading what was trained


def save_adapter(model: nn.Module, path: StrPath, *, bases: bool = False) -> None:
    """Write Omega, m and a fingerprint of Delta W, for every SVFTLinear of model, to one file, atomically (D15).

    The file holds coordinates without their basis, which load_adapter computes again from W0. bases=True stores
    the basis too, for weights whose SVD does not come out the same twice (repeated singular values); the full
    SVD of a rectangular weight is always stored. Under FSDP2 call it on every rank.
    Raises ValueError where there is no SVFTLinear in model, or an m is not finite, FileNotFoundError where the
    folder is missing. Warns where some m, but not every one, is still zero (its layer was not used, or not
    through forward), and of bases that a plain model will not have.
    """
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"path: got {str(path)!r}, want a file in a folder that exists")
    entries = {}
    for name, layer in _svft_layers(_unwrapped(model)).items():
        U, S, Vh, m = (_whole(t) for t in (layer.U, layer.S, layer.Vh, layer.m))
        with _naming(name):
            _check_finite("m", m)
        full, n = U.shape[1] != Vh.shape[0], min(U.shape[0], Vh.shape[1])
        negative, (i, j) = U.amax(0) < -U.amin(0), layer.omega.cpu()  # (r1,): is u_i's largest-magnitude entry so?
        entry = {"shape": (U.shape[0], Vh.shape[1]), "omega": layer.omega.cpu(), "m": m}
        entry |= {"rank": len(S) if len(S) < n else None, "full_matrices": full, "svd_dtype": str(layer.svd_dtype)}
        entry |= {"probes": _probes(layer.omega, m, U, Vh)}
        if bases or full:
            entry |= {"U": U, "S": S, "Vh": Vh}
        elif bool((negative[i] != negative[j]).any()):  # with canonical signs, this m_ij would be the negative
            warnings.warn(f"layer {name!r}: no plain model will have these signs; use bases=True", stacklevel=2)
        if m.dtype in HALF:
            warnings.warn(
                f"layer {name!r}: m in {m.dtype}, converted after inject: load it into a model made alike", stacklevel=2
            )
        entries[name] = entry
    if not entries:
        raise ValueError("model: got one without an SVFTLinear, want an injected model")
    still = [name for name, entry in entries.items() if not entry["m"].any()]
    if 0 < len(still) < len(entries):
        warnings.warn(f"m is still zero in {still}: does the model read these weights past forward?", stacklevel=2)
    _write(Path(path), {"format": FORMAT, "layers": entries, "sha256": _sha256(entries)})


def load_adapter(model: nn.Module, path: StrPath, *, cache_dir: StrPath | None = None) -> nn.Module:
    """Give model the update saved in path, in place, or refuse and leave the model exactly as it was.

    A plain model is injected with what the file names, default options, SVDs through cache_dir. An injected one
    must hold the same layers with the same Omegas. Either way the saved m must give the saved Delta W on the
    bases found here: a^T Delta W b, for 16 fixed random pairs a and b, may differ by 1e-3, relatively. That
    shows another base model, a flipped sign, a rotated subspace. It cannot show a change outside the adapted
    weights or in directions that Omega does not use, or of singular values that stay positive and in order, as in
    a scaled base or one into which a small plain adapter was merged already. m = 0 fits every base.
    Raises ValueError or TypeError, naming the layer and, if that is it, the difference; OSError where the file
    cannot be opened.
    """
    _check_unsharded(model)
    inner, entries = _unwrapped(model), _read_adapter(Path(path))
    have = _svft_layers(inner)
    there: dict[str, nn.Module] = have or dict(inner.named_modules())
    if unknown := sorted(entries.keys() - there.keys()):
        raise ValueError(f"{path}: got layers {unknown}, want only layers that the model has")
    if missing := sorted(have.keys() - entries.keys()):
        raise ValueError(f"{path}: got nothing for {missing}, want an entry for every SVFTLinear of the model")
    if not have:
        _check_targets(inner, entries)
    layers, bases = {}, {}
    for name in _tracked(entries, cache_dir):
        with _naming(name):
            entry, layer = entries[name], there[name]
            shape = tuple(_base_weight(layer).shape) if not have else (layer.out_features, layer.in_features)
            if shape != entry["shape"]:
                raise ValueError(f"weight: got shape {shape}, want {entry['shape']}, the adapter's")
            bases[name] = svd = SVD(entry["U"], entry["S"], entry["Vh"]) if "U" in entry else None
            if not have:
                options: dict[str, Any] = {"svd": svd}
                if svd is None:
                    dtype = getattr(torch, entry["svd_dtype"].removeprefix("torch."))
                    options = {"rank": entry["rank"], "dtype": dtype, "cache_dir": cache_dir}
                layer = SVFTLinear(layer, entry["omega"], **options)
            _check_update(layer, entry, svd)
            layers[name] = layer
    for name, layer in layers.items():
        for part, value in (bases[name]._asdict() if bases[name] else {}).items():
            old = getattr(layer, part)  # replaced, not overwritten: other layers may share its memory
            setattr(layer, part, nn.Parameter(value.to(old.device, old.dtype), requires_grad=False))
        with torch.no_grad():
            layer.m.copy_(entries[name]["m"])
    if not have:
        _freeze(_replace(inner, layers))
    return model


def _check_update(layer: SVFTLinear, entry: dict, svd: SVD | None) -> None:
    """Refuse an entry whose m would not be the saved update in this layer, with its bases or those of svd."""
    if not torch.equal(layer.omega.cpu(), entry["omega"]):
        raise ValueError("omega: got other positions in the model than in the adapter, want the same")
    if svd is not None:
        _check_svd(svd, layer._W0())
        if svd.U.shape != layer.U.shape or svd.Vh.shape != layer.Vh.shape:
            got = f"U {tuple(layer.U.shape)} and Vh {tuple(layer.Vh.shape)}"
            raise ValueError(f"svd: got {got}, want {tuple(svd.U.shape)} and {tuple(svd.Vh.shape)}, the adapter's")
    U, _, Vh = svd or (layer.U, layer.S, layer.Vh)
    difference = float((_probes(entry["omega"], entry["m"], U, Vh) - entry["probes"]).norm())
    norm = float(entry["probes"].norm())
    if not difference <= 1e-3 * norm:
        raise ValueError(
            f"m: got an update that differs from the saved one by {difference / norm if norm else math.inf:.2g}, "
            "relatively, want at most 1e-3. Is this the base model, in the dtype, that the adapter was trained on? "
            "If so, its singular vectors are not unique: save with bases=True"
        )


def _probes(omega: Tensor, m: Tensor, U: Tensor, Vh: Tensor) -> Tensor:
    """a^T (U M V^T) b for 16 fixed random pairs a (d1,), b (d2,): (16,), float64, on the CPU.

    RandomState's stream is frozen, so that the file need not hold a and b.
    """
    rng = np.random.RandomState(0)
    a, b = (torch.from_numpy(rng.standard_normal((16, size))) for size in (U.shape[0], Vh.shape[1]))
    aU, Vb = a @ U.detach().cpu().double(), b @ Vh.detach().cpu().double().T  # (16, r1), (16, r2)
    i, j = omega.cpu()
    return (aU[:, i] * Vb[:, j]) @ m.detach().cpu().double()


def _whole(t: Tensor) -> Tensor:
    """A parameter as a plain tensor on the CPU, gathered from all ranks where it is sharded."""
    t = t.detach()
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).cpu().clone()


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile, so that names in the file are the model's own."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def _read_adapter(path: Path) -> dict[str, dict]:
    """The entries of an adapter file, whole and unaltered; nothing in it is executed."""
    data = io.BytesIO(path.read_bytes())
    try:
        content = torch.load(data, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT or content["sha256"] != _sha256(content["layers"]):
            raise ValueError("another format, or altered: the checksum differs")
        return content["layers"]
    except Exception as error:  # whatever torch.load or a foreign content may raise
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: got no whole adapter file, want one of format {FORMAT!r} ({reason})") from error


def _write(path: Path, content: dict) -> None:
    """Write a file whole or not at all, also where several processes write the same one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(*parts: Any) -> str:
    """A digest of tensors (dtype, shape, bytes), dicts of them, and anything else by its repr."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(part, dict):
            digest.update(" ".join(_sha256(key, value) for key, value in part.items()).encode())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- Which layers, and the checks at the boundary


def _find_targets(model: nn.Module, target_modules: str | Sequence[str]) -> dict[str, nn.Module]:
    """The modules that target_modules names (D13), in the model's order; every entry must match one."""
    single = isinstance(target_modules, str)
    if not (single or isinstance(target_modules, Sequence)) or not all(isinstance(t, str) for t in target_modules):
        raise TypeError(f"target_modules: got {target_modules!r}, want a list of names, or one regular expression")
    if not target_modules:
        raise ValueError(f"target_modules: got {target_modules!r}, want at least one name")
    modules = dict(model.named_modules(remove_duplicate=False))
    found: set[str] = set()
    for entry in [target_modules] if single else target_modules:
        try:
            pattern = re.compile(entry if single else rf"(.*\.)?{re.escape(entry)}")
        except re.error as error:
            raise ValueError(f"target_modules: got {entry!r}, want a regular expression ({error})") from error
        hits = {name for name in modules if pattern.fullmatch(name)}
        if not hits:
            hint = f"; to match ends of names, pass [{entry!r}]" if single else ""
            linear = [name for name, module in modules.items() if type(module).__name__ in ("Linear", "Conv1D")]
            some = ", ".join(linear[:8]) + (f", ... ({len(linear)} in all)" if len(linear) > 8 else "")
            raise ValueError(f"target_modules: got {entry!r}, which matches nothing{hint}; want among {some}")
        found |= hits
    targets = {name: module for name, module in modules.items() if name in found}
    _check_targets(model, targets)
    return targets


def _check_targets(model: nn.Module, names: Any) -> None:
    """Refuse a target that cannot be replaced, or not without a side effect elsewhere."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        with _naming(name):
            base = modules[name]
            _base_weight(base)
            if not name:
                raise ValueError("target_modules: got the model itself, want layers inside it; use SVFTLinear(model)")
            if isinstance(modules[name.rpartition(".")[0]], nn.TransformerEncoderLayer):
                why = "its inference reads the weight directly, past forward"
                raise ValueError(f"base: got a part of nn.TransformerEncoderLayer, want another layer: {why}")
            for other, module in modules.items():
                if other != name and any(p is base.weight for p in module._parameters.values()):
                    raise ValueError(f"weight: got one shared with {other!r} (tied), want a weight of its own")


def _base_weight(base: nn.Module) -> Tensor:
    """base's weight as W0 (d1, d2); raises unless SVFTLinear can take base's place."""
    if isinstance(base, SVFTLinear):
        raise TypeError("base: got an SVFTLinear already, want a plain layer: merge it first")
    weight = getattr(base, "weight", None)
    conv1d = type(base).__name__ == "Conv1D" and getattr(base, "nf", None) == getattr(weight, "shape", "?")[-1]
    plain = type(base) is nn.Linear or conv1d
    if not plain or set(base._parameters) != {"weight", "bias"}:
        got = f"{type(base).__module__}.{type(base).__qualname__} with {sorted(getattr(base, '_parameters', []))}"
        why = "subclasses, parametrised and quantised layers may not use their weight through forward"
        raise TypeError(f"base: got {got}, want exactly nn.Linear or Hugging Face's Conv1D: {why}")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if "forward" in vars(base) or any(getattr(base, kind) for kind in hooks):
        raise ValueError("base: got hooks or a forward of its own on it, want them removed: they would be lost")
    _check_weight(weight)
    return weight.detach().T if conv1d else weight.detach()


def _check_weight(weight: Tensor) -> None:
    _check_matrix("weight", weight)
    if hasattr(weight, "__tensor_flatten__") or weight.layout != torch.strided:
        got = f"{type(weight).__name__} ({weight.layout})"
        raise TypeError(f"weight: got a {got}, want a plain dense tensor: inject before sharding or packing")
    if weight.is_meta or not weight.numel():
        got = "a meta tensor" if weight.is_meta else "an empty tensor"
        raise ValueError(f"weight: got {got} of shape {tuple(weight.shape)}, want one that holds values")
    _check_finite("weight", weight)


def _check_finite(name: str, t: Tensor) -> None:
    if not bool(torch.isfinite(t).all()):
        raise ValueError(f"{name}: got NaN or inf in it, want finite values")


def _check_matrix(name: str, matrix: Tensor) -> None:
    dtype = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
    if dtype not in (*HALF, torch.float32, torch.float64):
        raise TypeError(f"{name}: got {dtype}, want a tensor of float16, bfloat16, float32 or float64")
    if matrix.ndim != 2:
        raise ValueError(f"{name}: got shape {tuple(matrix.shape)}, want a matrix")


def _check_omega(omega: Tensor, r1: int | None = None, r2: int | None = None) -> Tensor:
    """omega, if it is an int64 (2, k) with k >= 1, 0 <= i < r1, 0 <= j < r2, strictly ascending by (i, j)."""
    dtype = omega.dtype if isinstance(omega, Tensor) else type(omega).__name__
    if dtype != torch.int64:
        raise TypeError(f"omega: got {dtype}, want an int64 tensor")
    if omega.ndim != 2 or omega.shape[0] != 2 or not omega.numel():
        raise ValueError(f"omega: got shape {tuple(omega.shape)}, want (2, k) with k >= 1")
    i, j = omega
    if not bool((omega >= 0).all() & (i < (r1 or math.inf)).all() & (j < (r2 or math.inf)).all()):
        got = f"i, j from {tuple(omega.amin(1).tolist())} to {tuple(omega.amax(1).tolist())}"
        raise ValueError(f"omega: got {got}, want 0 <= i < {r1 or 'any'} and 0 <= j < {r2 or 'any'}")
    flat = i * (j.max() + 1) + j
    if not bool((flat[1:] > flat[:-1]).all()):
        raise ValueError("omega: got unsorted or repeated positions, want each once, sorted by i, then j")
    return omega


def _check_unsharded(module: nn.Module) -> None:
    """Refuse what FSDP2 has sharded, also while its weights happen to be gathered."""
    _svft_layers(module)  # is it a module?
    fsdp = any(kind.__name__ == "FSDPModule" for m in module.modules() for kind in type(m).__mro__)
    if fsdp or any(hasattr(p, "full_tensor") for p in module.parameters()):
        raise TypeError(
            "model: got a sharded one, want a plain one: inject and load before sharding; "
            "to merge, save_adapter here and load into a plain model"
        )


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def _check_int(name: str, value: Any, low: int, high: float = math.inf) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: got {value!r}, want an int")
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, want {low} to {high}")
    return int(value)


@contextlib.contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Make errors name the layer."""
    try:
        yield
    except Exception as error:
        error.args = (f"layer {layer!r}: {error}",)
        raise


def _tracked(names: Any, cache_dir: Any) -> Iterator[str]:
    """Iterate over layers whose SVDs are computed; where that takes long, say once how long it will take."""
    start, told = time.perf_counter(), False
    for done, name in enumerate(names, 1):
        yield name
        spent = time.perf_counter() - start
        if spent > 10 and not told and done < len(names):
            left, told = spent / done * (len(names) - done), True
            hint = "" if cache_dir else "; cache_dir= would keep them for the next start"
            log.warning("SVDs: %d of %d layers in %.0f s, about %.0f s to go%s", done, len(names), spent, left, hint)
