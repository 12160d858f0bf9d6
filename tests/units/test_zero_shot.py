"""SAM-SGA against its slow twin, what it counts and measures, games that fail, and bad input."""

import copy
import itertools
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW

import qsam
from qsam.zero_shot import Divergence, GameOver, Limits, SamSga, detached, distill, output_of, spread
from tests.games import players
from tests.methods import BY_NAME, assert_same, everything, latents
from tests.models import BERT, CONV, MLP, TIED
from tests.reference import qat, saq
from tests.reference.in_graph import Grid
from tests.reference.zero_shot import SamSga as Twin

TWINS = {"saq": saq.SAQ, "qat": qat.QAT}


def grid_of(quantizer):
    scale = quantizer.scale.detach().clone().requires_grad_()
    return Grid(quantizer.quant_min, quantizer.quant_max, scale, quantizer.group_size)


def kl(t, q):
    return F.kl_div(q.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()


# --- the twin ---------------------------------------------------------------------------------------------------------


SETTINGS = [
    *(("saq", MLP, order, sees, (1, 1)) for order, sees in itertools.product(
        ["student_first", "generator_first", "together"], ["theta", "theta+e"])),
    ("saq", CONV, "student_first", "theta+e", (1, 1)),
    ("saq", MLP, "generator_first", "theta+e", (3, 2)),
    ("saq", MLP, "student_first", "theta", (2, 0)),
    ("qat", MLP, "student_first", "theta+e", (1, 1)),
    ("qat", MLP, "together", "theta", (1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "task", "order", "sees", "inner"), SETTINGS)
def test_an_iteration_equals_its_twin(name, task, order, sees, inner):
    """Student, generator and D are equal to the bit."""
    settings = {"order": order, "generator_sees": sees, "student_steps": inner[0], "generator_steps": inner[1]}
    teacher, student, generator, optimizer = players(task, BY_NAME[name], **settings)
    coverage = qsam.coverage_of(student)
    grids = {row.name: grid_of(row.quantizer) for row in coverage.quantized}
    inputs = {row.name: grid_of(row.quantizer) for row in coverage.inputs if row.quantizer is not None}
    rho = {"rho": 0.2} if name == "saq" else {}
    reference = TWINS[name](task.build(), grids, inputs, AdamW, {"lr": 1e-3}, **rho)
    other = copy.deepcopy(generator)
    rest = copy.deepcopy(teacher).eval().requires_grad_(False)
    ascent = SGD(other.parameters(), lr=0.05, maximize=True)
    twin = Twin(reference, ascent, lambda chance: other(other.draw(8, chance)),
                lambda forward, x: kl(rest(x), forward(x)), order, sees, steps=inner)  # fmt: skip
    torch.manual_seed(3)
    report = distill(teacher, student, generator, optimizer, steps=3, rows=8)
    torch.manual_seed(3)
    losses = [twin.step() for _ in range(3)]
    assert [entry["divergence"] for entry in report.history] == losses
    assert_same(latents(optimizer.student_optimizer, student), {k: w.detach() for k, w in reference.parameters.items()})
    assert_same(dict(generator.state_dict()), dict(other.state_dict()))


# --- counts and figures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "student", "generator", "teacher"),
    [
        ("saq", {}, 2, 1, 2),
        ("qat", {}, 1, 1, 2),
        ("squat-same_batch", {"student_steps": 2}, 6, 1, 3),
        ("saq", {"generator_sees": "theta+e", "generator_steps": 2}, 2, 4, 5),
        ("saq", {"generator_steps": 0}, 2, 0, 1),
        ("saq", {"order": "together"}, 2, 0, 2),
    ],
)
def test_steps_and_passes_of_an_iteration_are_reported(name, settings, student, generator, teacher):
    *models, optimizer = players(MLP, BY_NAME[name], **settings)
    found = distill(*models, optimizer, steps=3, rows=8)
    assert (found.iterations, found.good_iteration, found.stopped) == (3, 3, None)
    assert (found.student_passes, found.generator_passes) == (3 * student, 3 * generator)
    assert found.teacher_passes == 3 * teacher
    assert found.student_steps == 3 * settings.get("student_steps", 1)
    assert found.generator_steps == 3 * settings.get("generator_steps", 1)
    assert len(found.history) == 3
    assert {"divergence", "spread"} <= set(found.history[0])


def test_the_generator_ascends_whether_its_optimizer_maximizes_or_not():
    ends = []
    for maximize in (False, True):
        teacher, student, generator, optimizer = players()
        optimizer.generator_optimizer = SGD(generator.parameters(), lr=0.05, maximize=maximize)
        distill(teacher, student, generator, optimizer, steps=2, rows=8)
        ends.append(dict(generator.state_dict()))
    assert_same(*ends)


def test_a_small_step_of_the_generator_raises_d_at_its_own_z():
    """To first order by lr * ||dD/domega||^2. The student is float: a rounded one is no smooth function of x."""
    teacher, student, generator, optimizer = players(MLP, BY_NAME["sam"], generator_lr=1e-4)
    z = generator.draw(8, torch.Generator().manual_seed(0))

    def divergence(x):
        return (2 * teacher(x) - student(x)).square().sum()

    before = divergence(generator(z))
    gradients = torch.autograd.grad(before, list(generator.parameters()))
    expected = 1e-4 * float(sum(g.square().sum() for g in gradients))
    found = optimizer.ascend(lambda chance: generator(z), divergence)
    assert found == before.item()
    assert expected > 100 * torch.finfo(torch.float32).eps * found
    assert float((divergence(generator(z)) - before).detach()) == pytest.approx(expected, rel=0.1)


def test_distill_without_an_optimizer_is_saq_around_adam():
    teacher, student, generator, _ = players(MLP, None)
    given = copy.deepcopy((teacher, student, generator))
    distill(teacher, student, generator, steps=2, rows=8)
    optimizer = SamSga(qsam.SAQ(given[1], Adam, lr=1e-5, rho=0.1), Adam(given[2].parameters(), lr=1e-4))
    distill(*given, optimizer, steps=2, rows=8)
    assert_same(student.state_dict(), given[1].state_dict())


def test_the_squared_error_is_the_default_of_a_single_output():
    t, q = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]])
    assert float(Divergence()(t, q)) == float(Divergence("mse")(t, q)) == 2.5
    assert float(Divergence("kl")(t, q)) == 0.0


