"""Fine-tune GPT-2 with SVFT, set SVFT against other methods, and time it.

To copy: `train` and `loss_of`; `finetune` is the recipe around them, in order.

    python train_toy.py
        No download, no GPU. Pre-trains a small GPT-2 (842,496 parameters, bytes as tokens) on the source of Python's
        standard library, keeps it in .svft_cache, and fine-tunes it with SVFT on the prose of Python's language
        reference. The loss on held-out prose falls by about 0.29 nats per byte with 4% of the parameters. It prints
        the loss, the speed, how far the merged model is from the adapted one, and samples. The first time it takes
        three minutes, then one.
    python train_toy.py --base gpt2 --data my.txt --save adapter.npz
        The same with a pretrained model (any causal one of transformers, by name or folder), its tokenizer and your
        text, on a GPU if there is one. svft.load_adapter loads the file. --method lora or full trains another method.
    torchrun --nproc_per_node=4 train_toy.py --base gpt2
        The same on four GPUs, data-parallel; with --device cpu in four processes.
    python train_toy.py compare
        Figure 1 of the paper on the small model: full fine-tuning, LoRA, DoRA, VeRA, BOFT and four kinds of SVFT; then
        two studies, of a truncated SVD and of other choices of Omega. Prints tables and the figure as text. 45 min;
        stop it at any time, the same command goes on from there; with --minutes 0 it draws what is there.
    python train_toy.py compare --base gpt2
        The same figure on a pretrained model: about 100 runs, for a GPU. Started several times with one --out, the
        processes share the runs. --quick: 7 methods, 20 steps each, up to 45 min without a GPU.
    python train_toy.py bench
        What a training step of GPT-2 costs with each method: time, tokens per second, memory of a GPU; then what each
        path of svft.py costs on single layers. Two minutes in float32; --quick: one.

Times without a GPU are for 2 CPU cores (x86-64) and torch 2.13. --help after a command lists its options.
In comments on shapes, B sequences have T tokens each.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import svft

CACHE = Path(__file__).resolve().parent / ".svft_cache"  # pre-trained model and SVDs; safe to delete
TARGETS = ["c_attn", "c_proj", "c_fc"]  # GPT-2's four linear layers per block; c_proj is two of them
Targets = str | list[str]


# ---------------------------------------------------------------- the recipe: python train_toy.py


def finetune(args: argparse.Namespace) -> None:
    """Load, inject, train, evaluate, save, merge."""
    begin = time.perf_counter()
    with refusals(), first_process_first():
        label, r = check_method(args), args.d
        model, codec, task = load(args)
        total = sum(p.numel() for p in model.parameters())
        if args.method == "svft":  # freezes all but the m's
            svft.inject(model, args.targets, args.pattern, args.d, seed=args.seed, cache_dir=args.cache)
        elif args.method == "lora":
            torch.manual_seed(args.seed)  # of A
            replace(model, args.targets, lambda layer: LoRA(layer, r))
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]  # of SVFT: k, the entries in each M
    lr = args.lr or usual_lr(args.method, r if args.method == "lora" else statistics.mean(sizes), bool(args.base))
    say(f"method            {label}, learning rate {lr:.3g}; {machine(task.device, task.amp)}")
    say(f"trained           {sum(sizes):,} parameters, {sum(sizes) / total:.2%} of the model's {total:,}")
    before, text_before = evaluate(model, task.val, task), sample(model, codec, task, args.seed)
    peak_memory(task.device)

    seconds = train(parallel(model, args), task, args.steps, lr, args.seed, "fine-tuning")
    rate, memory = args.steps / seconds, peak_memory(task.device)
    after = evaluate(model, task.val, task)
    if not math.isfinite(after):
        raise UserError(f"--lr: got {lr:.3g}, want a smaller one: the loss became {after}")
    text_after = sample(model, codec, task, args.seed)
    say(f"validation loss   {before:.3f} -> {after:.3f} nats per {codec.unit} ({after - before:+.3f})")
    peak = f", peak memory {memory:.2f} GiB" if memory else ""
    say(f"speed             {rate:.1f} steps/s, {rate * task.batch * task.context:,.0f} {codec.unit}s/s{peak}")

    if args.save and RANK == 0:
        with refusals():
            svft.save_adapter(model, args.save)
    if args.method == "svft":
        window = task.val[None, : task.context].to(task.device)
        adapted = logits_of(model, window)
        difference = (logits_of(svft.merge(model), window) - adapted).abs().max()  # plain layers again, in place
        say(f"merged - adapted  at most {difference:.1e}, of logits up to {adapted.abs().max():.1f}")
    say(f"--- before\n{text_before}\n--- after\n{text_after}\n---")
    say(f"seconds           {seconds:.1f} of fine-tuning, {time.perf_counter() - begin:.1f} in all")


def train(model: nn.Module, task: Task, steps: int, lr: float, seed: int, label: str = "") -> float:
    """AdamW on what requires a gradient, 10% warm-up, then a cosine to zero. Returns the seconds taken."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0, fused=True)
    warm = max(1, round(0.1 * steps))
    fall = max(1, steps - warm)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (t + 1) / warm if t < warm else 0.5 + 0.5 * math.cos(math.pi * (t + 1 - warm) / fall)
    )
    generator = torch.Generator().manual_seed(seed)  # of the batches
    torch.manual_seed(seed + RANK)  # of dropout, where the model has it
    model.train()
    start = last = time.perf_counter()
    for step in range(1, steps + 1):
        loss = loss_of(model, task.draw(generator), task)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if label and RANK == 0 and (now := time.perf_counter()) - last > 10:
            last, left = now, timedelta(seconds=int((now - start) / step * (steps - step)))
            print(f"{label}: step {step}/{steps}, loss {loss.item():.3f}, {left} left", file=sys.stderr, flush=True)
    model.eval()
    loss.item()  # waits for the device
    return time.perf_counter() - start


