"""What people put round a model and a loop: averages, LoRA, hooks, checkpointing, dropped layers, modules used twice."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import qsam
from tests.models import BERT, MLP, Task, cross_entropy, seeded, vectors
from tests.optim.methods import (
    METHODS,
    PERTURBING,
    QUANTIZING,
    assert_on_grid,
    assert_same,
    closure_of,
    everything,
    latents,
    train,
)

each_method = pytest.mark.parametrize("method", METHODS, ids=str)
each_quantizing = pytest.mark.parametrize("method", QUANTIZING, ids=str)
each_perturbing = pytest.mark.parametrize("method", PERTURBING, ids=str)


# --- averages -----------------------------------------------------------------------------------------------------


@each_method
def test_an_average_taken_inside_latents_is_the_average_of_the_latents(method):
    """AveragedModel copies the model it is given: build it and update it where the model holds w."""
    model = method.model(MLP)
    optimizer = method(model, lr=1e-2)
    decay = 0.5
    with optimizer.latents():
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    expected = latents(optimizer, model)
    for i in range(4):
        train(optimizer, model, MLP, 1, start=i)
        with optimizer.latents():
            average.update_parameters(model)
        if i == 0:  # torch's first update copies
            expected = latents(optimizer, model)
        else:
            expected = {n: torch.lerp(expected[n], now, 1 - decay) for n, now in latents(optimizer, model).items()}
        if method.quantizes:
            assert_on_grid(optimizer)
    found = dict(average.module.named_parameters())
    for name, value in expected.items():
        # Each update rounds once in either order of operations.
        assert torch.allclose(
            found[name], value, rtol=0, atol=8 * torch.finfo(torch.float32).eps * float(value.abs().max())
        )


@each_quantizing
def test_a_copied_average_is_written_on_its_own_grid(method):
    """The averaged model carries its scales: write_ makes it the model to deploy."""
    model = method.model(MLP)
    optimizer = method(model, lr=1e-2)
    with optimizer.latents():
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for i in range(3):
        train(optimizer, model, MLP, 1, start=i)
        with optimizer.latents():
            average.update_parameters(model)
    before = everything(optimizer, model)
    qsam.write_(average.module)
    weight = average.module[0].weight
    assert len(weight.unique()) <= 16
    assert torch.equal(average.module[0].weight_quantizer(weight), weight)
    assert_same(everything(optimizer, model), before)


@each_method
def test_stochastic_weight_averaging_with_its_scheduler(method):
    """SWA at the end: the averaged latents become the model's, and Q of them is written."""
    model = method.model(MLP)
    optimizer = method(model, SGD, lr=0.1)
    scheduler = SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    with optimizer.latents():
        average = AveragedModel(model)
    seen = []
    for i in range(3):
        train(optimizer, model, MLP, 1, start=i)
        scheduler.step()
        seen.append(latents(optimizer, model))
        with optimizer.latents():
            average.update_parameters(model)
    mean = {name: torch.stack([one[name].double() for one in seen]).mean(0) for name in seen[0]}
    with torch.no_grad():
        for p, q in zip(model.parameters(), average.module.parameters(), strict=True):
            p.copy_(q)
    optimizer.sync_latents()
    for name, value in latents(optimizer, model).items():
        assert torch.allclose(value.double(), mean[name], rtol=0, atol=1e-6)
    train(optimizer, model, MLP, 1, start=3)


# --- gradients ----------------------------------------------------------------------------------------------------


@each_method
def test_a_hook_on_a_gradient_acts_in_every_pass(method):
    """One that doubles dL/dp is a loss of twice the size."""
    ends = []
    for hooks in (True, False):
        model = method.model(MLP)
        optimizer = method(model, SGD, lr=0.1)
        if hooks:
            for p in optimizer._parameters():
                if p.requires_grad:
                    p.register_hook(lambda grad: grad * 2)
        for i in range(3):

            def closure(i=i, model=model, optimizer=optimizer, factor=1 if hooks else 2):
                optimizer.zero_grad()
                loss = MLP.loss(model, MLP.batch(i)) * factor
                loss.backward()
                return loss

            optimizer.step(closure)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


@each_method
def test_a_hook_after_accumulation_sees_each_pass_once(method):
    model = method.model(MLP)
    optimizer = method(model)
    seen = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad is not None))
    calls = []
    closure = closure_of(optimizer, model, MLP, MLP.batch(0))
    optimizer.step(lambda: calls.append(1) or closure())
    assert seen == [True] * len(calls)


