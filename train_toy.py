"""Fine-tune GPT-2 with SVFT, set SVFT against other methods, and time it: three commands, no download, no GPU needed.

    python train_toy.py
        Pre-trains a small GPT-2 (842,496 parameters, bytes as tokens) on the source of Python's standard library,
        keeps it in .svft_cache, and fine-tunes it with SVFT on the prose of Python's language reference. The loss on
        held-out prose falls by about 0.29 nats per byte with 4% of the parameters. Two minutes the first time, 30 s
        after that. --base gpt2 fine-tunes the real one, or any causal language model of transformers.
        `torchrun --nproc_per_node=2 train_toy.py` trains on two GPUs, or in two processes on the CPU.
    python train_toy.py compare
        Figure 1 of the paper in miniature: full fine-tuning, LoRA, DoRA, VeRA, BOFT and four kinds of SVFT at several
        sizes, three seeds each, and three studies; a table, and a plot where matplotlib is installed. 35 min;
        stop it at any time, it goes on from there. --quick: 5 min.
    python train_toy.py bench
        What each path of svft.py costs, in times of a frozen linear layer, beside LoRA. 110 s; --quick: 13 s.

Times are for 2 CPU cores (x86-64 with AVX-512) and torch 2.13. --help after a command lists its options.
To read: Task (what is trained on), GPT2, train, finetune; then each method in 20 to 40 lines; then compare and bench.
In comments on shapes, B is the number of sequences and T that of their tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import platform
import statistics
import sys
import time
import uuid
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


class UserError(Exception):
    """Something that the user can mend: main prints it as one line and returns 2."""


# ---------------------------------------------------------------- where we run: device, processes, terminal


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def say(text: str = "") -> None:
    """Print once, however many processes there are."""
    if rank() == 0:
        print(text, flush=True)


def pick_device(name: str) -> torch.device:
    """auto: cuda, mps or cpu, the first that is there. Under torchrun, each process takes a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if name == "cuda" and 0 < gpus < here:
        raise UserError(f"torchrun: got {here} processes for {gpus} GPUs, want at most one process per GPU")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            own = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
            torch.cuda.set_device(device := torch.device("cuda", own))
        elif device.type not in ("mps", "cpu"):
            raise ValueError("another kind")
        torch.zeros(1, device=device)
    except Exception:  # torch raises many kinds
        raise UserError(f"--device: got {name!r}, want cpu, or a cuda or mps device that is there") from None
    return device


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; the CPU always has."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Under torchrun, join the other processes. They may have to wait for the first one's pre-training."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process fill the cache while the others wait; then they read it."""
    if world() > 1 and rank() > 0:
        try:
            dist.barrier()
        except RuntimeError:
            raise UserError("the first process has stopped") from None
    yield
    if world() > 1 and rank() == 0:
        dist.barrier()


def peak_memory(device: torch.device) -> str:
    """The most memory held so far: by tensors on a CUDA device, else by the whole process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of the process"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """A line on stderr: rewritten twice a second on a terminal, a new one every 15 seconds elsewhere."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.terminal = sys.stderr.isatty()
        self.start = self.last = time.perf_counter()

    def __call__(self, done: int, text: Callable[[float], str]) -> None:
        """`done` units are finished. text(units per second) is called only where a line is due: it may wait for it."""
        now = time.perf_counter()
        due = now - self.last >= (0.5 if self.terminal else 15) or done == self.total
        if rank() or not self.label or not due:
            return
        self.last, rate = now, done / (now - self.start)
        line = f"{self.label}: {self.unit} {done}/{self.total}, {text(rate)}, {clock((self.total - done) / rate)} left"
        end = "" if self.terminal and done < self.total else "\n"
        print(f"\r{line}\x1b[K" if self.terminal else line, end=end, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- text: tokens, and what is held out


class Codec(NamedTuple):
    """Text to tokens (n,) int64 and back. unit: what one token is, for the report."""

    encode: Callable[[str], Tensor]
    decode: Callable[[list[int]], str]
    unit: str


BYTES = Codec(
    encode=lambda text: torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)),
    decode=lambda tokens: bytes(tokens).decode(errors="replace"),
    unit="byte",
)


def read_stdlib(limit: int = 4_000_000) -> str:
    """The standard library's top-level modules in alphabetical order, cut at limit characters: to pre-train on."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)[:limit]


def read_topics() -> str:
    """The language reference's prose, as help() shows it: to fine-tune on.

    Topics repeat each other (the one on compound statements holds those on if, for and while), so each paragraph
    is kept once: otherwise much of the held-out text would be training text as well.
    """
    from pydoc_data.topics import topics

    kept: dict[str, str] = {}
    for paragraph in "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n"):
        kept.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(kept.values())


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"--data: cannot read {path!r} as UTF-8 text: {error}") from None


@dataclasses.dataclass
class Task:
    """What to train on, and where: the tokens of each split, (n,) int64 on the CPU, and the size of a batch."""

    train: Tensor
    val: Tensor
    test: Tensor
    context: int  # tokens per sequence
    batch: int  # sequences per step, all processes together
    device: torch.device
    amp: bool  # bfloat16 autocast
    share: tuple[int, int] = (0, 1)  # which part of a batch is this process', of how many

    def draw(self, generator: torch.Generator) -> Tensor:
        """This process' share of a batch of random windows of the training text: (B, context + 1)."""
        starts = torch.randint(len(self.train) - self.context, (self.batch,), generator=generator)
        part, parts = self.share
        return self.train[starts[part::parts, None] + torch.arange(self.context + 1)]


def make_task(text: str, source: str, codec: Codec, args: argparse.Namespace, device: torch.device) -> Task:
    """Cut the text's tokens into 100 blocks: of each ten, eight to train, one to validate, one to test."""
    tokens = codec.encode(text)
    length = len(tokens) // 100
    if 10 * length <= args.context:
        got, want = f"{len(tokens):,} {codec.unit}s", f"{10 * args.context + 100:,} or more"
        raise UserError(f"{source}: too little text: got {got}, want {want}")
    blocks, fold = tokens[: 100 * length].view(100, length), torch.arange(100) % 10
    train, val, test = (blocks[part].flatten() for part in (fold < 8, fold == 8, fold == 9))
    amp = device.type == "cuda" if args.amp is None else args.amp
    return Task(train, val, test, args.context, args.batch, device, amp)


