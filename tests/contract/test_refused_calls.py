"""A call that is refused says why, and changes nothing: neither the model nor the optimizer, their hooks or options."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import qsam
from tests.methods import assert_same, closure_of, everything, train
from tests.models import MLP


class Setting:
    """What the calls are made with: a float model, and a SQuAT that has trained a quantized one."""

    def __init__(self):
        self.model = MLP.build()
        self.quantized = MLP.quantized()
        self.squat = qsam.SQuAT(self.quantized, SGD, lr=0.01, momentum=0.9)
        train(self.squat, self.quantized, MLP, 2)
        self.closure = closure_of(self.squat, self.quantized, MLP, MLP.batch(0))
        self.spec = qsam.quantize_(MLP.build(), bits=3).to_spec()

    def quantize(self, **options):
        qsam.quantize_(self.model, **options)

    def qat(self, *args, **options):
        qsam.QAT(MLP.quantized(), *(args or (SGD,)), **{"lr": 0.1, **options})

    def load(self, change):
        state = copy.deepcopy(self.squat.state_dict())
        change(state)
        self.squat.load_state_dict(state)

    def rebuild(self, change):
        spec = copy.deepcopy(self.spec)
        change(spec)
        qsam.quantize_(self.model, spec=spec)

    def now(self):
        """Return all that a refused call must leave alone."""
        tensors = everything(self.squat, self.quantized) | {f"float {k}": v for k, v in self.model.state_dict().items()}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.squat.param_groups]
        hooks = {
            (i, name, type(module).__name__): len(module._forward_pre_hooks)
            for i, model in enumerate((self.model, self.quantized))
            for name, module in model.named_modules()
        }
        return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}, copy.deepcopy(
            (groups, hooks)
        )


@pytest.fixture(scope="module")
def setting():
    return Setting()


PAIRS = r"`rules` must be a sequence of pairs \(selector, overrides\), got "
QUANTIZING = [
    (lambda s: s.quantize(weights=4), TypeError, r"'0\.weight': a quantizer is a registered name or None, got 4"),
    (lambda s: s.quantize(activations=False), TypeError, "the input of '0': a quantizer is a registered name or None, got False"),
    (lambda s: s.quantize(activations="none"), ValueError, r"There is no quantizer 'none'\. Registered: .*\. Inputs are quantized per tensor: name another in `activations`"),
    (lambda s: s.quantize(granularity=None), ValueError, r"'0\.weight': `granularity` must be one of .*, got None"),
    (lambda s: s.quantize(granularity="per_group", group_size=8), ValueError, r"'4\.weight': `group_size` must divide the 12 entries"),
    (lambda s: s.quantize(rules="*"), TypeError, PAIRS + r"'\*'\."),
    (lambda s: s.quantize(rules={"*": {}}), TypeError, PAIRS + r"{'\*': {}}\."),
    (lambda s: s.quantize(rules=3), TypeError, PAIRS + r"3\."),
    (lambda s: s.quantize(rules=["*"]), TypeError, PAIRS + r"'\*' in it"),
    (lambda s: s.quantize(rules=[("*", {}, None)]), TypeError, PAIRS + r"\('\*', {}, None\) in it"),
    (lambda s: s.quantize(spec=3), TypeError, r"`spec` must be a path or what `Coverage\.to_spec\(\)` returned, got 3"),
    (lambda s: s.rebuild(lambda spec: spec.update(weights=[])), ValueError, r"its 'weights' must be a dict, got \[\]"),
    (lambda s: s.rebuild(lambda spec: spec["weights"].update({"9.weight": spec["weights"]["4.weight"]})), ValueError, r"the spec names '9\.weight', which this model does not have"),
    (lambda s: s.rebuild(lambda spec: spec["weights"]["4.weight"].pop("bits")), ValueError, r"'4\.weight': its entry in the spec lacks 'bits'"),
    (lambda s: s.rebuild(lambda spec: spec["weights"].update({"4.weight": 4})), ValueError, r"'4\.weight': its entry in the spec must be a dict, got 4"),
    (lambda s: s.rebuild(lambda spec: spec["weights"]["4.weight"].update(shape=[3, 3])), ValueError, r"'4\.weight' has shape \[4, 12\], the spec's has \[3, 3\]: it belongs to another model"),
]  # fmt: skip
BUILDING = [
    (lambda s: s.qat(0.1), TypeError, r"`base` must be an optimizer class or instance, got 0\.1"),
    (lambda s: s.qat(dict), TypeError, "`base` must be an optimizer class or instance, got <class 'dict'>"),
    (lambda s: s.qat(lrr=0.1), TypeError, r"neither QAT nor SGD has an argument 'lrr'\. Did you mean 'lr'\?"),
    (lambda s: s.qat(SGD(s.model.parameters(), lr=0.1)), TypeError, r"QAT was given an optimizer instance, which has its own groups and settings: drop \['lr'\]"),
    (lambda s: s.qat(scale_optimizer=Adam), ValueError, r"scale_lr=None \(balanced rates\) goes with SGD; give `scale_lr` a number for Adam"),
    (lambda s: s.qat(params=3), TypeError, "`params` must be parameters or groups of them, got 3"),
    (lambda s: qsam.SAQ(MLP.quantized(), SGD, lr=0.1, direction=None), ValueError, r"There is no direction None\. Registered: asam, "),
    (lambda s: qsam.SQuAT(MLP.quantized(), SGD, lr=0.1, schedule="three"), ValueError, "`schedule` must be one of same_batch, next_batch, fused, got 'three'"),
    (lambda s: qsam.SQuAT(MLP.quantized(), SGD, lr=0.1, period="2"), TypeError, "`period` must be an integer >= 1, got '2'"),
    (lambda s: qsam.QAT(s.quantized, SGD, lr=0.1), RuntimeError, "another qsam optimizer owns the weights of this model"),
]  # fmt: skip
TRAINING = [
    (lambda s: s.squat.step(3), TypeError, "`closure` must be a function that returns the loss, got 3"),
    (lambda s: qsam.QAT(MLP.quantized(), SGD, lr=0.1).scale_phase().__enter__(), RuntimeError, r"QAT steps weights and scales together: scale_phase\(\) belongs to SQuAT"),
    (lambda s: qsam.QAT(MLP.quantized(), SGD, lr=0.1).step_scales(), RuntimeError, r"QAT steps weights and scales together: step_scales\(\) belongs to SQuAT"),
    (lambda s: s.squat.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "rho": -1.0}), ValueError, "`rho` must be finite and >= 0, got -1"),
    (lambda s: s.squat.load_state_dict(qsam.SQuAT(MLP.quantized(), Adam, lr=0.1).state_dict()), ValueError, "the checkpoint is of the base optimizer Adam, this one is SGD: build it as it was built then"),
    (lambda s: s.load(lambda state: state["state"][4].pop("qsam_latent")), ValueError, "full-precision weights are lost"),
    (lambda s: s.load(lambda state: state["param_groups"].pop()), ValueError, "the checkpoint has . parameter groups, this optimizer 3"),
    (lambda s: s.load(lambda state: state["param_groups"][0].update(qsam_format=2)), ValueError, "the checkpoint has qsam_format 2"),
]  # fmt: skip
MEASURING = [
    (lambda s: qsam.reestimate_batchnorm("model", []), TypeError, r"`model` must be a torch\.nn\.Module, got str"),
    (lambda s: qsam.reestimate_batchnorm(nn.BatchNorm1d(8), None), TypeError, "`batches` must be an iterable of inputs, .* got None"),
    (lambda s: qsam.sharpness(s.squat, s.closure, rho="0.1"), TypeError, r"`rho` must be a number > 0, got '0\.1'"),
    (lambda s: qsam.sharpness(s.squat, 3), TypeError, "sharpness needs a function that returns the loss, got 3"),
    (lambda s: qsam.hessian_top_eigenvalue(s.squat, lambda: None, progress=False), TypeError, "`loss_fn` must return the loss, a tensor of one entry, got None"),
    (lambda s: qsam.loss_slice(s.squat, s.closure, "gradients"), ValueError, r"there is no direction 'gradients', only .* Did you mean 'gradient'\?"),
    (lambda s: qsam.loss_slice(s.squat, s.closure, 3), TypeError, "`directions` must be names, or a mapping from names to tensors, got 3"),
    (lambda s: qsam.loss_slice(s.squat, s.closure, {"mine": [torch.zeros(2)]}), ValueError, r"the direction 'mine' must have one tensor .* got \[\(2,\)\]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [pytest.param(*row, id=re.sub(r"\W+", " ", row[2])[:60]) for row in QUANTIZING + BUILDING + TRAINING + MEASURING],
)
def test_a_refused_call_says_why_and_changes_nothing(setting, call, kind, message):
    tensors, rest = setting.now()
    with pytest.raises(kind, match=message) as caught:
        call(setting)
    assert type(caught.value) is kind
    tensors_now, rest_now = setting.now()
    assert_same(tensors_now, tensors)
    assert rest_now == rest
