"""svft.py in the places where people run it: Hugging Face, several processes, compile, export, torch.func, devices."""

import copy
import importlib.util
import os
import pickle
import warnings

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from test_documents import README, python_blocks, stand_in
from torch import nn

import svft
from svft import SVD, SVFTLinear, compute_svd, omega_random
from test_svft import PATHS, Conv1D, adapted, layers, mlp, near, plain_layer, randomize, steps

FSDP_DTYPES = [torch.bfloat16, torch.float32] if torch.__version__ >= "2.7" else []  # torch 2.6 has no FSDP2 on the CPU
HAS_GLOO = torch.distributed.is_available() and torch.distributed.is_gloo_available()


# ---------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
class TestTransformers:
    def test_inject_generate_merge_save_and_load_again(self, tiny, kind, tmp_path):
        """At m = 0 the same logits; adapted ones survive merge, save_pretrained and from_pretrained."""
        model, targets = tiny(kind)
        ids = torch.tensor([[1, 5, 9, 7]])
        start = model(ids).logits
        assert len(adapted(svft.inject(model, targets))) == (8 if kind == "gpt2" else 14)
        near(model(ids).logits, start, 1e-5)
        randomize(model, 0.3)
        want, text = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
        assert (want - start).abs().max() > 1e-2
        svft.merge(model).save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        near(model(ids).logits, want, 1e-4)
        assert torch.equal(again(ids).logits, model(ids).logits) and not adapted(again)
        assert torch.equal(again.generate(ids, max_new_tokens=5, do_sample=False), text)

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames its own options
    def test_the_trainer_trains_it_with_gradient_checkpointing(self, tiny, kind, tmp_path):
        """Trainer, gradient checkpointing and enable_input_require_grads: the m's move, nothing else does."""
        pytest.importorskip("accelerate")
        hf = pytest.importorskip("transformers")
        model, targets = tiny(kind)
        svft.inject(model, targets).enable_input_require_grads()
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        texts = torch.randint(3, 50, (8, 12))
        how = dict(max_steps=3, per_device_train_batch_size=4, learning_rate=0.05, gradient_checkpointing=True)
        args = hf.TrainingArguments(tmp_path, **how, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True)
        hf.Trainer(model, args, train_dataset=[{"input_ids": ids, "labels": ids} for ids in texts]).train()
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
        assert all(model.get_submodule(name).m.abs().max() > 1e-3 for name in adapted(model))
        svft.save_adapter(model, tmp_path / "a.npz")
        fresh = svft.load_adapter(tiny(kind)[0], tmp_path / "a.npz")
        near(fresh(texts[:1]).logits, model.eval()(texts[:1]).logits, 1e-5)


# ---------------------------------------------------------------- weights elsewhere: in several processes, offloaded


def one_of_two(rank, folder, tiny):
    """A process of a gloo group of two: DDP, then FSDP2. Each takes its half of every batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    wrapper = nn.parallel.DistributedDataParallel(svft.inject(mlp(), ["0", "2", "4"]))
    wrapper.register_forward_pre_hook(lambda _, inputs: inputs[0].chunk(2)[rank])
    steps(wrapper)
    if rank == 0:
        svft.save_adapter(wrapper, folder / "ddp.npz")
    for dtype in FSDP_DTYPES if tiny else ():
        os.makedirs(folder / str(dtype), exist_ok=True)
        os.chdir(folder / str(dtype))
        with_fsdp(rank, tiny, dtype)
    torch.distributed.barrier()  # no process leaves while the other still reads from it
    torch.distributed.destroy_process_group()


def train_tiny(model, halves):
    """Three steps of plain gradient descent on two sequences, or on one of them."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.arange(3, 19).view(2, 8)[halves]
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model


