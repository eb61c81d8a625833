"""The paper's figure 1: how much of full fine-tuning's gain a method recovers, against what it trains.

    pip install ".[studies]"
    python -m studies.figure1
        On the small model of train_toy.py. Does the runs of SMALL that studies/runs/small.jsonl does not have yet,
        appends each to it as one line, prints the table and draws the figure.
    python -m studies.figure1 --base FOLDER --runs studies/runs/NAME.jsonl
        On a pretrained model, with the rows of LARGE. Several processes may append to one file, each with rows of its
        own: --rows "full; LoRA 4; banded 2".
    python -m studies.figure1 --draw
        Prints the tables of all files in studies/runs and draws studies/figure1.svg. With --runs FILE.jsonl: of that
        file, and FILE.svg. Needs neither a model nor PEFT.

The other methods are PEFT's. In peft 0.21, without its CUDA extension, BOFT takes one factor, trains full b x b blocks
and a scale for each output, and starts 1e-6 from W0. PEFT's DoRA, VeRA and BOFT are slower than plain code would be, so
their seconds are no property of the methods. Every Conv1D becomes an nn.Linear first, for all rows alike.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import svft
import train_toy

RUNS = Path(__file__).resolve().parent / "runs"
SEEDS = 3  # of the best rate by validation loss; the others are tried with seed 0 alone
RATES = (0.5, 1, 2)  # times the middle one, which SMALL and LARGE give for each row
ENTRIES = 64  # of each M in the rows "kept r" and "cut r", whose SVD is truncated at rank r
# NOTES explains sizes. Bands 1,2 3,4 8 16 have as many entries as LoRA r = 1, 2, 4, 8 has parameters, within 5%.
SMALL = {
    "base": 0, "full": 2.5e-3, "LoRA 1": 2e-2, "LoRA 2": 1.6e-2, "LoRA 4": 1.2e-2, "LoRA 8": 1e-2,
    "DoRA 1": 2e-2, "DoRA 4": 1.2e-2, "VeRA 256": 0.12, "BOFT 4": 2.5e-2, "BOFT 8": 2.5e-2,
    "plain": 0.2, "banded 1,2": 8e-2, "banded 3,4": 5e-2, "banded 8": 3e-2, "banded 16": 2e-2,
    "random 1,2": 8e-2, "random 3,4": 5e-2, "random 8": 3e-2, "random 16": 2e-2,
    "top-k 8": 3e-2, "diagonal 8": 3e-2, "gradient 8": 1.5e-2,
    "kept 8": 7.5e-2, "kept 32": 7.5e-2, "kept 96": 0.15, "cut 8": 7.5e-2, "cut 32": 0.15, "cut 96": 0.15,
}  # fmt: skip
LARGE = {
    "base": 0, "full": 1e-4, "LoRA 1": 4e-3, "LoRA 4": 2e-3, "LoRA 8": 1.4e-3, "LoRA 32": 7.071e-4,
    "DoRA 1": 6e-3, "DoRA 8": 2e-3, "VeRA 1024": 4e-2, "BOFT 8": 1e-3,
    "plain": 0.0415756, "banded 2": 0.0142431, "banded 8": 0.0063268, "banded 16": 4e-3,
    "random 2": 0.0142431, "random 8": 0.0063268, "random 16": 4e-3, "top-k 8": 0.0063268,
}  # fmt: skip
QUICK = ["base", "full", "LoRA 4", "plain", "banded 8"]
PEFT = ["LoRA", "DoRA", "VeRA", "BOFT"]
METHODS = ["base", "full", *PEFT, "plain", "banded", "random", "top-k", "diagonal", "gradient", "kept", "cut", "fused"]
STYLES = dict(zip([*PEFT, *METHODS[6:10]], ["C0^-", "C1v-", "C2D-", "C3P-", "ko-", "ks-", "kX--", "kh:"], strict=True))
NOTES = """\
plain to fused are SVFT. Sizes: r of LoRA, DoRA, VeRA; b of BOFT; of a band d, or z1,z2. random, top-k (random on oblong
weights), diagonal (all of it, the rest random) and gradient (the largest of U^T G V) have as many entries as that band.
kept r, cut r: the SVD truncated at rank r and 64 random entries; W0 kept, or cut too. fused: banded, all in bfloat16.
lr: of those tried with seed 0, the best by validation loss; * the smallest or largest of them, or the only one.
recovered: (base - method) / (base - full), of the mean losses. +-: standard deviation over the seeds."""


# ---------------------------------------------------------------- one run


def build(base: nn.Module, row: str, seed: int, task: train_toy.Task, names: list[str], cache: Path) -> nn.Module:
    """A copy of base as row has it. It starts at W0; "cut" at the best rank-r part of W0."""
    method, *numbers = row.replace(",", " ").split()
    size = [int(number) for number in numbers]
    torch.manual_seed(seed)
    model = copy.deepcopy(base).requires_grad_(method == "full")
    if method in ("base", "full"):
        return model
    if method in PEFT:
        import peft

        one, more = size[0], {"target_modules": names}
        if method == "VeRA":
            config = peft.VeraConfig(r=one, projection_prng_key=seed, **more)
        elif method == "BOFT":
            config = peft.BOFTConfig(boft_block_size=one, boft_n_butterfly_factor=1, **more)
        else:
            config = peft.LoraConfig(r=one, lora_alpha=2 * one, use_dora=method == "DoRA", **more)
        return peft.get_peft_model(model, config)
    gradients = iter([])
    if method == "gradient":  # with respect to each W0 (d1, d2), summed over 16 batches
        weights = [model.get_submodule(name).weight.requires_grad_(True) for name in names]
        generator = torch.Generator().manual_seed(0)
        losses = [train_toy.loss_of(model, task.draw(generator), task) for _ in range(16)]
        gradients = iter(torch.autograd.grad(sum(losses), weights))
    seeds = itertools.count(1000 * seed)  # one for each layer, which inject takes in the model's order

    def pattern(svd: svft.SVD) -> Tensor:
        return omega_of(method, size, svd, next(seeds), gradients)

    svft.inject(model, names, pattern, rank=size[0] if method in ("kept", "cut") else None, cache_dir=cache)
    for layer in model.modules():
        if method == "cut" and isinstance(layer, svft.SVFTLinear):  # W0 too, as in table 10 of the paper
            layer.weight.data = (layer.U * layer.S) @ layer.Vh
    return model


def omega_of(method: str, size: list[int], svd: svft.SVD, seed: int, gradients: Iterator[Tensor]) -> Tensor:
    """Omega of one layer: (2, k), with as many entries as the band of that size."""
    r1, r2 = svd.U.shape[1], svd.Vh.shape[0]
    band = svft.omega_banded(r1, r2, *(size or [0]))
    k = ENTRIES if method in ("kept", "cut") else band.shape[1]
    if method in ("plain", "banded"):
        return band
    if method == "top-k" and svd.U.shape[0] == svd.Vh.shape[1]:  # random on oblong weights, where it is not defined
        return svft.omega_top_k(svd.U, svd.Vh, k)
    if method == "gradient":
        flat = (svd.U.T @ next(gradients) @ svd.Vh.T).abs().flatten().topk(k).indices.sort().values.cpu()
        return torch.stack([flat // r2, flat % r2])
    if method == "diagonal":  # all (i, i), and the rest drawn off it: r2 - 1 places in a row, (i, i) left out
        i, j = svft.omega_random(r1, r2 - 1, k - r1, seed=seed)
        both = torch.cat([svft.omega_plain(r1, r2), torch.stack([i, j + (j >= i)])], 1)
        return both[:, (both[0] * r2 + both[1]).argsort()]
    return svft.omega_random(r1, r2, k, seed=seed)


# ---------------------------------------------------------------- all runs, and their file


def digest(tensors: Iterable[Tensor]) -> str:  # names them to the last bit
    return hashlib.sha256(b"".join(t.detach().cpu().contiguous().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def decisive(setting: dict[str, Any]) -> str:
    """What decides a result but for rounding: no names; nor who computed it, when, where and with what."""
    return json.dumps({key: value for key, value in setting.items() if key not in ("model", "data")}, sort_keys=True)


def read(file: Path) -> dict[str, dict[tuple[str, float, int], dict[str, Any]]]:
    """The finished runs, by setting, then by row, rate and seed. A line that was cut short is none."""
    runs: dict[str, dict[tuple[str, float, int], dict[str, Any]]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            run = json.loads(line)
            run |= {split: math.inf if run[split] is None else run[split] for split in ("val", "test")}
            runs.setdefault(decisive(run["setting"]), {})[run["row"], run["lr"], run["seed"]] = run
    return runs


def work(args: argparse.Namespace, rows: dict[str, float]) -> None:
    """Do the runs that the file does not have yet, and append each to it."""
    import peft
    import transformers

    with train_toy.first_process_first():
        args.runs.parent.mkdir(parents=True, exist_ok=True)
        open(args.runs, "a").close()
        base, _, task = train_toy.load(args)
        trial = svft.inject(copy.deepcopy(base), args.targets, "plain", cache_dir=args.cache)
    names = [name for name, module in trial.named_modules() if isinstance(module, svft.SVFTLinear)]
    for layer, name in [(base.get_submodule(name), name) for name in names]:
        if not isinstance(layer, nn.Linear):  # Hugging Face's Conv1D, whose weight is (d2, d1)
            linear = nn.Linear(*layer.weight.shape, device="meta")
            linear.weight, linear.bias = nn.Parameter(layer.weight.detach().T.contiguous()), layer.bias
            base.set_submodule(name, linear)
    task.windows, cpu = args.windows, f"{platform.machine()}, {os.cpu_count()} cores"
    setting = {
        "model": Path(args.base).resolve().name if args.base else "the small GPT-2",
        "weights": digest(base.state_dict().values()),
        "data": Path(args.data).name if args.data else "pydoc_data.topics",
        "tokens": digest([task.train, task.val, task.test]),
        "targets": args.targets, "steps": args.steps, "batch": task.batch, "context": task.context,
        "windows": task.windows, "precision": "bfloat16 autocast" if task.amp else "float32",
    }  # fmt: skip
    ran = {package.__name__: package.__version__ for package in (torch, transformers, peft, svft)}
    ran["hardware"] = torch.cuda.get_device_name(task.device) if task.device.type == "cuda" else cpu
    ran |= {"threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}

    def once(row: str, lr: float, seed: int) -> None:
        if (row, lr, seed) in read(args.runs).get(decisive(setting), {}):
            return
        start, method = time.perf_counter(), row.split()[0]
        model = build(base, row, seed, task, names, args.cache)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if lr:
            train_toy.train(model, task, args.steps, lr, seed, row)
        losses = [train_toy.evaluate(model, tokens, task) for tokens in (task.val, task.test)]
        val, test = (loss if math.isfinite(loss) else None for loss in losses)
        run = {"row": row, "lr": lr, "seed": seed, "setting": setting, "trained": trained, "val": val, "test": test}
        run["seconds"] = round(time.perf_counter() - start, 1)
        run["implementation"] = "peft" if method in PEFT else "torch" if method in ("base", "full") else "svft"
        cut_short = not args.runs.read_text().endswith("\n") and args.runs.stat().st_size > 0
        with open(args.runs, "a") as file:
            file.write("\n" * cut_short + json.dumps(run | {"ran": ran}) + "\n")
        print(f"{row}, lr {lr:.3g}, seed {seed}: validation loss {val}, {run['seconds']} s", flush=True)

    for row, middle in rows.items():
        for rate in args.rates if middle else [0]:
            once(row, rate * middle, 0)
        best = summary(read(args.runs)[decisive(setting)])[row]["best"]
        for seed in range(1, args.seeds if middle else 1):
            once(row, best, seed)


# ---------------------------------------------------------------- tables and the figure


def summary(runs: dict[tuple[str, float, int], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each row its best rate, and for each of its seeds the losses and the recovered shares in %."""
    rows: dict[str, dict[str, Any]] = {}
    for name in {row: 0 for row, _, seed in runs if seed == 0}:
        tried = {lr: run["val"] for (row, lr, seed), run in runs.items() if row == name and seed == 0}
        lr = min(tried, key=tried.get)
        best = [run for key, run in runs.items() if key[:2] == (name, lr)]
        losses = {split: torch.tensor([run[split] for run in best]).double() for split in ("val", "test")}
        edge = lr > 0 and lr in (min(tried), max(tried))
        rows[name] = {"trained": best[0]["trained"], "lr": f"{lr:.2g}{' *' * edge}", "best": lr, **losses}
    for row, split in itertools.product(rows.values(), ("val", "test")):
        start, goal = (rows[end][split].mean() if end in rows else math.nan for end in ("base", "full"))
        row[f"{split} %"] = 100 * (start - row[split]) / (start - goal)
    return dict(sorted(rows.items(), key=lambda row: (METHODS.index(row[0].split()[0]), row[1]["trained"])))


