# svft.py 0.2.0: SVFT (arXiv 2405.19597v1) in one file, to read beside the paper or to copy into a project.
# SPDX-License-Identifier: Apache-2.0. Written from the paper; its spec is test_svft.py, its notes paper_notes.md.
r"""SVFT: fine-tune a network by training a sparse matrix between the frozen singular vectors of its weights.

Paper: Lingam et al., "SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors", NeurIPS 2024.
The method on one weight:

    >>> W0, x = torch.randn(6, 4), torch.randn(3, 4)                # a pre-trained weight (d1, d2); three tokens
    >>> U, S, Vh = compute_svd(W0)                                  # W0 = U Sigma V^T: computed once, frozen
    >>> omega = omega_banded(4, 4, d=1)                             # Omega: where M may be non-zero
    >>> m = torch.zeros(omega.shape[1], requires_grad=True)         # all that is trained
    >>> M = torch.zeros(4, 4).index_put((omega[0], omega[1]), m)    # sparse: m on Omega, zero elsewhere
    >>> h = x @ (W0 + U @ M @ Vh).T                                 # Eq. (1); here a token is a row of x

The method on a model:

    model = svft.inject(model, ["c_attn", "c_proj"], "banded", d=2, cache_dir="svd")  # only the m's train
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    ...                                                             # train as usual
    svft.save_adapter(model, "adapter.npz")                         # Omega and m
    svft.load_adapter(fresh_model, "adapter.npz", cache_dir="svd")  # refuses a base that does not fit
    svft.merge(model)                                               # plain layers again

    paper     here                    shape
    d1, d2    out_features, in_features                W0 maps R^d2 to R^d1
    W0        weight                  (d1, d2)         frozen; (d2, d1) in Conv1D, GPT-2's linear layer
    U         U                       (d1, r1)         frozen; the left singular vector u_i is column i
    Sigma     S                       (min(r1, r2),)   frozen; its diagonal, largest first
    V^T       Vh                      (r2, d2)         frozen; the right singular vector v_j is row j
    Omega     omega                   (2, k)  int64    fixed; k pairs: row 0 is i, row 1 is j, sorted by (i, j)
    m_ij      m                       (k,)             trained; zero at the start
    M         M()                     (r1, r2)         zero outside Omega
    Delta W   delta_weight()          (d1, d2)         U M V^T
    z         z                       (r2, tokens)     V^T x, one column for each token
    d         d                                        half-width of the band |i - j| <= d

M is r1 x r2. With n = min(d1, d2): n x n for the thin SVD, the default; min(r, n) x min(r, n) with rank=r; d1 x d2,
as in the paper, for the full SVD (D1). c is any number of columns.

It does not do quantised weights, convolutions, embeddings, several adapters on one layer, or weights that are
sharded before inject. A tag such as (D3) names a row of the deviations table in paper_notes.md.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "0.2.0"
__all__ = [
    "SVD", "compute_svd", "omega_plain", "omega_banded", "omega_random", "omega_top_k", "rank_bound", "term_rank",
    "SVFTLinear", "inject", "merge", "disabled", "summary", "save_adapter", "load_adapter",
]  # fmt: skip

log = logging.getLogger(__name__)
HALF = (torch.float16, torch.bfloat16)
StrPath = str | os.PathLike


# ---------------------------------------------------------------- Section 3.1: the SVD, W0 = U Sigma V^T


class SVD(NamedTuple):
    """W0 = U Sigma V^T, section 3.1: U (d1, r1); S (min(r1, r2),), largest first; Vh (r2, d2). float32 or float64."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def compute_svd(
    weight: Tensor, *, rank: int | None = None, full_matrices: bool = False, cache_dir: StrPath | None = None
) -> SVD:
    """The singular value decomposition of a weight, in float64 and with canonical signs (D2).

    weight: (d1, d2), float16, bfloat16, float32 or float64. rank: the top r only, at most n; a layer then cuts its
    update and never W0 (D8). full_matrices: U (d1, d1) and Vh (d2, d2), which lemma (b) needs (D1). cache_dir: a
    folder for the result, one file per weight and size. Returns float32 factors (float64 for a float64 weight) on
    the weight's device. Raises TypeError or ValueError, naming the argument.

    >>> [tuple(t.shape) for t in compute_svd(torch.randn(6, 4), rank=3)]
    [(6, 3), (3,), (3, 4)]
    """
    _check_weight(weight)
    if rank is not None and full_matrices:
        raise ValueError(f"rank: got {rank} with full_matrices=True, want one or the other")
    n = min(weight.shape)
    r = n if rank is None else min(n, _check_int("rank", rank, 1))
    r1, r2 = weight.shape if full_matrices else (r, r)
    return _svd(weight, r1, r2) if cache_dir is None else _cached_svd(Path(cache_dir), weight, r1, r2)


def _svd(weight: Tensor, r1: int, r2: int) -> SVD:
    W = _exact(weight.detach())  # (d1, d2)
    lying = W.shape[0] < W.shape[1]  # LAPACK takes up to 1.7 times as long if the rows are fewer than the columns
    U, S, Vh = torch.linalg.svd(W.T if lying else W, full_matrices=r1 != r2)  # of a square W thin is full
    if lying:
        U, Vh = Vh.T, U.T
    if r1 < len(S) and S[r1 - 1] <= S[r1] * (1 + 1e-6):
        warnings.warn(f"rank: {r1} cuts through equal singular values: another machine may keep others", stacklevel=3)
    U, S, Vh = U[:, :r1], S[: min(r1, r2)], Vh[:r2]
    # (-u_i, -v_i) fits as well as (u_i, v_i). M depends on the choice: make the largest entry of u_i positive (D2), the
    # first of them if several are equal but for rounding.
    size = U.abs()
    first = (size >= (1 - 1e-6) * size.amax(0)).int().argmax(0, keepdim=True)  # (1, r1)
    sign = torch.where(U.gather(0, first) < 0, -1.0, 1.0).to(U.dtype)  # (1, r1)
    U = U * sign
    Vh[:r1] *= sign[:, :r2].T  # the rows that have a u_i
    return SVD(*(t.to(_wide(weight.dtype)).to(weight.device).contiguous() for t in (U, S, Vh)))


def _exact(t: Tensor) -> Tensor:
    """All of t (FSDP2 may have sharded it) in float64, on its own device if that is the CPU or CUDA, else on the CPU.

    All arithmetic outside forward uses it: neither TF32 nor autocast changes it, and two machines agree (D2).
    """
    if t.is_meta:
        raise ValueError("layer: got weights on meta (offloaded?), want them in memory: remove the hooks first")
    t = t.full_tensor() if hasattr(t, "full_tensor") else t
    return (t if t.is_cuda else t.cpu()).double()


