"""Lightning's automatic optimization takes the steps of ``step(closure)``; what it cannot do is refused before training."""

import pytest
import torch
import torchmetrics
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

import qsam
from qsam.integrations.lightning import LightningMixin
from tests.frameworks import Rows, steps_by_hand
from tests.methods import METHODS, assert_on_grid, assert_same, closure_of, everything, train
from tests.models import CONV, MLP

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers which may be a bottleneck"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]
SIZES = {"mlp": 16, "conv": 8}


class Plain(LightningModule):
    """A module of a task, with a method's optimizer and a scheduler that moves every step."""

    def __init__(self, method, task=MLP, base=AdamW, **options):
        super().__init__()
        self.method, self.task, self.options, self.base = method, task, options, base
        self.model = method.model(task)
        self.seen = []

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, _):
        loss = self.task.loss(self.model, batch)
        self.seen.append(float(loss.detach()))
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_batch_start(self, _, batch_idx):
        torch.manual_seed(self.trainer.global_step)

    def configure_optimizers(self):
        optimizer = self.method(self.model, self.base, **self.options)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 2, 0.5), "interval": "step"}}


class Lit(LightningMixin, Plain):
    """What a user writes."""


def fit(folder, module, batches=4, callbacks=(), checkpoint=None, **options):
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(
        default_root_dir=folder, callbacks=list(callbacks), log_every_n_steps=1, **{**settings, **options}
    )
    rows = DataLoader(Rows(module.task, batches), batch_size=SIZES[module.task.name])
    trainer.fit(module, rows, ckpt_path=checkpoint)
    return trainer


def by_closure(method, task=MLP, base=AdamW, batches=4, autocast=False, **options):
    model = method.model(task)
    optimizer = method(model, base, **options)
    scheduler = StepLR(optimizer, 2, 0.5)
    losses = []
    for i in range(batches):
        torch.manual_seed(i)

        def closure(i=i):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
                loss = task.loss(model, task.batch(i))
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
        scheduler.step()
    return optimizer, model, losses


BY_NAME = {str(method): method for method in METHODS}
SQUAT = BY_NAME["squat-same_batch"]


def ours(trainer):
    return qsam.unwrap(trainer.optimizers[0])


def assert_is_a_loop_of_closures(folder, module, fit_options=(), **loop):
    """Fit the module and loop over closures from the same start: the ends must agree bit for bit."""
    trainer = fit(folder, module, **dict(fit_options))
    expected, twin, _ = by_closure(module.method, module.task, module.base, **{**module.options, **loop})
    assert_same(everything(ours(trainer), module.model), everything(expected, twin))
    if module.method.quantizes:
        assert_on_grid(ours(trainer))


@pytest.mark.parametrize("name", ["sam", "saq", "squat-next_batch", "squat-fused"])
def test_a_fit_is_a_loop_of_closures(name, tmp_path):
    assert_is_a_loop_of_closures(tmp_path, Lit(BY_NAME[name], CONV))


@pytest.mark.parametrize("cls", [Lit, Plain])
def test_bf16_mixed_is_autocast(cls, tmp_path):
    assert_is_a_loop_of_closures(tmp_path, cls(SQUAT), {"precision": "bf16-mixed"}, autocast=True)


def test_the_log_is_of_the_first_pass(tmp_path):
    class Outputs(Callback):
        def __init__(self):
            self.losses = []

        def on_train_batch_end(self, trainer, module, outputs, *_):
            self.losses.append(float(outputs["loss"]))

    outputs = Outputs()
    module = Lit(SQUAT, rho=0.5)
    trainer = fit(tmp_path, module, callbacks=[outputs], logger=CSVLogger(tmp_path))
    _, _, losses = by_closure(SQUAT, rho=0.5)
    assert len(module.seen) == 12 and module.seen[::3] == losses
    assert outputs.losses == losses
    assert float(trainer.callback_metrics["train_loss_epoch"]) == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert float(trainer.callback_metrics["qsam_rise"]) == pytest.approx(module.seen[-2] - module.seen[-3], rel=1e-5)
    assert float(trainer.callback_metrics["qsam_perturbation_norm"]) == pytest.approx(0.5, rel=1e-4)


