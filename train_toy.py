"""Fine-tune GPT-2 with SVFT.

    python train_toy.py
        No download, no GPU. Pre-trains a small GPT-2 (842,496 parameters, bytes as tokens) on the source of Python's
        standard library, keeps it in .svft_cache, and fine-tunes it with SVFT on the prose of Python's language
        reference. It prints the loss on held-out prose before and after, how far the merged model is from the adapted
        one, and two samples. On 2 CPU cores it takes under three minutes the first time, then under one.
    python train_toy.py --base gpt2 --data my.txt --save adapter.npz
        The same with a pretrained model (any causal one of transformers, by name or folder), its tokenizer and your
        text, on a GPU if there is one. svft.load_adapter loads the file.
    torchrun --nproc_per_node=4 train_toy.py --base gpt2
        The same on four GPUs, data-parallel; with --device cpu in four processes.

To copy: `finetune` is the recipe, `train` its loop. In comments on shapes, B sequences have T tokens each.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import svft

CACHE = Path(__file__).resolve().parent / ".svft_cache"  # the pre-trained model and the SVDs; safe to delete
TARGETS = ["c_attn", "c_proj", "c_fc"]  # GPT-2's four linear layers in a block; c_proj is two of them
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
say = print if RANK == 0 else lambda text: None  # one process speaks


# ---------------------------------------------------------------- the recipe


def finetune(args: argparse.Namespace) -> None:
    """Load, inject, train, evaluate, save, merge."""
    begin = time.perf_counter()
    d = 8 if args.d is None else args.d
    with first_process_first():
        if not args.base:  # a trial on an untrained model: what cannot be injected is refused before the pre-training
            svft.inject(GPT2(), args.targets or TARGETS, args.pattern, d, seed=args.seed)
        model, tokenizer, task = load(args)
        total = sum(p.numel() for p in model.parameters())
        svft.inject(model, args.targets, args.pattern, d, seed=args.seed, cache_dir=args.cache)
    unit, length = ("token", 40) if args.base else ("byte", 150)  # of a sample
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]  # k, the number of entries, of each M
    lr = args.lr or 2.5 * (sum(sizes) / len(sizes)) ** (-2 / 3)
    share = f"{WORLD} processes, {task.batch // WORLD} sequences each" if WORLD > 1 else "one process"
    say(f"where             {task.device}, {'bfloat16 autocast' if task.amp else 'float32'}, {share}")
    why = "" if args.base else ", with which this small model gains hardly more than 0.2 nats"
    size = "" if args.pattern == "plain" else f", d = {d}" + (f" (inject has 2{why})" if args.d is None else "")
    say(f"method            SVFT, {args.pattern}{size}, learning rate {lr:.3g}")
    say(f"trained           {sum(sizes):,} parameters, {sum(sizes) / total:.2%} of the model's {total:,}")
    before, text_before = evaluate(model, task.val, task), sample(model, tokenizer, task, length, args.seed)

    runner = torch.compile(model) if args.compile else model
    runner = nn.parallel.DistributedDataParallel(runner) if WORLD > 1 else runner
    seconds = train(runner, task, args.steps, lr, args.seed, "fine-tuning")
    after = evaluate(model, task.val, task)
    if not math.isfinite(after):
        refuse(f"--lr: got {lr:.3g}, want a smaller one: the loss became {after}")
    text_after = sample(model, tokenizer, task, length, args.seed)
    say(f"validation loss   {before:.3f} -> {after:.3f} nats per {unit} ({after - before:+.3f})")

    if args.save and RANK == 0:
        svft.save_adapter(model, args.save)
    window = task.val[None, : task.context].to(task.device)  # (1, T)
    adapted = logits_of(model, window)
    difference = (logits_of(svft.merge(model), window) - adapted).abs().max()  # plain layers again, in place
    say(f"merged - adapted  at most {difference:.1e}, of logits up to {adapted.abs().max():.1f}")
    say(f"--- before\n{text_before}\n--- after\n{text_after}\n---")
    speed = f"{args.steps / seconds:.1f} steps/s"
    say(f"seconds           {seconds:.1f} of fine-tuning, {speed}; {time.perf_counter() - begin:.1f} in all")


def train(model: nn.Module, task: Task, steps: int, lr: float, seed: int, label: str) -> float:
    """AdamW on what requires a gradient, 10% warm-up, then a cosine to zero. Returns the seconds taken."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0, fused=True)
    warm = max(1, round(0.1 * steps))
    generator = torch.Generator().manual_seed(seed)  # of the batches
    torch.manual_seed(seed + RANK)  # of dropout, where the model has it
    model.train()
    start = time.perf_counter()
    for step in progress(range(1, steps + 1), label):
        fall = 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))
        optimizer.param_groups[0]["lr"] = lr * (step / warm if step <= warm else fall)
        loss = loss_of(model, task.draw(generator), task)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    loss.item()  # waits for the device
    return time.perf_counter() - start