def _wide(dtype: torch.dtype) -> torch.dtype:  # float32; float64 for float64
    return torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------- Section 3.1: Omega, where M may be non-zero
# Each returns Omega as an int64 tensor (2, k) on the CPU, and raises TypeError or ValueError, naming the argument.


def omega_plain(r1: int, r2: int) -> Tensor:
    """Plain, SVFT^P: the diagonal (i, i), which re-weights the singular values. k = min(r1, r2).

    >>> omega_plain(2, 3).tolist()
    [[0, 1], [0, 1]]
    """
    return omega_banded(r1, r2, 0)  # one definition for both (D9)


def omega_banded(r1: int, r2: int, d: int, above: int | None = None) -> Tensor:
    """Banded, SVFT^B_d: all (i, j) with i - d <= j <= i + above.

    d is the paper's z1, above its z2: d by default. The edges of M cut the band. If r1 = r2 = n > d and above = d,
    then k = n (2d + 1) - d (d + 1), table 7. Returns int64 (2, k) on the CPU. Raises TypeError or ValueError.

    >>> omega_banded(3, 3, 1, above=0).T.tolist()
    [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2]]
    """
    d = _check_int("d", d, 0, 2**62)  # i + d stays in int64
    above = d if above is None else _check_int("above", above, 0, 2**62)
    i = torch.arange(_check_int("r1", r1, 1), device="cpu")[:, None]  # (r1, 1)
    j = torch.arange(_check_int("r2", r2, 1), device="cpu")  # (r2,)
    return ((i - d <= j) & (j <= i + above)).nonzero().T.contiguous()


