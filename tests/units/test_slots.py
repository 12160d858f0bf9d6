"""Which parameters are a model's own, and which its quantizers'."""

import pytest
from torch import nn

import qsam
from qsam.coverage import quantizer_parameters
from qsam.latents import own_parameters
from tests.models import BERT, CONV, MLP, TIED


class Shared(nn.Module):
    """One block under two names, one Parameter in two places, and an empty place."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.first, self.second, self.absent = block, block, None
        self.register_parameter("nothing", None)
        self.head = nn.Linear(4, 4)
        self.head.weight = block[0].weight
        self.scale = nn.Parameter(block[0].bias.detach().clone())


@pytest.mark.parametrize("task", [MLP, CONV, BERT, TIED], ids=str)
def test_own_parameters_are_the_named_ones_without_the_quantizers(task):
    model = task.quantized()
    scales = {id(p) for p in quantizer_parameters(model)}
    assert scales
    assert list(own_parameters(model)) == [(n, p) for n, p in model.named_parameters() if id(p) not in scales]


def test_a_shared_parameter_comes_once_by_its_first_name():
    model = Shared()
    assert list(own_parameters(model)) == list(model.named_parameters())
    qsam.quantize_(model, rules=[("*", {"activations": None})])
    assert [name for name, _ in own_parameters(model)] == [name for name, _ in Shared().named_parameters()]