def with_fsdp(rank, tiny, dtype):
    """README's block, here in its own dtype or in another. Then what a sharded model is refused."""
    import transformers
    from torch.distributed.fsdp import fully_shard

    def train():
        for name, p in names["model"].named_parameters():
            assert abs(p.to_local().numel() - p.numel() / 2) <= p.numel() / p.shape[0], name  # half, to one row
        train_tiny(names["model"], slice(rank, rank + 1))

    transformers.AutoModelForCausalLM.from_pretrained = stand_in(tiny)
    torch.distributed.init_process_group = lambda: None  # done already, on the CPU
    names = {"svft": svft, "torch": torch, "AutoModelForCausalLM": transformers.AutoModelForCausalLM, "train": train}
    (block,) = [block for block in python_blocks(README) if "fully_shard" in block]
    exec(block.replace("...  #", "train()  #").replace("torch.bfloat16", str(dtype)), names)
    plain, at_root = mlp(), randomize(svft.inject(mlp(), ["0", "2", "4"]))
    svft.save_adapter(at_root, f"root{rank}.npz")
    for root in (plain, at_root):
        fully_shard(root)(torch.randn(2, 5))  # its weights stay gathered: plain tensors, for the time being
    sharded, refusal = names["model"], "layer '.*: got .*_hooks.* sharded[?]"
    for model, file in ((sharded, "adapter.npz"), (at_root, f"root{rank}.npz")):
        for act in (svft.merge, lambda m: svft.load_adapter(m, file)):  # noqa: B023
            with pytest.raises(ValueError, match=refusal):
                act(model)
    with pytest.raises(ValueError, match=refusal):
        svft.inject(plain, ["2"])


class TestDistributedAndOffloaded:
    @pytest.mark.skipif(not HAS_GLOO, reason="this torch has no gloo")
    def test_two_processes_equal_one_with_the_same_global_batch(self, tmp_path, monkeypatch):
        """DDP; FSDP2 as README has it, with W0, U and V halved on each rank. What they save loads on one process."""
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # two processes on one GPU would not do
        tiny = importlib.util.find_spec("transformers") and tiny_model
        # Not a fork: a child of a process that has run several threads may wait for one of them for ever.
        torch.multiprocessing.spawn(one_of_two, (tmp_path, tiny), 2)
        runs = [(torch.float32, "ddp.npz", mlp(), steps(svft.inject(mlp(), ["0", "2", "4"])))]
        for dtype in FSDP_DTYPES if tiny else ():
            assert (tmp_path / str(dtype) / "merged" / "config.json").is_file()
            fresh, alone = (tiny("llama")[0].to(dtype) for _ in range(2))
            alone = train_tiny(svft.inject(alone, "all-linear"), slice(2))
            runs.append((dtype, f"{dtype}/adapter.npz", fresh, alone))
        for dtype, file, *models in runs:
            svft.load_adapter(models[0], tmp_path / file)
            got, want = ({n: p.detach() for n, p in m.named_parameters() if p.requires_grad} for m in models)
            largest = max(m.abs().max() for m in want.values())
            assert got.keys() == want.keys() and largest > 1e-2
            for name in want:
                near(got[name], want[name], 16 * torch.finfo(dtype).eps * largest, name)

    def test_weights_that_accelerate_has_offloaded_are_refused_and_work_once_they_are_back(self, tmp_path):
        """Before inject or after it. A hook that was removed, and the forward that accelerate leaves, are accepted."""
        accelerate = pytest.importorskip("accelerate")
        plain, model, x = mlp(), randomize(svft.inject(mlp(), ["0", "2"])), torch.randn(3, 5)
        inject, save = lambda m: svft.inject(m, ["2"]), lambda m: svft.save_adapter(m, tmp_path / "a.npz")
        want = model(x)
        plain[2].register_full_backward_hook(print).remove()
        for offloaded, act in ((plain, inject), (model, svft.merge), (model, save)):
            accelerate.cpu_offload(offloaded, torch.device("cpu"))
            with pytest.raises(ValueError, match="layer '[02]': .*(meta|hook)"):
                act(offloaded)
            accelerate.hooks.remove_hook_from_module(offloaded, recurse=True)
        assert list(tmp_path.iterdir()) == [] and adapted(inject(plain)) == ["2"]
        near(svft.merge(model)(x), want, 1e-5)


# ---------------------------------------------------------------- what torch does with a model