def loss_of(model: nn.Module, window: Tensor, task: Task) -> Tensor:
    """Mean cross-entropy of window (B, T + 1) in nats per token."""
    window = window.to(task.device)
    with torch.autocast(task.device.type, torch.bfloat16, enabled=task.amp):
        logits = logits_of(model, window[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, T) -> (B, T, vocabulary), of the small GPT-2 or of a model from transformers."""
    out = model(tokens)
    return getattr(out, "logits", out)


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, task: Task) -> float:
    """Mean loss over at most task.windows windows spread evenly over tokens (n,), always the same; nats per token."""
    windows = tokens.unfold(0, task.context + 1, task.context)  # (N, T + 1)
    windows = windows[:: math.ceil(len(windows) / task.windows)]
    parts = progress(windows.split(task.batch), "evaluation")
    return sum(float(loss_of(model, part, task)) * len(part) for part in parts) / len(windows)


@torch.no_grad()
def sample(model: nn.Module, tokenizer: Any, task: Task, length: int, seed: int) -> str:
    """The beginning of the validation text, and how the model goes on from there at temperature 0.8."""
    generator = torch.Generator().manual_seed(seed)
    tokens = task.val[None, : min(64, (task.context + 1) // 2)].to(task.device)  # (1, T)
    for _ in progress(range(length), "sampling"):
        last = logits_of(model, tokens[:, -task.context :])[0, -1].float().cpu()  # (vocabulary,)
        drawn = torch.multinomial((last / 0.8).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn[None].to(tokens.device)], 1)
    return tokenizer.decode(tokens[0].tolist())


# ---------------------------------------------------------------- the small model: GPT-2's architecture


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        qkv = self.attn.c_attn(self.ln_1(x))  # (B, T, 3 width)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, width / heads)
        x = x + self.attn.c_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """Pre-norm, learned positions, output head tied to the embedding: 842,496 parameters by default."""

    def __init__(self, vocabulary: int = 256, context: int = 128, layers: int = 4, heads: int = 4, width: int = 128):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        std = 0.02 * math.sqrt(768 / width)  # GPT-2's 0.02 is for its own width
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # smaller where a block adds to the residual stream
                residual = math.sqrt(2 * layers) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=std / residual)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> logits (B, T, vocabulary)
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]  # (B, T, width)
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


# ---------------------------------------------------------------- text and loading


class Bytes:  # as tokens, with the two methods of transformers' tokenizers that are called here
    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def read_topics() -> str:
    """The language reference's prose, each paragraph once: held-out text that repeats would be trained on too."""
    kept: dict[str, str] = {}
    for paragraph in "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n"):
        kept.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(kept.values())