def test_the_kl_divergence_is_that_of_torch_distributions():
    t, q = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).double().chunk(2)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=t), torch.distributions.Categorical(logits=q)
    ).mean()
    assert float(Divergence()(t, q)) == pytest.approx(float(expected), rel=1e-5)  # it is computed in fp32


def test_hidden_states_add_their_squared_error():
    teacher, student = BERT.build().eval(), BERT.build().eval()
    student.bert.encoder.layer[0].output.LayerNorm.bias.data += 0.5
    x = {"input_ids": BERT.batch(0)["input_ids"], "output_hidden_states": True}
    t, q = teacher(**x), student(**x)
    errors = [F.mse_loss(b, a) for a, b in zip(t.hidden_states, q.hidden_states, strict=True)]
    assert [bool(error) for error in errors] == [False, True, True]
    found = float((Divergence(hidden=3.0)(t, q) - Divergence()(t, q)).detach())
    assert found == pytest.approx(float(sum(errors).detach()), rel=1e-5)  # three layers: embeddings and two


def test_the_output_of_every_kind_of_answer_is_found():
    logits = torch.zeros(2, 3)
    answer = BERT.build()(**BERT.batch(0))
    assert output_of(answer) is answer.logits
    assert output_of(logits) is output_of((logits, None)) is logits
    with pytest.raises(TypeError, match=r"a dict has no known output: give `divergence` a function of two answers\."):
        output_of({"scores": logits})


def test_matching_of_batchnorm_statistics_pulls_only_the_generator():
    """Its gradient is that of the squared distances; the student's is untouched."""
    runs = []
    for weight in (0.0, 0.5):
        teacher, student, generator, optimizer = players(CONV, generator_steps=1)
        distill(teacher, student, generator, optimizer, steps=1, rows=8, batchnorm=weight)
        runs.append((everything(optimizer.student_optimizer, student), dict(generator.named_parameters())))
    assert_same(runs[0][0], runs[1][0])
    teacher, _, generator, _ = players(CONV, None)
    x = generator(generator.draw(8, torch.Generator().manual_seed(1)))
    conv, norm, relu, _, second, other = list(teacher.eval())[:6]
    first = conv(x)
    total = torch.zeros(())
    for one, h in ((norm, first), (other, second(relu(norm(first))))):
        mean, variance = h.mean((0, 2, 3)), h.var((0, 2, 3), correction=0)
        total = total + (mean - one.running_mean).square().sum() + (variance - one.running_var).square().sum()
    for (name, plain), matched, p in zip(runs[0][1].items(), runs[1][1].values(), generator.parameters(), strict=True):
        (gradient,) = torch.autograd.grad(total, p, retain_graph=True)
        expected = -0.05 * 0.5 * gradient
        bound = 1e-4 * float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close((matched - plain).detach(), expected, rtol=1e-3, atol=bound, msg=name)