class TestTransformations:
    @given(layer=layers())
    def test_a_copy_a_pickle_and_a_state_dict_carry_the_layer(self, layer):
        """The same output bits, whatever the other layer held, another Omega too, and in whatever way it is loaded."""
        base = layer.base.pop()
        state, x = layer.state_dict(), torch.randn(3, layer.in_features, dtype=torch.float64)
        if type(base) is nn.Linear:  # the Conv1D here only borrows the name by which pickle would find it
            assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
        ways = {
            "whole": lambda other: other.load_state_dict(state),
            "assign": lambda other: other.load_state_dict(state, assign=True),
            "from meta": lambda other: other.to("meta").load_state_dict(state, assign=True),
            "after to_empty": lambda other: other.to_empty(device="cpu").load_state_dict(state),
            "in parts": lambda other: [other.load_state_dict({n: state[n]}, strict=False) for n in reversed(state)],
        }
        for way, load in ways.items():
            other = copy.deepcopy(layer)
            assert torch.equal(other(x), layer(x))
            other.omega.copy_(omega_random(*layer.M().shape, len(layer.m), seed=5))
            for p in other.parameters():
                p.data.normal_()
            assert not torch.equal(other(x), layer(x))
            load(other)
            assert torch.equal(other(x), layer(x)), way

    def test_a_whole_model_compiles_and_exports_for_inputs_of_any_length(self):
        """Every path in one model. One exported program; a few compiled graphs, not one for each length or for each
        path that auto could take."""
        torch._dynamo.reset()
        lengths = (2, 9, 30, 120, 500, 1900)  # uncompiled, auto changes its path between them
        model = nn.Sequential(*(nn.Linear(*size) for size in ((5, 6), (6, 19), (19, 4), (4, 4), (4, 4), (4, 4))))
        for name, path in zip("012345", ("auto", "auto", "auto", *PATHS), strict=True):
            svft.inject(model, [name], "plain", path=path)
        randomize(model, 0.1)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        graphs = torch._dynamo.utils.counters["stats"]
        graphs.clear()
        with torch.no_grad():
            for tokens in lengths:
                near(compiled(torch.ones(tokens, 5)), model(torch.ones(tokens, 5)), 1e-5)
        assert 1 <= graphs["unique_graphs"] <= 3
        for tokens in lengths:
            x = torch.randn(tokens, 5)
            want, got = (torch.autograd.grad(f(x).square().sum(), model[0].m)[0] for f in (model, compiled))
            near(got, want, 1e-4 * float(want.abs().max()))
        assert 2 <= graphs["unique_graphs"] <= 6
        any_length = {"input": {0: torch.export.Dim("length", min=2, max=4096)}}
        program = torch.export.export(model, (torch.randn(7, 5),), dynamic_shapes=any_length).module()
        for tokens in lengths:
            near(program(torch.ones(tokens, 5)), model(torch.ones(tokens, 5)), 1e-5)

    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
    def test_gradient_checkpointing_changes_nothing(self, reentrant):
        """The recomputed forward gives the same gradient."""
        model, x = randomize(svft.inject(mlp(), ["0", "2", "4"])), torch.randn(3, 5, requires_grad=True)
        want = torch.autograd.grad(model(x).sum(), [model[0].m, x])
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        assert torch.equal(model[0].m.grad, want[0]) and torch.equal(x.grad, want[1])

    def test_torch_func_works(self):
        """functional_call with grad, and per-sample gradients through vmap."""
        layer, x = randomize(SVFTLinear(plain_layer(5, 4), path="gather")), torch.randn(6, 4, dtype=torch.float64)
        grad = torch.func.grad(lambda m, x: torch.func.functional_call(layer, {"m": m}, (x,)).square().sum())
        want = torch.autograd.grad(layer(x).square().sum(), layer.m)[0]
        near(grad(layer.m.detach(), x), want, 1e-10)
        with warnings.catch_warnings(action="ignore"):  # no batching rule for embedding_bag: torch falls back to a loop
            each = torch.func.vmap(grad, in_dims=(None, 0))(layer.m.detach(), x[:, None])
        near(each.sum(0), want, 1e-10)

    @pytest.mark.parametrize("how", ["inject", "load_adapter"])
    def test_what_is_made_inside_inference_mode_can_be_trained_and_merged(self, how, saved):
        """A model is often set up where it was evaluated: its m's are no inference tensors, nor is what merge gives."""
        base, want, path = saved
        with torch.inference_mode():
            layer = svft.SVFTLinear(base[0])
            model = svft.inject(base, ["0", "2", "4"]) if how == "inject" else svft.load_adapter(base, path)
            assert how == "inject" or torch.equal(model(torch.ones(2, 5)), want(torch.ones(2, 5)))
        layer(torch.ones(2, 5)).sum().backward()
        before = [model[i].m.detach().clone() for i in (0, 2, 4)]
        trained = steps(model)(torch.ones(2, 5))
        assert all((model[i].m != m).all() for i, m in zip((0, 2, 4), before, strict=True))
        with torch.inference_mode():
            svft.merge(model)
        near(model(torch.ones(2, 5)), trained, 1e-5)
        model.requires_grad_(True)(torch.ones(2, 5)).sum().backward()
        assert model[2].weight.grad.abs().sum() > 0

    def test_names_are_the_models_own_inside_torchs_wrappers(self, tmp_path):
        """torch.compile, activation checkpointing and DDP put their names into a module's: they are left out when
        matching, in the seed of "random", and in files. So a file is the same whatever was wrapped."""
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        def model():
            torch.manual_seed(0)
            return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in "ab"))

        plain, inside, path, x = model(), model(), tmp_path / "a.npz", torch.randn(3, 6)
        inside[0], inside[1] = torch.compile(inside[0]), checkpoint_wrapper(inside[1])
        own, parts = ["0.1", "1.0"], ["0._orig_mod.1", "1._checkpoint_wrapped_module.0"]
        whole = nn.DataParallel(torch.compile(model())), checkpoint_wrapper(model())
        names = own, parts, ["_orig_mod.0.1", "1.0"], own
        for wrapped, targets in zip((plain, inside, *whole), names, strict=True):
            svft.save_adapter(randomize(svft.inject(wrapped, targets, "random", 1)), path)
            assert [row.split()[0] for row in svft.summary(wrapped).splitlines()[1:3]] == own
            near(svft.load_adapter(model(), path)(x), plain(x), 1e-5)
            near(svft.load_adapter(nn.DataParallel(model()), path).module(x), plain(x), 1e-5)