class Task:
    """What to train on, and where. Of each ten of the text's 100 blocks, eight train, one validates, one tests."""

    def __init__(self, tokens: list[int], context: int, batch: int, device: torch.device, amp: bool = False) -> None:
        length = len(tokens) // 100
        blocks, fold = torch.tensor(tokens[: 100 * length]).view(100, length), torch.arange(100) % 10
        self.train, self.val, self.test = (blocks[part].flatten() for part in (fold < 8, fold == 8, fold == 9))  # (n,)
        self.context, self.batch = context, batch  # T; sequences in a step, all processes together
        self.device, self.amp = device, amp  # amp: bfloat16 autocast
        self.windows = 256  # sequences in an evaluation, at most

    def draw(self, generator: torch.Generator) -> Tensor:
        """This process' share of a batch of random windows of the training text: (B, T + 1)."""
        starts = torch.randint(len(self.train) - self.context, (self.batch,), generator=generator)
        return self.train[starts[RANK::WORLD, None] + torch.arange(self.context + 1)]


def load(args: argparse.Namespace) -> tuple[nn.Module, Any, Task]:
    """The base model, its tokenizer, and the text in tokens. Sets args.targets and args.context where they are open."""
    try:
        text = Path(args.data).read_text(encoding="utf-8") if args.data else read_topics()
    except (OSError, UnicodeError) as error:
        refuse(f"--data: cannot read {args.data!r} as UTF-8 text: {error}")
    model, tokenizer = from_transformers(args.base) if args.base else (GPT2(), Bytes())
    most = getattr(model.config, "max_position_embeddings", 256) if args.base else model.wpe.num_embeddings
    args.context = args.context or min(256, most)
    if args.context > most:
        refuse(f"--context: got {args.context}, want at most the model's {most}")
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    args.targets = args.targets or (TARGETS if leaves.issuperset(TARGETS) else "all-linear")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) < (least := 10 * args.context + 100):
        refuse(f"--data {args.data or ''}: too little text: got {len(tokens):,} tokens, want {least:,} or more")
    if args.base and max(tokens) >= (known := model.get_input_embeddings().num_embeddings):
        refuse(f"--base: got a tokenizer that knows more than the {known:,} tokens of its model")
    model = model.to(args.device) if args.base else pretrained(args.cache, args.device, args.seed)
    amp = args.device.type == "cuda" and bool(args.base) if args.amp is None else args.amp
    return model, tokenizer, Task(tokens, args.context, args.batch, args.device, amp)


def from_transformers(name: str) -> tuple[nn.Module, Any]:
    """A causal language model in float32 and its tokenizer, by name or from a folder."""
    want = 'the transformers package (pip install ".[gpt2]")'
    try:
        import transformers

        want = "a model with its tokenizer"
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if not tokenizer.encode("a"):
            raise ValueError("it knows no token")
        want = "a causal language model"
        model = transformers.AutoModelForCausalLM.from_pretrained(name, use_cache=False).float()
    except Exception as error:  # transformers raises many kinds
        refuse(f"--base: got {name!r}, want {want} ({error})")
    return model, tokenizer


