"""Fine-tune GPT-2 with SVFT, set SVFT against other methods, and time it. Three commands, no download.

    python train_toy.py            pre-train a small GPT-2 on Python's standard library, then fine-tune it
                                   with SVFT on the prose of Python's language reference
    python train_toy.py compare    figure 1 of the paper in miniature, against six methods
    python train_toy.py bench      what each path of svft.py costs, against a frozen linear and LoRA
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
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
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: got {name!r}, want a device that this machine has ({reason})") from None
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
        dist.barrier()
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

    def __init__(self, label: str, steps: int, tokens_per_step: int) -> None:
        self.label, self.steps, self.tokens = label, steps, tokens_per_step
        self.terminal = sys.stderr.isatty()
        self.start = self.last = time.perf_counter()

    def __call__(self, step: int, loss: Callable[[], float]) -> None:
        """After step 1, 2, ...; loss() waits for the device, so it is called only where a line is due."""
        now = time.perf_counter()
        if rank() or not self.label or (now - self.last < (0.5 if self.terminal else 15) and step < self.steps):
            return
        self.last, rate = now, step / (now - self.start)
        line = (
            f"{self.label}: step {step}/{self.steps}, loss {loss():.3f}, {rate:.1f} steps/s, "
            f"{rate * self.tokens:,.0f} tokens/s, {clock((self.steps - step) / rate)} left"
        )
        end = "\n" if step == self.steps or not self.terminal else ""
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

    def draw(self, generator: torch.Generator) -> Tensor:
        """This process' share of a batch of random training windows: (batch / processes, context + 1)."""
        starts = torch.randint(len(self.train) - self.context, (self.batch,), generator=generator)
        return self.train[starts[rank() :: world(), None] + torch.arange(self.context + 1)]


def make_task(text: str, source: str, codec: Codec, args: argparse.Namespace, device: torch.device) -> Task:
    """Cut the text's tokens into 40 contiguous blocks: of each ten, eight to train, one to validate, one to test."""
    tokens = codec.encode(text)
    length = len(tokens) // 40
    if 4 * length <= args.context:
        want = 10 * args.context + 50
        raise UserError(f"{source}: too little text: got {len(tokens):,} {codec.unit}s, want {want:,} or more")
    if args.batch % world():
        raise UserError(f"--batch: got {args.batch}, want a multiple of the {world()} processes")
    blocks, fold = tokens[: 40 * length].view(40, length), torch.arange(40) % 10
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
    """Pre-norm, learned positions, output head tied to the embedding: 842,240 parameters by default."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocabulary, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # GPT-2's start: smaller where a block adds to the residual stream
                std = 0.02 / math.sqrt(2 * config.layers) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=std)

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
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0, fused=task.device.type == "cuda")
    warm = max(1, round(0.1 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: (t + 1) / warm if t < warm else 0.5 + 0.5 * math.cos(math.pi * (t + 1 - warm) / (steps - warm)),
    )
    generator = torch.Generator().manual_seed(seed)
    progress = Progress(label, steps, task.batch * task.context)
    model.train()
    start = time.perf_counter()
    for step in range(1, steps + 1):
        loss = loss_of(model, task.draw(generator), task)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(step, loss.item)
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


def pretrained(args: argparse.Namespace, device: torch.device, steps: int = 800, lr: float = 2e-3) -> GPT2:
    """Our GPT-2, trained on the standard library's source: from the cache, or made now and put there."""
    settings = argparse.Namespace(context=Config.context, batch=16, amp=False)
    task = make_task(read_stdlib(), "the standard library", BYTES, settings, device)
    key = digest("format 1", dataclasses.astuple(Config()), steps, settings.batch, lr, args.seed, task.train)
    file = args.cache / f"gpt2-{key}.pt"
    if (model := read_cache(file, device)) is None:
        torch.manual_seed(args.seed)
        model = GPT2(Config()).to(device)
        train(model, task, steps, lr, args.seed, "pre-training")
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
    except Exception as error:
        raise UserError(f"--base: got {name!r}, want a causal language model ({one_line(error)})") from None

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return model, Codec(encode, tokenizer.decode, "token")


# ---------------------------------------------------------------- python train_toy.py