def markdown(rows: list[list[str]]) -> str:
    """A table that reads well on a terminal too: heads first; all but the first column are set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * (w - (c > 0)) + ":" * (c > 0) for c, w in enumerate(widths)], *rows[1:]]
    return "\n".join(f"| {' | '.join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])])} |" for r in rows)


def draw(files: list[Path], picture: Path) -> None:
    """Prints a table for each setting in the files, and draws a panel for each that has both ends of the scale."""
    panels = {}
    for runs in [runs for file in files for runs in read(file).values()]:
        rows, every = summary(runs), list(runs.values())
        lines = [["row", "trained", "lr", "seeds", "validation loss", "test loss", "recovered, %: validation", "test"]]
        for name, row in rows.items():
            cells = [name, f"{row['trained']:,}", row["lr"], str(len(row["val"]))]
            for column, digits in {"val": 4, "test": 4, "val %": 1, "test %": 1}.items():
                spread = f" +- {row[column].std():.{digits}f}" if len(row[column]) > 1 else ""
                cells.append(f"{row[column].mean():.{digits}f}{spread}")
            lines.append(cells)
        s, dates = every[0]["setting"], [run["ran"]["date"] for run in every]
        size = f"{s['model']}: {s['steps']} steps of {s['batch']} x {s['context']}, {s['precision']}"
        more = f"{s['data']}; targets {s['targets']}; at most {s['windows']} windows in an evaluation"
        others = [run for run in every if run["row"].split()[0] in PEFT]
        by = "; ".join(dict.fromkeys(f"{run['row'].split()[0]} by {run['implementation']}" for run in others))
        where = "; ".join(dict.fromkeys(f"{run['ran']['hardware']}, torch {run['ran']['torch']}" for run in every))
        print(f"## {size}\n\n{more}\n{where}; {min(dates)} to {max(dates)}\n{by}\n\n{markdown(lines)}\n")
        if {"base", "full"} < rows.keys():
            panels[f"{size}\n{where}, seeds: {max(len(row['val']) for row in rows.values())}"] = rows
    print(NOTES)
    if panels:
        plot(panels, picture)
        print(f"picture: {picture}")


def plot(panels: dict[str, dict[str, dict[str, Any]]], picture: Path) -> None:
    """SVFT in black, the others in colour. Every axis of shares starts at 0."""
    import matplotlib.figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "svft", "font.size": 8, "axes.grid": True}
    figure = matplotlib.figure.Figure(figsize=(6 * len(panels), 5), layout="constrained")
    for axes, (head, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.set(title=head, xscale="log", xlabel="trained parameters", ylabel="recovered on the test split, %")
        axes.axhline(100, color="black", linewidth=0.8, label="full fine-tuning")
        for method, style in STYLES.items():
            if mine := [row for name, row in rows.items() if name.split()[0] == method]:
                x, shares = [row["trained"] for row in mine], [row["test %"] for row in mine]
                errors = [share.std() if len(share) > 1 else 0 for share in shares]
                label = method if method in PEFT else f"SVFT {method}"
                axes.errorbar(x, [share.mean() for share in shares], errors, fmt=style, label=label, capsize=3)
        axes.set_ylim(min(0, axes.get_ylim()[0]), None)
        axes.xaxis.set_minor_formatter("")
        axes.legend()
    figure.savefig(picture, metadata={"Date": None})


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("figure1", "python -m studies.figure1 [options]", __doc__, formatter_class=raw)
    train_toy.add_options(parser)
    add = parser.add_argument
    add("--rows", help='some of the rows, as "full; LoRA 4; banded 2"')
    add("--seeds", type=int, default=SEEDS, help=f"of the best rate ({SEEDS})")
    add("--steps", type=int, default=120, help="of a run (120)")
    add("--windows", type=int, help="in an evaluation, at most (256; with --base 64)")
    add("--runs", type=Path, metavar="FILE.jsonl", help="where the runs are (studies/runs/small.jsonl)")
    add("--quick", action="store_true", help="few rows, one rate and seed, 20 steps, into .svft_cache/quick.jsonl")
    add("--draw", action="store_true", help="do no run; print and draw what is there")
    args = parser.parse_args(argv)
    rows, args.seed, args.rates = LARGE if args.base else SMALL, 0, RATES
    if args.quick:
        rows, args.rates, args.seeds, args.steps = {row: rows[row] for row in QUICK}, (1,), 1, 20
    wanted = [row.strip() for row in args.rows.split(";")] if args.rows else list(rows)
    if unknown := [row for row in wanted if row not in rows]:
        train_toy.refuse(f"--rows: got {unknown}, want among {list(rows)}")
    if not args.runs and not args.draw:
        name = Path(args.base).resolve().name if args.base else "small"
        args.runs = args.cache / "quick.jsonl" if args.quick else RUNS / f"{name}.jsonl"
    args.windows, args.device = args.windows or (64 if args.base else 256), train_toy.pick_device(args.device)
    try:
        if not args.draw:
            work(args, {row: rows[row] for row in wanted})
        files = [args.runs] if args.runs else sorted(RUNS.glob("*.jsonl"))
        draw(files, args.runs.with_suffix(".svg") if args.runs else RUNS.parent / "figure1.svg")
        return 0
    except ImportError as error:
        train_toy.refuse(f'{error}: pip install ".[studies]"')
    except KeyboardInterrupt:
        print("\ninterrupted; every finished run is in the file")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