def loss_of(model: nn.Module, window: Tensor, task: Task) -> Tensor:
    """Mean cross-entropy of window (B, T + 1) in nats per token; does not wait for the device."""
    window = window.pin_memory() if task.device.type == "cuda" else window
    window = window.to(task.device, non_blocking=True)
    with torch.autocast(task.device.type, torch.bfloat16, enabled=task.amp):
        logits = logits_of(model, window[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, T) -> (B, T, vocabulary), of our GPT-2 or of a model from transformers."""
    out = model(tokens)
    return getattr(out, "logits", out)


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, task: Task) -> float:
    """Mean loss over at most task.windows windows spread evenly over tokens (n,), always the same; nats per token."""
    windows = tokens.unfold(0, task.context + 1, task.context)  # (N, T + 1)
    windows = windows[:: math.ceil(len(windows) / task.windows)]
    total = sum(loss_of(model, part, task) * len(part) for part in windows.split(32))
    return float(total) / len(windows)


@torch.no_grad()
def sample(model: nn.Module, codec: Codec, task: Task, seed: int) -> str:
    """The beginning of the validation text, and how the model goes on from there at temperature 0.8."""
    generator = torch.Generator().manual_seed(seed)
    tokens = task.val[None, : min(64, (task.context + 1) // 2)].to(task.device)  # (1, T)
    for _ in range(codec.sample):
        last = logits_of(model, tokens[:, -task.context :])[0, -1].float().cpu()  # (vocabulary,)
        drawn = torch.multinomial((last / 0.8).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn[None].to(tokens.device)], 1)
    return codec.decode(tokens[0].tolist())


RATES = {  # a, b of a peak learning rate a size^b: for the small model, and for one that is pretrained at length
    "svft": ((5, -2 / 3), (2.5, -2 / 3)),  # size: the entries in each M
    "lora": ((0.02, -1 / 3), (4e-3, -1 / 2)),  # size: r
    "dora": ((0.02, -1 / 3), (6e-3, -1 / 2)),
    "vera": ((0.12, 0), (0.04, 0)),
    "boft": ((0.05, -1), (8e-3, -1)),  # size: b
    "full": ((2.5e-3, 0), (1e-4, 0)),
}


def usual_lr(method: str, size: float, pretrained: bool) -> float:
    """A peak learning rate near the best that compare found; SVFT's is near the paper's too."""
    a, b = RATES[method][pretrained]
    return min(0.2, a * size**b)


# ---------------------------------------------------------------- the small model: GPT-2's architecture


@dataclasses.dataclass(frozen=True)
class Config:
    vocabulary: int = 256
    context: int = 128
    layers: int = 4
    heads: int = 4
    width: int = 128


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, width / heads)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, width)


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.width), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.width), MLP(config)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """Pre-norm, learned positions, output head tied to the embedding: 842,496 parameters by default."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocabulary, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        std = 0.02 * math.sqrt(768 / config.width)  # GPT-2's 0.02 is for its own width
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # smaller where a block adds to the residual stream
                residual = math.sqrt(2 * config.layers) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=std / residual)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, vocabulary)."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]  # (B, T, width)
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


# ---------------------------------------------------------------- text: tokens, and what is held out


class Codec(NamedTuple):
    """Text to tokens (n,) int64 and back."""

    encode: Callable[[str], Tensor]
    decode: Callable[[list[int]], str]
    unit: str = "token"
    sample: int = 40  # tokens to draw for a sample


BYTES = Codec(
    encode=lambda text: torch.from_numpy(np.frombuffer(text.encode(), np.uint8).astype(np.int64)),
    decode=lambda tokens: bytes(tokens).decode(errors="replace"),
    unit="byte",
    sample=150,
)


def read_topics() -> str:
    """The language reference's prose, as help() shows it: to fine-tune on.

    Topics repeat each other. Each paragraph is kept once, or held-out text would be training text as well.
    """
    from pydoc_data.topics import topics

    kept: dict[str, str] = {}
    for paragraph in "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n"):
        kept.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(kept.values())


@dataclasses.dataclass
class Task:
    """What to train on, and where: the tokens of each split, (n,) int64 on the CPU, and the size of a batch."""

    train: Tensor
    val: Tensor
    test: Tensor
    context: int  # T
    batch: int  # sequences per step, all processes together
    device: torch.device
    amp: bool = False  # bfloat16 autocast
    windows: int = 256  # sequences in an evaluation, at most

    def draw(self, generator: torch.Generator) -> Tensor:
        """This process' share of a batch of random windows of the training text: (B, T + 1)."""
        starts = torch.randint(len(self.train) - self.context, (self.batch,), generator=generator)
        return self.train[starts[RANK::WORLD, None] + torch.arange(self.context + 1)]


def make_task(text: str, source: str, codec: Codec, context: int, batch: int, **options: Any) -> Task:
    """Cut the text's tokens into 100 blocks: of each ten, eight to train, one to validate, one to test."""
    tokens = codec.encode(text)
    length = len(tokens) // 100
    if 10 * length <= context:
        got, want = f"{len(tokens):,} {codec.unit}s", f"{10 * context + 100:,} or more"
        raise UserError(f"{source}: too little text: got {got}, want {want}")
    blocks, fold = tokens[: 100 * length].view(100, length), torch.arange(100) % 10
    train, val, test = (blocks[part].flatten() for part in (fold < 8, fold == 8, fold == 9))
    return Task(train, val, test, context, batch, **options)


# ---------------------------------------------------------------- loading


def check_method(args: argparse.Namespace) -> str:
    """The method's name; an option that the method would ignore, or that cannot work, is refused."""
    useless = {"full": ["targets", "d", "pattern", "save"], "lora": ["pattern", "save"], "svft": []}[args.method]
    for name in useless:
        if getattr(args, name) is not None:
            raise UserError(f"--{name}: got it with --method {args.method}, which has no use for it")
    args.d, args.pattern = 8 if args.d is None else args.d, args.pattern or "banded"
    if args.method == "lora" and args.d == 0:
        raise UserError("--d: got 0, want LoRA's r, at least 1")
    if args.batch % WORLD:
        raise UserError(f"--batch: got {args.batch}, want a multiple of the {WORLD} processes")
    if args.save:
        special = args.save.exists() and not args.save.is_file()
        if special or not os.access(args.save.resolve().parent, os.W_OK):
            raise UserError(f"--save: got {str(args.save)!r}, want a file in a folder that can be written")
    if args.method == "svft" and not args.base:  # a rehearsal, on a model that is not trained yet
        svft.inject(GPT2(Config()), TARGETS if args.targets is None else args.targets, args.pattern, args.d)
    size = f"d = {args.d}" if args.pattern != "plain" else "the diagonal"
    return {"full": "full", "lora": f"LoRA, r = {args.d}", "svft": f"SVFT, {args.pattern}, {size}"}[args.method]


