"""The Hugging Face Trainer takes the steps of a loop by hand, bit for bit, and keeps model and optimizer together."""

import functools
import json
import warnings

import pytest
import torch
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments

import qsam
from qsam.integrations.trainer import TrainerMixin
from tests.frameworks import Rows, steps_by_hand
from tests.methods import METHODS, assert_on_grid, assert_same, everything, long_but, train
from tests.models import BERT

BATCH = 8


class QsamTrainer(TrainerMixin, Trainer):
    """What a user writes."""


class Seeds(TrainerCallback):
    """The same random numbers at each step as :func:`steps_by_hand`."""

    def on_step_begin(self, args, state, control, **_):
        torch.manual_seed(state.global_step)


def arguments(folder, **options):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": BATCH, "num_train_epochs": 1, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none", "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1, "train_sampling_strategy": "sequential", "dataloader_pin_memory": False, "optim": "adamw_torch",
    }  # fmt: skip
    return TrainingArguments(**{**settings, **options})


def trainer(folder, model, optimizer=None, batches=4, method=None, scheduler=None, **options):
    return QsamTrainer(
        model,
        arguments(folder, **options),
        train_dataset=Rows(BERT, batches),
        eval_dataset=Rows(BERT, 1),
        optimizers=(optimizer, scheduler),
        callbacks=[Seeds()],
        qsam_method=method,
    )


BY_NAME = {str(method): method for method in METHODS}


def assert_steps_of_a_loop(
    folder, build, numbers=((0,), (1,), (2,), (3,)), *, model=BERT.quantized, loop=None, **options
):
    """Train with the Trainer and by hand from the same start: the ends must agree bit for bit; return the optimizer."""
    ours, twin = model(), model()
    optimizer, expected = build(ours), build(twin)
    schedules = [loop["scheduler"](o) if loop and "scheduler" in loop else None for o in (optimizer, expected)]
    trainer(folder, ours, optimizer, sum(map(len, numbers)), scheduler=schedules[0], **options).train()
    steps_by_hand(expected, twin, BERT, numbers, **{**(loop or {}), "scheduler": schedules[1]})
    assert_same(everything(optimizer, ours), everything(expected, twin))
    return optimizer


CASES = [
    ("saq", {"every": 2, "start": 1}),
    ("squat-same_batch", {"every": 2, "reuse": "perturbation"}),
    ("squat-next_batch", {}),
    ("squat-fused", {"period": 2}),
]
LONG_CASES = [
    ("qat", {}),
    ("sam", {}),
    ("joint", {}),
    ("squat-same_batch", {"period": 2}),
    ("squat-next_batch", {"direction": "momentum", "every": 2}),
]


@pytest.mark.parametrize(
    ("name", "options"), [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG_CASES)], ids=str
)
def test_the_trainer_takes_the_steps_of_a_loop(name, options, tmp_path):
    method = BY_NAME[name]
    build = functools.partial(method, **options)
    optimizer = assert_steps_of_a_loop(tmp_path, build, model=lambda: method.model(BERT))
    assert optimizer.steps > 1
    if method.quantizes:
        assert_on_grid(optimizer)


@pytest.mark.parametrize("name", ["saq", "squat-next_batch"])
@pytest.mark.long
def test_micro_batches_take_their_own_passes(name, tmp_path):
    """BERT's loss takes keywords, and the Trainer leaves it undivided then: so does the loop."""
    loop = {"divide": False}
    assert_steps_of_a_loop(tmp_path, BY_NAME[name], [[0, 1], [2, 3]], loop=loop, gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    ("loop", "options"),
    [
        ({"scheduler": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step))}, {}),
        ({"autocast": torch.bfloat16}, {"bf16": True}),
    ],
    ids=["a scheduler", "bf16"],
)
@pytest.mark.long
def test_the_scheduler_moves_after_the_scales_and_bf16_is_autocast(loop, options, tmp_path):
    assert_steps_of_a_loop(tmp_path, BY_NAME["squat-same_batch"], loop=loop, **options)


