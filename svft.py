# svft.py 0.3.0: SVFT (arXiv 2405.19597v1) in one file, to read beside the paper or to copy into a project.
# SPDX-License-Identifier: Apache-2.0. Written from the paper; its spec is test_svft.py, its notes paper_notes.md.
r"""SVFT (Lingam et al., NeurIPS 2024): train a sparse matrix between the frozen singular vectors of each weight.

    >>> W0, x = torch.randn(6, 4), torch.randn(3, 4)                # a pre-trained weight (d1, d2); three tokens
    >>> U, S, Vh = compute_svd(W0)                                  # W0 = U Sigma V^T: computed once, frozen
    >>> omega = omega_banded(4, 4, d=1)                             # Omega: where M may be non-zero
    >>> m = torch.zeros(omega.shape[1], requires_grad=True)         # all that is trained
    >>> M = torch.zeros(4, 4).index_put((omega[0], omega[1]), m)    # sparse: m on Omega, zero elsewhere
    >>> h = x @ (W0 + U @ M @ Vh).T                                 # Eq. (1); here a token is a row of x

On a model:

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
    Omega     omega                   (2, k)  int64    fixed; row 0 is i, row 1 is j; sorted by (i, j), no pair twice
    m_ij      m                       (k,)             trained; zero at the start
    M         M()                     (r1, r2)         zero outside Omega
    Delta W   delta_weight()          (d1, d2)         U M V^T
    z         z                       (r2, tokens)     V^T x, one column for each token

With n = min(d1, d2), M is n x n for the thin SVD, the default; min(r, n) x min(r, n) with rank=r; d1 x d2, as in the
paper, for the full SVD (D1). A tag such as (D1) names a row of the deviations table in paper_notes.md. Not done:
quantised weights, convolutions, embeddings, several adapters on one layer, weights that are sharded before inject.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import re
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "0.3.0"
__all__ = ["compute_svd", "disabled", "inject", "load_adapter", "merge", "omega_banded", "omega_plain", "omega_random",
           "omega_top_k", "rank_bound", "save_adapter", "summary", "SVD", "SVFTLinear", "term_rank"]  # fmt: skip
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

    weight: (d1, d2), float16, bfloat16, float32 or float64. rank: the top r only; a layer then cuts its update and
    never W0 (D8). full_matrices: U (d1, d1) and Vh (d2, d2), which lemma (b) needs (D1). cache_dir: a folder that
    keeps the result. Returns float32 factors (float64 for a float64 weight) on the weight's device.

    >>> [tuple(t.shape) for t in compute_svd(torch.randn(6, 4), rank=3)]
    [(6, 3), (3,), (3, 4)]
    """
    _check_weight(weight)
    _require(rank is None or (rank >= 1 and not full_matrices), "rank", rank, "at least 1, and not with full_matrices")
    if cache_dir is not None:
        return _cached_svd(Path(cache_dir), weight, rank, full_matrices)
    W = _exact(weight.detach())  # (d1, d2)
    transposed = W.shape[0] < W.shape[1]  # LAPACK takes up to 1.7 times as long on a wide matrix as on a tall one
    U, S, Vh = torch.linalg.svd(W.T if transposed else W, full_matrices=full_matrices)
    if transposed:
        U, Vh = Vh.T, U.T
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]  # rank None takes all
    # (-u_i, -v_i) fits as well as (u_i, v_i), and M depends on the choice. So the largest entry of u_i is made positive
    # (D2), the first of them if several are equal but for rounding.
    size = U.abs()
    first = (size >= (1 - 1e-6) * size.amax(0)).int().argmax(0, keepdim=True)  # (1, r1)
    sign = U.gather(0, first).sign()  # (1, r1); the largest entry of a unit vector is never 0
    U = U * sign
    Vh[: len(S)] *= sign.T[: len(S)]  # the rows that have a u_i
    return SVD(*(t.to(_wide(weight.dtype)).to(weight.device).contiguous() for t in (U, S, Vh)))


# ---------------------------------------------------------------- Section 3.1: Omega, where M may be non-zero
# Each returns Omega as an int64 tensor (2, k) on the CPU, and raises for what it cannot be.


def omega_plain(r1: int, r2: int) -> Tensor:
    """Plain, SVFT^P: the diagonal (i, i), which re-weights the singular values. k = min(r1, r2).

    >>> omega_plain(2, 3).tolist()
    [[0, 1], [0, 1]]
    """
    return omega_banded(r1, r2, 0)  # one definition for both (D9)


def omega_banded(r1: int, r2: int, d: int, above: int | None = None) -> Tensor:
    """Banded, SVFT^B_d: all (i, j) with i - d <= j <= i + above.

    d is the paper's z1, above its z2: d by default. The edges of M cut the band. If r1 = r2 = n > d and above = d,
    then k = n (2d + 1) - d (d + 1), table 7.

    >>> omega_banded(3, 3, 1, above=0).T.tolist()
    [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2]]
    """
    above = d if above is None else above
    _require(min(d, above) >= 0, "d, above", (d, above), "at least 0")
    band = torch.ones(r1, r2, dtype=torch.bool, device="cpu").triu(-d).tril(above)  # (r1, r2)
    return _check_omega(band.nonzero().T.contiguous())