def test_the_spread_is_that_of_the_first_floating_tensor():
    rows = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    assert spread(rows) == spread((torch.ones(2), rows)[1:]) == pytest.approx((1 / 5) ** 0.5)
    assert spread({"ids": torch.ones(2, dtype=torch.long), "x": rows}) == spread(rows)
    assert spread({"ids": rows.long()}) == spread(rows)  # token ids only
    with pytest.raises(TypeError, match="the generator must return a tensor, or a tuple or dict with one, got dict"):
        spread({"ids": [1, 2]})


def test_detached_keeps_values_and_kinds():
    x = torch.ones(2, requires_grad=True)
    found = detached({"a": (x, 1), "b": None})
    assert not found["a"][0].requires_grad
    assert torch.equal(found["a"][0], x)
    assert (*found["a"][1:], found["b"]) == (1, None)


# --- games that fail --------------------------------------------------------------------------------------------------


def fail(spoil, message, steps=12, task=MLP, **options):
    """Spoil a game after iteration 4; assert that it ends with the student of iteration 4, and return its report."""
    teacher, student, generator, optimizer = players(task)
    kept = {}

    def after(game):
        if game.iterations == 4:
            kept.update(everything(game.student_optimizer, student))
            spoil(generator, game)

    with pytest.warns(UserWarning, match=rf"ended after \d+ iterations: .*{message}.* of iteration 4\.") as caught:
        report = distill(teacher, student, generator, optimizer, steps=steps, rows=8, keep_every=2, after_step=after,
                         limits=Limits(patience=3, **options))  # fmt: skip
    assert len(caught) == 1
    assert report.good_iteration == 4
    assert report.stopped in str(caught[0].message)
    assert_same(everything(optimizer.student_optimizer, student), kept)
    return report


def collapse(generator, game):
    generator.layers[2].weight.data.zero_()
    game.generator_optimizer.param_groups[0]["lr"] = 0.0


def leave(generator, game):
    generator.outside = lambda x: 0.7


def spoil_generator(generator, game):
    generator.layers[0].weight.data.fill_(float("nan"))


def spoil_student(generator, game):
    """A finite D whose gradient is not: the weights are NaN, and only the next D tells."""
    slot = game.student_optimizer._latents.slots[0]
    slot.parameter.register_hook(lambda gradient: gradient * float("nan"))


def win(generator, game):
    generator.outside = lambda x: 0.0
    generator.forward = lambda z: 1e4 * generator.layers(z)


@pytest.mark.parametrize(
    ("spoil", "message", "iterations"),
    [
        (collapse, r"collapsed: for 3 iterations its rows .* less than 0\.01 of their size", 7),
        (leave, r"left the range of real inputs: .* more than 50% .* soft or hard tokens", 7),
        (spoil_generator, r"D is nan in a step of the student, which was not taken\. Lower the", 4),
        (spoil_student, r"D is nan in a step of the generator, which was not taken\. Lower the", 4),
    ],
)
def test_a_game_that_fails_ends_with_the_last_good_student(spoil, message, iterations):
    assert fail(spoil, message).iterations == iterations


def test_a_generator_that_wins_is_told():
    """The student that is put back may be a later one: nothing is wrong with x itself."""
    teacher, student, generator, optimizer = players()

    def after(game):
        if game.iterations == 4:
            win(generator, game)

    with pytest.warns(UserWarning, match=r"the generator wins: D has grown .* take more `student_steps`\."):
        report = distill(teacher, student, generator, optimizer, steps=12, rows=8, after_step=after,
                         limits=Limits(patience=3, max_growth=5.0))  # fmt: skip
    assert report.iterations < 12
    assert report.good_iteration == 0


def test_a_game_that_was_stopped_can_go_on_with_a_lower_rate():
    teacher, student, generator, optimizer = players()
    healthy = copy.deepcopy(generator.state_dict())
    spoil_generator(generator, optimizer)
    with pytest.warns(UserWarning, match="D is nan"):
        distill(teacher, student, generator, optimizer, steps=4, rows=8)
    generator.load_state_dict(healthy)
    optimizer.generator_optimizer.param_groups[0]["lr"] = 0.001
    report = distill(teacher, student, generator, optimizer, steps=4, rows=8)
    assert (report.stopped, report.iterations) == (None, 4)


def test_sam_sga_alone_raises_and_leaves_the_student():
    _, student, generator, optimizer = players()
    before = everything(optimizer.student_optimizer, student)
    with pytest.raises(GameOver, match=r"D is inf in a step of the student"):
        optimizer.step(lambda chance: generator(generator.draw(8, chance)), lambda x: student(x).sum() * float("inf"))
    assert_same(everything(optimizer.student_optimizer, student), before)


