"""What a training step of GPT-2 costs with SVFT, beside full fine-tuning and PEFT's LoRA; then the paths of svft.py.

    pip install ".[studies]"
    python -m studies.bench
        GPT-2's shapes with random weights: 12 blocks on a GPU, 4 of them without one. Milliseconds and tokens per
        second of a step (forward, backward, AdamW), and the peak memory of a GPU. Then single layers: the time of each
        path, and of "auto", over a frozen linear layer's, and auto over the fastest.
    python -m studies.bench --amp; python -m studies.bench --dtype bfloat16; python -m studies.bench --quick

All rows of a table are measured in turn, round by round: a machine that slows down slows all of them alike. Compare
the rows of one run, not two runs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import svft
import train_toy
from studies.figure1 import markdown

try:
    import peft
except ImportError as error:
    train_toy.refuse(f'{error}: pip install ".[studies]"')

PATTERNS = {"plain": ("plain", 0), "banded 2": ("banded", 2), "banded 16": ("banded", 16)}
PATHS = ["dense", "gather", "fused", "auto"]
SHAPES = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]  # (d1, d2) of GPT-2's c_attn, c_proj, c_fc, c_proj


def models(args: argparse.Namespace, blocks: int, cache: str) -> Iterator[tuple[str, nn.Module]]:
    """One base model, as each method adapts it."""
    torch.manual_seed(0)
    base = train_toy.GPT2(50257, args.context, blocks, 12, 768).to(args.device, args.dtype).train()
    yield "full fine-tuning", copy.deepcopy(base)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=train_toy.TARGETS)
    yield "PEFT LoRA r = 8", peft.get_peft_model(copy.deepcopy(base), lora, autocast_adapter_dtype=False)
    for name, (pattern, d) in PATTERNS.items():
        yield f"SVFT {name}", svft.inject(copy.deepcopy(base), train_toy.TARGETS, pattern, d, cache_dir=cache)


def steps_table(args: argparse.Namespace, blocks: int) -> str:
    """A step of each method. All models are there at once; the memory is what one of them adds to what it found."""
    tokens = torch.randint(50257, (100 * (args.context + 1),)).tolist()
    task = train_toy.Task(tokens, args.context, args.batch, args.device, args.amp)
    window = task.draw(torch.Generator().manual_seed(0))  # (B, T + 1)
    calls, rows = {}, {}

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        train_toy.loss_of(model, window, task).backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as cache:  # of the SVDs
        held = memory()
        for name, model in models(args, blocks, cache):
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, 1e-5, fused=True)
            runner = torch.compile(model) if args.compile else model
            calls[name] = lambda runner=runner, optimizer=optimizer: step(runner, optimizer)
            seconds_of(calls[name], 3 if args.cuda else 1)
            peak = f"{memory(peak=True) - held:.2f}" if args.cuda else "-"
            held = memory()
            rows[name] = [name, f"{sum(p.numel() for p in trained):,}", peak]
    for name, seconds in medians(calls, 5 if args.quick else 20).items():
        rows[name] += [f"{1000 * seconds:.1f}", f"{args.batch * args.context / seconds:,.0f}"]
    head = ["method", "trained", "peak memory, GiB", "ms per step", "tokens/s"]
    return markdown([head, *rows.values()])


def layers_of(d1: int, d2: int, args: argparse.Namespace) -> dict[str, nn.Module]:
    """A frozen layer d2 -> d1 and SVFT on it, W0 made from its SVD, so that nobody has to wait for one."""
    torch.manual_seed(0)
    n = min(d1, d2)
    U, V = (torch.linalg.qr(torch.randn(d, n, dtype=torch.float64)).Q for d in (d1, d2))  # (d1, n), (d2, n)
    S = torch.linspace(2, 0.1, n, dtype=torch.float64)
    frozen = nn.Linear(d2, d1).requires_grad_(False)
    frozen.weight.data = (U * S) @ V.T
    frozen = frozen.to(args.device, args.dtype)
    svd = svft.SVD(*(t.to(args.device, args.dtype) for t in (U, S, V.T)))
    return {"": frozen} | {name: svft.SVFTLinear(frozen, *how, svd=svd) for name, how in PATTERNS.items()}


def layers_table(args: argparse.Namespace, lengths: list[int]) -> str:
    """A row for each shape, length and pattern: forward and backward, over the frozen layer's time."""
    rows, over = [["d1 x d2, T, pattern", *PATHS, "auto/fastest"]], {}
    may = PATHS[:2] if args.amp or args.dtype == torch.bfloat16 else PATHS[:3]  # what auto may take

    def call(layer: nn.Module, path: str, x: torch.Tensor) -> None:
        if path:
            layer.path = path
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            y = layer(x)
        torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], torch.ones_like(y))

    for (d1, d2), T in itertools.product([*SHAPES, *[(4096, 4096)] * args.cuda], lengths):
        layers = layers_of(d1, d2, args)
        x = torch.randn(T, d2, device=args.device, dtype=args.dtype, requires_grad=True)
        forms = [("", ""), *itertools.product(PATTERNS, PATHS)]
        calls = {(name, path): (lambda f=(layers[name], path, x): call(*f)) for name, path in forms}
        times = medians(calls, 1)
        for name in PATTERNS:
            label = f"{d1} x {d2}, {T}, {name}"
            over[label] = times[name, "auto"] / min(times[name, path] for path in may)
            ratios = [f"{times[name, path] / times['', '']:.2f}" for path in PATHS]
            rows.append([label, *ratios, f"{over[label]:.2f}"])
    worst = max(over, key=over.get)
    return f"{markdown(rows)}\n\nauto over the fastest of {may}: {over[worst]:.2f} at worst ({worst})."