# ---------------------------------------------------------------- the model: GPT-2's architecture, small


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


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, T) -> (B, T, vocabulary), of our GPT-2 or of a model from transformers."""
    out = model(tokens)
    return getattr(out, "logits", out)


@torch.no_grad()
def generate(model: nn.Module, prompt: Tensor, count: int, context: int, seed: int) -> list[int]:
    """count tokens that go on from prompt (n,), drawn at temperature 0.8."""
    tokens, generator = prompt, torch.Generator().manual_seed(seed)
    for _ in range(count):
        last = logits_of(model, tokens[None, -context:])[0, -1].float().cpu()  # (vocabulary,)
        drawn = torch.multinomial((last / 0.8).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn.to(tokens.device)])
    return tokens[len(prompt) :].tolist()


# ---------------------------------------------------------------- training


def loss_of(model: nn.Module, window: Tensor, task: Task) -> Tensor:
    """Mean cross-entropy of window (B, context + 1) in nats per token; does not wait for the device."""
    window = window.pin_memory() if task.device.type == "cuda" else window
    window = window.to(task.device, non_blocking=True)
    with torch.autocast(task.device.type, torch.bfloat16, enabled=task.amp):
        logits = logits_of(model, window[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, task: Task, limit: int = 256) -> float:
    """Mean loss over at most limit windows spread evenly over tokens (n,), always the same; nats per token."""
    windows = tokens.unfold(0, task.context + 1, task.context)  # (N, context + 1)
    windows = windows[:: math.ceil(len(windows) / limit)]
    training, total = model.training, torch.zeros((), device=task.device)
    model.eval()
    for part in windows.split(32):
        total += loss_of(model, part, task) * len(part)
    model.train(training)
    return float(total) / len(windows)


def train(model: nn.Module, task: Task, steps: int, lr: float, seed: int, label: str = "") -> float:
    """AdamW on what requires a gradient, 10% warm-up, then a cosine to zero. Returns the seconds taken."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0, fused=True)
    warm = max(1, round(0.1 * steps))
    fall = max(1, steps - warm)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (t + 1) / warm if t < warm else 0.5 + 0.5 * math.cos(math.pi * (t + 1 - warm) / fall)
    )
    generator = torch.Generator().manual_seed(seed)
    progress, tokens = Progress(label, steps, "step"), task.batch * task.context
    model.train()
    start = time.perf_counter()
    for step in range(1, steps + 1):
        loss = loss_of(model, task.draw(generator), task)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(step, lambda r, loss=loss: f"loss {loss.item():.3f}, {r:.1f} steps/s, {r * tokens:,.0f} tokens/s")
    synchronize(task.device)
    return time.perf_counter() - start


# ---------------------------------------------------------------- the two base models


def digest(*parts: Any) -> str:
    """16 hexadecimal digits that name numbers, texts and tensors, to the last bit."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.cpu().contiguous().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode()
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:16]


def read_cache(file: Path, device: torch.device) -> GPT2 | None:
    """The model in file, or None where there is none or it is damaged; executes nothing."""
    model = GPT2(Config()).to(device)
    try:
        saved = torch.load(file, map_location=device, weights_only=True)
        if saved["digest"] != digest(*saved["state"].values()):
            raise ValueError("checksum")
        model.load_state_dict(saved["state"])
        return model
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise UserError(f"--cache: got {str(file.parent)!r}, want a folder") from None
    except Exception:  # whatever torch.load makes of a short or foreign file
        say(f"{file} is damaged and will be made again")
        return None


def write_cache(file: Path, model: GPT2) -> None:
    """Whole or not at all: a process that is killed here leaves no half file."""
    state, temporary = model.state_dict(), file.with_suffix(f".{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save({"state": state, "digest": digest(*state.values())}, temporary)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        say(f"going on without a cache: cannot write {file} ({error})")


def pretrained(cache: Path, device: torch.device, seed: int = 0, steps: int = 1200, lr: float = 3e-3) -> GPT2:
    """Our GPT-2, trained on the standard library's source: from the cache, or made now and put there."""
    settings = argparse.Namespace(context=Config.context, batch=8, amp=False)
    task = make_task(read_stdlib(), "the standard library", BYTES, settings, device)
    key = digest("format 1", dataclasses.astuple(Config()), steps, task.batch, lr, seed, task.train)
    file = cache / f"gpt2-{key}.pt"
    if (model := read_cache(file, device)) is None:
        torch.manual_seed(seed)
        model = GPT2(Config()).to(device)
        train(model, task, steps, lr, seed, "pre-training")
        write_cache(file, model)
    return model


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def from_transformers(name: str, device: torch.device) -> tuple[nn.Module, Codec]:
    """A causal language model and its tokenizer, by name or from a folder, in float32."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError("--base: needs the transformers package: pip install transformers") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if not tokenizer("a")["input_ids"]:
            raise ValueError("it knows no token")
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"--base: got {name!r}, want a model with its tokenizer ({one_line(error)})") from None
    try:
        model = AutoModelForCausalLM.from_pretrained(name).float().to(device)
        model.config.use_cache = False
    except Exception as error:
        raise UserError(f"--base: got {name!r}, want a causal language model ({one_line(error)})") from None

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return model, Codec(encode, tokenizer.decode, "token")


# ---------------------------------------------------------------- python train_toy.py


def svft_lr(k: float) -> float:
    """A peak learning rate for k entries per matrix: near the best on this task, and near the paper's."""
    return min(0.2, 5 * k ** (-2 / 3))


def inject(model: nn.Module, args: argparse.Namespace, cache: Path | None) -> nn.Module:
    """svft.inject with the command line's choices, its refusals as one line."""
    try:
        return svft.inject(model, args.targets, args.pattern, args.d, seed=args.seed, cache_dir=cache)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(one_line(error)) from None


def prepare(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Codec, Task]:
    """The base model, its codec and the text in its tokens; refuses what it must before the long work."""
    if args.save and (args.save.is_dir() or not args.save.resolve().parent.is_dir()):
        raise UserError(f"--save: got {str(args.save)!r}, want a file in a folder that exists")
    if args.batch % world():
        raise UserError(f"--batch: got {args.batch}, want a multiple of the {world()} processes")
    text = read_text(args.data) if args.data else read_topics()
    model, codec = from_transformers(args.base, device) if args.base else (None, BYTES)
    most = getattr(model.config, "max_position_embeddings", args.context) if model else Config.context
    if args.context > most:
        raise UserError(f"--context: got {args.context}, want at most the model's {most}")
    task = make_task(text, args.data or "pydoc_data.topics", codec, args, device)
    task.share = rank(), world()
    if model is None:
        inject(GPT2(Config()), args, None)  # a rehearsal on a model that is not trained
        model = pretrained(args.cache, device, args.seed)
    elif int(task.train.max()) >= (known := model.get_input_embeddings().num_embeddings):
        raise UserError(f"--base: got a tokenizer that knows more than the {known:,} tokens of its model")
    return model, codec, task