def inject(model: nn.Module, targets: list[str], *args: Any, **options: Any) -> nn.Module:
    """svft.inject, its refusals as one line."""
    try:
        return svft.inject(model, targets, *args, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(one_line(error)) from None


def default_lr(pattern: str, d: int) -> float:
    """The more entries, the smaller the rate, as in the paper's appendix; found on this task."""
    return 0.05 if pattern == "plain" or d == 0 else 0.02 if d < 4 else 0.01


def prepare(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Codec, Task]:
    """The base model, its codec, and the text in its tokens; what can be refused is, before the long work."""
    text = read_text(args.data) if args.data else read_topics()
    model, codec = from_transformers(args.base, device) if args.base else (None, BYTES)
    most = getattr(model.config, "max_position_embeddings", args.context) if args.base else Config.context
    if args.context > most:
        raise UserError(f"--context: got {args.context}, want at most the model's {most}")
    if args.save and not Path(args.save).resolve().parent.is_dir():
        raise UserError(f"--save: got {args.save!r}, want a file in a folder that exists")
    task = make_task(text, args.data or "pydoc_data.topics", codec, args, device)
    if model is None:
        inject(GPT2(Config()), args.targets, args.pattern, args.d, cache_dir=None)  # a rehearsal
        model = pretrained(args, device)
    return model, codec, task


def finetune(args: argparse.Namespace) -> None:
    """The default command: fine-tune a language model with SVFT and say what came of it."""
    begin, device = time.perf_counter(), pick_device(args.device)
    with processes(device):
        with first_process_first():
            model, codec, task = prepare(args, device)
            total = sum(p.numel() for p in model.parameters())
            inject(model, args.targets, args.pattern, args.d, seed=args.seed, cache_dir=args.cache)
        before = evaluate(model, task.val, task)
        runner = torch.compile(model) if args.compile else model
        if world() > 1:
            own = [device.index] if device.type == "cuda" else None
            runner = nn.parallel.DistributedDataParallel(runner, device_ids=own)
        torch.manual_seed(args.seed + rank())  # for dropout, where the base model has it
        lr = args.lr or default_lr(args.pattern, args.d)
        seconds = train(runner, task, args.steps, lr, args.seed, "fine-tuning")
        after = evaluate(model, task.val, task)
        if not math.isfinite(after):
            raise UserError(f"--lr: got {lr}, want a smaller one: the loss became {after}")
        if args.save and rank() == 0:
            svft.save_adapter(model, args.save)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        speed, precision = args.steps / seconds, "bfloat16 autocast" if task.amp else "float32"
        say(f"SVFT               {args.pattern}, d = {args.d}, lr {lr}, on {device} in {precision}")
        say(f"trained            {trained:,} parameters, {100 * trained / total:.2f}% of the model's {total:,}")
        say(f"validation loss    {before:.3f} -> {after:.3f} nats per {codec.unit} ({after - before:+.3f})")
        say(f"speed              {speed:.1f} steps/s, {speed * task.batch * task.context:,.0f} {codec.unit}s/s")
        say(f"peak memory        {peak_memory(device)}")
        show(model.eval(), codec, task, args.seed)
        say(f"seconds            {seconds:.1f} of fine-tuning, {time.perf_counter() - begin:.1f} in all")


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
    say(f"merged - adapted   at most {difference:.1e}, of logits up to {largest:.1f}")
    for name, text in (("prompt", codec.decode(prompt.tolist())), ("before", before), ("after", after)):
        say(f"--- {name}\n{text}")
    say("---")


# ---------------------------------------------------------------- the command line


def number(kind: type, least: float, strict: bool = False) -> Callable[[str], Any]:
    """An argument type: a finite number of this kind, at least (strict: above) least."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not math.isfinite(value) or value < least or (strict and value == least):
            raise argparse.ArgumentTypeError(f"got {text}, want a number {'above' if strict else 'of at least'} {least}")
        return value

    parse.__name__ = kind.__name__
    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message} (--help lists the options)")


def finetune_options(parser: Parser) -> None:
    parser.add_argument("--pattern", default="banded", choices=["plain", "banded", "random", "top_k"])
    parser.add_argument("--d", type=number(int, 0), default=8, help="half-width of the band, or its count (8)")
    parser.add_argument("--steps", type=number(int, 1), default=200, help="of fine-tuning (200)")
    parser.add_argument("--lr", type=number(float, 0, strict=True), help="peak rate (by pattern and d)")
    parser.add_argument("--batch", type=number(int, 1), default=16, help="sequences per step, all processes together")
    parser.add_argument("--context", type=number(int, 1), default=128, help="tokens per sequence (128)")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (on for cuda)")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--base", metavar="NAME_OR_FOLDER", help="a causal language model of transformers, as gpt2")
    parser.add_argument("--targets", type=lambda text: text.split(","), default=TARGETS, help="c_attn,c_proj,c_fc")
    parser.add_argument("--data", metavar="FILE", help="UTF-8 text to fine-tune on")
    parser.add_argument("--save", metavar="FILE", help="where to write the adapter")


COMMANDS = {"": (finetune, finetune_options)}


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
        command(parser.parse_args(argv))
        return 0
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