def load(args: argparse.Namespace) -> tuple[nn.Module, Codec, Task]:
    """The base model, its codec, and the text in its tokens. What cannot work is refused before the long work."""
    try:
        text = Path(args.data).read_text(encoding="utf-8") if args.data else read_topics()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--data: cannot read {args.data!r} as UTF-8 text: {error}") from None
    if args.cache.is_file():
        raise UserError(f"--cache: got {str(args.cache)!r}, want a folder")
    model, codec = from_transformers(args.base, args.device) if args.base else (GPT2(Config()), BYTES)
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if args.targets is None:
        args.targets = TARGETS if leaves.issuperset(TARGETS) else "all-linear"
    svft._find_targets(model, args.targets)
    most = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "context", args.context)
    if args.context > most:
        raise UserError(f"--context: got {args.context}, want at most the model's {most}")
    amp = args.device.type == "cuda" and bool(args.base) if args.amp is None else args.amp
    source = f"--data {args.data}" if args.data else "pydoc_data.topics"
    task = make_task(text, source, codec, args.context, args.batch, device=args.device, amp=amp)
    if not args.base:
        return pretrained(args.cache, args.device, args.seed), codec, task
    largest = max(int(part.max()) for part in (task.train, task.val, task.test))
    if largest >= (known := model.get_input_embeddings().num_embeddings):
        raise UserError(f"--base: got a tokenizer that knows more than the {known:,} tokens of its model")
    return model, codec, task


def pretrained(cache: Path, device: torch.device, seed: int = 0, steps: int = 1200, lr: float = 3e-3) -> GPT2:
    """Our GPT-2, trained on the standard library's source: from the cache, or made now and put there."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))  # its top-level modules, cut at 4 million characters
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)[:4_000_000]
    task = make_task(text, "the standard library", BYTES, Config.context, 8, device=device)
    key = digest("format 2", dataclasses.astuple(Config()), steps, task.batch, lr, seed, task.train)
    file = cache / f"gpt2-{key}.npz"
    torch.manual_seed(seed)
    model = GPT2(Config()).to(device)
    try:
        with np.load(file) as arrays:  # executes nothing, and checks each array's CRC
            model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
        return model
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # whatever numpy makes of a short or foreign file
        say(f"{file} is damaged and will be made again ({error})")
    train(model, task, steps, lr, seed, "pre-training")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        svft._write(file, svft._npz({name: t.cpu().numpy() for name, t in model.state_dict().items()}))
    except OSError as error:
        say(f"--cache: cannot write, going on without ({error})")
    return model


def from_transformers(name: str, device: torch.device) -> tuple[nn.Module, Codec]:
    """A causal language model and its tokenizer, by name or from a folder, in float32."""
    transformers = need("transformers", "--base")
    want = "a model with its tokenizer"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if not tokenizer("a")["input_ids"]:
            raise ValueError("it knows no token")
        want = "a causal language model"
        model = transformers.AutoModelForCausalLM.from_pretrained(name).float().to(device)
        model.config.use_cache = False
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"--base: got {name!r}, want {want} ({error})") from None

    encode = functools.partial(tokenizer, add_special_tokens=False, verbose=False)
    return model, Codec(lambda text: torch.tensor(encode(text)["input_ids"]), tokenizer.decode)


def digest(*parts: Any) -> str:
    """16 hexadecimal digits that name numbers, texts and tensors, to the last bit."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.cpu().contiguous().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode()
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:16]


# ---------------------------------------------------------------- devices, processes, messages

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


class UserError(Exception):
    """Something that the user can mend: main prints it as one line and returns 2."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What svft.py refuses becomes one line too."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(str(error)) from error


def say(text: str) -> None:
    """Print once, however many processes there are."""
    if RANK == 0:
        print(text, flush=True)


def pick_device(name: str) -> torch.device:
    """auto: cuda, mps or cpu, the first that is there. Under torchrun, each process takes a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if WORLD > 1 and name != "cpu":
        if name != "cuda" or gpus < here:
            raise UserError(f"--device: got {name} for {here} processes and {gpus} GPUs, want cpu, or a GPU for each")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).item()
    except Exception:  # torch raises many kinds
        raise UserError(f"--device: got {name!r}, want cpu, or a cuda or mps device that is there") from None
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    return torch.device(name)


def machine(device: torch.device, amp: bool, dtype: str = "float32") -> str:
    """Where, and in which precision."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    where = f"{device} ({name}), {torch.get_num_threads()} threads, torch {torch.__version__}"
    return f"{where}, {dtype}{', autocast to bfloat16' if amp else ''}"


def need(package: str, option: str) -> Any:
    """An optional package, or one line that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{option}: needs the {package} package: pip install {package}") from None


def peak_memory(device: torch.device) -> float:
    """The most that tensors held on a CUDA device since the last call, in GiB; 0 on another device."""
    if device.type != "cuda":
        return 0.0
    held = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return held / 2**30


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process fill the cache while the others wait; then they read it."""
    if RANK > 0:
        dist.barrier()
    yield
    if RANK == 0 and WORLD > 1:
        dist.barrier()


def parallel(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """model as it is to be trained: compiled if asked for, data-parallel under torchrun."""
    runner = torch.compile(model) if args.compile else model
    own = [args.device] if args.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(runner, own) if WORLD > 1 else runner


# ---------------------------------------------------------------- the other methods, each from its formula


class Adapter(nn.Module):
    """A frozen linear layer W0 x + b, W0 (d1, d2), whose weight a method turns into merged_weight() (d1, d2)."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = as_linear(base).requires_grad_(False)
        self.d1, self.d2 = self.base.weight.shape

    def values(self, *shape: int, scale: float = 0.0) -> nn.Parameter:
        """A trained parameter on W0's device: uniform in [-scale, scale], or zero."""
        W0 = self.base.weight
        return nn.Parameter(torch.empty(shape, dtype=W0.dtype, device=W0.device).uniform_(-scale, scale))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merged_weight(), self.base.bias)


class LoRA(Adapter):
    """h = W0 x + (alpha / r) B A x + b; B = 0 at the start, alpha = 2 r."""

    def __init__(self, base: nn.Module, r: int) -> None:
        super().__init__(base)
        self.A = self.values(r, self.d2, scale=self.d2**-0.5)  # (r, d2)
        self.B = self.values(self.d1, r)  # (d1, r)
        self.scale = 2.0  # alpha / r

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.A) * self.scale, self.B)

    def merged_weight(self) -> Tensor:
        return self.base.weight + self.scale * self.B @ self.A


class DoRA(LoRA):
    """W = m V / ||V||, V = W0 + (alpha / r) B A; m = ||W0|| at the start.

    The norm is taken per output feature (a row of W), as common implementations do; the SVFT paper writes it per
    column. No gradient flows through it, which the authors of DoRA propose to save memory.
    """

    def __init__(self, base: nn.Module, r: int) -> None:
        super().__init__(base, r)
        self.m = nn.Parameter(self.base.weight.detach().norm(dim=1))  # (d1,)

    forward = Adapter.forward

    def merged_weight(self) -> Tensor:
        V = super().merged_weight()
        return (self.m / V.detach().norm(dim=1))[:, None] * V