# --- activation checkpointing -------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """An MLP with dropout whose middle is recomputed in the backward."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def middle(self, x):
        return torch.dropout(torch.relu(self.b(x)), 0.3, self.training)

    def forward(self, x):
        x = torch.relu(self.a(x))
        recomputed = self.training and self.reentrant is not None
        x = checkpoint(self.middle, x, use_reentrant=self.reentrant) if recomputed else self.middle(x)
        return self.head(x)


def checkpointed(reentrant):
    build = seeded(functools.partial(Checkpointed, reentrant))
    return Task("checkpointed", build, vectors, cross_entropy)


@each_method
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_recomputed_activations_change_nothing(method, reentrant):
    """Both ways: the backward runs inside the block, at the weights of its forward."""
    ends = []
    for way in (reentrant, None):
        task = checkpointed(way)
        model = method.model(task)
        optimizer = method(model)
        torch.manual_seed(0)
        losses = train(optimizer, model, task, 3)
        ends.append(everything(optimizer, model) | {"losses": torch.tensor(losses)})
    assert_same(*ends)


# --- layers that come and go --------------------------------------------------------------------------------------


class LayerDrop(nn.Module):
    """Layers that are skipped by chance in training, as in Wav2Vec2 and OPT."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(8, 12), nn.Linear(12, 4)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(6))
        self.kept = []

    def forward(self, x):
        x = torch.relu(self.first(x))
        kept = [not self.training or float(torch.rand([])) > 0.5 for _ in self.layers]
        self.kept.append(tuple(kept))
        for layer, keep in zip(self.layers, kept, strict=True):
            x = x + torch.relu(layer(x)) if keep else x
        return self.head(x)


LAYER_DROP = Task("layer-drop", seeded(LayerDrop), vectors, cross_entropy)


@each_method
def test_all_passes_of_a_step_skip_the_same_layers(method):
    model = method.model(LAYER_DROP)
    optimizer = method(model)
    seen = set()
    for i in range(6):
        model.kept.clear()
        before = latents(optimizer, model)
        steps = optimizer.steps
        train(optimizer, model, LAYER_DROP, 1, start=i)
        assert len(set(model.kept)) == 1
        seen |= set(model.kept)
        after = latents(optimizer, model)
        if optimizer.steps > steps and i == 0:  # later Adam moves what has a moment
            moved = tuple(
                not torch.equal(before[n], after[n]) for n in before if n.startswith("layers") and n.endswith("weight")
            )
            assert moved == model.kept[0]
        if method.quantizes:
            assert_on_grid(optimizer)
    assert len(seen) > 1


@each_perturbing
def test_a_skipped_layer_is_not_perturbed(method):
    model = method.model(LAYER_DROP)
    optimizer = method(model, rho=0.5)
    model.kept.clear()
    with optimizer.first_pass():
        LAYER_DROP.loss(model, LAYER_DROP.batch(0)).backward()
    before = [layer.weight.detach().clone() for layer in model.layers]
    with optimizer.perturbed():
        moved = tuple(not torch.equal(layer.weight, w) for layer, w in zip(model.layers, before, strict=True))
        LAYER_DROP.loss(model, LAYER_DROP.batch(0)).backward()
    if method.quantizes:
        assert moved == model.kept[0] and 0 < sum(moved) < 6
    optimizer.step()


class Twice(nn.Module):
    """One layer that is called twice, and one that is called never."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(torch.relu(self.a(x)))))))


class Unrolled(Twice):
    """The same without the module's second call: its weight is used by a plain function."""

    def forward(self, x):
        again = torch.nn.functional.linear(torch.relu(self.a(x)), self.a.weight, self.a.bias)
        return self.head(torch.relu(self.b(torch.relu(again))))


@each_method
def test_a_module_that_is_called_twice_has_one_gradient_and_one_that_is_never_called_none(method):
    ends = []
    for cls in (Twice, Unrolled):
        task = Task("twice", seeded(cls), vectors, cross_entropy)
        model = cls().train()
        model.load_state_dict(seeded(Twice)().state_dict())
        if method.quantizes:
            qsam.quantize_(model, rules=[("unused", None), ("*", {})], activations=None)
        optimizer = method(model)
        unused = model.unused.weight.detach().clone()
        train(optimizer, model, task, 3)
        assert torch.equal(model.unused.weight, unused)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


