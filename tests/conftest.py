"""The fixtures of the spec for all of tests/, two tiny models of transformers, and one line on what is not installed."""

import importlib.util
import os

import pytest
import torch

from test_svft import saved, svd_calls  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def tiny_model(kind):
    """A model with random weights, "gpt2" (Conv1D, square ones among them) or "llama", and its targets."""
    hf = pytest.importorskip("transformers")
    common = dict(vocab_size=50, pad_token_id=0)
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = dict(n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
        return hf.GPT2LMHeadModel(hf.GPT2Config(**shape, **common)).eval(), ["c_attn", "c_proj", "c_fc"]
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, max_position_embeddings=32)
    config = hf.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **shape, **common)
    return hf.LlamaForCausalLM(config).eval(), r".*\.(q|k|v|o|up|gate|down)_proj"


@pytest.fixture
def tiny():
    return tiny_model


def pytest_terminal_summary(terminalreporter):
    packages = ("transformers", "peft", "matplotlib", "accelerate")
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        terminalreporter.write_line(f"Without {', '.join(missing)} some tests were skipped: pip install '.[dev]'")