def omega_random(r1: int, r2: int, k: int, *, seed: int = 0) -> Tensor:
    """Random, SVFT^R: k distinct positions, drawn uniformly without replacement (D3).

    numpy never changes the stream of RandomState: one seed gives one Omega on every machine.

    >>> omega_random(100, 100, 500).unique(dim=1).shape
    torch.Size([2, 500])
    """
    random = np.random.RandomState(seed % 2**32)
    flat = np.sort(random.choice(r1 * r2, k, replace=False))  # (k,)
    return _check_omega(torch.from_numpy(np.stack([flat // r2, flat % r2]).astype(np.int64)))


def omega_top_k(U: Tensor, Vh: Tensor, k: int) -> Tensor:
    """Top-k, SVFT^T: the k positions with the largest alignment |u_i . v_j| (D4); only for d1 = d2 (D5).

    U: (d1, r1). Vh: (r2, d2). Of equal alignments the first in the order of (i, j) is taken.

    >>> omega_top_k(torch.eye(2), torch.tensor([[0.6, -0.8], [0.8, 0.6]]), 2).tolist()
    [[0, 1], [1, 0]]
    """
    _require(len(U) == Vh.shape[1], "top_k", f"a {len(U)} x {Vh.shape[1]} weight", "d1 = d2; or 'banded', 'random'")
    alignment = (_exact(U).mT @ _exact(Vh).mT).abs().flatten().cpu()  # (r1 r2,); mT refuses what is no matrix
    _require(1 <= k <= len(alignment), "k", k, f"1 to {len(alignment)}")
    flat = alignment.sort(descending=True, stable=True).indices[:k].sort().values  # (k,)
    return torch.stack([flat // len(Vh), flat % len(Vh)])


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
    keep_weight: if False the layer holds no W0 and `.weight` is None: U Sigma V^T stands in for it on every path.
    svd: the weight's SVD if it is known; else compute_svd gets rank, full_matrices and cache_dir.
    Raises TypeError or ValueError, with what it got and what it wants.

    m starts at zero (D6), passes no gate (D7), and is all that gets a gradient, with the bias where it is unfrozen.
    m and S are float32 (float64 for a float64 weight), U and Vh have the weight's dtype (D12). A later .to(dtype)
    converts m too: convert first, then inject. At m = 0 dense and gather give base's output bit for bit. fused and
    keep_weight=False round W0 to U Sigma V^T: in half precision "auto" takes fused only where W0 is gone (D14).

    >>> layer = SVFTLinear(nn.Linear(8, 6), "banded", d=1)
    >>> layer.m.shape, layer(torch.randn(3, 8)).shape
    (torch.Size([16]), torch.Size([3, 6]))
    """

    @torch.inference_mode(False)  # a layer made inside torch.inference_mode() can be trained all the same
    def __init__(self, base: nn.Module, pattern: Pattern = "banded", d: int = 2, *, k: int | None = None, seed: int = 0,
                 path: str = "auto", keep_weight: bool = True, svd: SVD | None = None, rank: int | None = None,
                 full_matrices: bool = False, cache_dir: StrPath | None = None) -> None:  # fmt: skip
        super().__init__()
        W0 = _check_base(base)  # (d1, d2)
        if svd is None:
            svd = compute_svd(W0, rank=rank, full_matrices=full_matrices, cache_dir=cache_dir)
        else:
            _require((rank, full_matrices, cache_dir) == (None, False, None), "svd", "it with rank= etc.", "it alone")
            _check_svd(svd, W0)
        omega, self.pattern = _make_omega(pattern, svd, d, k, seed)  # (2, k), and a label for tables

        def frozen(t: Tensor, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(t.to(W0.device, dtype), requires_grad=False)

        self.out_features, self.in_features = W0.shape
        self.weight = frozen(base.weight.detach(), W0.dtype) if keep_weight else None
        self.bias = None if base.bias is None else frozen(base.bias.detach(), base.bias.dtype)  # (d1,)
        self.U = frozen(svd.U.contiguous(), W0.dtype)  # (d1, r1)
        self.S = frozen(svd.S.contiguous(), _wide(W0.dtype))  # (min(r1, r2),)
        self.Vh = frozen(svd.Vh.contiguous(), W0.dtype)  # (r2, d2)
        self.m = nn.Parameter(torch.zeros(omega.shape[1], dtype=self.S.dtype, device=W0.device))  # (k,)
        self.register_buffer("omega", omega.to(W0.device, copy=True, memory_format=torch.contiguous_format))  # (2, k)
        self.path = path  # its setter reads weight and S
        self._base_type = type(base)
        self._disabled = False
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """Eq. (1): x (..., d2) -> h (..., d1), in the weight's dtype, or autocast's."""
        W0 = None if self.weight is None else self._layout(self.weight.detach())  # (d1, d2)
        if self._disabled and W0 is not None:
            return F.linear(x, W0, self.bias)
        U, Vh = self.U.detach(), self.Vh.detach()  # no gradient but m's, whatever requires_grad says
        path = _cheapest_path(self, x) if self.path == "auto" else self.path
        if path == "dense":
            W = U @ self._M_times(Vh, add_sigma=W0 is None)  # (d1, d2)
            if W0 is not None:  # summed as the base stores it: in the other memory order the last bit of h may change
                W = self._layout(self._layout(W0) + self._layout(W))
            return F.linear(x, W, self.bias)
        z = Vh @ x.reshape(-1, x.shape[-1]).T  # (r2, tokens)
        shape = (*x.shape[:-1], self.out_features)
        if path == "gather":
            return F.linear(x, W0, self.bias) + (self._M_times(z).T @ U.T).view(shape)
        return F.linear(self._M_times(z, add_sigma=True).T, U, self.bias).view(shape)

    def _layout(self, W: Tensor) -> Tensor:  # (d1, d2) to the base's own storage, or back: Conv1D's is transposed
        return W if self._base_type is nn.Linear else W.T

    def _M_times(self, Z: Tensor, *, add_sigma: bool = False) -> Tensor:
        """M Z, or (Sigma + M) Z: (r1, c), in Z's dtype. Z: (r2, c); z with c = tokens, or V^T with c = d2."""
        m = torch.zeros_like(self.m) if self._disabled else self.m
        Y = _sparse_times(self.omega, m, self.U.shape[1], Z)  # (r1, c)
        if add_sigma:  # beside M Z, not in M: in half precision Sigma + M would lose a small m on the diagonal
            S = self.S.detach()[:, None].to(Y.dtype)  # (min(r1, r2), 1)
            square = len(Y) == len(Z)  # then in place on Y itself: on a slice of it, backward would copy the gradient
            (Y if square else Y[: len(S)]).addcmul_(S, (Z if square else Z[: len(S)]).to(Y.dtype))
        return Y.to(Z.dtype)

    @property
    def path(self) -> str:
        """How forward computes: "dense", "gather", "fused" or "auto". ValueError for one that the layer cannot take."""
        return self._path

    @path.setter
    def path(self, path: str) -> None:
        want = f"one of {_paths(self)}: gather needs W0; fused, and any path without W0, all of Sigma (no rank=, D8)"
        _require(path in _paths(self), "path", repr(path), want)
        self._path = path

    def M(self) -> Tensor:
        """M of Eq. (1), dense, (r1, r2), in m's dtype (float32 at least) and on its device; differentiable in m."""
        return _dense_M(self.omega, self.m, self.U.shape[1], len(self.Vh))

    def delta_weight(self) -> Tensor:
        """Delta W = U M V^T, (d1, d2), Eq. (2); differentiable in m. In float64, then float32 unless U is float64."""
        return _exact_delta(self).to(_wide(self.U.dtype)).to(self.U.device)

    def merged_weight(self) -> Tensor:
        """W0 + Delta W, (d1, d2); differentiable in m. In float64 and then rounded, like delta_weight."""
        return (_exact_W0(self) + _exact_delta(self)).to(_wide(self.U.dtype)).to(self.U.device)

    def check_rank(self) -> tuple[int, int, int]:
        """(rank, term rank, bound): rank(Delta W) = rank(M) <= term_rank(omega) <= min(k, d1, d2), lemma (c).

        The rank is numerical, in float64. Raises RuntimeError unless the three ascend, ValueError for NaN or inf.
        """
        M = _exact(self.M().detach())  # (r1, r2)
        _check_finite(M, "m")
        bound = rank_bound(self.omega, (self.out_features, self.in_features))
        found = (int(torch.linalg.matrix_rank(M)), term_rank(self.omega), bound)
        _require(found[0] <= found[1] <= found[2], "rank, term rank, bound", found, "them to ascend", RuntimeError)
        return found

    def merge(self) -> nn.Module:
        """A new, frozen layer of the base's own type with the weight W0 + Delta W; this layer stays as it is.

        Computed in float64 and rounded once. Warns if that rounding loses more than 10% of the update. ValueError for
        NaN or inf in m or in the sum, for hooks, or if U, S and Vh no longer fit a kept W0; TypeError if sharded.
        """
        return _merged(self, "the layer", 6)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.pattern}, k={len(self.m)}"


def _sparse_times(omega: Tensor, m: Tensor, r1: int, Z: Tensor) -> Tensor:
    """M Z, of the sparse M (r1, r2) and a dense Z (r2, c): (r1, c). Its row i sums m_ij (row j of Z) over j (D11)."""
    if Z.device.type != "cpu" or Z.shape[1] == 0:  # embedding_bag refuses c = 0
        # A GPU multiplies M as a dense matrix two to three times faster than it gathers. Backward keeps that matrix.
        return _dense_M(omega, m, r1, len(Z)).to(Z.dtype) @ Z
    # embedding_bag computes zeros(r1, c).index_add_(0, i, m[:, None] * Z[j]), up to 12 times faster and without a k x c
    # tensor. It sums in float32 at least (D12). It has no second derivative and no forward-mode one.
    i, j = omega.cpu()
    starts = torch.searchsorted(i, torch.arange(r1, device=i.device))  # (r1,): where each row of M begins in m
    m = m.to(_wide(m.dtype))
    return F.embedding_bag(j, Z.to(m.dtype), starts, mode="sum", per_sample_weights=m)


def _dense_M(omega: Tensor, m: Tensor, r1: int, r2: int) -> Tensor:
    m = m.to(_wide(m.dtype))
    return m.new_zeros(r1, r2).index_put((omega[0].to(m.device), omega[1].to(m.device)), m)


# ---------------------------------------------------------------- Section 3.2: how large can rank(M) be?


def rank_bound(omega: Tensor, shape: Sequence[int]) -> int:
    """Lemma (c): rank(Delta W) <= min(k, d1, d2). omega: (2, k); shape: (d1, d2). Else TypeError or ValueError.

    >>> rank_bound(omega_banded(4, 4, 1), (4, 8))
    4
    """
    d1, d2 = shape
    return min(_check_omega(omega, d1, d2).shape[1], d1, d2)


def term_rank(omega: Tensor) -> int:
    """The largest number of positions of which no two share a row or a column: a bipartite matching (D10).

    omega: (2, k), int64; TypeError or ValueError if it is none. rank(M) <= term_rank(omega) <= rank_bound(omega, shape)
    for every M on Omega; for almost every M rank(M) = term_rank(omega).

    >>> term_rank(torch.tensor([[0, 0, 0, 1], [0, 1, 2, 0]]))
    2
    """
    columns_of: dict[int, list[int]] = {}  # row -> its columns in Omega
    for i, j in _check_omega(omega).T.tolist():
        columns_of.setdefault(i, []).append(j)
    column_of: dict[int, int] = {}  # row -> the column it is matched with
    row_of: dict[int, int] = {}  # column -> the row it is matched with
    for start in columns_of:
        reached_from: dict[int, int] = {}  # column -> the row from which this search reached it
        queue = [start]
        for row in queue:  # breadth first; the queue grows meanwhile
            new = [column for column in columns_of[row] if column not in reached_from]
            reached_from.update(dict.fromkeys(new, row))
            free = next((column for column in new if column not in row_of), None)
            if free is not None:
                break
            queue += [row_of[column] for column in new]
        while free is not None:  # back to the start: each row takes the free column and frees the one that it had
            row = reached_from[free]
            row_of[free], column_of[row], free = row, free, column_of.get(row)
    return len(row_of)


# ================================================================ The paper is over. What follows makes it usable:
# what serves the layer; a whole model; which layers are targets; files; checks.


def _exact(t: Tensor) -> Tensor:
    """All of t (FSDP2 may have sharded it) in float64, on its own device if that is the CPU or CUDA, else on the CPU.

    All arithmetic outside forward uses it: neither TF32 nor autocast changes it, and two machines agree (D2).
    """
    _require(not t.is_meta, "layer", "weights on meta (offloaded?)", "them in memory: remove the hooks first")
    t = t.full_tensor() if hasattr(t, "full_tensor") else t
    return (t if t.is_cuda else t.cpu()).double()


def _wide(dtype: torch.dtype) -> torch.dtype:  # float32; float64 for float64
    return torch.promote_types(dtype, torch.float32)


def _make_omega(pattern: Pattern, svd: SVD, d: int, k: int | None, seed: int) -> tuple[Tensor, str]:
    """The omega that SVFTLinear's arguments name, and its label."""
    r1, r2 = svd.U.shape[1], len(svd.Vh)
    name = pattern if isinstance(pattern, str) else None
    counted = name in ("random", "top_k")
    _require(k is None or counted, "k", f"{k} with pattern {name or 'custom'!r}", "it with random or top_k alone")
    if counted and k is None:  # R_d and T_d have as many entries as the band of d
        k = omega_banded(r1, r2, d).shape[1]
    makers = {
        "plain": lambda: omega_plain(r1, r2),
        "banded": lambda: omega_banded(r1, r2, d),
        "random": lambda: omega_random(r1, r2, k, seed=seed),
        "top_k": lambda: omega_top_k(svd.U, svd.Vh, k),
        None: lambda: _check_omega(pattern(svd) if callable(pattern) else pattern, r1, r2),
    }
    _require(name in makers, "pattern", repr(name), f"one of {[*makers][:4]}, an omega, or a function of the SVD")
    return makers[name](), f"banded d={d}" if name == "banded" else name or "custom"


def _paths(layer: SVFTLinear) -> list[str]:
    """The paths that the layer can take. Where U Sigma V^T stands in for W0, rank must not have cut Sigma (D8)."""
    kept = layer.weight is not None
    whole = len(layer.S) == min(layer.out_features, layer.in_features)
    able = {"auto": kept or whole, "fused": whole, "gather": kept, "dense": kept or whole}
    return [path for path, yes in able.items() if yes]


def _cheapest_path(layer: SVFTLinear, x: Tensor) -> str:
    """The path with the fewest multiply-adds, forward, and backward if gradients are on (D11).

    One column of the primitive counts as 12 k on the CPU, because memory bounds it there, and as r1 r2 elsewhere,
    where M is dense. A product runs once forward and once backward for each factor that depends on m or x.
    """
    d1, r1 = layer.U.shape
    r2, d2 = layer.Vh.shape
    # A compiled graph is for inputs of all lengths: looking at the length would compile one for each choice.
    tokens = 2048 if torch.compiler.is_compiling() else x.numel() // d2
    column = 12 * len(layer.m) if x.device.type == "cpu" else r1 * r2
    one, two = (2, 3) if torch.is_grad_enabled() else (1, 1)  # runs, if one factor depends on m or x; if both do
    cost = {"fused": one * tokens * (r1 * d1 + r2 * d2) + two * tokens * column}
    cost["gather"] = cost["fused"] + one * tokens * d1 * d2
    cost["dense"] = two * tokens * d1 * d2 + one * d2 * (r1 * d1 + column)
    # An empty product has the dtype in which products run here: autocast's, or the layer's own. [1:]: without "auto".
    keep = layer.weight is not None and torch.mm(layer.U[:0], layer.U.T[:, :0]).dtype in HALF
    paths = [path for path in _paths(layer)[1:] if not (keep and path == "fused")]  # fused would round W0 (D14)
    return min(paths, key=cost.get)


def _exact_delta(layer: SVFTLinear) -> Tensor:  # (d1, d2), float64
    Y = _sparse_times(layer.omega, _exact(layer.m), layer.U.shape[1], _exact(layer.Vh.detach()))  # (r1, d2)
    return _exact(layer.U.detach()) @ Y


def _exact_W0(layer: SVFTLinear) -> Tensor:  # (d1, d2), float64
    if layer.weight is not None:
        return _exact(layer._layout(layer.weight.detach()))
    U, S, Vh = (_exact(t.detach()) for t in (layer.U, layer.S, layer.Vh))
    return (U[:, : len(S)] * S) @ Vh[: len(S)]


@torch.inference_mode(False)
@torch.no_grad()
def _merged(layer: SVFTLinear, name: str, level: int) -> nn.Module:
    """SVFTLinear.merge. name: of the layer, level: of the caller's line, both for the warning."""
    _check_alone(layer)
    W0 = _exact_W0(layer)  # (d1, d2)
    _check_whole(layer, W0)
    delta = _exact_delta(layer)  # (d1, d2)
    W = (W0 + delta).to(layer.U.dtype)  # (d1, d2)
    _check_finite(W, "merged weight")
    lost = float((W.double() - W0 - delta).norm() / delta.norm())
    if 0.1 < lost < float("inf"):  # not for m = 0: lost is NaN or inf
        _warn([name], f"merged and rounded to {W.dtype}: that loses {lost:.0%} of the update", level=level)
    weight = layer._layout(W)
    with torch.device("meta"):  # no random weight
        plain = layer._base_type(*reversed(weight.shape))  # Linear(d2, d1), Conv1D(d1, d2)
    plain.weight = nn.Parameter(weight.contiguous().to(layer.U.device), requires_grad=False)
    plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.clone(), requires_grad=False)
    return plain.train(layer.training)


# ---------------------------------------------------------------- A whole model


@torch.inference_mode(False)
def inject(
    model: nn.Module, target_modules: str | Iterable[str], pattern: Pattern = "banded", d: int = 2, **options: Any
) -> nn.Module:
    """Replace the targets in model by SVFTLinear, in place; freeze all but the m's; return model.

    target_modules, as in PEFT (D13): a list whose entries match a module's whole name or its end at a dot; or one
    regular expression that matches whole names; or "all-linear": every layer that can be taken, but the output
    embedding and heads that are drawn anew with each model. A warning names what else stays as it is: what
    "all-linear" leaves out, and the stacks of weights (a mixture's experts) that an entry matches.
    options: SVFTLinear's. Each "random" layer draws its own Omega (D3): its seed is seed plus its name's CRC-32.
    The m's of an earlier inject stay trainable. Raises TypeError or ValueError, naming the layer; model is then as it
    was. Make the optimizer, DDP and torch.compile afterwards.

    >>> model = inject(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), ["0", "2"], "plain")
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.m', '2.m']
    """
    targets = _find_targets(model, target_modules)

    def adapt(name: str, base: nn.Module) -> SVFTLinear:
        return SVFTLinear(base, pattern, d, **options | {"seed": options.get("seed", 0) + zlib.crc32(name.encode())})

    return _replace(model, targets, _for_each(targets, adapt), freeze=True)


def merge(model: nn.Module) -> nn.Module:
    """Replace every SVFTLinear in model by its merged plain layer, in place, and return model.

    If model is itself an SVFTLinear, return its merged layer. A second merge changes nothing. Warns as
    SVFTLinear.merge does, and raises as it does, naming the layer; model is then as it was.

    >>> merge(inject(nn.Sequential(nn.Linear(4, 4)), ["0"]))[0]
    Linear(in_features=4, out_features=4, bias=True)
    """
    layers = _svft_layers(model)
    new = _for_each(layers, lambda name, layer: _merged(layer, name, 8))
    return new[""] if isinstance(model, SVFTLinear) else _replace(model, layers, new, freeze=False)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside `with disabled(model):` every SVFTLinear computes as if m were zero: W0 x + b. Blocks nest.

    Not for several threads at once: all see the flag that it sets on each layer. A copy made inside keeps that flag.
    """
    switched = [layer for layer in _svft_layers(model).values() if not layer._disabled]
    try:
        for layer in switched:
            layer._disabled = True
        yield model
    finally:
        for layer in switched:
            layer._disabled = False


def summary(model: nn.Module) -> str:
    """A table of the SVFTLinear layers: name, d1 x d2, pattern, k, path, bytes, |M|/|Sigma|; totals and % trained.

    |M|/|Sigma| is |Delta W|/|W0|, in Frobenius' norm, unless rank cuts Sigma. As in papers, the share trained is of the
    base model's parameters, without U, S, Vh and m.
    """
    layers = _svft_layers(model)
    rows = [("layer", "shape", "pattern", "k", "path", "bytes", "|M|/|Sigma|")]
    base = sum(p.numel() for p in model.parameters())
    total = 0
    for name, layer in layers.items():
        d1, d2 = layer.out_features, layer.in_features
        base += (d1 * d2 if layer.weight is None else 0) - sum(t.numel() for t in (layer.U, layer.S, layer.Vh, layer.m))
        size = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
        total += size
        ratio = float(_exact(layer.m.detach()).norm() / _exact(layer.S.detach()).norm())
        rows.append((name, f"{d1} x {d2}", layer.pattern, f"{len(layer.m):,}", layer.path, f"{size:,}", f"{ratio:.2g}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = f"{trained / max(base, 1):.3%} of the base model's {base:,}"
    return "\n".join([*lines, f"{len(layers)} layers, {total:,} bytes", f"trained: {trained:,} parameters, {share}"])


WRAPPER = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module)(?=\.|$)")  # torch.compile's, and checkpointing's


def _named(model: nn.Module, what: str = "modules") -> dict[str, Any]:
    """The modules, or the parameters, of model by their own names, without torch's wrappers."""
    while list(model._modules) in (["module"], ["_orig_mod"]):  # DDP's, and torch.compile's
        (model,) = model.children()
    # A wrapper and the module in it get one name; the module comes later, and wins.
    return {WRAPPER.sub("", name).lstrip("."): found for name, found in getattr(model, f"named_{what}")()}


def _svft_layers(model: nn.Module) -> dict[str, SVFTLinear]:
    return {name: module for name, module in _named(model).items() if isinstance(module, SVFTLinear)}


def _replace(model: nn.Module, old: Mapping[str, Any], new: Mapping[str, Any], *, freeze: bool) -> nn.Module:
    """Put new[name] in place of old[name], wherever it stands in model; if freeze, freeze all but the m's."""
    swap = {id(old[name]): layer for name, layer in new.items()}
    for parent in list(model.modules()):
        parent._modules.update({leaf: swap.get(id(child), child) for leaf, child in parent._modules.items()})
    if freeze:
        trained = {id(layer.m) for layer in _svft_layers(model).values() if layer.m.requires_grad}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)  # by identity, never by name
    return model


def _for_each(layers: Mapping[str, Any], make: Callable[[str, Any], Any]) -> dict[str, Any]:
    """name -> make(name, layer). An error names the layer; long work logs every ten seconds how long the rest takes."""
    made: dict[str, Any] = {}
    last = start = time.monotonic()
    for name, layer in layers.items():
        try:
            made[name] = make(name, layer)
        except Exception as error:
            error.args = (f"layer {name!r}: {error}",)
            raise
        now = time.monotonic()
        if now - last > 10 and len(made) < len(layers):
            last = now
            left = (now - start) / len(made) * (len(layers) - len(made))
            logging.getLogger(__name__).warning("%d of %d layers, about %.0f s to go", len(made), len(layers), left)
    return made


# ---------------------------------------------------------------- Which layers are targets

ADAPTER = {"base_layer", "original_module"}  # one of them lies in each of PEFT's wrappers
HEADS = {"score", "classifier", "qa_outputs"}  # transformers' names of heads that each new model draws anew


def _find_targets(model: nn.Module, target_modules: str | Iterable[str]) -> dict[str, nn.Module]:
    """The modules that target_modules names (D13), in the model's order; every entry must match one."""
    modules = _named(model)
    parameters = _named(model, "parameters").items()
    stacks = [name for name, p in parameters if p.ndim == 3 and len(p) > 1 and "weight" not in name]  # not a Conv1d's
    everything = target_modules == "all-linear"
    one = isinstance(target_modules, str)
    wanted = {target_modules} if one else {WRAPPER.sub("", entry).lstrip(".") for entry in target_modules}
    # hits: the name of a module or stack -> the entries that match it
    if everything:
        outputs = {id(m.get_output_embeddings()) for m in model.modules() if hasattr(m, "get_output_embeddings")}
        linear = [n for n, m in modules.items() if isinstance(m, nn.Linear | nn.MultiheadAttention) or _is_base(m)]
        hits = {name: wanted for name in linear if id(modules[name]) not in outputs} | dict.fromkeys(stacks, wanted)
    elif one:
        hits = {name: wanted for name in (*modules, *stacks) if re.fullmatch(target_modules, name)}
    else:
        hits = {name: wanted.intersection(_ends(name)) for name in (*modules, *stacks)}
    targets = {name: module for name, module in modules.items() if hits.get(name)}
    left = [name for name in stacks if hits.get(name)]
    check = _checker(model, everything)
    for name, module in list(targets.items()):
        try:
            _for_each({name: module}, check)  # which names the layer in the error
        except (TypeError, ValueError):
            if not everything:
                raise
            del targets[name]
            left.append(name)
    _warn(left, "stay as they are: stacks of weights, new heads, or what cannot be adapted (name one to see)", level=5)
    missing = sorted(wanted.difference(*map(hits.get, targets)))  # the entries that no target matches
    kinds = Counter(type(module).__name__ for module in modules.values()).most_common(8)
    there = f"{_list([name for name, m in modules.items() if _is_base(m)])} in {kinds}, left out {_list(left)}"
    want = f"ends of names in a list, or one regular expression for whole names; there are {there}"
    _require(targets and not missing, "target_modules", f"{missing}, which matches no layer to take", want)
    return targets


def _ends(name: str) -> Iterable[str]:  # of a.b.c: c, b.c and a.b.c
    return itertools.accumulate(reversed(name.split(".")), lambda end, part: f"{part}.{end}")


def _checker(model: nn.Module, everything: bool = False) -> Callable[[str, nn.Module], Tensor]:
    """A function of (name, base) that returns W0 (d1, d2), or raises if no SVFTLinear can take base's place."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    out: set[int] = set()  # the ids of modules
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) or hasattr(module, "_orig_mod"):
            out.update(map(id, module.children()))  # it can read their weights without calling them
        if everything and (ADAPTER & module._modules.keys() or name.rpartition(".")[2] in HEADS):
            out.update(map(id, module.modules()))  # in another adapter, or in a head that each new model draws anew

    def check(name: str, base: nn.Module) -> Tensor:
        shared = uses[id(getattr(base, "weight", None))] > 1
        _require(not shared, "weight", "one in two places (tied, or one layer twice)", "one of its own")
        _require(id(base) not in out, "base", "one whose forward its parent bypasses", "one that is called")
        _require(base is not model, "base", "the model itself", "a layer inside it: use SVFTLinear(model)")
        return _check_base(base)

    return check


def _is_base(module: nn.Module) -> bool:
    return type(module) is nn.Linear or str(type(module)) == "<class 'transformers.pytorch_utils.Conv1D'>"


# ---------------------------------------------------------------- Files: .npz archives, which anyone can open

FORMAT = "svft 3"  # of the adapter and cache files
PARTS = ("omega", "m", "probes", "shape", "pattern")  # of each layer in an adapter file: see save_adapter


def save_adapter(model: nn.Module, path: StrPath) -> None:
    """Write Omega and m of every SVFTLinear in model to one .npz file, whole or not at all (D15).

    For each layer NAME: NAME/omega (2, k), int64; NAME/m (k,), float32 or float64; NAME/shape, int64: d1, d2 and the
    length of S; NAME/pattern, its label; NAME/probes (16,), float64: a^T Delta W b for fixed random a and b, by which
    load_adapter checks the base. U, S and Vh are not in the file: if singular values repeat, save the model's
    state_dict instead. Under FSDP2 call it on every rank. Raises ValueError, naming the layer, for NaN or inf in m, an
    unsorted omega, factors that no longer fit W0, or the full SVD of a rectangular weight; OSError, naming the file.
    Warns of trained parameters that are not in the file, of m's that are still zero, of singular values that repeat.
    """
    file = Path(os.path.realpath(path))  # a symbolic link keeps pointing where it did
    new = file.parent.is_dir() and (file.is_file() or not file.exists())
    _require(new, "path", repr(str(path)), "a regular file in a folder that exists", OSError)
    layers = _svft_layers(model)
    _require(layers, "model", "one without an SVFTLinear", "an injected model")
    inside = {id(p) for layer in layers.values() for leaf, p in layer.named_parameters() if leaf != "bias"}
    other = [name for name, p in _named(model, "parameters").items() if p.requires_grad and id(p) not in inside]
    _warn(other, "train too and are not in the file: save them yourself")
    entries = _for_each(layers, lambda name, layer: _entry_of(layer))
    zero = [name for name, entry in entries.items() if not entry["m"].any()]
    _warn(zero, "have an m that is still zero: was the optimizer made before inject? does a parent read layer.weight?")
    ties = [name for name, layer in layers.items() if layer.S.dtype not in HALF and _has_ties(layer.S)]
    _warn(ties, "have equal singular values: move a state_dict instead of the file")
    arrays = {f"{name}/{part}": value for name, entry in entries.items() for part, value in entry.items()}
    _write(file, np.savez_compressed, {"format": FORMAT, **arrays})


@torch.inference_mode(False)
def load_adapter(model: nn.Module, path: StrPath, *, cache_dir: StrPath | None = None) -> nn.Module:
    """Give model the update saved in path, in place, and return it; or refuse and leave model as it was.

    A plain layer that the file names becomes an SVFTLinear of the file's rank, its SVD through cache_dir; then all but
    the m's is frozen. An SVFTLinear takes the file's omega, m and pattern if it has as many entries. The file's probes
    a^T Delta W b must agree to 1e-2 of their largest with those on the bases found here. They catch another base
    model, a flipped sign, a rotated subspace. They miss a change outside the adapted weights, in directions that Omega
    does not use, or of singular values alone; m = 0 fits every base. Raises ValueError or TypeError, naming the layer;
    OSError if there is no such file. Make the optimizer, DDP and torch.compile afterwards.
    """
    files = _read_adapter(Path(path))
    modules = _named(model)
    layers = _svft_layers(model)
    alone = sorted(files.keys() - modules.keys() | layers.keys() - files.keys())
    _require(not alone, path, f"layers {_list(alone)} in one of file and model alone", "one entry for each SVFTLinear")
    check = _checker(model)
    entries = _for_each(files, lambda name, arrays: _entry_for(name, modules[name], arrays, check))
    plain = {name: modules[name] for name in entries if name not in layers}

    def adapt(name: str, base: nn.Module) -> SVFTLinear:
        return SVFTLinear(base, entries[name]["omega"], rank=int(entries[name]["shape"][2]), cache_dir=cache_dir)

    new = _for_each(plain, adapt)
    layers |= new
    _for_each(entries, lambda name, entry: _check_update(layers[name], entry))
    for name, entry in entries.items():
        layers[name].omega.copy_(entry["omega"])
        layers[name].m.data.copy_(entry["m"])  # the same Parameter: an optimizer may hold it
        layers[name].pattern = entry["pattern"]
    return _replace(model, plain, new, freeze=bool(plain))


def _read_adapter(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of an adapter file by layer. Nothing in it is executed; its names are checked before it is read."""
    path.stat()  # raises OSError, which names the file
    try:
        arrays = _read(path, lambda key: key == "format" or key.rpartition("/")[2] in PARTS)
        _require(str(arrays.pop("format")) == FORMAT, "format", "another one", repr(FORMAT))
        names = dict.fromkeys(key.rpartition("/")[0] for key in arrays)
        _require(names, "names", "no layer", f"{PARTS} for each")
        return {name: {part: arrays[f"{name}/{part}"] for part in PARTS} for name in names}
    except Exception as error:  # whatever zipfile, numpy or a foreign content may raise
        raise ValueError(f"{path}: got no whole adapter file, want one of format {FORMAT!r} ({error!r})") from error


def _entry_for(name: str, layer: nn.Module, arrays: dict, check: Callable[[str, nn.Module], Tensor]) -> dict[str, Any]:
    """A layer's entry as tensors; refuses arrays of other kinds and sizes. A plain layer gets the file's rank and k."""
    omega, m, probes, shape, pattern = (arrays[part] for part in PARTS)
    kinds = [(str(a.dtype), a.shape) for a in (omega, m, probes, shape)] + [(pattern.dtype.kind, pattern.shape)]
    wide = "float64" if m.dtype == np.float64 else "float32"
    want = [("int64", (2, m.size)), (wide, (m.size,)), ("float64", (16,)), ("int64", (3,)), ("U", ())]
    fit = kinds == want and pattern.itemsize < 400 and shape[2] <= shape[:2].min()
    _require(fit, "no whole adapter file", [*kinds, shape.tolist()], want)
    _require(np.isfinite(m).all() and np.isfinite(probes).all(), "m, probes", "NaN or inf", "finite values")
    sizes = [*shape.tolist(), len(m)]
    if isinstance(layer, SVFTLinear):
        _check_alone(layer)  # FSDP, say, would undo the change
        own = [layer.out_features, layer.in_features, len(layer.S), len(layer.m)]
    else:
        own = [*check(name, layer).shape, *sizes[2:]]
    _require(own == sizes, "d1, d2, rank, k", own, f"the file's {sizes} (for another k load into a plain model)")
    tensors = {part: torch.from_numpy(array) for part, array in arrays.items() if part != "pattern"}
    _check_omega(tensors["omega"], sizes[2], sizes[2])
    return {**tensors, "pattern": str(pattern)}


def _check_update(layer: SVFTLinear, entry: Mapping[str, Any]) -> None:
    """Refuse an m that would be another update on this layer's bases."""
    _check_finite(entry["m"].to(layer.m.dtype), "m")
    size = entry["probes"].abs().max()
    error = (_probes(entry["omega"], entry["m"], layer.U, layer.Vh) - entry["probes"]).abs().max()
    got = f"an update that differs from the saved one by {float(error / size):.2g}, relatively"
    why = "another base, equal singular values, or one rounded to another dtype: load in that of training, then convert"
    _require(error <= 1e-2 * size, "m", got, f"at most 0.01 ({why})")


def _probes(omega: Tensor, m: Tensor, U: Tensor, Vh: Tensor) -> Tensor:
    """a^T (U M V^T) b, (16,), float64, for 16 random pairs a (d1,), b (d2,) that numpy draws alike on every machine."""
    random = np.random.RandomState(0)
    U, Vh, m = (_exact(t.detach()) for t in (U, Vh, m))
    a, b = (torch.from_numpy(random.standard_normal((16, d))).to(U.device) for d in (len(U), Vh.shape[1]))
    i, j = omega.to(U.device)
    return (((a @ U)[:, i] * (b @ Vh.T)[:, j]) @ m.to(U.device)).cpu()


def _entry_of(layer: SVFTLinear) -> dict[str, Any]:
    _check_whole(layer, _exact_W0(layer))
    # The full SVD of a rectangular weight has extra columns, which are arbitrary.
    _require(layer.U.shape[1] == len(layer.Vh), "full_matrices", "the full SVD", "the thin one, or save a state_dict")
    m = _exact(layer.m.detach()).to(_wide(layer.m.dtype)).cpu()
    shape = torch.tensor([layer.out_features, layer.in_features, len(layer.S)], device="cpu")
    probes = _probes(layer.omega, layer.m, layer.U, layer.Vh)
    return dict(zip(PARTS, (layer.omega.cpu(), m, probes, shape, layer.pattern), strict=True))


def _has_ties(S: Tensor) -> bool:
    """Whether neighbours in S are equal, to the rounding of S or to that of the SVD's own arithmetic."""
    exact = _exact(S.detach())
    return bool((-exact.diff() <= torch.finfo(S.dtype).eps * exact[1:] + 1e-12 * exact[0]).any())


def _cached_svd(folder: Path, weight: Tensor, rank: int | None, full_matrices: bool) -> SVD:
    """The SVD from its file in folder, or computed and written there. A file that is not whole is written anew."""
    key = hashlib.sha256(repr((FORMAT, weight.dtype, weight.shape, min(weight[:rank].shape), full_matrices)).encode())
    key.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    file = folder / f"{key.hexdigest()}.npz"
    with contextlib.suppress(Exception):  # a file that is missing, short, damaged or foreign
        arrays = _read(file, SVD._fields.__contains__)
        svd = SVD(*(torch.from_numpy(arrays[name]).to(weight.device) for name in SVD._fields))
        _check_svd(svd, weight)
        return svd
    svd = compute_svd(weight, rank=rank, full_matrices=full_matrices)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, np.savez, {name: t.cpu() for name, t in svd._asdict().items()})
    except OSError:  # the text leaves the file out, so that Python shows it once for a folder, not once for each layer
        warnings.warn(f"cache_dir: cannot write in {str(folder)!r}; going on without", stacklevel=3)
    return svd


def _read(path: Path, known: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Names that are not known, or come twice, are refused before anything is read."""
    with np.load(path, allow_pickle=False, mmap_mode="r") as archive:  # an .npy fails here, mapped and not read
        names = archive.files
        fit = len({*names}) == len(names) and all(map(known, names))
        _require(fit, "names", _list(names), "those of this format, each once")
        return {name: archive[name] for name in names}  # zipfile checks each CRC


def _write(file: Path, save: Callable[..., None], arrays: Mapping[str, Any]) -> None:
    """Write a file whole or not at all, also if several processes write the same one."""
    temporary = file.with_name(f".{os.getpid()}.{time.monotonic_ns()}.tmp")
    try:
        with open(temporary, "xb") as stream:
            save(stream, **arrays)
        os.replace(temporary, file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error  # with the name that the user knows
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- Checks


def _require(ok: Any, name: Any, got: Any, want: Any, error: type[Exception] = ValueError) -> None:
    if not ok:
        raise error(f"{name}: got {got}, want {want}")


def _kind(t: Any) -> str:
    return f"{type(t).__name__} {tuple(t.shape)} of {t.dtype} on {t.device}" if isinstance(t, Tensor) else repr(t)[:100]


def _list(names: Sequence[str]) -> str:
    return f"{names[:8]}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _warn(names: list[str], what: str, level: int = 3) -> None:
    if names:
        warnings.warn(f"{_list(names)} {what}", stacklevel=level)


def _check_base(base: nn.Module) -> Tensor:
    """base's weight as W0 (d1, d2); raises unless an SVFTLinear can take base's place."""
    _require(_is_base(base), "base", type(base), "exactly nn.Linear or Conv1D of transformers, not adapted", TypeError)
    _check_alone(base)
    _check_weight(base.weight)
    return base.weight.detach() if type(base) is nn.Linear else base.weight.detach().T


def _check_alone(layer: nn.Module) -> None:
    """Refuse a layer with hooks, a forward or parts of its own: its replacement would have none."""
    extra = {*layer._parameters, *layer._buffers, *layer._modules} - {"weight", "bias", "U", "S", "Vh", "m", "omega"}
    extra |= {kind for kind, found in vars(layer).items() if kind.endswith("_hooks") and found}
    extra |= {"forward"} if layer.forward != type(layer).forward.__get__(layer) else set()
    _require(not extra, "layer", sorted(extra), "none: all would be lost (remove hooks; sharded? use a plain model)")


def _check_weight(weight: Tensor, name: str = "weight") -> None:
    dense = isinstance(weight, Tensor) and weight.layout == torch.strided and not hasattr(weight, "__tensor_flatten__")
    floats = dense and weight.dtype in (*HALF, torch.float32, torch.float64)
    whole = floats and weight.ndim == 2 and weight.numel() and not weight.is_meta
    want = "a dense matrix of floats, not empty, in memory (offloaded? remove the hooks; sharded? use a plain model)"
    _require(whole, name, _kind(weight), want, ValueError if floats else TypeError)
    _check_finite(weight, name)


def _check_finite(t: Tensor, name: str) -> None:
    ok = torch.stack((t.min(), t.max())).isfinite().all()  # NaN makes both NaN; isfinite(t) would take t's size
    _require(ok, name, "NaN or inf in it", "finite values")


@torch.no_grad()
def _check_svd(svd: SVD, W0: Tensor) -> None:
    """Refuse factors that are no SVD of W0 (d1, d2) to 2e-5, or to the rounding of the finer dtype of theirs and W0's.

    In float64 on random vectors (Freivalds' check): O(d1 d2) multiply-adds; the products themselves take O(n d1 d2).
    """
    tensors = isinstance(svd, tuple) and hasattr(svd, "Vh") and all(isinstance(t, Tensor) for t in svd)
    _require(tensors, "svd", type(svd).__name__, "an SVD(U, S, Vh) of tensors", TypeError)
    limit = max(2e-5, 1.5 * torch.finfo(torch.promote_types(W0.dtype, svd[0].dtype)).eps)
    W = _exact(W0)  # (d1, d2)
    U, S, Vh = (_exact(t).to(W.device) for t in svd)
    fit = (U.ndim, S.ndim, Vh.ndim) == (2, 1, 2) and (len(U), Vh.shape[1]) == W.shape
    shapes = [tuple(t.shape) for t in svd]
    _require(fit and len(S) == min(U.shape[1], len(Vh)) > 0, "svd", shapes, "shapes (d1, r1), (min(r1, r2),), (r2, d2)")
    random = np.random.RandomState(0)  # a and b have sizes from 1 to 2 and random signs: no wrong entry hides
    draws = (random.uniform(1, 2, r) * random.choice([-1.0, 1.0], r) for r in (U.shape[1], len(Vh)))
    a, b = (torch.from_numpy(draw).to(W.device) for draw in draws)  # (r1,), (r2,)
    laws = {
        "Sigma sorted, >= 0": (S, S.abs().sort(descending=True).values),
        "U^T U = I": (U.T @ (U @ a), a),
        "V^T V = I": (Vh @ (Vh.T @ b), b),
        "W0 V = U Sigma": (W @ (Vh.T @ b), U[:, : len(S)] @ (S * b[: len(S)])),
        "W0^T U = V Sigma": (W.T @ (U @ a), Vh[: len(S)].T @ (S * a[: len(S)])),
    }
    why = "was W0 changed or reloaded, the model converted (train, load, merge in one dtype), U trained or averaged?"
    for law, (left, right) in laws.items():
        error = (left - right).norm()
        got = f"U, S, Vh with a relative error of {float(error / right.norm()):.1g} in {law}"
        _require(error <= limit * right.norm(), "svd", got, f"at most {limit:.0g}; {why}")  # NaN fails it too


def _check_whole(layer: SVFTLinear, W0: Tensor) -> None:
    """Refuse a layer whose parts no longer belong together. W0: (d1, d2), float64."""
    _check_finite(_exact(layer.m.detach()), "m")
    _check_omega(layer.omega, layer.U.shape[1], len(layer.Vh))
    _require(layer.m.shape == layer.omega[0].shape, "m", tuple(layer.m.shape), tuple(layer.omega[0].shape))
    _check_svd(SVD(layer.U, layer.S, layer.Vh), W0.to(layer.U.dtype))  # whose rounding is the limit


def _check_omega(omega: Tensor, r1: float = float("inf"), r2: float = float("inf")) -> Tensor:
    """omega, if it is an int64 (2, k) with k >= 1, 0 <= i < r1, 0 <= j < r2, strictly ascending by (i, j)."""
    integers = isinstance(omega, Tensor) and omega.dtype == torch.int64
    _require(integers, "omega", _kind(omega), "an int64 tensor", TypeError)
    _require(omega.numel() and omega.shape == (2, omega.numel() // 2), "omega", _kind(omega), "(2, k) with k >= 1")
    i, j = omega
    inside = omega.min() >= 0 and i.max() < r1 and j.max() < r2
    _require(inside, "omega", f"{omega.amin(1).tolist()} to {omega.amax(1).tolist()}", f"0 <= i < {r1}, 0 <= j < {r2}")
    ascending = ((i.diff() > 0) | (i.diff() == 0) & (j.diff() > 0)).all()
    _require(ascending, "omega", "unsorted or repeated positions", "each once, sorted by i, then j")
    return omega