@each_quantizing
def test_a_quantized_layer_that_is_never_called_stays_where_it_is(method):
    task = Task("twice", seeded(Twice), vectors, cross_entropy)
    model = task.build()
    qsam.quantize_(model, activations=None)
    optimizer = method(model)
    slot = next(s for s in optimizer._latents.slots if s.path == "unused.weight")
    before = slot.latent.detach().clone(), slot.quantizer.scale.detach().clone()
    train(optimizer, model, task, 3)
    assert torch.equal(slot.latent, before[0]) and torch.equal(slot.quantizer.scale, before[1])
    assert_on_grid(optimizer)


# --- LoRA ---------------------------------------------------------------------------------------------------------


peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def lora(trained_base):
    """Return BERT with real LoRA adapters in its attention; the base quantized, frozen or trained."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(BERT.build(), LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.1)).train()
    with torch.no_grad():  # peft starts B at 0, where A has no gradient
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.02)
    if trained_base:
        for name, p in model.named_parameters():
            if "base_layer.weight" in name:
                p.requires_grad_(True)
    return model


@peft
@pytest.mark.parametrize("method", [m for m in METHODS if str(m) in ("qat", "sam", "squat-same_batch")], ids=str)
@pytest.mark.parametrize("trained_base", [False, True], ids=["frozen", "trained"])
def test_lora_trains_on_a_quantized_base(method, trained_base):
    torch.manual_seed(0)
    model = lora(trained_base)
    options = {"perturb": "all"} if method.perturbs else {}
    optimizer = method(model, lr=1e-2, **options)
    before = latents(optimizer, model)
    factors = [name for name in before if "lora_" in name]
    bases = [name for name in before if "base_layer.weight" in name]
    assert factors and bases
    if method.quantizes:
        quantized = {slot.path for slot in optimizer._latents.slots}
        assert set(bases) <= quantized and not quantized & set(factors)
    train(optimizer, model, BERT, 4)
    after = latents(optimizer, model)
    assert all(not torch.equal(before[name], after[name]) for name in factors)
    assert all(torch.equal(before[name], after[name]) != trained_base for name in bases)
    if method.quantizes:
        assert_on_grid(optimizer)


@peft
@pytest.mark.parametrize("method", [m for m in PERTURBING if m.name == "saq"], ids=str)
def test_a_perturbation_of_frozen_weights_alone_says_that_it_perturbs_nothing(method):
    """perturb="quantized" with a frozen base: every quantized weight lacks a gradient."""
    torch.manual_seed(0)
    model = lora(trained_base=False)
    for name, p in model.named_parameters():
        if "base_layer" not in name and "lora_" not in name:
            p.requires_grad_(False)
    optimizer = method(model, lr=1e-2)
    with pytest.warns(UserWarning, match=r"nothing is perturbed: .* use perturb='all'"):
        train(optimizer, model, BERT, 3)


# --- copies -------------------------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_under_a_scheduler(method, how):
    """A scheduler patches ``step`` of the instance, which must not come along."""
    model = method.model(MLP)
    optimizer = method(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    train(optimizer, model, MLP, 2)
    scheduler.step()
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train(optimizer, model, MLP, 2, start=2)
    train(other, twin, MLP, 2, start=2)
    assert_same(everything(other, twin), everything(optimizer, model))


@peft
def test_a_base_of_adam_s_kind_and_one_without_state_train_the_same_lora():
    """The adapters may have a base of their own, in one optimizer, by groups."""
    torch.manual_seed(0)
    model = lora(trained_base=True)
    qsam.quantize_(model)
    scales = {id(p) for name, p in model.named_parameters() if "quantizer" in name}
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in scales]
    groups = [
        {"params": [p for n, p in trained if "lora_" in n], "lr": 1e-2},
        {"params": [p for n, p in trained if "lora_" not in n], "lr": 1e-4, "rho": 0.05},
    ]
    optimizer = qsam.SQuAT(model, AdamW, lr=1e-3, params=groups, perturb="all")
    before = latents(optimizer, model)
    train(optimizer, model, BERT, 2)
    after = latents(optimizer, model)
    moved = {name: float((after[name] - before[name]).abs().max()) for name in after}
    assert all(moved[n] > 5e-3 for n, _ in trained if "lora_" in n)
    assert all(0 < moved[n] < 5e-4 for n, _ in trained if "lora_" not in n)