def finetune(args: argparse.Namespace) -> None:
    """The default command: fine-tune a language model with SVFT and say what came of it."""
    begin, device = time.perf_counter(), pick_device(args.device)
    with processes(device):
        with first_process_first():
            model, codec, task = prepare(args, device)
            total = sum(p.numel() for p in model.parameters())
            inject(model, args, args.cache)
        sizes = [p.numel() for p in model.parameters() if p.requires_grad]  # k of each layer
        lr = args.lr or svft_lr(sum(sizes) / len(sizes))
        before = evaluate(model, task.val, task)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(args.seed + rank())  # for dropout, where the base model has it
        seconds = train(distribute(model, args, device), task, args.steps, lr, args.seed, "fine-tuning")
        memory, after = peak_memory(device), evaluate(model, task.val, task)
        if not math.isfinite(after):
            raise UserError(f"--lr: got {lr:.3g}, want a smaller one: the loss became {after}")
        if args.save and rank() == 0:
            save(model, args.save)
        choice = args.pattern if args.pattern == "plain" else f"{args.pattern}, d = {args.d}"
        precision, rate = "bfloat16 autocast" if task.amp else "float32", args.steps / seconds
        say(f"SVFT              {choice}, learning rate {lr:.3g}, {len(sizes)} layers, on {device} in {precision}")
        say(f"trained           {sum(sizes):,} parameters, {sum(sizes) / total:.2%} of the model's {total:,}")
        say(f"validation loss   {before:.3f} -> {after:.3f} nats per {codec.unit} ({after - before:+.3f})")
        say(f"speed             {rate:.1f} steps/s, {rate * task.batch * task.context:,.0f} {codec.unit}s/s")
        say(f"peak memory       {memory}")
        show(model.eval(), codec, task, args.seed)
        say(f"seconds           {seconds:.1f} of fine-tuning, {time.perf_counter() - begin:.1f} in all")


def save(model: nn.Module, file: Path) -> None:
    try:
        svft.save_adapter(model, file)
    except OSError as error:
        raise UserError(f"--save: cannot write {str(file)!r}: {error}") from None