def pretrained(cache: Path, device: torch.device, seed: int = 0, steps: int = 1200, lr: float = 3e-3) -> GPT2:
    """The small GPT-2, trained on the standard library's source: from the cache, or made now and put there."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))  # its top-level modules, cut at 4 million characters
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in sources)[:4_000_000]
    file = cache / f"gpt2-{zlib.crc32(f'{steps} {lr} {text}'.encode()):08x}-{seed}.pt"
    torch.manual_seed(seed)
    model = GPT2().to(device)
    cache.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(Exception):  # not there yet, short or foreign: it is made now
        model.load_state_dict(torch.load(file, map_location=device, weights_only=True))
        return model
    train(model, Task(Bytes().encode(text), 128, 8, device), steps, lr, seed, "pre-training")
    torch.save(model.state_dict(), part := file.with_suffix(f".{os.getpid()}"))
    part.replace(file)  # whole or not at all
    return model


# ---------------------------------------------------------------- devices, processes, messages


def refuse(text: str) -> NoReturn:
    """One line about something that the user can mend; exit code 2, as argparse has it."""
    if RANK == 0:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(text.split())[:400]}", file=sys.stderr)
    raise SystemExit(2)


def progress(items: Sequence[Any], label: str) -> Iterator[Any]:
    """items in turn; about every ten seconds a line says how far it is and how long the rest takes."""
    start = last = time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        if RANK == 0 and (now := time.perf_counter()) - last > 10:
            last, left = now, timedelta(seconds=int((now - start) / done * (len(items) - done)))
            print(f"{label}: {done}/{len(items)}, {left} left", file=sys.stderr, flush=True)


def pick_device(name: str) -> torch.device:
    """auto: the accelerator, or the CPU. Under torchrun, each process takes a GPU of its own."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    try:
        if name == "cuda" and WORLD > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(name)
        torch.zeros(1, device=name).item()
    except Exception:  # torch raises many kinds
        refuse(f"--device: got {name!r}, want cpu or an accelerator that is there, one for each process")
    return torch.device(name)


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process fill the cache; the others wait and read it. What svft.py refuses becomes one line."""
    if RANK > 0:
        dist.barrier()
    try:
        yield
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        refuse(str(error))
    if RANK == 0 and WORLD > 1:
        dist.barrier()


# ---------------------------------------------------------------- the command line


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that the studies have too."""
    add = parser.add_argument
    add("--base", metavar="NAME_OR_FOLDER", help="a causal language model of transformers, as gpt2")
    add("--data", metavar="FILE", help="UTF-8 text to fine-tune on (Python's language reference)")
    add("--targets", nargs="+", help=f"ends of names, or all-linear ({' '.join(TARGETS)}, if the model has them)")
    add("--batch", type=int, default=8, help="sequences in a step (8)")
    add("--context", type=int, help="tokens in a sequence (128; with --base 256, or what the model allows)")
    add("--device", default="auto", help="cpu, cuda or another that torch knows (an accelerator, if there is one)")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (on: a GPU with --base)")
    add("--cache", type=Path, default=CACHE, help=f"folder for the pre-trained model and the SVDs ({CACHE.name})")


def check(args: argparse.Namespace) -> None:
    """Refuse what the options alone show to be wrong."""
    save = args.save and args.save.resolve()
    writable = not save or save.is_file() or (os.access(save.parent, os.W_OK) and not save.exists())
    for ok, text in [
        (min(args.steps, args.batch, args.context or 1) > 0, "--steps, --batch, --context: want 1 or more"),
        (args.batch % WORLD == 0, f"--batch: got {args.batch}, want a multiple of the {WORLD} processes"),
        (args.lr is None or 0 < args.lr < math.inf, f"--lr: got {args.lr}, want a number above 0"),
        (args.d is None or args.pattern != "plain", "--d: got it with --pattern plain, which is the diagonal alone"),
        (writable, f"--save: got {args.save}, want a file in a folder that can be written"),
    ]:
        if not ok:
            refuse(text)


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 130 for Ctrl-C; SystemExit(2) for what the user can mend."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("train_toy.py", "train_toy.py [options]", __doc__, formatter_class=raw)
    add_options(parser)
    add = parser.add_argument
    add("--pattern", default="banded", choices=["plain", "banded", "random", "top_k"], help="of M (banded)")
    add("--d", type=int, help="half-width of the band, whose size random and top_k take too (8)")
    add("--lr", type=float, help="peak learning rate (2.5 k^(-2/3), k entries in each M on average)")
    add("--steps", type=int, default=300, help="of fine-tuning (300)")
    add("--seed", type=int, default=0, help="of pre-training, random entries, batches and the sample (0)")
    add("--save", metavar="FILE.npz", type=Path, help="where to write the adapter")
    add("--compile", action="store_true", help="torch.compile")
    args = parser.parse_args(argv)
    check(args)
    args.device = pick_device(args.device)
    try:
        if WORLD > 1:  # the others may have to wait for the first one's pre-training
            dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
        finetune(args)
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; nothing is half-written", file=sys.stderr)
        return 130
    finally:
        if WORLD > 1 and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