@pytest.mark.parametrize("own", [None, 0.01])
@pytest.mark.long
def test_clipping_is_the_optimizer_s(own, tmp_path):
    """TrainingArguments(max_grad_norm) would clip dL/dQ; the optimizer's own setting wins."""
    model, twin = BERT.quantized(), BERT.quantized()
    optimizer = qsam.SQuAT(model, SGD, lr=0.1, max_grad_norm=own)
    given = arguments(tmp_path, max_grad_norm=0.05)
    run = QsamTrainer(model, given, train_dataset=Rows(BERT, 2), optimizers=(optimizer, None), callbacks=[Seeds()])
    run.train()
    assert given.max_grad_norm == 0.05  # the caller's arguments are left alone
    assert optimizer.max_grad_norm == (0.05 if own is None else own)
    expected = qsam.SQuAT(twin, SGD, lr=0.1, max_grad_norm=optimizer.max_grad_norm)
    steps_by_hand(expected, twin, BERT, [[0], [1]])
    assert_same(everything(optimizer, model), everything(expected, twin))


def test_a_method_is_built_around_the_trainer_s_own_optimizer(tmp_path):
    model = BERT.quantized()
    run = trainer(tmp_path, model, method=functools.partial(qsam.SQuAT, rho=0.05), weight_decay=0.1)
    run.train()
    optimizer = qsam.unwrap(run.optimizer)
    assert isinstance(optimizer, qsam.SQuAT) and isinstance(optimizer.base, AdamW)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1 and optimizer.param_groups[1]["weight_decay"] == 0.0
    assert all(group["qsam_rho"] == 0.05 for group in optimizer.param_groups[:2])
    twin = BERT.quantized()
    other = trainer(tmp_path, twin, weight_decay=0.1)
    expected = qsam.SQuAT(twin, without_scales(Trainer.create_optimizer(other), twin), rho=0.05)
    steps_by_hand(expected, twin, BERT, [[0], [1], [2], [3]])
    assert_same(everything(optimizer, model), everything(expected, twin))


def without_scales(base, model):
    for group in base.param_groups:
        kept = [
            p
            for p in group["params"]
            if not any(p is s for n, s in model.named_parameters() if n.endswith("quantizer.scale"))
        ]
        group["params"][:] = kept
    return base


@pytest.mark.long
def test_the_log_is_of_the_first_pass_and_says_what_the_perturbation_added(tmp_path):
    model = BERT.quantized()
    run = trainer(tmp_path, model, qsam.SQuAT(model, AdamW, lr=1e-3, rho=0.5))
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    twin = BERT.quantized()
    losses = steps_by_hand(qsam.SQuAT(twin, AdamW, lr=1e-3, rho=0.5), twin, BERT, [[0], [1], [2], [3]])
    assert [entry["loss"] for entry in logs] == pytest.approx(losses, rel=1e-6)
    assert all(entry["qsam_rise"] > 0 and entry["qsam_direction_norm"] > 0 for entry in logs)
    assert logs[1]["qsam_perturbation_norm"] == pytest.approx(0.5, rel=1e-3)
    assert run.state.total_flos == 3 * 4 * Trainer.floating_point_ops(run, BERT.batch(0))


def test_the_rise_of_one_step_is_the_difference_of_its_losses(tmp_path):
    model = BERT.quantized()
    run = trainer(tmp_path, model, qsam.SAQ(model, AdamW, lr=1e-3, rho=0.5), batches=1)
    run.train()
    twin = BERT.quantized()
    expected = qsam.SAQ(twin, AdamW, lr=1e-3, rho=0.5)
    torch.manual_seed(0)
    train(expected, twin, BERT, 1)
    assert run.state.log_history[0]["qsam_rise"] == pytest.approx(expected.diagnostics()["rise"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("squat-next_batch", True),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("qat", True), ("squat-fused", False))),
    ],
)
def test_resuming_is_as_if_nothing_had_stopped(name, given, tmp_path):
    """In the middle of an epoch, of the alternation, with dropout and a schedule."""

    method = BY_NAME[name]
    common = {
        "batches": 5,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "save_strategy": "steps",
        "save_steps": 3,
    }

    def build():
        model = method.model(BERT)
        if given:
            return model, trainer(tmp_path, model, method(model), **common)
        return model, trainer(tmp_path, model, method=functools.partial(method, rho=0.1), **common)

    model, run = build()
    run.remove_callback(Seeds)  # the random state comes from the checkpoint
    run.train()
    other, resumed = build()
    resumed.remove_callback(Seeds)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == run.state.global_step == 5
    assert_same(everything(qsam.unwrap(resumed.optimizer), other), everything(qsam.unwrap(run.optimizer), model))


