"""What SVFT costs: training steps of GPT-2, then the paths of svft.py on single layers.

    pip install ".[studies]"
    python -m studies.bench
        Full fine-tuning, PEFT's LoRA r = 8 and SVFT on GPT-2's shapes with random weights (without a GPU 4 of its 12
        blocks): time, tokens per second, a GPU's peak memory. Then every path on single layers. In float32; --amp: with
        bfloat16 autocast; --dtype bfloat16: with such weights. --quick: fewer rounds, one length.

All methods of a table are timed in turn, round after round: a machine that slows down slows all alike.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import svft
import train_toy
from studies.figure1 import markdown

BLOCK = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]  # (d1, d2) of GPT-2's c_attn, c_proj, c_fc, c_proj
PATTERNS = {"plain": ("plain", 2), "banded 2": ("banded", 2), "banded 16": ("banded", 16)}
PATHS = ["dense", "gather", "fused", "auto"]


def steps_table(args: argparse.Namespace) -> str:
    """What a step of each method takes. All models are there at once; the memory is of each alone."""
    import peft
    import transformers

    torch.manual_seed(0)
    gpu, rows, steps, held = args.device.type == "cuda", {}, {}, 0
    config = transformers.GPT2Config(n_layer=12 if gpu else 4, n_positions=max(1024, args.context), use_cache=False)
    base = transformers.GPT2LMHeadModel(config).to(args.device, getattr(torch, args.dtype))
    tokens = torch.randint(config.vocab_size, (100 * args.context,)).tolist()
    task = train_toy.Task(tokens, args.context, args.batch, args.device, args.amp)
    window = task.draw(torch.Generator().manual_seed(0))  # (B, T + 1)
    torch._dynamo.config.cache_size_limit = 64  # with --compile: the models share their code
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=train_toy.TARGETS, fan_in_fan_out=True)
    peft_lora = functools.partial(peft.get_peft_model, peft_config=lora, autocast_adapter_dtype=False)
    make = {"full fine-tuning": lambda model: model, "PEFT's LoRA r = 8": peft_lora}
    for name, (pattern, d) in PATTERNS.items():
        make[f"SVFT {name}"] = functools.partial(svft.inject, target_modules=train_toy.TARGETS, pattern=pattern, d=d)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        train_toy.loss_of(model, window, task).backward()
        optimizer.step()
        optimizer.zero_grad()

    for name, adapt in make.items():
        model = adapt(copy.deepcopy(base)).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        runner = torch.compile(model) if args.compile else model
        steps[name] = functools.partial(step, runner, torch.optim.AdamW(trained, 1e-5, fused=True))
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds_of(steps[name], 3)
        peak = f"{(torch.cuda.max_memory_allocated() - held) / 2**30:.2f}" if gpu else "-"
        held = torch.cuda.memory_allocated() if gpu else 0
        rows[name] = [name, f"{sum(p.numel() for p in trained):,}", peak]
    times = medians(steps, 5 if args.quick else 20)
    body = [[*rows[name], f"{1000 * s:.1f}", f"{args.batch * args.context / s:,.0f}"] for name, s in times.items()]
    return markdown([["method", "trained", "peak memory, GiB", "ms per step", "tokens/s"], *body])


def layers_table(args: argparse.Namespace, lengths: list[int]) -> str:
    """One row for each shape, length and pattern; then the worst cell of auto."""
    dtype, over = getattr(torch, args.dtype), []
    rows = [["d1 x d2, T, pattern", *PATHS, "auto / fastest"]]
    may = PATHS[:2] if args.amp or dtype == torch.bfloat16 else PATHS[:3]  # what auto may take while W0 is kept

    def call(layer: nn.Module, path: str, x: torch.Tensor) -> None:
        layer.path = path  # of a frozen linear layer a mere attribute
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            y = layer(x)
        torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], torch.ones_like(y))

    for d1, d2 in [*BLOCK, (4096, 4096)] if args.device.type == "cuda" else BLOCK:
        frozen = nn.Linear(d2, d1, device=args.device, dtype=dtype).requires_grad_(False)
        svd = svft.compute_svd(frozen.weight)
        layers = {name: svft.SVFTLinear(frozen, *pattern, svd=svd) for name, pattern in PATTERNS.items()}
        forms = {form: layers[form[0]] for form in itertools.product(PATTERNS, PATHS)} | {("frozen", ""): frozen}
        for T in lengths:
            x = torch.randn(T, d2, device=args.device, dtype=dtype, requires_grad=True)
            times = medians({form: functools.partial(call, forms[form], form[1], x) for form in forms}, 1)
            for name in PATTERNS:
                over.append(times[name, "auto"] / min(times[name, path] for path in may))
                ratios = [f"{times[name, path] / times['frozen', '']:.2f}" for path in PATHS]
                rows.append([f"{d1} x {d2}, {T}, {name}", *ratios, f"{over[-1]:.2f}"])
    return f"{markdown(rows)}\n\nauto over the fastest of {', '.join(may)}: {max(over):.2f} at worst."


def seconds_of(call: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) / times


def medians(calls: dict[Any, Callable[[], Any]], budget: float) -> dict[Any, float]:
    """Median seconds of each call over 3 to 25 rounds of all, as many as the budget in seconds allows."""
    for _ in range(2):  # rounds that do not count
        first = {key: seconds_of(call, 1) for key, call in calls.items()}
    times = {key: max(1, min(20, int(1e-3 / seconds))) for key, seconds in first.items()}
    rounds = max(3, min(25, int(budget / sum(first[key] * times[key] for key in calls))))
    found = [{key: seconds_of(calls[key], times[key]) for key in calls} for _ in range(rounds)]
    return {key: statistics.median(values[key] for values in found) for key in calls}


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench", "python -m studies.bench [options]", __doc__, formatter_class=raw)
    add = parser.add_argument
    add("--device", default="auto", help="cpu, cuda or another that torch knows (an accelerator, if there is one)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights (float32)")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--batch", type=int, help="sequences in a step (8; on a CPU 1)")
    add("--context", type=int, help="tokens in a sequence (1024; on a CPU 256)")
    add("--compile", action="store_true", help="torch.compile, in the first table")
    add("--quick", action="store_true", help="fewer rounds, one length")
    args = parser.parse_args(argv)
    args.device = train_toy.pick_device(args.device)
    gpu = args.device.type == "cuda"
    args.batch, args.context = args.batch or (8 if gpu else 1), args.context or (1024 if gpu else 256)
    lengths = [256] if args.quick else [256, 1024, 8192] if gpu else [64, 256, 1024]
    where = f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{where}, {args.dtype}{', autocast' * args.amp}\n\nA step of GPT-2, {args.batch} x {args.context} tokens\n")
    try:
        print(steps_table(args), flush=True)
    except ImportError as error:
        train_toy.refuse(f'{error}: pip install ".[studies]"')
    print("\nSingle layers, forward and backward, over the time of a frozen linear layer\n")
    print(layers_table(args, lengths))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