# --- bad input --------------------------------------------------------------------------------------------------------


def built(**settings):
    return players(MLP, BY_NAME["saq"], **settings)


def given(student=None, generator=None):
    _, _, own, optimizer = players()
    return SamSga(student or optimizer.student_optimizer, generator or Adam(own.parameters()))


def called(**settings):
    teacher, student, generator, optimizer = players()
    arguments = {"steps": 1, "rows": 8, "teacher": teacher, "student": student, "generator": generator}
    return distill(**{**arguments, "optimizer": optimizer, **settings})


BAD = [
    (lambda: built(order="both"), ValueError, r"`order` must be one of student_first, .*, got 'both'\."),
    (lambda: built(generator_sees="e"), ValueError, r"`generator_sees` must be one of theta, theta\+e, got 'e'\."),
    (lambda: built(student_steps=0), ValueError, r"`student_steps` must be an integer >= 1, got 0\."),
    (lambda: built(generator_steps=1.5), TypeError, r"`generator_steps` must be an integer >= 0, got 1\.5\."),
    (lambda: built(seed=True), TypeError, r"`seed` must be an integer >= 0, got True\."),
    (lambda: built(order="together", student_steps=2), ValueError, r"is one step of both: leave `student_steps` and"),
    (lambda: given(student=SGD(MLP.build().parameters())), TypeError, r"must be a qsam optimizer or a wrapper around one, got SGD"),
    (lambda: given(generator=MLP.build()), TypeError, r"`generator_optimizer` must be a torch optimizer, or None"),
    (lambda: called(steps=-1), ValueError, r"`steps` must be an integer >= 0, got -1\."),
    (lambda: called(rows=1), ValueError, r"`rows` must be an integer >= 2, got 1\."),
    (lambda: called(keep_every=0), ValueError, r"`keep_every` must be an integer >= 1, got 0\."),
    (lambda: called(divergence="js"), ValueError, r"`divergence` must be 'auto', 'kl', 'mse' or a .*, got 'js'\."),
    (lambda: called(batchnorm=1.0), ValueError, r"`batchnorm` needs a teacher with BatchNorm .*: leave it at 0\."),
    (lambda: called(batchnorm=-1.0), ValueError, r"`batchnorm` must be finite and >= 0, got -1\.0\."),
    (lambda: Limits(patience=0), ValueError, r"`patience` must be an integer >= 1, got 0\."),
    (lambda: Limits(max_growth=float("nan")), ValueError, r"`max_growth` must be finite and >= 0, got nan\."),
    (lambda: called(generator=MLP.build()), TypeError, r"must be a module with draw\(rows, chance\) .*, got Sequential"),
    (lambda: called(student=MLP.quantized()), ValueError, r"trains another model than `student`: build its student_"),
    (lambda: called(divergence=Divergence(hidden=1.0)), ValueError, r"`hidden` needs the hidden states of teacher and"),
    (lambda: Divergence(hidden=-1.0), ValueError, r"`hidden` must be finite and >= 0, got -1\.0\."),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input_is_refused_with_its_cure(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_teacher_that_shares_a_parameter_is_refused():
    teacher, student, generator, optimizer = players()
    teacher[2].weight = student[2].weight
    with pytest.raises(ValueError, match=r"teacher and student share '2\.weight': quantize a copy, copy\.deepcopy"):
        distill(teacher, student, generator, optimizer, steps=1)


def test_a_generator_without_a_gradient_is_refused_before_the_student_is_touched():
    _, student, generator, optimizer = players(order="generator_first")
    before = everything(optimizer.student_optimizer, student)
    message = r"D does not depend on a trainable parameter of the generator: give its"
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda chance: generator(generator.draw(8, chance)).detach(), lambda x: x.sum())
    optimizer.generator_optimizer = SGD(MLP.build().parameters())  # of another module
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda chance: generator(generator.draw(8, chance)), lambda x: x.sum())
    assert_same(everything(optimizer.student_optimizer, student), before)


def test_tied_weights_and_tuples_of_arguments_work():
    teacher, student = TIED.build(), TIED.quantized(activations=None)
    _, _, generator, _ = players(MLP, None)
    generator.forward = lambda z: (generator.layers(z),)
    optimizer = SamSga(qsam.SAQ(student, AdamW, lr=1e-3), SGD(generator.parameters(), lr=0.05))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert distill(teacher, student, generator, optimizer, steps=2, rows=8).iterations == 2