def memory(*, peak: bool = False) -> float:
    """What tensors hold on a CUDA device, or the most that they held since the last call, in GiB."""
    if not torch.cuda.is_available():
        return 0.0
    held = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return held / 2**30


def seconds_of(call: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) / times


def medians(calls: dict[Any, Callable[[], Any]], budget: float) -> dict[Any, float]:
    """Median seconds of each call over 3 to 25 rounds, as many as the budget in seconds allows."""
    first = {key: seconds_of(call, 2) for key, call in calls.items()}
    times = {key: max(1, min(20, int(1e-3 / seconds))) for key, seconds in first.items()}  # short calls several at once
    rounds = int(budget / sum(first[key] * times[key] for key in calls))
    found = [{key: seconds_of(calls[key], times[key]) for key in calls} for _ in range(max(3, min(25, rounds)))]
    return {key: statistics.median(values[key] for values in found) for key in calls}


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench", "python -m studies.bench [options]", __doc__, formatter_class=raw)
    add = parser.add_argument
    add("--device", default="auto", help="cpu, cuda or another that torch knows (an accelerator, if there is one)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights (float32)")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--batch", type=int, help="sequences in a step (8 on a GPU, else 1)")
    add("--context", type=int, help="tokens in a sequence (1024 on a GPU, else 256)")
    add("--compile", action="store_true", help="torch.compile the whole models")
    add("--quick", action="store_true", help="fewer rounds, one length")
    args = parser.parse_args(argv)
    args.device = train_toy.pick_device(args.device)
    args.cuda = args.device.type == "cuda"
    args.batch, args.context = args.batch or (8 if args.cuda else 1), args.context or (1024 if args.cuda else 256)
    args.dtype = getattr(torch, args.dtype)
    blocks = 12 if args.cuda else 4
    card = torch.cuda.get_device_name(args.device) if args.cuda else f"{torch.get_num_threads()} threads"
    how = f"{args.dtype}{', bfloat16 autocast' if args.amp else ''}{', compiled' if args.compile else ''}"
    print(f"{args.device} ({card}), torch {torch.__version__}, {how}, {time.strftime('%Y-%m-%d')}")
    print(f"\nA training step of GPT-2, {blocks} of its 12 blocks, {args.batch} x {args.context} tokens\n")
    print(steps_table(args, blocks))
    print("\nSingle layers, forward and backward: time over a frozen linear layer's\n")
    print(layers_table(args, [256] if args.quick else [256, 1024, 8192] if args.cuda else [64, 256, 1024]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