def test_a_checkpoint_of_the_model_alone_is_not_overwritten_by_older_latents(tmp_path):
    model = BERT.quantized()
    run = trainer(
        tmp_path, model, qsam.QAT(model, AdamW, lr=1e-2), save_strategy="steps", save_steps=4, save_only_model=True
    )
    run.train()
    end = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = BERT.quantized()
    optimizer = qsam.QAT(other, AdamW, lr=0.0)
    resumed = trainer(tmp_path, other, optimizer, num_train_epochs=2)
    with pytest.warns(UserWarning, match="on the quantization grid already: training starts from rounded weights"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(p, end[name]) for name, p in other.named_parameters())


@pytest.mark.parametrize("only_model", long_but([False], [False, True]))
def test_the_optimizer_follows_the_best_model(only_model, tmp_path):
    """The rate makes the second checkpoint worse than the first; training goes on from the best without an alarm."""
    model = BERT.quantized()
    optimizer = qsam.SQuAT(model, SGD, lr=1.0)
    scores = iter([1.0, 3.0])
    run = trainer(
        tmp_path, model, optimizer, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="made_up", greater_is_better=False, save_only_model=only_model,
    )  # fmt: skip
    run.compute_metrics = lambda _: {"made_up": next(scores)}
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    twin = BERT.quantized()
    expected = qsam.SQuAT(twin, SGD, lr=1.0)
    steps_by_hand(expected, twin, BERT, [[0], [1]])
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))
    if only_model:  # the full-precision weights of that step were not saved
        assert all(torch.equal(slot.latent, slot.parameter) for slot in optimizer._latents.slots)
    else:
        assert_same(everything(optimizer, model), everything(expected, twin))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps_by_hand(optimizer, model, BERT, [[2]])


@pytest.mark.long
def test_a_saved_model_is_rebuilt_from_its_folder(tmp_path):
    from transformers import BertForSequenceClassification

    model = BERT.quantized()
    run = trainer(tmp_path, model, qsam.SQuAT(model, AdamW, lr=1e-3), save_strategy="steps", save_steps=4)
    run.train()
    run.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-4", "final"):
        assert json.loads((tmp_path / folder / "qsam.json").read_text())["qsam_format"]
        loaded = BertForSequenceClassification.from_pretrained(tmp_path / folder)
        qsam.quantize_(loaded, spec=tmp_path / folder)
        batch = BERT.batch(0)
        assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.long
def test_training_again_goes_on(tmp_path):
    """What a run that was interrupted between its passes has left is forgotten."""
    ends = []
    for interrupted in (True, False):
        model = BERT.quantized()
        optimizer = qsam.SQuAT(model, AdamW, lr=1e-3)
        run = trainer(tmp_path, model, optimizer, batches=2)
        run.train()
        if interrupted:
            run.training_step(model, BERT.batch(7))
        run.train()
        ends.append(everything(optimizer, model))
    assert_same(*ends)


def test_what_the_trainer_cannot_drive_is_refused_before_training(tmp_path):
    model = BERT.quantized()
    with pytest.raises(TypeError, match=r"must be a qsam optimizer or a wrapper around one, got AdamW"):
        trainer(tmp_path, model).train()
    optimizer = qsam.SQuAT(model, AdamW, lr=1e-3, schedule="fused")
    with pytest.raises(
        ValueError, match=r"schedule='fused' steps the scales between the passes .* is 2: use schedule="
    ):
        trainer(tmp_path, model, optimizer, gradient_accumulation_steps=2).train()
    with pytest.raises(ValueError, match=r"give either `qsam_method` or an optimizer in `optimizers`, not both\."):
        trainer(tmp_path, model, optimizer, method=qsam.SQuAT)
    qsam.dequantize_(model, optimizer)
    lbfgs = qsam.QAT(model, LBFGS)
    with pytest.raises(TypeError, match=r"the Trainer takes no closure, which LBFGS wants: use AdamW or SGD\."):
        trainer(tmp_path, model, lbfgs).train()