def distribute(model: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """model as it is to be trained: compiled if asked for, data-parallel under torchrun."""
    runner = torch.compile(model) if args.compile else model
    if world() == 1:
        return runner
    return nn.parallel.DistributedDataParallel(runner, [device] if device.type == "cuda" else None)


@torch.no_grad()
def show(model: nn.Module, codec: Codec, task: Task, seed: int) -> None:
    """Text before and after, and how far the merged model is from the adapted one. Merges model."""
    prompt = task.val[: min(64, task.context // 2)].to(task.device)
    with svft.disabled(model):
        before = codec.decode(generate(model, prompt, 150, task.context, seed))
    after = codec.decode(generate(model, prompt, 150, task.context, seed))
    window = task.val[None, : task.context].to(task.device)
    adapted = logits_of(model, window)
    merged = logits_of(svft.merge(model), window)
    difference, largest = float((merged - adapted).abs().max()), float(adapted.abs().max())
    say(f"merged - adapted  at most {difference:.1e}, of logits up to {largest:.1f}")
    for name, text in (("prompt", codec.decode(prompt.tolist())), ("before", before), ("after", after)):
        say(f"--- {name}\n{text}")
    say("---")


# ---------------------------------------------------------------- the other methods, each from its formula


class Adapter(nn.Module):
    """A frozen linear layer W0 x + b, W0 (d1, d2), with something trained beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.d1, self.d2 = base.weight.shape

    def values(self, *shape: int, scale: float = 0.0) -> nn.Parameter:
        """A trained parameter on W0's device: uniform in [-scale, scale], or zero."""
        W0 = self.base.weight
        return nn.Parameter(torch.empty(shape, dtype=W0.dtype, device=W0.device).uniform_(-scale, scale))


class LoRA(Adapter):
    """h = W0 x + (alpha / r) B A x + b; B = 0 at the start, alpha = 2 r."""

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__(base)
        self.A = self.values(r, self.d2, scale=self.d2**-0.5)  # (r, d2)
        self.B = self.values(self.d1, r)  # (d1, r)
        self.scale = 2.0  # alpha / r

    def update(self, x: Tensor) -> Tensor:  # (..., d2) -> (..., d1)
        return F.linear(F.linear(x, self.A) * self.scale, self.B)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.update(x)

    def merged_weight(self) -> Tensor:  # (d1, d2)
        return self.base.weight + self.scale * self.B @ self.A


class DoRA(LoRA):
    """W = m V / ||V||, V = W0 + (alpha / r) B A; m = ||W0|| at the start.

    The norm is taken per output feature (a row of W), as common implementations do; the SVFT paper writes it per
    column. No gradient flows through it, which the authors of DoRA propose to save memory.
    """

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__(base, r)
        self.m = nn.Parameter(base.weight.detach().norm(dim=1))  # (d1,)

    def gain(self) -> Tensor:  # (d1,)
        return self.m / super().merged_weight().detach().norm(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.gain() * (F.linear(x, self.base.weight) + self.update(x))
        return h if self.base.bias is None else h + self.base.bias

    def merged_weight(self) -> Tensor:
        return self.gain()[:, None] * super().merged_weight()


class VeRA(Adapter):
    """h = W0 x + L_b B L_d A x + b; L_b = 0 and L_d = 0.1 at the start, both diagonal and all that is trained.

    shared: (d1, d2) -> the random, frozen A (r, d2) and B (d1, r), the same for all layers of one shape.
    """

    def __init__(self, base: nn.Linear, r: int, shared: dict[tuple[int, int], tuple[Tensor, Tensor]]) -> None:
        super().__init__(base)
        if (self.d1, self.d2) not in shared:
            A, B = (self.values(r, self.d2, scale=(3 / self.d2) ** 0.5), self.values(self.d1, r, scale=(3 / r) ** 0.5))
            shared[self.d1, self.d2] = A.detach(), B.detach()
        A, B = shared[self.d1, self.d2]
        self.register_buffer("A", A)
        self.register_buffer("B", B)
        self.L_d = nn.Parameter(self.values(r).data + 0.1)  # (r,)
        self.L_b = self.values(self.d1)  # (d1,)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.L_b * F.linear(self.L_d * F.linear(x, self.A), self.B)

    def merged_weight(self) -> Tensor:
        return self.base.weight + (self.L_b[:, None] * self.B) @ (self.L_d[:, None] * self.A)


class BOFT(Adapter):
    """W = R_m ... R_1 W0, each R a butterfly-permuted block-diagonal orthogonal matrix (d1, d1), blocks b x b.

    Each block is the Cayley transform (I + K)^-1 (I - K) of a trained skew-symmetric K, zero at the start. Factor
    i mixes chunks of b / 2 features that lie 2^i chunks apart, so m factors mix b 2^(m-1) features. In comments on
    shapes, g = d1 / (b 2^i).
    """

    def __init__(self, base: nn.Linear, b: int, m: int) -> None:
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

    def merged_weight(self) -> Tensor:  # (d1, d2)
        y = self.base.weight.T  # (d2, d1): R acts on its rows
        for i, Q in enumerate(self.blocks()):
            chunks = y.unflatten(-1, (-1, 2, 2**i, self.b // 2))  # (d2, g, 2, 2^i, b / 2)
            parts = chunks.transpose(-3, -2).flatten(-2)  # (d2, g, 2^i, b)
            mixed = torch.einsum("xgsj,gsij->xgsi", parts, Q.unflatten(0, parts.shape[1:3]))
            y = mixed.unflatten(-1, (2, -1)).transpose(-3, -2).flatten(1)  # (d2, d1)
        return y.T

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merged_weight(), self.base.bias)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """GPT-2's four linear layers per block, by name."""
    return {name: layer for name, layer in model.named_modules() if name.rpartition(".")[2] in TARGETS}


def adapt(model: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Freeze model and put make(layer) in the place of each of those layers."""
    model.requires_grad_(False)
    for name, layer in linears(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, make(layer))
    return model


# ---------------------------------------------------------------- python train_toy.py compare

BANDS = [(1, 2), (3, 4), (8, 8), (16, 16)]  # (z1, z2): as many entries as LoRA r = 1, 2, 4, 8, within 5%
ENTRIES = 64  # of each M in the truncation study, whatever the rank: all of M at rank 8
NAMES = {
    "plain": "SVFT plain",
    "banded": "SVFT banded",
    "random": "SVFT random",
    "top-k": "SVFT top-k [1]",
    "diagonal": "SVFT random with the diagonal",
    "gradient": "SVFT largest of U^T G V",
    "kept": "SVFT rank r, W0 kept",
    "cut": "SVFT rank r, W0 cut to it",
}
NOTES = """\
recovered: (base - method) / (base - full fine-tuning), of the losses on the test split; mean and standard
deviation over the seeds. lr: of those tried with seed 0, the best on the validation split; * the smallest or
the largest of them.
[1] top-k on the square weights only, where it is defined; as many random entries on the others.
LoRA and DoRA: alpha = 2 r. DoRA: the norm per output feature, no gradient through it. BOFT: m factors of b x b
blocks on the output side. VeRA: A and B shared by the layers of one shape."""


class Entry(NamedTuple):
    """A row of a table: a method at one size."""

    method: str
    size: tuple[int, ...] = ()

    def label(self) -> str:
        return " ".join([NAMES.get(self.method, self.method), self.setting()]).strip()

    def setting(self) -> str:
        if len(self.size) < 2:
            return "".join(f"r={r}" for r in self.size)
        if self.method == "BOFT":
            return "b={}, m={}".format(*self.size)
        return f"d={self.size[0]}" if self.size[0] == self.size[1] else "z1={}, z2={}".format(*self.size)

    def rates(self, quick: bool) -> list[float]:
        """The learning rates to try: the middle one, half and twice it. The middles were found on this task."""
        if self.method in NAMES:
            band = svft.omega_banded(Config.width, Config.width, *(self.size if len(self.size) == 2 else (0, 0)))
            middle = svft_lr(ENTRIES if self.method in ("kept", "cut") else band.shape[1])
            middle /= 2 if self.method in ("kept", "cut", "gradient") else 1
        else:
            first = self.size[0] if self.size else 1
            middle = {"full": 0.0025, "VeRA": 0.12, "BOFT": 0.05 / first}.get(self.method, 0.02 * first ** (-1 / 3))
        return [middle] if quick else [middle / 2, middle, middle * 2]


FIGURE = [
    Entry("full"),
    *(Entry("LoRA", (r,)) for r in (1, 2, 4, 8)),
    *(Entry("DoRA", (r,)) for r in (1, 2, 4)),
    *(Entry("VeRA", (r,)) for r in (16, 256)),
    *(Entry("BOFT", size) for size in ((2, 2), (4, 3), (8, 4))),
    Entry("plain"),
    *(Entry("banded", band) for band in BANDS),
    *(Entry("random", band) for band in BANDS),
    *(Entry("top-k", band) for band in BANDS[:3]),
]
QUICK = [Entry("full"), Entry("LoRA", (1,)), Entry("LoRA", (4,)), Entry("DoRA", (4,)), Entry("VeRA", (256,))]
QUICK += [Entry("BOFT", (4, 3)), Entry("plain"), *(Entry(m, b) for m in ("banded", "random") for b in BANDS[::2])]
QUICK += [Entry("top-k", (8, 8))]
RANKS = [Config.width // 16, Config.width // 4, 3 * Config.width // 4]
STUDIES = {
    f"Truncation, {ENTRIES} random entries in each M": [
        *(Entry(method, (r,)) for r in RANKS for method in ("kept", "cut")),
        Entry("kept", (Config.width,)),
    ],
    "Random, the diagonal always held or not": [
        Entry(method, band) for band in BANDS[:3] for method in ("random", "diagonal")
    ],
    "Omega chosen by the gradient at the start, against the paper's four": [
        Entry("plain"),
        *(Entry(m, band) for band in BANDS[:3] for m in ("banded", "random", "top-k", "gradient")),
    ],
}


class Outcome(NamedTuple):
    """What came of an entry at its best learning rate."""

    lr: str  # with a star where it is the largest or smallest of those tried
    trained: int  # parameters
    test: list[float]  # loss in nats per byte, for each seed


def omega_of(method: str, svd: svft.SVD, size: tuple[int, ...], seed: int, G: Tensor | None) -> Tensor:
    """Omega of one layer, as many entries as the band `size`; G (d1, d2): the gradient with respect to W0."""
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


def gradients(model: nn.Module, task: Task, batches: int = 16) -> dict[str, Tensor]:
    """Name -> G (d1, d2): the loss's gradient with respect to each weight, summed over training batches."""
    generator = torch.Generator().manual_seed(0)
    model.requires_grad_(True)
    for _ in range(batches):
        loss_of(model, task.draw(generator), task).backward()
    found = {name: layer.weight.grad for name, layer in linears(model).items()}
    model.zero_grad()
    return found


def build(model: nn.Module, entry: Entry, seed: int, task: Task, cache: Path) -> nn.Module:
    """Freeze model but for what the method trains, which starts at W0 ("cut": at the best rank-r part of it)."""
    torch.manual_seed(seed)
    method, size = entry
    shared: dict = {}
    makers = {"LoRA": LoRA, "DoRA": DoRA, "BOFT": BOFT, "VeRA": lambda layer, r: VeRA(layer, r, shared)}
    if method == "full":
        return model.requires_grad_(True)
    if method in makers:
        return adapt(model, lambda layer: makers[method](layer, *size))
    G = gradients(model, task) if method == "gradient" else {}
    r = size[0] if method in ("kept", "cut") else None
    for number, (name, layer) in enumerate(linears(model).items()):
        svd = svft.compute_svd(layer.weight, rank=r, cache_dir=cache)
        if method == "cut":  # as the paper's truncation does to the base model
            layer.weight.data = (svd.U * svd.S) @ svd.Vh
        svft.inject(model, [name], omega_of(method, svd, size, 1000 * seed + number, G.get(name)), svd=svd)
    return model


class Study:
    """Runs entries and keeps every finished run in a file at once: JSON lines {"config": ..., "result": ...}."""

    def __init__(self, base: nn.Module, task: Task, args: argparse.Namespace) -> None:
        self.base, self.task, self.args, self.file = base, task, args, args.out / "runs.jsonl"
        data = digest(task.train, task.val, task.test, task.context, task.batch, task.amp)
        self.fixed = {"base": digest(*base.state_dict().values()), "data": data, "steps": args.steps}
        self.fixed["device"] = task.device.type
        self.results: dict[str, dict] = {}
        self.seen: set[str] = set()
        for line in self.file.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that Ctrl-C cut short
                row = json.loads(line)
                [float(row["result"][name]) for name in ("trained", "val", "test", "seconds")]  # are they there?
                self.results[json.dumps(row["config"])] = row["result"]

    def run(self, entry: Entry, lr: float, seed: int, total: int) -> dict:
        """trained, val, test and seconds of one run, from the file if it is there; total: of runs, for the progress."""
        config = {"method": entry.method, "size": entry.size, "lr": lr, "seed": seed, **self.fixed}
        key = json.dumps(config)
        self.seen.add(key)
        if key in self.results:
            return self.results[key]
        start, task = time.perf_counter(), self.task
        model = build(copy.deepcopy(self.base), entry, seed, task, self.args.cache)
        result: dict = {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        train(model, task, self.args.steps, lr, seed)
        result |= {split: evaluate(model, getattr(task, split), task) for split in ("val", "test")}
        result["seconds"] = time.perf_counter() - start
        with open(self.file, "a") as file:  # on a line of its own, whatever the one before looks like
            file.write("\n" + json.dumps({"config": config, "result": result}) + "\n")
        self.results[key] = result
        left = (total - len(self.seen)) * statistics.mean(self.results[key]["seconds"] for key in self.seen)
        say(
            f"[{len(self.seen)}/{total}] {entry.label()}, lr {lr:.3g}, seed {seed}: validation loss "
            f"{result['val']:.3f}, {result['seconds']:.1f} s; {clock(left)} left"
        )
        return result

    def best(self, entry: Entry, total: int) -> Outcome:
        """The entry at the rate that does best on the validation split with seed 0, over all seeds."""
        rates = entry.rates(self.args.quick)
        tried = {lr: self.run(entry, lr, 0, total)["val"] for lr in rates}
        lr = min(rates, key=lambda lr: tried[lr] if tried[lr] == tried[lr] else math.inf)
        runs = [self.run(entry, lr, seed, total) for seed in range(self.args.seeds)]
        star = " *" if len(rates) > 1 and lr in (rates[0], rates[-1]) else ""
        return Outcome(f"{lr:.2g}{star}", runs[0]["trained"], [run["test"] for run in runs])


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table that reads well on a terminal too: the first two columns to the left, numbers to the right."""
    widths = [max(len(row[c]) for row in [heads, *rows]) for c in range(len(heads))]
    sides = ["<" if c < 2 else ">" for c in range(len(heads))]

    def line(cells: list[str]) -> str:
        padded = (f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if side == "<" else "-" * (width - 1) + ":" for side, width in zip(sides, widths, strict=True)]
    return "\n".join(map(line, [heads, rule, *rows]))


def results_table(entries: list[Entry], outcomes: dict[Entry, Outcome], recovered: dict, total: int) -> str:
    rows = []
    for entry in entries:
        lr, trained, test = outcomes[entry]
        share = f"{100 * statistics.mean(recovered[entry]):.1f}"
        loss = f"{statistics.mean(test):.4f}"
        if len(test) > 1:
            share, loss = f"{share} +- {100 * spread(recovered[entry]):.1f}", f"{loss} +- {spread(test):.4f}"
        parameters = f"{trained:,}", f"{100 * trained / total:.2f}"
        rows.append([NAMES.get(entry.method, entry.method), entry.setting(), *parameters, lr, loss, share])
    heads = ["method", "size", "trained", "% of model", "lr", "test loss, nats/byte", "recovered, %"]
    return markdown(heads, rows)


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def bar(outcomes: dict[Entry, Outcome], recovered: dict[Entry, list[float]]) -> str:
    """Do banded and random SVFT recover at least as much as LoRA of the same size, on every seed?"""
    rows, passed = [], True
    for lora in (entry for entry in outcomes if entry.method == "LoRA"):
        for entry in (entry for entry in outcomes if entry.method in ("banded", "random")):
            size, want = outcomes[entry].trained, outcomes[lora].trained
            if abs(size - want) > 0.05 * want:
                continue
            ahead = [a - b for a, b in zip(recovered[entry], recovered[lora], strict=True)]
            passed &= min(ahead) >= 0
            verdict = "PASS" if min(ahead) >= 0 else "FAIL"
            points = ", ".join(f"{100 * value:+.1f}" for value in ahead)
            rows.append([entry.label(), lora.label(), f"{size / want - 1:+.1%}", points, verdict])
    heads = ["SVFT", "LoRA", "more parameters by", "ahead by, points, each seed", "verdict"]
    return f"{markdown(heads, rows)}\n\nThe bar as a whole: {'PASS' if passed and rows else 'FAIL'}"


def plot(outcomes: dict[Entry, Outcome], recovered: dict[Entry, list[float]], stem: Path) -> str:
    """The figure as PNG and SVG, with matplotlib where it is installed; SVFT in black, the others in colour."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: it needs the matplotlib package (pip install matplotlib)"
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log")
    axes.axhline(100, color="black", linewidth=0.8, label=f"full fine-tuning ({outcomes[Entry('full')].trained:,})")
    methods = [method for method in dict.fromkeys(entry.method for entry in outcomes) if method != "full"]
    for method, marker in zip(methods, "^vDoPsXh", strict=False):
        entries = [entry for entry in outcomes if entry.method == method]
        axes.errorbar(
            [outcomes[entry].trained for entry in entries],
            [100 * statistics.mean(recovered[entry]) for entry in entries],
            [100 * spread(recovered[entry]) for entry in entries],
            label=NAMES.get(method, method).removesuffix(" [1]"),
            marker=marker,
            linestyle={"random": "--", "top-k": ":"}.get(method, "-"),
            linewidth=1,
            capsize=3,
            markersize=5,
            color="black" if method in NAMES else None,
            markerfacecolor={"plain": "black", "banded": "black", "random": "0.6"}.get(method, "white"),
        )
    axes.set_xlabel("trained parameters (log scale)")
    axes.set_ylabel("share of full fine-tuning's gain recovered, %")
    axes.grid(alpha=0.3)
    axes.legend()
    for kind in ("png", "svg"):
        figure.savefig(f"{stem}.{kind}", dpi=150)
    return f"plot: {stem}.png, {stem}.svg"


def compare(args: argparse.Namespace) -> None:
    """Runs what is not in the file yet, then prints the tables and draws the figure."""
    device = pick_device(args.device)
    settings = argparse.Namespace(context=Config.context, batch=8, amp=False)
    task = make_task(read_topics(), "pydoc_data.topics", BYTES, settings, device)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        open(args.out / "runs.jsonl", "a").close()
    except OSError as error:
        raise UserError(f"--out: cannot write in the folder {args.out}: {error}") from None
    args.steps, args.seeds = args.steps or (100 if args.quick else 120), args.seeds or (2 if args.quick else 3)
    base = pretrained(args.cache, device)
    figure, studies = (QUICK, {}) if args.quick else (FIGURE, STUDIES)
    entries = list(dict.fromkeys([*figure, *(entry for rows in studies.values() for entry in rows)]))
    study = Study(base, task, args)
    total = sum(len(entry.rates(args.quick)) + args.seeds - 1 for entry in entries)
    start, goal = evaluate(base, task.test, task), statistics.mean(study.best(Entry("full"), total).test)
    if not goal < start:
        raise UserError(f"--steps: got {args.steps}, want more: full fine-tuning gained nothing to compare with")
    outcomes = {entry: study.best(entry, total) for entry in entries}
    recovered = {entry: [(start - loss) / (start - goal) for loss in o.test] for entry, o in outcomes.items()}
    size = sum(p.numel() for p in base.parameters())
    drawn = {entry: outcomes[entry] for entry in figure}
    text = [f"Test loss {start:.4f} nats per byte before, {goal:.4f} after full fine-tuning; {args.seeds} seeds, "]
    text[0] += f"{args.steps} steps of {task.batch} x {task.context} bytes. {machine(device)}."
    text += [results_table(figure, outcomes, recovered, size), NOTES]
    text += ["## At equal size, SVFT against LoRA", bar(drawn, recovered)]
    for title, rows in studies.items():
        text += [f"## {title}", results_table(rows, outcomes, recovered, size)]
    stem = args.out / ("compare-quick" if args.quick else "compare")
    stem.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    say("\n" + "\n\n".join(text))
    say(f"\ntable: {stem}.md\n{plot(drawn, recovered, stem)}")


# ---------------------------------------------------------------- python train_toy.py bench

BLOCK = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]  # (d1, d2) of GPT-2's c_attn, c_proj, c_fc, c_proj
PATTERNS = {"plain": ("plain", 0), "banded 2": ("banded", 2), "banded 16": ("banded", 16), "random 16": ("random", 16)}
PATHS = ["dense", "gather", "fused"]
Form = tuple[str, str]  # how a layer computes, and its pattern, "" where there is none


class AuthorsForm(nn.Module):
    """SVFT in the order in which the authors' code takes it: a sum of two sparse matrices, times V^T, transposed,
    times U^T, gives the weight's transpose, by which x is multiplied. Trains the sparse values."""

    def __init__(self, layer: svft.SVFTLinear) -> None:
        super().__init__()
        self.U, self.S, self.Vh, self.bias, self.omega = layer.U, layer.S, layer.Vh, layer.bias, layer.omega
        self.m = nn.Parameter(layer.m.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        n = len(self.S)
        diagonal = torch.arange(n, device=x.device).expand(2, n)
        Sigma = torch.sparse_coo_tensor(diagonal, self.S, (n, n), check_invariants=False)
        M = torch.sparse_coo_tensor(self.omega, self.m, (n, n), check_invariants=False)
        return x @ (torch.sparse.mm(Sigma + M, self.Vh).T @ self.U.T) + self.bias  # (T, d2) @ (d2, d1)


def peft_lora(base: nn.Linear) -> nn.Module:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("--peft: needs the peft package: pip install peft") from None
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["linear"])
    return inject_adapter_in_model(config, nn.ModuleDict({"linear": base}))["linear"]


def bench_layers(
    d1: int, d2: int, device: torch.device, peft: bool = False, dtype: torch.dtype = torch.float32
) -> dict[Form, nn.Module]:
    """Layers d2 -> d1 with one W0, which is made from its SVD, so that nobody has to wait for one."""
    torch.manual_seed(0)
    n = min(d1, d2)
    U, V = (torch.linalg.qr(torch.randn(d, n)).Q.to(device) for d in (d1, d2))  # (d1, n), (d2, n)
    svd = svft.SVD(U, torch.linspace(2, 0.1, n, device=device), V.T.contiguous())
    full = nn.Linear(d2, d1, device=device)
    full.weight.data = (svd.U * svd.S) @ svd.Vh
    full, svd = full.to(dtype), svft.SVD(*(t.to(dtype) for t in svd))
    frozen, lora = copy.deepcopy(full).requires_grad_(False), LoRA(copy.deepcopy(full), 8)
    layers: dict[Form, nn.Module] = {("frozen", ""): frozen, ("full", ""): full, ("LoRA r=8", ""): lora}
    if peft:
        layers["PEFT", ""] = peft_lora(copy.deepcopy(full))
    for name, (pattern, d) in PATTERNS.items():
        for path in [*PATHS, "auto"] if dtype == torch.float32 else ["dense", "gather", "auto"]:
            layers[path, name] = svft.SVFTLinear(full, pattern, d, path=path, svd=svd)
        layers["authors", name] = AuthorsForm(layers["auto", name])
    return layers


class Cell(NamedTuple):
    """One mode, one shape, one number of tokens: what is timed side by side."""

    training: bool
    d1: int
    d2: int
    T: int

    def size(self) -> int:
        return self.T * self.d1 * self.d2

    def counts(self) -> bool:
        """Whether the summary of GPT-2's block needs it."""
        return self.training and (self.d1, self.d2) in BLOCK and self.T in (256, 1024, 4096)

    def multiply_adds(self, path: str) -> int:
        """Of one call; the sparse step, small against the rest, is left out, as in the notes' table of costs."""
        training, d1, d2, T = self
        n, linear = min(d1, d2), (1 + training) * T * d1 * d2
        both = (1 + training) * n * (d1 + d2) * T  # by V^T, and by U
        dense = (1 + 2 * training) * T * d1 * d2 + (1 + training) * n * d1 * d2
        return {"frozen": linear, "dense": dense, "gather": linear + both, "fused": both}[path]

    def choice(self, layers: dict[Form, nn.Module], pattern: str) -> str:
        """The path that auto takes here."""
        with torch.set_grad_enabled(self.training):
            return layers["auto", pattern]._cheapest(self.T, False)

    def over_best(self, layers: dict[Form, nn.Module], times: dict[Form, float], pattern: str) -> float:
        """Time of auto's path over that of the fastest; NaN where not every path was timed."""
        every = [times.get((path, pattern), math.nan) for path in PATHS]
        return times[self.choice(layers, pattern), pattern] / (math.nan if math.isnan(sum(every)) else min(every))

    def calls(self, layers: dict[Form, nn.Module], device: torch.device, whole: bool) -> dict[Form, Callable]:
        """What is to be timed. Unless whole: the paths that auto does not take with one pattern only."""
        x, g = torch.randn(self.T, self.d2, device=device), torch.randn(self.T, self.d1, device=device)
        x.requires_grad_(self.training)

        def wanted(form: str, pattern: str) -> bool:
            few = not whole and pattern not in ("", "banded 2")
            if form in ("auto", "full"):
                return form == "full" and self.training
            if form in ("PEFT", "authors"):
                return self.counts() and not few and pattern != "random 16"
            return not few or form == self.choice(layers, pattern)

        return {key: call_of(layer, x, g) for key, layer in layers.items() if wanted(*key)}


def call_of(layer: nn.Module, x: Tensor, g: Tensor, amp: bool = False) -> Callable[[], Any]:
    """Forward and backward, to x and to what is trained, given the gradient g of the output; or forward only."""
    forward = torch.autocast(x.device.type, torch.bfloat16)(layer) if amp else layer
    if x.requires_grad:
        inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(forward(x), inputs, g)
    return torch.no_grad()(lambda: forward(x))


def seconds_of(call: Callable[[], Any], device: torch.device, times: int = 1) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / times


def medians(
    calls: dict[Form, Callable[[], Any]], device: torch.device, budget: float, least: int = 3
) -> dict[Form, float]:
    """Median seconds of each call over `least` to 25 rounds, as many as the budget in seconds allows.

    Rounds are interleaved (A B C, A B C, ...), so that a machine that slows down slows all alike. Short calls
    are timed several at once, after a round that does not count.
    """
    found = {key: [seconds_of(call, device)] for key, call in calls.items()}
    if sum(values[0] for values in found.values()) < 1:
        found = {key: [seconds_of(call, device)] for key, call in calls.items()}
    times = {key: max(1, min(20, int(1e-3 / found[key][0]))) for key in calls}
    rounds = int(budget / sum(found[key][0] * times[key] for key in calls))
    for _ in range(max(least, min(25, rounds)) - 1):
        for key, call in calls.items():
            found[key].append(seconds_of(call, device, times[key]))
    return {key: statistics.median(values) for key, values in found.items()}


def bench(args: argparse.Namespace) -> None:
    """Times every path against a frozen linear, full fine-tuning and LoRA, and prints ratios."""
    begin, device = time.perf_counter(), pick_device(args.device)
    found, layers, missed = measure_grid(args, device, begin)
    for training, mode in ((True, "Training: forward and backward"), (False, "Inference: forward")):
        if shown := {cell: times for cell, times in found.items() if cell.training == training}:
            say(f"\n{mode}, over a frozen linear's time\n\n{bench_table(shown, layers)}")
    if missed:
        say(f"\nNo time was left for {missed} more of the shapes and lengths; --all measures them.")
    over_best = [cell.over_best(layers[cell[1:3]], times, name) for cell, times in found.items() for name in PATTERNS]
    known = [value for value in over_best if value == value]
    over = f"{max(known):.2f} at worst, {sum(value > 1.1 for value in known)} over 1.10"
    say(f"\n{BENCH_NOTES}\n\nauto/best, {len(known)} measured: {over}.")
    say("\nGPT-2 block, training: its four linears' times added up, auto's path for each\n")
    say(f"{block_table(found, layers)}\n\n{storage_line(layers)}")
    if not args.quick:
        say("\nHalf precision, training, banded 16: each form's time over its own in float32\n")
        say(half_table({shape: layers[shape] for shape in ((768, 768), (3072, 768))}, 1024, device))
        say(f"\n{svd_line(12 if args.all else 1, device)}")
    say(f"\n{machine(device)}; {time.perf_counter() - begin:.0f} s")


def measure_grid(args: argparse.Namespace, device: torch.device, begin: float) -> tuple[dict, dict, int]:
    """Cell -> form -> seconds; shape -> form -> layer; and how many cells there was no time for."""
    everything = args.all or device.type == "cuda"
    shapes, lengths = (BLOCK, [256]) if args.quick else ([*BLOCK, (2048, 2048)], [64, 256, 1024, 4096, 16384])
    cells = [Cell(training, *shape, T) for training in (True, False) for shape in shapes for T in lengths]
    cells = [cell for cell in cells if everything or (cell.T < 16384 and cell.size() <= 4096 * 768 * 3072)]
    layers = {shape: bench_layers(*shape, device, args.peft) for shape in shapes}
    found, progress = {}, Progress("bench", len(cells), "cell")
    for number, cell in enumerate(sorted(cells, key=lambda cell: (not cell.counts(), cell.size())), 1):
        if time.perf_counter() - begin > 95 and not everything:
            break
        whole = everything or cell.size() <= 256 * 768 * 2304
        calls = cell.calls(layers[cell[1:3]], device, whole)
        found[cell] = medians(calls, device, 0.4 if args.quick else 0.7, 5 if everything else 3)
        progress(number, lambda rate, cell=cell: f"{cell.d1} x {cell.d2}, {cell.T} tokens")
    return {cell: found[cell] for cell in cells if cell in found}, layers, len(cells) - len(found)


BENCH_NOTES = """\
auto: the path it takes; its time is that path's. best: the fastest of the three paths. bound: multiply-adds of
auto's path over the frozen linear's. -: not measured. LoRA r=8 is this file's; authors: the authors' order."""


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    cores = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return f"{name}, {cores}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, float32 on {device}"


def fixed(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def bench_table(found: dict[Cell, dict[Form, float]], layers: dict) -> str:
    """One row per cell and pattern."""
    rows, forms = [], ["full", "LoRA r=8", *PATHS]
    for cell, measured in found.items():
        for pattern in PATTERNS:
            chosen = cell.choice(layers[cell[1:3]], pattern)
            bound = cell.multiply_adds(chosen) / cell.multiply_adds("frozen")
            times = {form: seconds for (form, p), seconds in measured.items() if p in ("", pattern)}
            ratio = {form: times.get(form, math.nan) / times["frozen"] for form in forms}
            over_best = cell.over_best(layers[cell[1:3]], measured, pattern)
            marks = [*map(fixed, ratio.values()), chosen, fixed(over_best), fixed(bound / ratio[chosen])]
            rows.append([f"{cell.d1} x {cell.d2}", pattern, str(cell.T), *marks])
    return markdown(["d1 x d2", "pattern", "T", *forms, "auto", "auto/best", "bound/auto"], rows)


def block_table(found: dict[Cell, dict[Form, float]], layers: dict) -> str:
    """GPT-2's four linears together, training; the last row is the geometric mean over T and d."""
    rows = []
    for T in (256, 1024, 4096):
        block = [cell for cell in found if cell.counts() and cell.T == T]
        for name in list(PATTERNS)[:3] if block else []:

            def total(form: str, pattern: str = "", block: list[Cell] = block) -> float:
                return sum(found[cell].get((form, pattern), math.nan) for cell in block)

            chosen = [cell.choice(layers[cell[1:3]], name) for cell in block]
            auto = sum(found[cell][path, name] for cell, path in zip(block, chosen, strict=True))
            least = sum(cell.multiply_adds(path) for cell, path in zip(block, chosen, strict=True))
            frozen, lora = total("frozen"), total("LoRA r=8")
            bound = least / sum(cell.multiply_adds("frozen") for cell in block) * frozen / auto
            others = [auto / lora, auto / total("PEFT"), auto / total("authors", name)]
            rows.append([str(T), name, auto / frozen, lora / frozen, *others, bound])
    known = [[value for value in column if value == value] for column in list(zip(*rows, strict=True))[2:]]
    means = [math.exp(statistics.mean(map(math.log, column))) if column else math.nan for column in known]
    heads = ["T", "pattern", "auto/frozen", "LoRA/frozen", "auto/LoRA", "auto/PEFT", "auto/authors", "bound/auto"]
    return markdown(heads, [[*row[:2], *map(fixed, row[2:])] for row in [*rows, ["mean", "geometric", *means]]])


def storage_line(layers: dict) -> str:
    """What the block's layers hold besides m (W0, U, S, V^T, Omega, biases) over what W0 takes."""
    kept = []
    for name in PATTERNS:
        block = [layers[shape]["auto", name] for shape in BLOCK]
        tensors = [t for layer in block for t in (*layer.parameters(), *layer.buffers()) if t is not layer.m]
        held, W0 = (sum(t.numel() * t.element_size() for t in ts) for ts in (tensors, [a.weight for a in block]))
        kept.append(f"{name} {held / W0:.2f} ({held / W0 - 1:.2f})")
    return f"Its frozen storage over W0's, in brackets without W0: {', '.join(kept)}."


def half_table(layers: dict, T: int, device: torch.device) -> str:
    """bfloat16: a layer of that dtype. autocast: one of layers, float32, under autocast to it."""
    rows, forms = [], ["frozen", *PATHS, "auto"]
    for (d1, d2), single in layers.items():
        half = bench_layers(d1, d2, device, dtype=torch.bfloat16)
        x, g = torch.randn(T, d2, device=device, requires_grad=True), torch.randn(T, d1, device=device)
        y = x.detach().bfloat16().requires_grad_()
        calls: dict[Form, Callable[[], Any]] = {}
        for form in forms:
            key = form, "" if form == "frozen" else "banded 16"
            calls[form, "float32"] = call_of(single[key], x, g)
            calls[form, "autocast"] = call_of(single[key], x, g.bfloat16(), amp=True)
            if key in half:
                calls[form, "bfloat16"] = call_of(half[key], y, g.bfloat16())
        found = medians(calls, device, 1)
        for kind in ("bfloat16", "autocast"):
            ratios = (found.get((form, kind), math.nan) / found[form, "float32"] for form in forms)
            rows.append([f"{d1} x {d2}", kind, str(T), *map(fixed, ratios)])
    return markdown(["d1 x d2", "in", "T", *forms], rows)


def svd_line(blocks: int, device: torch.device) -> str:
    """inject against bare torch.linalg.svd in float64, in turn, on random weights of so many GPT-2 blocks."""
    bare = ours = 0.0
    for seed in range(blocks):
        torch.manual_seed(seed)
        block = nn.Sequential(*(nn.Linear(d2, d1) for d1, d2 in BLOCK)).to(device)
        weights = [layer.weight.detach() if device.type == "cuda" else layer.weight.detach().cpu() for layer in block]
        for W in weights:
            bare += seconds_of(lambda W=W: torch.linalg.svd(W.double(), full_matrices=False), device)
        ours += seconds_of(lambda block=block: svft.inject(block, ["0", "1", "2", "3"]), device)
    return f"inject on {4 * blocks} weights of GPT-2's shapes: {ours:.1f} s, {ours / bare:.2f} times bare float64 SVDs"


# ---------------------------------------------------------------- the command line


def number(kind: type, least: float) -> Callable[[str], Any]:
    """An argument type: a finite number of this kind, at least least."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"got {text}, want a finite number of at least {least}")
        return value

    parse.__name__ = kind.__name__  # argparse's "invalid int value"
    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message} (--help lists the options)")


def finetune_options(parser: Parser) -> None:
    parser.add_argument("--pattern", default="banded", choices=["plain", "banded", "random", "top_k"])
    parser.add_argument(
        "--d", type=number(int, 0), default=8, help="half-width of the band; others take as many entries (8)"
    )
    parser.add_argument("--steps", type=number(int, 1), default=300, help="of fine-tuning (300)")
    parser.add_argument("--lr", type=number(float, 1e-9), help="peak learning rate (by the number of entries)")
    parser.add_argument(
        "--batch", type=number(int, 1), default=8, help="sequences per step, all processes together (8)"
    )
    parser.add_argument("--context", type=number(int, 1), default=128, help="tokens per sequence (128)")
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="of pre-training, random entries and batches (0)"
    )
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (on for cuda)")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--base", metavar="NAME_OR_FOLDER", help="a causal language model of transformers, as gpt2")
    parser.add_argument("--targets", type=lambda text: text.split(","), default=TARGETS, help="c_attn,c_proj,c_fc")
    parser.add_argument("--data", metavar="FILE", help="UTF-8 text to fine-tune on")
    parser.add_argument("--save", metavar="FILE", type=Path, help="where to write the adapter")


def compare_options(parser: Parser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="fewer sizes, steps and seeds, one learning rate, no studies"
    )
    parser.add_argument("--seeds", type=number(int, 1), help="(3; --quick: 2)")
    parser.add_argument("--steps", type=number(int, 1), help="of fine-tuning in each run (120; --quick: 100)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for runs, table, plot (results)")


def bench_options(parser: Parser) -> None:
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="GPT-2's shapes at one length")
    extent.add_argument("--all", action="store_true", help="the whole grid on the CPU too, however long it takes")
    parser.add_argument("--peft", action="store_true", help="time the LoRA of the peft package too")


COMMANDS = {"": (finetune, finetune_options), "compare": (compare, compare_options), "bench": (bench, bench_options)}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = argv.pop(0) if argv and argv[0] in COMMANDS else ""
    command, options = COMMANDS[name]
    parser = Parser(f"train_toy.py {name}".strip(), description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto (cuda, mps or cpu), or a name such as cuda:1")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"folder for what is slow to make ({CACHE.name})")
    options(parser)
    try:
        args = parser.parse_args(argv)
        if name and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("runs in one process: start it with python, not with torchrun")
        command(args)
        return 0
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted; what was finished is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