class VeRA(Adapter):
    """W = W0 + L_b B L_d A; L_b = 0 and L_d = 0.1 at the start, both diagonal and all that is trained.

    shared: (d1, d2) -> the random, frozen A (r, d2) and B (d1, r), the same for all layers of one shape.
    """

    def __init__(self, base: nn.Module, r: int, shared: dict[tuple[int, int], tuple[Tensor, Tensor]]) -> None:
        super().__init__(base)
        if (self.d1, self.d2) not in shared:
            A, B = self.values(r, self.d2, scale=(3 / self.d2) ** 0.5), self.values(self.d1, r, scale=(3 / r) ** 0.5)
            shared[self.d1, self.d2] = A.detach(), B.detach()
        A, B = shared[self.d1, self.d2]
        self.register_buffer("A", A)
        self.register_buffer("B", B)
        self.L_d = nn.Parameter(self.values(r).data + 0.1)  # (r,)
        self.L_b = self.values(self.d1)  # (d1,)

    def merged_weight(self) -> Tensor:
        return self.base.weight + (self.L_b[:, None] * self.B) @ (self.L_d[:, None] * self.A)


class BOFT(Adapter):
    """W = R_m ... R_1 W0, each R a butterfly-permuted block-diagonal orthogonal matrix (d1, d1), blocks b x b.

    Each block is the Cayley transform (I + K)^-1 (I - K) of a trained skew-symmetric K, zero at the start. Factor
    i mixes chunks of b / 2 features that lie 2^i chunks apart, so m factors mix b 2^(m-1) features. In comments on
    shapes, g = d1 / (b 2^i).
    """

    def __init__(self, base: nn.Module, b: int, m: int) -> None:
        super().__init__(base)
        if b % 2 or self.d1 % (b * 2 ** (m - 1)):
            raise ValueError(f"b, m: got {b}, {m}, want b even and b 2^(m-1) to divide d1 = {self.d1}")
        self.b = b
        self.K = self.values(m, self.d1 // b, b * (b - 1) // 2)  # K's entries above the diagonal

    def blocks(self) -> Tensor:  # (m, d1 / b, b, b), orthogonal
        i, j = torch.triu_indices(self.b, self.b, 1, device=self.K.device)
        upper = self.K.new_zeros(*self.K.shape[:2], self.b, self.b)
        upper[:, :, i, j] = self.K
        skew, eye = upper - upper.mT, torch.eye(self.b, device=self.K.device, dtype=self.K.dtype)
        return torch.linalg.solve(eye + skew, eye - skew)

    def merged_weight(self) -> Tensor:
        y = self.base.weight.T  # (d2, d1): R acts on its rows
        for i, Q in enumerate(self.blocks()):
            chunks = y.unflatten(-1, (-1, 2, 2**i, self.b // 2))  # (d2, g, 2, 2^i, b / 2)
            parts = chunks.transpose(-3, -2).flatten(-2)  # (d2, g, 2^i, b)
            mixed = torch.einsum("xgsj,gsij->xgsi", parts, Q.unflatten(0, parts.shape[1:3]))
            y = mixed.unflatten(-1, (2, -1)).transpose(-3, -2).flatten(1)  # (d2, d1)
        return y.T


def as_linear(layer: nn.Module) -> nn.Linear:
    """layer; or for Hugging Face's Conv1D, whose weight is (d2, d1), an nn.Linear with its values."""
    if isinstance(layer, nn.Linear):
        return layer
    linear = nn.Linear(*layer.weight.shape, device="meta")
    linear.weight, linear.bias = nn.Parameter(layer.weight.detach().T.contiguous()), layer.bias
    return linear


def replace(model: nn.Module, targets: Targets, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Freeze model and put make(layer) in the place of each target."""
    model.requires_grad_(False)
    for name, layer in svft._find_targets(model, targets).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, make(layer))
    return model


# ---------------------------------------------------------------- python train_toy.py compare

METHODS = {  # the names in tables
    "base": "as it was", "full": "full fine-tuning", "LoRA": "LoRA", "DoRA": "DoRA", "VeRA": "VeRA", "BOFT": "BOFT",
    "plain": "SVFT plain", "banded": "SVFT banded", "random": "SVFT random", "top-k": "SVFT top-k",
    "diagonal": "SVFT random with the diagonal", "gradient": "SVFT largest of U^T G V",
    "kept": "SVFT truncated, W0 kept", "cut": "SVFT truncated, W0 cut too",
}  # fmt: skip
STYLES = {"LoRA": "C0^-", "DoRA": "C1v-", "VeRA": "C2D-", "BOFT": "C3P-"}  # of lines, as matplotlib writes them
STYLES |= {"plain": "ko-", "banded": "ks-", "random": "kX--", "top-k": "kh:"}
ENTRIES = 64  # of each M in the truncation study, whatever the rank: all of M at rank 8
TABLE_NOTES = """\
Sizes: r of LoRA, DoRA, VeRA; b,m of BOFT: m factors of b x b blocks on the output side; z1,z2 of a band, of which
random and top-k have as many entries (top-k on the square weights, random ones on the others); rank of a truncated SVD.
recovered: (base - method) / (base - full fine-tuning), of the losses on the test split. +-: standard deviation over
the seeds. lr: of those tried with seed 0, the best on the validation split; * the smallest or the largest of them.
LoRA, DoRA: alpha = 2 r. DoRA: the norm per output feature, no gradient through it. VeRA: A, B shared by shape."""


class Entry(NamedTuple):
    """A row of a table: a method at one size."""

    method: str
    size: tuple[int, ...] = ()

    def label(self) -> str:
        return f"{METHODS[self.method]} {','.join(map(str, self.size))}".strip()

    def fits(self, d1: list[int]) -> bool:
        """Whether the method can adapt layers of so many outputs: BOFT's blocks must divide them."""
        return self.method != "BOFT" or not any(d % (self.size[0] * 2 ** (self.size[1] - 1)) for d in d1)


def entries(text: str) -> list[Entry]:
    """ "plain; LoRA 1 4" -> three entries."""
    rows = [(method, sizes or [""]) for method, *sizes in map(str.split, text.split(";"))]
    return [Entry(method, tuple(map(int, filter(None, size.split(","))))) for method, sizes in rows for size in sizes]


# The most telling rows first: --quick takes eight, the base model and 7 methods. Bands have as many entries as LoRA
# r = 1, 2, 4, 8, within 5%.
SMALL = entries(
    "base; full; LoRA 1 4; VeRA 256; plain; banded 1,2 8,8; LoRA 2 8; banded 3,4 16,16; random 1,2 3,4 8,8 16,16; "
    "top-k 1,2 3,4 8,8; DoRA 1 2 4; VeRA 16; BOFT 2,2 4,3 8,4"
)
LARGE = entries(
    "base; full; LoRA 4 32; VeRA 1024; plain; banded 2,2 8,8 16,16; LoRA 1 8; random 2,2 8,8 16,16; top-k 8,8; "
    "DoRA 1 8; BOFT 8,2"
)
STUDIES = {
    f"Truncation, {ENTRIES} random entries in each M": entries("kept 8 32 96 128; cut 8 32 96"),
    "Other choices of Omega, of the sizes above": entries("diagonal 1,2 3,4 8,8; gradient 1,2 3,4 8,8"),
}


def omega_of(entry: Entry, seeds: Iterator[int], gradients: Iterator[Tensor], svd: svft.SVD) -> Tensor:
    """Omega of the next layer: as many entries as the band, by its SVD, its seed, or the gradient at the start."""
    (method, size), seed, G = entry, next(seeds), next(gradients, None)  # G (d1, d2), with respect to W0
    r1, r2 = svd.U.shape[1], svd.Vh.shape[0]
    if method in ("kept", "cut"):
        return svft.omega_random(r1, r2, ENTRIES, seed=seed)
    band = svft.omega_banded(r1, r2, *(size or (0, 0)))
    k = band.shape[1]
    if method in ("plain", "banded"):
        return band
    if method == "top-k" and svd.U.shape[0] == svd.Vh.shape[1]:
        return svft.omega_top_k(svd.U, svd.Vh, k)
    if method == "gradient":
        flat = (svd.U.T @ G @ svd.Vh.T).abs().flatten().topk(k).indices.sort().values.cpu()
        return torch.stack([flat // r2, flat % r2])
    if method == "diagonal":  # all (i, i), and the rest drawn off it: r2 - 1 places per row, (i, i) left out
        i, j = svft.omega_random(r1, r2 - 1, k - r1, seed=seed)
        both = torch.cat([svft.omega_plain(r1, r2), torch.stack([i, j + (j >= i)])], 1)
        return both[:, (both[0] * r2 + both[1]).argsort()]
    return svft.omega_random(r1, r2, k, seed=seed)


def build(model: nn.Module, entry: Entry, seed: int, task: Task, args: argparse.Namespace) -> None:
    """Freeze model but for what the method trains, which starts at W0 ("cut": at the best rank-r part of it)."""
    torch.manual_seed(seed)
    method, size = entry
    model.requires_grad_(method == "full")
    others = {"LoRA": LoRA, "DoRA": DoRA, "BOFT": BOFT, "VeRA": functools.partial(VeRA, shared={})}
    if method in others:
        replace(model, args.targets, lambda layer: others[method](layer, *size))
    elif method not in ("base", "full"):
        seeds, G = itertools.count(1000 * seed), iter([])  # inject takes the layers in the model's order
        if method == "gradient":  # of the loss at the start, summed over 16 batches
            generator = torch.Generator().manual_seed(0)
            for _ in range(16):
                loss_of(model.requires_grad_(True), task.draw(generator), task).backward()
            G = iter([layer.weight.grad for layer in svft._find_targets(model, args.targets).values()])
            model.zero_grad()
        rank = size[0] if method in ("kept", "cut") else None
        pattern = functools.partial(omega_of, entry, seeds, G)
        svft.inject(model, args.targets, pattern, rank=rank, cache_dir=args.cache)
    for layer in model.modules():
        if method == "cut" and isinstance(layer, svft.SVFTLinear):  # as the paper's truncation does to the base model
            layer.weight.data = (layer.U * layer.S) @ layer.Vh


class Run(NamedTuple):
    entry: Entry
    lr: float
    seed: int

    def label(self) -> str:
        return f"{self.entry.label()}, lr {self.lr:.3g}, seed {self.seed}"


class Study:
    """Does runs, and keeps each finished one in a file at once, one JSON line each.

    Several processes may work on one file, and another machine may go on with it.
    """

    def __init__(self, base: nn.Module, task: Task, args: argparse.Namespace, rows: list[Entry]) -> None:
        self.base, self.task, self.args, self.rows = base, task, args, rows
        layers = svft._find_targets(base, args.targets)
        self.n = [min(layer.weight.shape) for layer in layers.values()]
        data = digest(task.train, task.val, task.test, task.context, task.batch, task.amp, task.windows)
        self.fixed = {"base": digest(*base.state_dict().values(), *layers), "data": data, "steps": args.steps}
        self.file, self.results = args.out / "runs.jsonl", {}
        self.read()

    def read(self) -> None:
        """Take in what this process and others have finished."""
        for line in self.file.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that was cut short
                (method, size, lr, seed), fixed, result = json.loads(line)
                if fixed == self.fixed:
                    found = {name: float(result[name]) for name in ("trained", "val", "test", "seconds")}
                    self.results[Run(Entry(method, tuple(size)), lr, seed)] = found

    def middle(self, entry: Entry) -> float:
        """The learning rate to begin with."""
        (method, size), large = entry, bool(self.args.base)
        if method == "base":
            return 0.0
        if method.lower() in RATES:
            return usual_lr(method.lower(), size[0] if size else 1, large)
        few, (z1, z2) = method in ("kept", "cut"), size if len(size) == 2 else (0, 0)
        band = statistics.mean(n * (z1 + z2 + 1) - (z1 * (z1 + 1) + z2 * (z2 + 1)) / 2 for n in self.n)  # entries of M
        return usual_lr("svft", ENTRIES if few else band, large) / (2 if few or method == "gradient" else 1)

    def grid(self, entry: Entry) -> tuple[dict[float, dict[str, float]], float | None, list[float]]:
        """Results with seed 0 by learning rate; the best rate, once all are tried; the rates still to try.

        They are half, once and twice the middle; where the best is at an edge, the grid goes on in its direction.
        """
        low, high = (0, 0) if self.args.quick or entry.method == "base" else (-1, 1)
        while True:
            rates = [self.middle(entry) * 2.0**e for e in range(low, high + 1)]
            tried = {lr: self.results[run] for lr in rates if (run := Run(entry, lr, 0)) in self.results}
            # a loss that is not a number is the worst
            best = min(tried, key=lambda lr: (math.isnan(tried[lr]["val"]), tried[lr]["val"]), default=None)
            inside = len(rates) in (1, 6) or best not in (rates[0], rates[-1])
            if inside or len(tried) < len(rates):
                return tried, best, [lr for lr in rates if lr not in tried]
            low, high = (low - 1, high) if best == rates[0] else (low, high + 1)

    def pending(self) -> tuple[list[Run], int]:
        """The runs to do next, those with seed 0 first; and how many are left in all, as far as can be known."""
        todo, later = [], 0
        for entry in self.rows:
            _, best, rates = self.grid(entry)
            more = range(1, 1 if entry.method == "base" else self.args.seeds)
            todo += [Run(entry, lr, 0) for lr in rates]
            todo += [run for seed in more if not rates and (run := Run(entry, best, seed)) not in self.results]
            later += len(more) if rates else 0
        return sorted(todo, key=lambda run: run.seed), len(todo) + later

    def work(self) -> None:
        """Do all runs, and leave to other processes on the same file what they have taken."""
        begin, before = time.perf_counter(), len(self.results)
        with open(self.args.out / "runs.lock", "ab") as lock:
            while (todo := self.pending()[0]) and time.perf_counter() - begin < 60 * self.args.minutes:
                run = next((run for run in todo if claim(lock, [run, self.fixed])), None)
                time.sleep(run is None)  # others do all that is left
                self.read()
                if run and run not in self.results:
                    result = self.do(run)
                    left = self.pending()[1]
                    seconds = left * (time.perf_counter() - begin) / (len(self.results) - before)
                    more = f"{left} more runs, {timedelta(seconds=int(seconds))} left"
                    say(f"{run.label()}: validation loss {result['val']:.4f}, {result['seconds']:.1f} s; {more}")

    def do(self, run: Run) -> dict[str, float]:
        start, task, model = time.perf_counter(), self.task, copy.deepcopy(self.base)
        build(model, run.entry, run.seed, task, self.args)
        result: dict[str, float] = {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        if run.lr:
            train(model, task, self.args.steps, run.lr, run.seed, run.label())
        result |= {split: evaluate(model, getattr(task, split), task) for split in ("val", "test")}
        result["seconds"] = time.perf_counter() - start
        with open(self.file, "a") as file:  # on a line of its own, whatever the one before looks like
            file.write("\n" + json.dumps([[*run.entry, run.lr, run.seed], self.fixed, result]) + "\n")
        self.results[run] = result
        return result


def claim(lock: Any, run: Any) -> bool:
    """Whether this process may do the run. When the process that took it ends, the system gives it back."""
    try:
        import fcntl

        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(digest(run), 16) >> 2)  # one byte stands for the run
    except ImportError:  # Windows: nothing is shared
        pass
    except (BlockingIOError, PermissionError):
        return False
    return True


class Point(NamedTuple):
    """What came of an entry at its best learning rate: test losses, and recovered shares in %, one for each seed."""

    entry: Entry
    trained: int  # parameters
    lr: str  # with a star where it is the largest or smallest of those tried
    test: list[float]
    recovered: list[float]


def points_of(study: Study) -> dict[Entry, Point]:
    """What is finished, by method and size; the base model and full fine-tuning come first."""
    found: dict[Entry, Point] = {}
    for entry in sorted(study.rows, key=lambda entry: (list(METHODS).index(entry.method), entry.size)):
        tried, lr, _ = study.grid(entry)
        if tried:
            runs = [Run(entry, lr, seed) for seed in range(study.args.seeds)]
            test = [study.results[run]["test"] for run in runs if run in study.results]
            star = " *" if len(tried) > 1 and lr in (min(tried), max(tried)) else ""
            found[entry] = Point(entry, int(tried[lr]["trained"]), f"{lr:.2g}{star}", test, [])
    start, goal = (statistics.mean(found[e].test) if (e := Entry(m)) in found else math.nan for m in ("base", "full"))
    if not goal < start:
        raise UserError("--steps, --minutes: got too few, want a full fine-tuning that gains on the test split")
    for point in found.values():
        point.recovered.extend(100 * (start - loss) / (start - goal) for loss in point.test)
    return found


def table(points: list[Point], total: int, unit: str) -> str:
    def spread(values: list[float], digits: int) -> str:
        deviation = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{deviation}"

    rows = [["method, size", "trained", "% of model", "lr", f"test loss, nats/{unit}", "recovered, %"]]
    for entry, n, lr, test, recovered in points:
        rows.append([entry.label(), f"{n:,}", f"{100 * n / total:.2f}", lr, spread(test, 4), spread(recovered, 1)])
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """A table that reads well on a terminal too: heads first; all but the first column are set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * (w - (c > 0)) + ":" * (c > 0) for c, w in enumerate(widths)], *rows[1:]]
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in aligned)


def text_plot(points: list[Point]) -> str:
    """The figure as text, which every page shows: a bar for each point, the one with the fewest parameters first."""
    shares = [statistics.mean(point.recovered) for point in points]
    low, top = 10 * math.floor(max(0, min(shares)) / 10), max(100, *shares)
    lines = [f"{'':<22}{'trained':>12}  recovered, %, from {low} on"]
    for point, share in sorted(zip(points, shares, strict=True), key=lambda pair: pair[0].trained):
        bar = ("#" if "SVFT" in METHODS[point.entry.method] else "-") * round(60 * (share - low) / (top - low))
        lines.append(f"{point.entry.label():<22}{point.trained:>12,} |{bar} {share:.1f}")
    return "\n".join([*lines, "# SVFT, - another method"])


def plot(points: list[Point], stem: str) -> str:
    """The figure as PNG and SVG, where matplotlib is installed: SVFT in black, the others in colour."""
    if not importlib.util.find_spec("matplotlib"):
        return "no picture: it needs the matplotlib package (pip install matplotlib)"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="trained parameters", ylabel="recovered, %")
    axes.axhline(100, color="black", linewidth=0.8, label="full fine-tuning")
    for method, style in STYLES.items():
        if mine := [point for point in points if point.entry.method == method]:
            y = [statistics.mean(point.recovered) for point in mine]
            errors = [statistics.stdev(point.recovered) if len(point.recovered) > 1 else 0 for point in mine]
            axes.errorbar([point.trained for point in mine], y, errors, fmt=style, label=METHODS[method], capsize=3)
    axes.grid(alpha=0.3)
    axes.legend()
    for kind in ("png", "svg"):
        figure.savefig(f"{stem}.{kind}", dpi=150)
    return f"picture: {stem}.png, {stem}.svg"


def compare(args: argparse.Namespace) -> None:
    """Does what runs are not in the file yet, then prints the tables and draws the figure."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        open(args.out / "runs.jsonl", "a").close()
    except OSError as error:
        raise UserError(f"--out: cannot write in the folder {args.out}: {error}") from None
    large, few, args.seed = bool(args.base), args.quick and bool(args.base), 0
    args.context, args.batch = args.context or (256 if large else Config.context), args.batch or (4 if few else 8)
    args.steps, args.seeds = args.steps or (20 if few else 120), args.seeds or (1 if args.quick else 3)
    with refusals():
        base, codec, task = load(args)
        replace(base, args.targets, as_linear)
    task.windows = 16 if few else task.windows
    d1 = [layer.weight.shape[0] for layer in svft._find_targets(base, args.targets).values()]
    figure = [entry for entry in (LARGE if large else SMALL) if entry.fits(d1)][: 8 if args.quick else None]
    studies = {"": figure} | ({} if large or args.quick else STUDIES)
    study = Study(base, task, args, list(dict.fromkeys(itertools.chain(*studies.values()))))
    study.work()
    points, total = points_of(study), sum(p.numel() for p in base.parameters())
    tables = {}
    for title, rows in studies.items():
        tables[title] = table([point for point in points.values() if point.entry in rows], total, codec.unit)
    finite = [point for point in points.values() if np.isfinite(point.recovered).all()]
    drawn = [point for point in finite if point.entry in figure and point.entry.method in STYLES]
    size = f"up to {args.seeds} seeds, {args.steps} steps of {task.batch} x {task.context} {codec.unit}s"
    text = [f"{args.base or 'The small GPT-2'}, {size}, {machine(task.device, task.amp)}."]
    text += [tables.pop(""), TABLE_NOTES, *([f"```text\n{text_plot(drawn)}\n```"] if drawn else [])]
    text += [f"## {title}\n\n{rows}" for title, rows in tables.items()]
    names = ["compare", *[Path(args.base or "").resolve().name] * large, *["quick"] * args.quick]
    stem = str(args.out / "-".join(names))
    Path(f"{stem}.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    say("\n" + "\n\n".join(text) + f"\n\ntable: {stem}.md\n{plot(drawn, stem)}")


# ---------------------------------------------------------------- python train_toy.py bench

WHOLE = Config(vocabulary=50257, context=1024, layers=12, heads=12, width=768)
BLOCK = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]  # (d1, d2) of GPT-2's c_attn, c_proj, c_fc, c_proj
PATTERNS = {"plain": ("plain", 0), "banded 2": ("banded", 2), "banded 16": ("banded", 16)}
SIZES = ["vocab_size", "n_positions", "n_layer", "n_head", "n_embd"]  # Config's fields, as transformers calls them
PATHS = ["dense", "gather", "fused"]


def bench(args: argparse.Namespace) -> None:
    """Times training steps of GPT-2, then training of single layers."""
    begin, gpu = time.perf_counter(), args.device.type != "cpu"
    args.peft, args.amp = need("peft", "--peft") if args.peft else None, bool(args.amp)
    args.batch = args.batch or (8 if gpu else 1)
    args.context = args.context or (1024 if gpu else 256)
    longest = max(WHOLE.context, args.context)
    config = dataclasses.replace(WHOLE, context=longest, layers=WHOLE.layers if gpu else min(4, WHOLE.layers))
    say(machine(args.device, args.amp, args.dtype))
    args.dtype = getattr(torch, args.dtype)
    size = f"{config.layers} of its {WHOLE.layers} blocks, random weights, {args.batch} x {args.context} tokens"
    say(f"\nA training step of GPT-2: {size}\n\n{steps_table(args, config)}")
    say("\nSingle layers, forward and backward: time over a frozen linear layer's; auto: the path that it takes\n")
    say(layers_table(args, [256] if args.quick else [256, 1024, 8192] if gpu else [64, 256, 1024]))
    say(f"\n{time.perf_counter() - begin:.0f} s")


def bench_models(args: argparse.Namespace, config: Config, cache: str) -> Iterator[tuple[str, nn.Module]]:
    """GPT-2 with random weights, of transformers where it is installed, and with each method in turn."""
    torch.manual_seed(0)
    if importlib.util.find_spec("transformers"):
        hf, sizes = need("transformers", "bench"), dict(zip(SIZES, dataclasses.astuple(config), strict=True))
        base = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, use_cache=False))
    else:
        base = GPT2(config)
    base = base.to(args.dtype).train()

    def fresh() -> nn.Module:
        return copy.deepcopy(base).to(args.device)

    yield "full fine-tuning", fresh()
    yield "LoRA r=8", replace(fresh(), TARGETS, functools.partial(LoRA, r=8))
    if args.peft:
        conv1d = not isinstance(base, GPT2)
        lora = args.peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, fan_in_fan_out=conv1d)
        yield "LoRA r=8, peft's", args.peft.inject_adapter_in_model(lora, fresh().requires_grad_(False))
    for name, (pattern, d) in PATTERNS.items():
        yield f"SVFT {name}", svft.inject(fresh(), TARGETS, pattern, d, cache_dir=cache)


def steps_table(args: argparse.Namespace, config: Config) -> str:
    """What a step of each method takes. All models are there at once; the memory is of each alone."""
    steps, rows, held = {}, {}, 0.0
    window = torch.randint(config.vocabulary, (args.batch, args.context + 1))
    task = Task(window, window, window, args.context, args.batch, args.device, args.amp)
    torch._dynamo.config.cache_size_limit = 64  # with --compile: the models share their code

    def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        loss_of(model, window, task).backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as cache:  # of the SVDs
        for name, model in bench_models(args, config, cache):
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, 1e-5, fused=True)
            runner = torch.compile(model) if args.compile else model
            steps[name] = functools.partial(one_step, runner, optimizer)
            peak_memory(args.device)
            seconds_of(steps[name], 1 if args.device.type == "cpu" else 3)
            peak = peak_memory(args.device)
            memory = f"{peak - held:.2f}" if peak else "-"
            rows[name] = [name, f"{sum(p.numel() for p in trained):,}", memory]
            held = torch.cuda.memory_allocated() / 2**30
    times = medians(steps, 5 if args.quick else 20)
    body = [[*rows[name], f"{1000 * s:.1f}", f"{args.batch * args.context / s:,.0f}"] for name, s in times.items()]
    return markdown([["method", "trained", "peak memory, GiB", "ms per step", "tokens/s"], *body])


def bench_layers(d1: int, d2: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Layers d2 -> d1 with one W0, which is made from its SVD, so that nobody has to wait for one."""
    torch.manual_seed(0)
    n = min(d1, d2)
    U, V = (torch.linalg.qr(torch.randn(d, n).to(device)).Q for d in (d1, d2))  # (d1, n), (d2, n)
    S = torch.linspace(2, 0.1, n, device=device)
    frozen = nn.Linear(d2, d1, device=device, dtype=dtype).requires_grad_(False)
    frozen.weight.data = ((U * S) @ V.T).to(dtype)
    svd = svft.SVD(*(t.to(dtype) for t in (U, S, V.T)))
    layers = {name: svft.SVFTLinear(frozen, pattern, d, svd=svd) for name, (pattern, d) in PATTERNS.items()}
    return {"frozen": frozen, **layers}


def layers_table(args: argparse.Namespace, lengths: list[int]) -> str:
    """One row for each shape, length and pattern; then the worst cell."""
    rows, over = [["d1 x d2, T, pattern", *PATHS, "auto", "auto/best"]], {}
    may = PATHS[:2] if args.amp or args.dtype == torch.bfloat16 else PATHS  # that auto may take
    autocast = torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp)

    def call(layer: nn.Module, path: str, x: Tensor) -> None:
        if path:
            layer.path = path
        with autocast:
            y = layer(x)
        torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], torch.ones_like(y))

    for (d1, d2), T in itertools.product([*BLOCK, *[(4096, 4096)] * (args.device.type == "cuda")], lengths):
        layers = bench_layers(d1, d2, args.device, args.dtype)
        x = torch.randn(T, d2, device=args.device, dtype=args.dtype, requires_grad=True)
        forms = [(name, path) for name in layers for path in (PATHS if name in PATTERNS else [""])]
        times = medians({form: functools.partial(call, layers[form[0]], form[1], x) for form in forms}, 1)
        for name in PATTERNS:
            with autocast:
                auto = svft._cheapest_path(layers[name], x)
            label = f"{d1} x {d2}, {T}, {name}"
            over[label] = times[name, auto] / min(times[name, path] for path in may)
            ratios = [f"{times[name, path] / times['frozen', '']:.2f}" for path in PATHS]
            rows.append([label, *ratios, auto, f"{over[label]:.2f}"])
    worst = max(over, key=over.get)
    left_out = ", fused left out" if len(may) < 3 else ""
    return f"{markdown(rows)}\n\nauto over the fastest path{left_out}: {over[worst]:.2f} at worst ({worst})."


def seconds_of(call: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) / times


def medians(calls: dict[Any, Callable[[], Any]], budget: float) -> dict[Any, float]:
    """Median seconds of each call over 3 to 25 rounds, as many as the budget in seconds allows.

    Rounds are interleaved (A B C, A B C, ...), so that a machine that slows down slows all alike. Short calls are
    timed several at once, after a round that does not count.
    """
    for _ in range(2):
        first = {key: seconds_of(call, 1) for key, call in calls.items()}
        if sum(first.values()) > 1:
            break
    times = {key: max(1, min(20, int(1e-3 / seconds))) for key, seconds in first.items()}
    rounds = int(budget / sum(first[key] * times[key] for key in calls))
    found = [{key: seconds_of(calls[key], times[key]) for key in calls} for _ in range(max(3, min(25, rounds)))]
    return {key: statistics.median(values[key] for values in found) for key in calls}


# ---------------------------------------------------------------- the command line


def number(kind: type, least: float) -> Callable[[str], Any]:
    """An argument type: a finite number of this kind, at least least."""

    def parse(text: str) -> Any:
        if not least <= (value := kind(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"got {text}, want a finite number of at least {least}")
        return value

    parse.__name__ = kind.__name__  # argparse's "invalid int value"
    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message} (--help lists the options)")


def add_options(parser: Parser, command: str) -> None:
    def add(commands: str, name: str, **options: Any) -> None:
        if command in commands:
            parser.add_argument(f"--{name}", **options)

    def names(text: str) -> Targets:
        return text if text == "all-linear" else [name for name in text.split(",") if name]

    count, flag = number(int, 1), "store_true"
    both, every = "finetune compare", "finetune compare bench"
    add(every, "device", default="auto", help="auto (cuda, mps or cpu), or a name such as cuda:1")
    add(both, "base", metavar="NAME_OR_FOLDER", help="a causal language model of transformers, as gpt2")
    add(both, "data", metavar="FILE", help="UTF-8 text to fine-tune on (Python's language reference)")
    add(both, "targets", type=names, help=f"all-linear, or a list ({','.join(TARGETS)}, if the model has them)")
    add("finetune", "method", default="svft", choices=["svft", "lora", "full"], help="(svft)")
    add("finetune", "pattern", choices=["plain", "banded", "random", "top_k"], help="where M is not zero (banded)")
    add("finetune", "d", type=number(int, 0), help="half-width of the band; of random, top_k its size; LoRA's r (8)")
    add("finetune", "lr", type=number(float, 1e-9), help="peak learning rate (by method and size)")
    add("finetune", "seed", type=number(int, 0), default=0, help="of pre-training, random entries and batches (0)")
    add("finetune", "save", metavar="FILE.npz", type=Path, help="where to write SVFT's adapter")
    add("compare", "quick", action=flag, help="7 methods, 1 learning rate, 1 seed; with --base 20 steps of 4 x 256")
    add("compare", "seeds", type=count, help="runs at the best learning rate (3; --quick: 1)")
    add("compare", "minutes", type=number(float, 0), default=1e9, help="start no run later, and draw what is there")
    add("compare", "out", type=Path, default=Path("results"), help="folder of runs and tables, can be shared (results)")
    add("bench", "quick", action=flag, help="fewer rounds, one length")
    add("bench", "peft", action=flag, help="time the LoRA of the peft package too")
    add("bench", "dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights (float32)")
    add(both, "steps", type=count, help="of training (300; compare: 120)")
    add(every, "batch", type=count, help="sequences in a step (8; compare --base --quick 4; bench on a CPU 1)")
    add(every, "context", type=count, help="tokens in a sequence (128; compare --base 256; bench 1024, on a CPU 256)")
    if command == "finetune":
        parser.set_defaults(steps=300, batch=8, context=128)
    yes_or_no = argparse.BooleanOptionalAction
    add(every, "amp", action=yes_or_no, help="bfloat16 autocast (on: a GPU with --base; bench: off)")
    add("finetune bench", "compile", action=flag, help="torch.compile")
    add(both, "cache", type=Path, default=CACHE, help=f"folder for the pre-trained model and the SVDs ({CACHE.name})")


COMMANDS = {"finetune": finetune, "compare": compare, "bench": bench}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = argv.pop(0) if argv and argv[0] in COMMANDS else "finetune"
    name = "train_toy.py" if command == "finetune" else f"train_toy.py {command}"
    parser = Parser(name, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser, command)
    try:
        args = parser.parse_args(argv)
        if command != "finetune" and WORLD > 1:
            raise UserError("runs in one process: start it with python, not with torchrun")
        args.device = pick_device(args.device)
        if WORLD > 1:  # the others may have to wait for the first one's pre-training
            gpu = args.device if args.device.type == "cuda" else None
            dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu, timeout=timedelta(hours=2))
        COMMANDS[command](args)
        return 0
    except UserError as error:
        if RANK == 0:
            print(f"{parser.prog}: {' '.join(str(error).split())[:400]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    finally:
        if WORLD > 1 and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