# ---------------------------------------------------------------- devices


def test_no_path_mixes_devices():
    """Every pattern and path on a fake GPU, injected, run and merged. LAPACK works on CUDA, else on the CPU, as for MPS."""
    if torch.cuda.is_available():
        pytest.skip("the laws themselves run on this GPU, which shows a mix-up")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot register a backend in Python")
    torch.multiprocessing.spawn(run_on_a_fake_gpu)  # in its own process: autograd must start with the fake GPU


def run_on_a_fake_gpu(rank):
    """Fake tensors of a backend that torch lets Python register: once it passes for CUDA, once it does not."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Fake(FakeTensorMode):  # svft's checks ask tensors for scalars: answer 'all is well'
        def dispatch(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                return True if args[0].dtype == torch.bool else 0.01 if args[0].dtype.is_floating_point else 1
            if func is torch.ops.aten.nonzero.default:  # omega_banded's: as many positions as a band of d = 1 has
                with self:
                    return torch.zeros(3 * args[0].shape[0] - 2, 2, dtype=torch.int64, device="cpu")
            return super().dispatch(func, types, args, kwargs or {})

    def check(dtype):
        with torch.device("meta"):
            model = nn.Sequential(Conv1D(8, 8), nn.Linear(8, 12), nn.Linear(12, 8))
        for module in model:
            for name, p in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=dtype, device=gpu)))
        x = torch.zeros(2, 8, dtype=dtype, device=gpu)
        svd = SVD(*(t.cpu() for t in compute_svd(model[1].weight)))  # given from elsewhere
        assert SVFTLinear(model[1], "plain", svd=svd).U.device.type == gpu
        for target, pattern in zip("012", ("top_k", "random", "banded"), strict=True):
            svft.inject(model, [target], pattern, 1)
        for path in ("auto", *PATHS):
            for layer in model:
                layer.path = path
            y = model(x)
            y.float().sum().backward()
            assert y.device.type == model[0].m.grad.device.type == gpu
        with svft.disabled(model):
            assert model(x).device.type == gpu
        merged = svft.merge(model)[0]
        assert merged.weight.device.type == gpu and type(merged) is Conv1D

    gpu = "fakegpu"
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(gpu)
    with Fake(), pytest.raises(RuntimeError, match="same device"):
        torch.zeros(2, device=gpu) + torch.zeros(2)
    real, served = torch.linalg.svd, set()
    torch.linalg.svd = lambda W, **options: served.add((W.device.type, W.dtype)) or real(W, **options)
    for where, dtype in ((gpu, torch.float32), ("cpu", torch.bfloat16)):
        torch.Tensor.is_cuda = property(lambda t, where=where: t.device.type == where == gpu)
        served.clear()
        with Fake():
            check(dtype)
        assert served == {(where, torch.float64)}, dtype