def omega_random(r1: int, r2: int, k: int, *, seed: int = 0) -> Tensor:
    """Random, SVFT^R: k distinct positions, drawn uniformly without replacement (D3).

    numpy never changes the stream of RandomState: one seed gives one Omega on every machine.

    >>> omega_random(100, 100, 500).unique(dim=1).shape
    torch.Size([2, 500])
    """
    size = _check_int("r1", r1, 1) * _check_int("r2", r2, 1)
    random = np.random.RandomState(_check_int("seed", seed, 0, 2**32 - 1))
    flat = np.sort(random.choice(size, _check_int("k", k, 1, size), replace=False))
    return torch.from_numpy(np.stack([flat // r2, flat % r2]).astype(np.int64))


def omega_top_k(U: Tensor, Vh: Tensor, k: int) -> Tensor:
    """Top-k, SVFT^T: the k positions with the largest alignment |u_i . v_j| (D4); only for d1 = d2 (D5).

    U: (d1, r1). Vh: (r2, d2). Of equal alignments the first in the order of (i, j) is taken.

    >>> omega_top_k(torch.eye(2), torch.tensor([[0.6, -0.8], [0.8, 0.6]]), 2).tolist()
    [[0, 1], [1, 0]]
    """
    _check_weight(U, "U")
    _check_weight(Vh, "Vh")
    if U.shape[0] != Vh.shape[1]:
        raise ValueError(f"top_k: got a {U.shape[0]} x {Vh.shape[1]} weight, want d1 = d2; use 'banded' or 'random'")
    alignment = (_exact(U).T @ _exact(Vh).T).abs().flatten().cpu()  # (r1 r2,)
    order = alignment.sort(descending=True, stable=True).indices
    flat = order[: _check_int("k", k, 1, len(order))].sort().values
    return torch.stack([flat // Vh.shape[0], flat % Vh.shape[0]])


# ---------------------------------------------------------------- Eq. (1): the layer

Pattern = str | Tensor | Callable[[SVD], Tensor]  # how to choose Omega


class SVFTLinear(nn.Module):
    """A frozen linear layer with a trained update: h = W0 x + U M V^T x + b, Eq. (1).

    One primitive, sparse M times a dense matrix, gives U M V^T x on three paths (D11):

        dense    (W0 + U (M V^T)) x        M meets V^T; builds a d1 x d2 matrix in every forward
        gather   W0 x + U (M (V^T x))      M meets V^T x; builds no such matrix: Eq. (1), left
        fused    U ((Sigma + M) (V^T x))   the same without W0: Eq. (1), right

    base: exactly an nn.Linear or a Hugging Face Conv1D. It does not change; the layer shares its memory.
    pattern: "plain", "banded", "random", "top_k", an omega (2, k), or a function of the SVD that returns one.
    d: half-width of the band. "random" and "top_k" take k entries, or as many as that band. Others ignore d.
    seed: of "random". path: "dense", "gather", "fused", or "auto", the one with the fewest multiply-adds (D11).
    keep_weight: if False the layer computes with U Sigma V^T alone, and `.weight` is None.
    svd: the weight's SVD if it is known, else compute_svd(weight, **svd_options).
    Raises TypeError or ValueError, naming what it got and what it wants.

    m starts at zero (D6) and passes no gate (D7). m and S are float32 (float64 for a float64 weight), U and Vh have
    the weight's dtype (D12). A later .to(dtype) converts m too: convert first, then inject. At m = 0 dense and gather
    give base's output bit for bit. fused and keep_weight=False round W0 to U Sigma V^T. In half precision that shows,
    so "auto" does not take fused there while W0 is kept (D14). In float16 V^T x may overflow where W0 x does not, if an
    x has a norm over 65,504: take path="dense" there.

    >>> layer = SVFTLinear(nn.Linear(8, 6), "banded", d=1)
    >>> layer.m.shape, layer(torch.randn(3, 8)).shape
    (torch.Size([16]), torch.Size([3, 6]))
    """

    def __init__(
        self, base: nn.Module, pattern: Pattern = "banded", d: int = 2, *, k: int | None = None, seed: int = 0,
        path: str = "auto", keep_weight: bool = True, svd: SVD | None = None, **svd_options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if unknown := svd_options.keys() - {"rank", "full_matrices", "cache_dir"}:
            raise TypeError(f"options: got {sorted(unknown)}, want those of SVFTLinear and compute_svd")
        W0 = _base_weight(base)  # (d1, d2)
        if svd is not None and svd_options:
            raise ValueError(f"svd: got svd= together with {sorted(svd_options)}, want one or the other")
        svd = compute_svd(W0, **svd_options) if svd is None else _check_svd(svd, W0)
        omega = _make_omega(pattern, svd, d, k, seed)  # (2, k)

        def frozen(t: Tensor, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(t.to(W0.device, dtype), requires_grad=False)

        self.out_features, self.in_features = W0.shape
        self.weight = frozen(base.weight, W0.dtype) if keep_weight else None
        self.bias = None if base.bias is None else frozen(base.bias, base.bias.dtype)  # (d1,)
        self.U = frozen(svd.U.contiguous(), W0.dtype)  # (d1, r1)
        self.S = frozen(svd.S.contiguous(), _wide(W0.dtype))  # (min(r1, r2),)
        self.Vh = frozen(svd.Vh.contiguous(), W0.dtype)  # (r2, d2)
        self.m = nn.Parameter(torch.zeros(omega.shape[1], dtype=self.S.dtype, device=W0.device))  # (k,)
        self.register_buffer("omega", omega.to(W0.device, copy=True, memory_format=torch.contiguous_format))  # (2, k)
        name = pattern if isinstance(pattern, str) else "custom"
        self.pattern = f"banded d={d}" if name == "banded" else name  # a label, for tables
        self.path = path  # its setter reads weight and S
        self._base_type = type(base)
        self._disabled = False
        self.train(base.training)

    @property
    def path(self) -> str:
        """How forward computes: "dense", "gather", "fused" or "auto". ValueError if the layer cannot take it."""
        return self._path

    @path.setter
    def path(self, path: str) -> None:
        n = min(self.out_features, self.in_features)
        got = f"path: got {path!r} with keep_weight={self.weight is not None} and rank {len(self.S)} of {n}"
        if path not in ("auto", "dense", "gather", "fused") or (path == "gather" and self.weight is None):
            raise ValueError(f"{got}, want 'auto', 'dense', 'fused', or, with W0 kept, 'gather'")
        if len(self.S) < n and (path == "fused" or self.weight is None):
            raise ValueError(f"{got}, want W0 kept and no 'fused': they would cut W0 to that rank (D8)")
        self._path = path

    def forward(self, x: Tensor) -> Tensor:
        """Eq. (1): x (..., d2) -> h (..., d1), in the weight's dtype, or autocast's. ValueError for another d2."""
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x: got shape {tuple(x.shape)}, want (..., {self.in_features})")
        W0 = None if self.weight is None else self._turned(self.weight)  # (d1, d2)
        if self._disabled and W0 is not None:
            return F.linear(x, W0, self.bias)
        path = _cheapest_path(self, x) if self.path == "auto" else self.path
        if path == "dense":
            Y = self._M_times(self.Vh, add_sigma=W0 is None).to(self.U.dtype)  # (r1, d2)
            W = self.U @ Y  # (d1, d2)
            if W0 is not None:  # the sum lies in memory as the base's weight does: else the last bit may change
                W = self._turned(self.weight + self._turned(W))
            return F.linear(x, W, self.bias)
        z = self.Vh @ x.reshape(-1, self.in_features).T  # (r2, tokens)
        y = self._M_times(z, add_sigma=path == "fused").to(z.dtype)  # (r1, tokens)
        if path == "fused":
            return F.linear(y.T, self.U, self.bias).view(*x.shape[:-1], self.out_features)
        h = F.linear(x, W0, self.bias)
        return h + (y.T @ self.U.T).view_as(h)

    def _turned(self, W: Tensor) -> Tensor:  # (d1, d2) from the base's layout, or into it
        return W if self._base_type is nn.Linear else W.T

    def _M_times(self, Z: Tensor, *, add_sigma: bool = False) -> Tensor:
        """M Z or (Sigma + M) Z, of Z (r2, c): (r1, c)."""
        m = self.m if not self._disabled else torch.zeros_like(self.m)
        Y = _sparse_times(self.omega, m, self.U.shape[1], Z)  # (r1, c)
        if add_sigma:  # beside M Z, not in M: in half precision Sigma + M would lose a small m on the diagonal
            S = self.S[:, None].to(Y.dtype)  # (min(r1, r2), 1)
            if len(Y) == len(Z):
                Y.addcmul_(S, Z.to(Y.dtype))
            else:  # the full SVD of a rectangular weight: Sigma is not square
                Y[: len(S)] += S * Z[: len(S)].to(Y.dtype)
        return Y

    def M(self) -> Tensor:
        """M of Eq. (1), dense, (r1, r2), in m's dtype (float32 at least) and on its device; differentiable in m."""
        return _dense_M(self.omega, self.m, self.U.shape[1], self.Vh.shape[0])

    def delta_weight(self) -> Tensor:
        """Delta W = U M V^T, (d1, d2), Eq. (2); differentiable in m. Like merged_weight in dtype and device."""
        return self._exact_delta().to(_wide(self.U.dtype)).to(self.U.device)

    def merged_weight(self) -> Tensor:
        """W0 + Delta W, (d1, d2); differentiable in m. In float64, then rounded to float32 unless U is float64."""
        return (self._exact_W0() + self._exact_delta()).to(_wide(self.U.dtype)).to(self.U.device)

    def _exact_delta(self) -> Tensor:  # (d1, d2), float64
        Y = _sparse_times(self.omega, _exact(self.m), self.U.shape[1], _exact(self.Vh))  # (r1, d2)
        return _exact(self.U) @ Y

    def _exact_W0(self) -> Tensor:  # (d1, d2), float64
        if self.weight is not None:
            return _exact(self._turned(self.weight))
        r = len(self.S)
        return (_exact(self.U)[:, :r] * _exact(self.S)) @ _exact(self.Vh)[:r]

    def check_rank(self) -> tuple[int, int, int]:
        """(rank, term rank, bound): rank(Delta W) = rank(M) <= term_rank(omega) <= min(k, d1, d2), lemma (c).

        The rank is numerical, in float64. Raises RuntimeError unless the three ascend, ValueError for NaN or inf.
        """
        _check_unsharded(self)
        _check_finite("m", _exact(self.m.detach()))
        rank = int(torch.linalg.matrix_rank(_exact(self.M().detach())))
        found = rank, term_rank(self.omega), rank_bound(self.omega, (self.out_features, self.in_features))
        if not found[0] <= found[1] <= found[2]:
            raise RuntimeError(f"check_rank: got rank, term rank, bound = {found}, want them ascending")
        return found

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """A new, frozen layer of the base's own type with the weight W0 + Delta W; this layer stays as it is.

        Computed in float64 and rounded once. Warns if that rounding loses more than 10% of the update. ValueError for
        NaN or inf in m or in the sum, or if U, S and Vh are no longer the SVD of W0; TypeError for a sharded layer.
        """
        _check_unsharded(self)
        _, W0 = _check_whole(self)  # (d1, d2)
        delta = self._exact_delta()  # (d1, d2)
        W = (W0 + delta).to(self.U.dtype)  # (d1, d2)
        _check_finite("merged weight", W)
        lost = float((W.double() - W0 - delta).norm() / delta.norm())
        if lost > 0.1:  # not for m = 0: lost is NaN
            warnings.warn(f"merge: rounding {tuple(W.shape)} to {W.dtype} loses {lost:.0%} of the update", stacklevel=3)
        with torch.device("meta"):  # no random weight; nn.Linear takes (d2, d1), Conv1D (d1, d2)
            plain = self._base_type(*self._turned(W.T).shape)
        plain.weight = nn.Parameter(self._turned(W).contiguous().to(self.U.device), requires_grad=False)
        plain.bias = None if self.bias is None else nn.Parameter(self.bias.clone(), requires_grad=False)
        return plain.train(self.training)

    def __setstate__(self, state: dict) -> None:  # a copy made inside disabled() is enabled: no block would restore it
        super().__setstate__({**state, "_disabled": False})

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, pattern={self.pattern}, k={len(self.m)}, path={self.path}"


def _dense_M(omega: Tensor, m: Tensor, r1: int, r2: int) -> Tensor:
    m = m.to(_wide(m.dtype))
    return m.new_zeros(r1, r2).index_put((omega[0], omega[1]), m)


def _sparse_times(omega: Tensor, m: Tensor, r1: int, Z: Tensor) -> Tensor:
    """M Z, of the sparse M (r1, r2) and a dense Z (r2, c): (r1, c). Row i is the sum over j of m_ij Z_j (D11)."""
    omega = omega.to(Z.device)
    if Z.device.type != "cpu" or Z.shape[1] == 0:  # embedding_bag refuses c = 0
        # A GPU multiplies M as a dense matrix two to three times faster than it gathers. Backward keeps that matrix.
        return _dense_M(omega, m, r1, len(Z)).to(Z.dtype) @ Z
    # embedding_bag is zeros(r1, c).index_add_(0, i, m[:, None] * Z[j]), up to 12 times faster and without the k x c
    # tensor. It sums in float32 at least (D12). It has no second derivative and no forward-mode one.
    i, j = omega
    starts = torch.searchsorted(i, torch.arange(r1, device=i.device))  # (r1,): where each row of M begins in m
    m = m.to(_wide(m.dtype))
    return F.embedding_bag(j, Z.to(m.dtype), starts, mode="sum", per_sample_weights=m)


# ---------------------------------------------------------------- Section 3.2: how large can rank(M) be?


def rank_bound(omega: Tensor, shape: Sequence[int]) -> int:
    """Lemma (c): rank(Delta W) <= min(k, d1, d2). omega: (2, k); shape: (d1, d2). Else TypeError or ValueError.

    >>> rank_bound(omega_banded(4, 4, 1), (4, 8))
    4
    """
    if not isinstance(shape, Sequence) or len(shape) != 2:
        raise ValueError(f"shape: got {shape!r}, want (d1, d2)")
    d1 = _check_int("d1", shape[0], 1)
    d2 = _check_int("d2", shape[1], 1)
    return min(_check_omega(omega, d1, d2).shape[1], d1, d2)


def term_rank(omega: Tensor) -> int:
    """The largest number of positions of which no two share a row or a column: a bipartite matching (D10).

    omega: (2, k), int64; TypeError or ValueError if it is none. rank(M) <= term_rank(omega) <= rank_bound(omega, shape)
    for every M on Omega; for almost every M rank(M) = term_rank(omega). If ten entries share a row, it is 1.

    >>> term_rank(torch.tensor([[0, 0, 0, 1], [0, 1, 2, 0]]))
    2
    """
    omega_of: dict[int, list[int]] = {}  # row -> its columns in Omega
    for i, j in _check_omega(omega).T.tolist():
        omega_of.setdefault(i, []).append(j)
    column_of: dict[int, int] = {}  # row -> the column it is matched with
    row_of: dict[int, int] = {}  # column -> the row it is matched with
    for start in omega_of:
        reached_from: dict[int, int] = {}  # column -> the row from which this search reached it
        queue = [start]
        for row in queue:  # breadth first; the queue grows meanwhile
            new = [column for column in omega_of[row] if column not in reached_from]
            reached_from.update(dict.fromkeys(new, row))
            free = next((column for column in new if column not in row_of), None)
            if free is not None:
                break
            queue += [row_of[column] for column in new]
        while free is not None:  # back to the start: each row on the way takes the column it led to, and frees its own
            row = reached_from[free]
            row_of[free] = row
            column_of[row], free = free, column_of.get(row)
    return len(row_of)


# ================================================================ The paper is over. What follows makes it usable:
# a whole model; files; how a layer chooses Omega and path; which layers are targets; checks at the boundary.


def inject(
    model: nn.Module, target_modules: str | Sequence[str], pattern: Pattern = "banded", d: int = 2, **options: Any
) -> nn.Module:
    """Replace the targets in model by SVFTLinear, in place; freeze all but the m's; return model.

    target_modules, as in PEFT (D13): a list whose entries match a module's whole name or its end at a dot; or one
    regular expression that matches whole names; or "all-linear": every nn.Linear and Conv1D but the output embedding.
    options: SVFTLinear's. Each "random" layer draws its own Omega: its seed is seed plus the CRC-32 of its name.
    The m's of an earlier inject stay trainable. Warns if an entry also names a stack of weights (a mixture's experts):
    inject leaves it alone. Raises TypeError or ValueError, naming the layer; model is then as it was.

    >>> model = inject(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), ["0", "2"], "plain")
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.m', '2.m']
    """
    _check_unsharded(model)
    targets = _find_targets(model, target_modules)
    seed = _check_int("seed", options.pop("seed", 0), 0, 2**32 - 1)
    seed_of = {name: (seed + zlib.crc32(name.encode())) % 2**32 for name in targets}
    new = _for_each(targets, lambda name, base: SVFTLinear(base, pattern, d, seed=seed_of[name], **options))
    return _replace(model, targets, new, freeze=True)


def merge(model: nn.Module) -> nn.Module:
    """Replace every SVFTLinear in model by its merged plain layer, in place, and return model.

    If model is itself an SVFTLinear, return its merged layer. A second merge changes nothing. Warns and raises as
    SVFTLinear.merge does, naming the layer, and TypeError for a sharded model; model is then as it was.

    >>> merge(inject(nn.Sequential(nn.Linear(4, 4)), ["0"]))[0]
    Linear(in_features=4, out_features=4, bias=True)
    """
    _check_unsharded(model)
    layers = _svft_layers(model)
    new = _for_each(layers, lambda name, layer: layer.merge())
    if isinstance(model, SVFTLinear):
        return new[""]
    return _replace(model, layers, new)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside `with disabled(model):` every SVFTLinear computes as if m were zero: W0 x + b. Blocks nest.

    Not for several threads at once: all threads see the flag that it sets on each layer.
    """
    before = {layer: layer._disabled for layer in _svft_layers(model).values()}
    try:
        for layer in before:
            layer._disabled = True
        yield model
    finally:
        for layer, was in before.items():
            layer._disabled = was


def summary(model: nn.Module) -> str:
    """A table of the SVFTLinear layers: name, d1 x d2, pattern, k, path, bytes; then totals and % trained.

    As in papers, the share is of the base model's parameters, without U, S, Vh and m.
    """
    rows = [("layer", "shape", "pattern", "k", "path", "bytes")]
    layers = _svft_layers(model)
    base = sum(p.numel() for p in model.parameters())
    memory = 0
    for name, layer in layers.items():
        size = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
        memory += size
        base -= sum(t.numel() for t in (layer.U, layer.S, layer.Vh, layer.m))
        base += layer.out_features * layer.in_features if layer.weight is None else 0
        shape = f"{layer.out_features} x {layer.in_features}"
        rows.append((name, shape, layer.pattern, f"{len(layer.m):,}", layer.path, f"{size:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = f"{trained / max(base, 1):.3%} of the base model's {base:,}"
    return "\n".join([*lines, f"{len(layers)} layers, {memory:,} bytes", f"trained: {trained:,} parameters, {share}"])


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of model by their own names, without the wrappers of torch.compile, DDP and checkpointing."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module")
    named: dict[str, nn.Module] = {}
    for long_name, module in model.named_modules():
        name = _own_name(long_name)  # a wrapper and the module in it have one name; the module comes later, and wins
        if name in named and (_is_linear(named[name]) or isinstance(named[name], SVFTLinear)):
            raise ValueError(f"model: got two layers named {name!r} once wrappers are left out, want one")
        named[name] = module
    return named


def _own_name(name: str) -> str:
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module")]
    return ".".join(parts[1:] if len(parts) > 1 and parts[0] == "module" else parts)


def _svft_layers(model: nn.Module) -> dict[str, SVFTLinear]:
    return {name: module for name, module in _named(model).items() if isinstance(module, SVFTLinear)}


def _replace(model: nn.Module, old: Mapping[str, Any], new: Mapping[str, Any], *, freeze: bool = False) -> nn.Module:
    """Put new[name] in place of old[name], wherever it stands in model; if freeze, freeze all but the m's."""
    swap = {id(old[name]): layer for name, layer in new.items()}
    for parent in list(model.modules()):
        for leaf, child in parent._modules.items():
            parent._modules[leaf] = swap.get(id(child), child)
    if freeze:
        trained = {id(layer.m) for layer in _svft_layers(model).values()}  # by identity, never by name
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained and parameter.requires_grad)
    return model


def _for_each(layers: Mapping[str, Any], make: Callable[[str, Any], Any]) -> dict[str, Any]:
    """name -> make(name, layer). An error names the layer; work of over 10 s logs once how long the rest takes."""
    made: dict[str, Any] = {}
    start = time.perf_counter()
    spent = 0.0
    for name, layer in layers.items():
        try:
            made[name] = make(name, layer)
        except Exception as error:
            error.args = (f"layer {name!r}: {error}",)
            raise
        before, spent = spent, time.perf_counter() - start
        if before <= 10 < spent and len(made) < len(layers):
            left = spent / len(made) * (len(layers) - len(made))
            log.warning("%d of %d layers in %.0f s, about %.0f s to go", len(made), len(layers), spent, left)
    return made


# ---------------------------------------------------------------- Files: .npz archives, which anyone can open

FORMAT = "svft 2"  # of the adapter and cache files
PARTS = ("omega", "m", "probes", "shape")  # of each layer in an adapter file
_unwritable: set[Path] = set()  # cache folders that a warning has named


def save_adapter(model: nn.Module, path: StrPath) -> None:
    """Write Omega and m of every SVFTLinear in model to one .npz file, whole or not at all (D15).

    For each layer NAME: NAME/omega (2, k), int64; NAME/m (k,), float32 or float64; NAME/shape, int64: d1, d2 and the
    length of S; NAME/probes (16,), float64: a^T Delta W b for fixed random a and b, by which load_adapter checks the
    base. U, S and Vh are not in the file: if singular values repeat, save the model's state_dict instead. Under FSDP2
    call it on every rank. Raises ValueError, naming the layer, for NaN or inf in m, an unsorted omega, factors that no
    longer fit W0, or the full SVD of a rectangular weight; OSError, naming the file. Warns of trained parameters that
    are not in the file, of m's that are still zero, and of singular values that repeat.
    """
    file = Path(os.path.realpath(path))  # a symbolic link keeps pointing where it did
    if file.is_dir() or not file.parent.is_dir():
        raise FileNotFoundError(f"path: got {str(path)!r}, want a file in a folder that exists")
    layers = _svft_layers(model)
    if not layers:
        raise ValueError("model: got one without an SVFTLinear, want an injected model")
    entries = _for_each(layers, lambda name, layer: _entry_of(layer))
    own = {id(layer.m) for layer in layers.values()}
    if other := [_own_name(name) for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]:
        warnings.warn(f"save_adapter: {other} train too and are not in the file: save them yourself", stacklevel=2)
    if zero := [name for name, entry in entries.items() if not entry["m"].any()]:
        which = "every m" if len(zero) == len(layers) else f"m of {zero}"
        why = "was the optimizer made before inject, or is the weight read past forward?"
        warnings.warn(f"save_adapter: {which} is still zero: {why}", stacklevel=2)
    if converted := [name for name, layer in layers.items() if layer.S.dtype in HALF]:
        why = "only a model made alike can load the file; convert first, then inject"
        warnings.warn(f"save_adapter: {converted} were converted after inject: {why}", stacklevel=2)
    if ties := [name for name, layer in layers.items() if name not in converted and _has_ties(layer.S)]:
        warnings.warn(f"save_adapter: {ties} have equal singular values: move a state_dict instead", stacklevel=2)
    arrays = {f"{name}/{part}": array for name, entry in entries.items() for part, array in entry.items()}
    _write(file, _npz({"format": np.array(FORMAT), **arrays}))


def load_adapter(model: nn.Module, path: StrPath, *, cache_dir: StrPath | None = None) -> nn.Module:
    """Give model the update saved in path, in place, and return it; or refuse and leave model as it was.

    A plain layer that the file names becomes an SVFTLinear of the file's rank, its SVD through cache_dir; then all but
    the m's is frozen. An SVFTLinear takes the file's Omega and m. The file's probes a^T Delta W b must agree to 1e-3,
    relatively, with those on the bases found here. They catch another base model, a flipped sign, a rotated subspace.
    They miss a change outside the adapted weights, in directions that Omega does not use, or of singular values alone;
    m = 0 fits every base. Raises ValueError or TypeError, naming the layer; OSError if the file cannot be opened.
    """
    _check_unsharded(model)
    entries = _read_adapter(Path(path))
    modules = _named(model)
    layers = _svft_layers(model)
    if unknown := sorted(entries.keys() - modules.keys()):
        raise ValueError(f"{path}: got layers {unknown}, want only layers that the model has")
    if missing := sorted(layers.keys() - entries.keys()):
        raise ValueError(f"{path}: got nothing for {missing}, want an entry for every SVFTLinear of the model")
    plain = {name: modules[name] for name in entries if name not in layers}
    _check_targets(model, plain)
    _for_each(entries, lambda name, entry: _check_shape(modules[name], entry["shape"]))

    def layer_for(name: str, base: nn.Module) -> nn.Module:
        omega = torch.from_numpy(entries[name]["omega"])
        return SVFTLinear(base, omega, rank=int(entries[name]["shape"][2]), cache_dir=cache_dir)

    new = _for_each(plain, layer_for)
    layers |= new
    _for_each(entries, lambda name, entry: _check_update(layers[name], entry))
    for name, entry in entries.items():
        layer = layers[name]
        layer.omega = torch.from_numpy(entry["omega"]).to(layer.omega.device)
        m = torch.from_numpy(entry["m"]).to(layer.m)
        if m.shape == layer.m.shape:
            layer.m.data.copy_(m)  # the same Parameter: an optimizer may hold it
            layer.m.grad = None
        else:
            layer.m = nn.Parameter(m, requires_grad=layer.m.requires_grad)
        layer.pattern = "custom"
    return _replace(model, plain, new, freeze=bool(plain))


def _read_adapter(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """name -> part -> array of an adapter file. All of it is checked, nothing in it is executed."""
    with open(path, "rb") as file:
        try:
            arrays = dict(np.load(file, allow_pickle=False))  # zipfile checks each CRC
            if str(arrays.pop("format")) != FORMAT:
                raise ValueError("another format")
            names = dict.fromkeys(key.rpartition("/")[0] for key in arrays)
            if not names or arrays.keys() != {f"{name}/{part}" for name in names for part in PARTS}:
                raise ValueError(f"arrays {sorted(arrays)[:8]}")
            entries = {name: {part: arrays[f"{name}/{part}"].copy() for part in PARTS} for name in names}  # in C order
            _for_each(entries, lambda name, entry: _check_entry(**entry))
            return entries
        except Exception as error:  # whatever zipfile, numpy or a foreign content may raise
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: got no whole adapter file, want one of format {FORMAT!r} ({reason})") from error


def _check_entry(omega: np.ndarray, m: np.ndarray, probes: np.ndarray, shape: np.ndarray) -> None:
    kinds = [(array.dtype, array.shape) for array in (omega, m, probes, shape)]
    m_kind = np.float64 if m.dtype == np.float64 else np.float32
    if kinds != [(np.int64, (2, m.size)), (m_kind, (m.size,)), (np.float64, (16,)), (np.int64, (3,))]:
        raise ValueError(f"{PARTS} are {kinds}")
    d1, d2, r = shape.tolist()
    if not (1 <= r <= min(d1, d2) and np.isfinite(m).all() and np.isfinite(probes).all()):
        raise ValueError(f"shape is {(d1, d2, r)}, or m or probes have NaN or inf")
    _check_omega(torch.from_numpy(omega), r, r)


def _check_shape(layer: nn.Module, shape: np.ndarray) -> None:
    plain = not isinstance(layer, SVFTLinear)  # it gets the adapter's rank
    want = shape.tolist()
    own = [*_base_weight(layer).shape, want[2]] if plain else [layer.out_features, layer.in_features, len(layer.S)]
    if own != want:
        raise ValueError(f"weight: got shape and rank {own}, want {want}, the adapter's")


def _check_update(layer: SVFTLinear, entry: Mapping[str, np.ndarray]) -> None:
    """Refuse an m that would be another update on this layer's bases."""
    omega, m = torch.from_numpy(entry["omega"]), torch.from_numpy(entry["m"])
    _check_finite("m", m.to(layer.m.dtype))
    size = np.abs(entry["probes"]).max()
    difference = np.abs(_probes(omega, m, layer.U, layer.Vh) - entry["probes"]).max()
    if not difference <= 1e-3 * size:  # nor if it is NaN
        got = f"an update that differs from the saved one by {difference / (size or 1):.2g}, relatively"
        why = "another base model or dtype, or its singular values repeat: move a state_dict instead"
        raise ValueError(f"m: got {got}, want at most 1e-3: {why}")


def _probes(omega: Tensor, m: Tensor, U: Tensor, Vh: Tensor) -> np.ndarray:
    """a^T (U M V^T) b, (16,), float64, for 16 random pairs a (d1,), b (d2,) that numpy draws alike on every machine."""
    random = np.random.RandomState(0)
    U, Vh, m = (_exact(t.detach()) for t in (U, Vh, m))
    aU = torch.from_numpy(random.standard_normal((16, len(U)))).to(U.device) @ U  # (16, r1)
    bV = torch.from_numpy(random.standard_normal((16, Vh.shape[1]))).to(U.device) @ Vh.T  # (16, r2)
    i, j = omega.to(U.device)
    return ((aU[:, i] * bV[:, j]) @ m.to(U.device)).cpu().numpy()


def _entry_of(layer: SVFTLinear) -> dict[str, np.ndarray]:
    (U, S, Vh), _ = _check_whole(layer)
    if U.shape[1] != Vh.shape[0]:  # its extra columns are arbitrary
        raise ValueError("full_matrices: got the full SVD of a rectangular weight, want thin: save a state_dict")
    m = _exact(layer.m.detach()).to(_wide(layer.m.dtype)).cpu().numpy()
    shape = np.array([len(U), Vh.shape[1], len(S)], np.int64)
    return {"omega": layer.omega.cpu().numpy(), "m": m, "probes": _probes(layer.omega, layer.m, U, Vh), "shape": shape}


def _has_ties(S: Tensor) -> bool:
    """Whether neighbours in S are equal, to the rounding of S or to that of the SVD's own arithmetic."""
    exact = _exact(S.detach())
    return bool((-exact.diff() <= torch.finfo(S.dtype).eps * exact[1:] + 1e-12 * exact[0]).any())


def _check_whole(layer: SVFTLinear) -> tuple[SVD, Tensor]:
    """Refuse a layer whose parts no longer belong together; return its factors and W0 (d1, d2) in float64."""
    _check_finite("m", _exact(layer.m.detach()))
    _check_omega(layer.omega, layer.U.shape[1], layer.Vh.shape[0])
    svd = SVD(*(_exact(t.detach()) for t in (layer.U, layer.S, layer.Vh)))
    W0 = layer._exact_W0()
    return _check_svd(svd, W0, layer.U.dtype), W0


def _cached_svd(folder: Path, weight: Tensor, r1: int, r2: int) -> SVD:
    """The SVD from its file in folder, or computed and written there. A file with a wrong bit is written anew."""
    key = hashlib.sha256(f"{FORMAT} {weight.dtype} {tuple(weight.shape)} {r1} {r2} ".encode())
    key.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    file = folder / f"{key.hexdigest()}.npz"
    try:
        content = file.read_bytes()
        arrays = dict(np.load(io.BytesIO(content), allow_pickle=False))
        svd = SVD(*(torch.from_numpy(arrays[name]).to(weight.device) for name in SVD._fields))
        if (svd.U.shape[1], svd.Vh.shape[0], svd.U.dtype) != (r1, r2, _wide(weight.dtype)) or _npz(arrays) != content:
            raise ValueError("other sizes, another dtype, or altered")  # CRCs do not cover an archive's headers
        return _check_svd(svd, weight)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # whatever zipfile, numpy or a foreign content may raise
        log.warning("cache_dir: %s is no SVD of this weight (%s); computing it again", file, error)
    svd = _svd(weight, r1, r2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, _npz({name: t.cpu().numpy() for name, t in svd._asdict().items()}))
    except OSError as error:
        if folder not in _unwritable:
            warnings.warn(f"cache_dir: cannot write in {str(folder)!r} ({error}); going on without", stacklevel=3)
            _unwritable.add(folder)
    return svd


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, also if several processes write the same one."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # with the name that the user knows
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- Behind SVFTLinear: its Omega, its path


def _make_omega(pattern: Pattern, svd: SVD, d: int, k: int | None, seed: int) -> Tensor:
    """The omega that SVFTLinear's arguments name."""
    r1, r2 = svd.U.shape[1], len(svd.Vh)
    _check_int("d", d, 0, 2**62)  # also where it is not used
    name = pattern if isinstance(pattern, str) else None
    if k is not None and name not in ("random", "top_k"):
        raise ValueError(f"k: got {k} with pattern {pattern!r}, want k only with 'random' and 'top_k'")
    if k is None and name in ("random", "top_k"):  # R_d and T_d have as many entries as the band of d
        k = omega_banded(r1, r2, d).shape[1]
    makers = {
        "plain": lambda: omega_plain(r1, r2),
        "banded": lambda: omega_banded(r1, r2, d),
        "random": lambda: omega_random(r1, r2, k, seed=seed),
        "top_k": lambda: omega_top_k(svd.U, svd.Vh, k),
    }
    if name in makers:
        return makers[name]()
    if not isinstance(pattern, Tensor) and not callable(pattern):
        raise ValueError(f"pattern: got {pattern!r}, want one of {[*makers]}, an omega, or a function of the SVD")
    return _check_omega(pattern if isinstance(pattern, Tensor) else pattern(svd), r1, r2)


def _cheapest_path(layer: SVFTLinear, x: Tensor) -> str:
    """The path with the fewest multiply-adds, forward, and backward if gradients are on (D11).

    One column of the primitive counts as 12 k on the CPU, where it waits for memory, and as r1 r2 elsewhere, where M
    is dense. A product runs once forward and once backward for each factor that depends on m or x.
    """
    d1, r1 = layer.U.shape
    r2, d2 = layer.Vh.shape
    # A compiled graph is for inputs of all lengths: looking at the length would compile one for each choice.
    tokens = 2048 if torch.compiler.is_compiling() else x.numel() // d2
    column = 12 * len(layer.m) if x.device.type == "cpu" else r1 * r2
    one, two = (2, 3) if torch.is_grad_enabled() else (1, 1)  # runs of a product if one factor depends, if two do
    dense = two * tokens * d1 * d2 + one * d2 * (r1 * d1 + column)
    fused = one * tokens * (r1 * d1 + r2 * d2) + two * tokens * column
    if layer.weight is not None:
        # An empty product has the dtype in which products run here: autocast's, or the layer's own.
        half = torch.mm(layer.U[:0], layer.U.T[:, :0]).dtype in HALF
        if half or len(layer.S) < min(d1, d2):  # fused would round W0 (D14), or cut it (D8)
            return "dense" if dense < fused + one * tokens * d1 * d2 else "gather"
    return "dense" if dense < fused else "fused"


# ---------------------------------------------------------------- Which layers are targets


def _find_targets(model: nn.Module, target_modules: str | Sequence[str]) -> dict[str, nn.Module]:
    """The modules that target_modules names (D13), in the model's order; every entry must match one."""
    rule = target_modules if isinstance(target_modules, str) else ""  # "" for a list
    if not isinstance(target_modules, Sequence) or not all(isinstance(entry, str) for entry in target_modules):
        raise TypeError(f"target_modules: got {target_modules!r}, want a list of names, or one regular expression")
    if not target_modules:
        raise ValueError(f"target_modules: got {target_modules!r}, want at least one name")
    try:
        regex = re.compile(rule)
    except re.error as error:
        raise ValueError(f"target_modules: got {rule!r}, want a regular expression ({error})") from error
    entries = {rule} if rule else set(map(_own_name, target_modules))
    modules = _named(model)
    embedded = [m for m in model.modules() if rule == "all-linear" and hasattr(m, "get_output_embeddings")]
    heads = [m.get_output_embeddings() for m in embedded]
    linear = {name for name, module in modules.items() if _is_linear(module) and not any(module is h for h in heads)}
    stacks = _stacks(modules)

    def matches(name: str) -> set[str]:
        """The entries that match the name of a module or of a stack."""
        if rule == "all-linear":
            return entries if name in linear or name in stacks else set()
        if rule:
            return entries if regex.fullmatch(name) else set()
        parts = name.split(".")
        return entries.intersection(".".join(parts[start:]) for start in range(len(parts)))

    targets = {name: module for name, module in modules.items() if matches(name)}
    left = sorted(filter(matches, stacks))
    beside = f"; {left[:8]} are stacks of weights, no layers: they stay as they are" if left else ""
    if missing := sorted(entries.difference(*map(matches, targets))):
        hint = f"; to match ends of names, pass [{rule!r}]" if rule else ""
        some = ", ".join(sorted(linear)[:8]) + (f", ... ({len(linear)} in all)" if len(linear) > 8 else "")
        raise ValueError(f"target_modules: got {missing}, which matches nothing{hint}{beside}; want among {some}")
    _check_targets(model, targets)
    if left:
        warnings.warn(f"target_modules: got {target_modules!r}{beside}", stacklevel=3)
    return targets


def _stacks(modules: Mapping[str, nn.Module]) -> set[str]:
    """The names of the parameters that are several matrices, such as the experts of a mixture."""
    no_stacks = nn.modules.conv._ConvNd | nn.utils.parametrize.ParametrizationList
    return {
        f"{name}.{leaf}".lstrip(".")
        for name, module in modules.items()
        for leaf, p in module._parameters.items()
        if p is not None and p.ndim == 3 and len(p) > 1 and not isinstance(module, no_stacks)
    }


def _check_targets(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Refuse a target that cannot be replaced, or not without a side effect elsewhere."""
    owners: dict[int, list[str]] = {}  # id of a parameter -> the names of its modules
    bypassed: set[int] = set()  # ids of the modules whose forward their parent does not call
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module._parameters.values():
            owners.setdefault(id(p), []).append(_own_name(name))
        if isinstance(module, nn.TransformerEncoderLayer) or hasattr(module, "_orig_mod"):
            bypassed.update(map(id, module.children()))

    def check(name: str, base: nn.Module) -> None:
        _base_weight(base)
        if base is model:
            raise ValueError("base: got the model itself, want a layer inside it: use SVFTLinear(model)")
        if id(base) in bypassed:
            raise ValueError("base: got a part of another module, which bypasses its forward, want one that is called")
        if len(names := owners[id(base.weight)]) > 1:
            raise ValueError(f"weight: got one shared by {names} (tied), want a weight of its own")

    _for_each(targets, check)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _base_weight(base: nn.Module) -> Tensor:
    """base's weight as W0 (d1, d2); raises unless SVFTLinear can take base's place."""
    if isinstance(base, SVFTLinear):
        raise TypeError("base: got an SVFTLinear already, want a plain layer: merge it first")
    if not _is_linear(base) or base._parameters.keys() != {"weight", "bias"}:
        got = f"{type(base).__module__}.{type(base).__qualname__} with {sorted(getattr(base, '_parameters', []))}"
        raise TypeError(f"base: got {got}, want exactly nn.Linear or Hugging Face's Conv1D: others may bypass .weight")
    class_forward = type(base).forward.__get__(base)
    if base.forward != class_forward or any(kind.endswith("_hooks") and found for kind, found in vars(base).items()):
        raise ValueError("base: got hooks or a forward of its own on it, want them removed: they would be lost")
    _check_weight(base.weight)
    return base.weight.detach() if type(base) is nn.Linear else base.weight.detach().T


# ---------------------------------------------------------------- Checks at the boundary


def _check_weight(weight: Tensor, name: str = "weight") -> None:
    dtype = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
    if dtype not in (*HALF, torch.float32, torch.float64):
        raise TypeError(f"{name}: got {dtype}, want a tensor of float16, bfloat16, float32 or float64")
    if hasattr(weight, "__tensor_flatten__") or weight.layout != torch.strided:
        raise TypeError(f"{name}: got a {type(weight).__name__} ({weight.layout}), want a plain dense tensor")
    if weight.ndim != 2 or weight.is_meta or not weight.numel():
        got = f"{'a meta tensor (offloaded?)' if weight.is_meta else 'a tensor'} of shape {tuple(weight.shape)}"
        raise ValueError(f"{name}: got {got}, want a matrix that holds values")
    _check_finite(name, weight)


@torch.no_grad()
def _check_svd(svd: SVD, W0: Tensor, dtype: torch.dtype | None = None) -> SVD:
    """svd, if it is one of W0 (d1, d2) to 2e-5, or to dtype's rounding (by default the finer of theirs and W0's).

    Checks U^T U = I, V^T V = I, W0 V = U Sigma and W0^T U = V Sigma in float64 on two random vectors each (Freivalds'
    check): O(d1 d2) multiply-adds, where the products themselves take O(n d1 d2).
    """
    if not (isinstance(svd, tuple) and len(svd) == 3 and all(isinstance(t, Tensor) for t in svd)):
        raise TypeError(f"svd: got {type(svd).__name__}, want an SVD(U, S, Vh) of tensors")
    limit = max(2e-5, 1.5 * torch.finfo(dtype or torch.promote_types(W0.dtype, svd[0].dtype)).eps)
    W = _exact(W0)  # (d1, d2)
    U, S, Vh = (_exact(t).to(W.device) for t in svd)
    matrices = (U.ndim, S.ndim, Vh.ndim) == (2, 1, 2) and (len(U), Vh.shape[1]) == W.shape
    if not (matrices and len(S) == min(U.shape[1], len(Vh)) > 0):
        shapes = [tuple(t.shape) for t in svd]
        raise ValueError(f"svd: got shapes {shapes}, want (d1, r1), (min(r1, r2),), (r2, d2) for {tuple(W.shape)}")
    top = S.abs().max().clamp(min=1e-300)  # a weight's scale does not matter
    S = S / top
    random = np.random.RandomState(0)
    errors = [("Sigma sorted, >= 0", S - S.abs().sort(descending=True).values, S)]
    for side, law, A, B, AtoB in 2 * [("V", "W0 V = U Sigma", Vh.T, U, W), ("U", "W0^T U = V Sigma", U, Vh.T, W.T)]:
        g = torch.from_numpy(random.standard_normal(A.shape[1])).to(W.device)
        Ag = A @ g
        Sg = S * g[: len(S)]
        errors += [(f"{side}^T {side} = I", A.T @ Ag - g, g), (law, (AtoB @ Ag) / top - B[:, : len(S)] @ Sg, Sg)]
    for law, difference, scale in errors:
        if not difference.norm() <= limit * scale.norm():  # nor if it is NaN
            error = float(difference.norm() / scale.norm())
            raise ValueError(f"svd: got factors with a relative error of {error:.1g} in {law}, want {limit:.0g}")
    return SVD(*svd)


def _check_finite(name: str, t: Tensor) -> None:
    if not torch.stack((t.min(), t.max())).isfinite().all():  # NaN makes both NaN; isfinite(t) would take t's size
        raise ValueError(f"{name}: got NaN or inf in it, want finite values")


def _check_omega(omega: Tensor, r1: float = math.inf, r2: float = math.inf) -> Tensor:
    """omega, if it is an int64 (2, k) with k >= 1, 0 <= i < r1, 0 <= j < r2, strictly ascending by (i, j)."""
    dtype = omega.dtype if isinstance(omega, Tensor) else type(omega).__name__
    if dtype != torch.int64:
        raise TypeError(f"omega: got {dtype}, want an int64 tensor")
    if omega.ndim != 2 or omega.shape[0] != 2 or not omega.numel():
        raise ValueError(f"omega: got shape {tuple(omega.shape)}, want (2, k) with k >= 1")
    low, high = omega.amin(1).tolist(), omega.amax(1).tolist()
    if min(low) < 0 or high[0] >= r1 or high[1] >= r2:
        raise ValueError(f"omega: got i, j from {low} to {high}, want 0 <= i < {r1} and 0 <= j < {r2}")
    i, j = omega
    if not ((i.diff() > 0) | (i.diff() == 0) & (j.diff() > 0)).all():
        raise ValueError("omega: got unsorted or repeated positions, want each once, sorted by i, then j")
    return omega


def _check_unsharded(model: nn.Module) -> None:
    """Refuse what FSDP has sharded, also while its weights happen to be gathered."""
    kinds = {kind.__name__ for module in _named(model).values() for kind in type(module).__mro__}
    if kinds & {"FSDPModule", "FullyShardedDataParallel"} or any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise TypeError("model: got a sharded one, want a plain one: to merge, save_adapter and load it into one")


def _check_int(name: str, value: Any, low: int, high: float = math.inf) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: got {value!r}, want an int")
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, want {low} to {high}")
    return int(value)