class Measured(Lit):
    """A module with metrics, one of them in a collection, and with a second network."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        torch.manual_seed(0)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4)
        self.others = torchmetrics.MetricCollection({"rows": torchmetrics.CatMetric(), "sum": torchmetrics.SumMetric()})
        self.judge = torch.nn.BatchNorm1d(4)

    def training_step(self, batch, _):
        outputs = self.model(batch["x"])
        self.judge(outputs.detach())
        self.accuracy(outputs, batch["labels"])
        self.others.update(batch["labels"].float())
        loss = torch.nn.functional.cross_entropy(outputs, batch["labels"])
        self.log("accuracy", self.accuracy, on_epoch=True, on_step=False)
        self.seen.append(outputs.detach())
        return loss

    def on_train_epoch_end(self):
        self.counted = self.accuracy.update_count, self.others["rows"].compute(), self.others["sum"].compute()
        self.value = self.accuracy.compute()


@pytest.mark.parametrize("name", ["saq", "squat-same_batch", "squat-next_batch"])
def test_a_metric_and_a_second_network_count_the_first_pass_only(name, tmp_path):
    method = BY_NAME[name]
    module = Measured(method, MLP)
    fit(tmp_path, module)
    updates, rows, total = module.counted
    labels = torch.cat([MLP.batch(i)["labels"] for i in range(4)])
    assert updates == 4
    assert torch.equal(rows, labels.float()) and total == labels.sum()
    assert module.judge.num_batches_tracked == 4
    if method.schedule != "next_batch":
        firsts = module.seen[:: len(module.seen) // 4]
        expected = torchmetrics.functional.classification.multiclass_accuracy(torch.cat(firsts), labels, 4)
        assert module.value == pytest.approx(float(expected), rel=8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("own", [None, 0.01])
def test_clipping_is_the_optimizer_s(own, tmp_path):
    module = Lit(SQUAT, base=SGD, lr=0.1, max_grad_norm=own)
    effective = 0.05 if own is None else own
    assert_is_a_loop_of_closures(tmp_path, module, {"gradient_clip_val": 0.05}, max_grad_norm=effective)


@pytest.mark.parametrize("name", ["qat", "squat-next_batch"])
def test_resuming_is_as_if_nothing_had_stopped(name, tmp_path):
    method = BY_NAME[name]
    module = Lit(method)
    whole = fit(tmp_path, module, max_epochs=2, batches=3)
    first = fit(tmp_path, Lit(method), batches=3)
    first.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    resumed = Lit(method)
    trainer = fit(tmp_path, resumed, max_epochs=2, batches=3, checkpoint=tmp_path / "last.ckpt")
    assert trainer.global_step == whole.global_step == 6
    ends = [everything(ours(t), m.model) for t, m in ((trainer, resumed), (whole, module))]
    assert_same(*ends)


def half(scale=2.0**16):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


class Wrong(Lit):
    def configure_optimizers(self):
        return SGD(self.model.parameters(), lr=0.1)


LAST_CLOSURE = "gives the optimizer the last micro-batch's closure only"
REFUSED = {
    "16-mixed": (
        Lit,
        lambda: {"plugins": half()},
        r"precision='16-mixed' runs the closure without the optimizer, .*: use precision='bf16-mixed' or 32",
    ),
    "accumulation": (
        Lit,
        lambda: {"accumulate_grad_batches": 2},
        f"accumulate_grad_batches=2 {LAST_CLOSURE}: use larger",
    ),
    "scheduled": (
        Lit,
        lambda: {"callbacks": [GradientAccumulationScheduler({0: 1, 3: 4})]},
        f"accumulate_grad_batches=4 {LAST_CLOSURE}",
    ),
    "by value": (
        Lit,
        lambda: {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
        r"gradient_clip_algorithm='value' would clip dL/dQ, .*: use gradient_clip_algorithm='norm'",
    ),
    "not ours": (Wrong, dict, r"must be a qsam optimizer or a wrapper around one, got SGD"),
}


@pytest.mark.parametrize(("cls", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_lightning_cannot_do_is_refused_before_training(cls, options, message, tmp_path):
    module = cls(SQUAT)
    with pytest.raises((ValueError, TypeError), match=message):
        fit(tmp_path, module, **options())
    assert not module.seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {"accumulate_grad_batches": 2}, r"step\(closure\) clears the gradients .*accumulate_grad_batches"),
        (lambda: {"plugins": half(2.0**8)}, r"is a plain QAT step\. A framework .*Lightning with 16-mixed"),
    ],
    ids=["accumulation", "16-mixed"],
)
def test_without_the_mixin_what_is_lost_is_said(options, message, tmp_path):
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path, Plain(SQUAT), **options())


class ByHand(Lit):
    """Manual optimization: micro-batches and blocks by hand; Lightning's closure then runs its hooks only."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.automatic_optimization = False

    def training_step(self, batch, number):
        optimizer = qsam.unwrap(self.optimizers())
        for block in optimizer.blocks:
            with getattr(optimizer, block)():
                self.manual_backward(self.task.loss(self.model, batch) / 2)
        if number % 2:
            self.optimizers().step()


def test_manual_optimization_accumulates_by_hand(tmp_path):
    method = BY_NAME["saq"]
    module = ByHand(method, MLP)
    trainer = fit(tmp_path, module)
    twin = method.model(MLP)
    expected = method(twin)
    steps_by_hand(expected, twin, MLP, [[0, 1], [2, 3]], seed=False)
    assert_same(everything(ours(trainer), module.model), everything(expected, twin))


def test_the_proxy_of_lightning_refuses_the_blocks_and_names_unwrap(tmp_path):
    model = MLP.quantized()
    optimizer = qsam.SQuAT(model, AdamW, lr=1e-3)
    proxy = LightningOptimizer(optimizer)
    for verb in ("first_pass", "perturbed", "scale_phase", "latents"):
        with pytest.raises(
            RuntimeError, match=rf"{verb}\(\) was called on a wrapper .*: use qsam\.unwrap\(optimizer\)\.{verb}\(\)"
        ):
            getattr(proxy, verb)().__enter__()
    assert qsam.unwrap(proxy) is optimizer
    optimizer.step(closure_of(optimizer, model, MLP, MLP.batch(0)))
    train(optimizer, model, MLP, 1)
