"""The comparison of a runtime with the model, by functions in place of runtimes."""

import pytest
import torch

import qsam
from qsam.deploy import check
from tests.models import MLP


@pytest.fixture
def model():
    model = MLP.quantized()
    qsam.write_(model)
    return model.eval()


@pytest.fixture
def batches():
    return [MLP.batch(i)["x"] for i in range(3)]


def off_by(model, distance):
    return lambda x: model(x).detach().numpy() + distance


def test_the_model_itself_passes_with_a_difference_of_zero(model, batches):
    report = check(model, off_by(model, 0.0), batches)
    assert report.passed
    assert report.mean == report.largest == 0
    assert report.noise > 0
    assert "verdict      passed" in str(report)


def test_a_difference_of_more_than_factor_times_the_noise_fails(model, batches):
    noise = check(model, off_by(model, 0.0), batches).noise
    report = check(model, off_by(model, 100 * noise + 1e-3), batches)
    assert not report.passed
    assert report.mean == pytest.approx(100 * noise + 1e-3, rel=1e-2)
    assert "FAILED" in str(report)
    assert check(model, off_by(model, 1e-3), batches, factor=1e9).passed


def test_the_metric_is_taken_of_both(model, batches):
    report = check(model, off_by(model, 1.0), batches, metric=lambda outputs: sum(float(y.sum()) for y in outputs))
    entries = sum(model(x).numel() for x in batches)
    assert report.metric[1] - report.metric[0] == pytest.approx(entries, rel=1e-3)
    assert "metric       model" in str(report)


def test_the_model_is_left_as_it_was(model, batches):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    check(model, off_by(model, 0.0), batches)
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_cannot_be_compared_is_refused(model, batches):
    with pytest.raises(ValueError, match="the runtime returned the shape"):
        check(model, lambda x: model(x).detach().numpy()[:1], batches)
    with pytest.raises(ValueError, match="check"):
        check(model, off_by(model, 0.0), [])
    with pytest.raises(RuntimeError, match="check needs a quantized model"):
        check(MLP.build(), off_by(model, 0.0), batches)
