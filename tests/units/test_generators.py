"""Generators: shapes, ranges, gradients, and the same x for the same draw."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

import qsam
from qsam.generators import ImageGenerator, TextGenerator
from qsam.zero_shot import SamSga, distill
from tests.models import BERT, GPT2, bert, gpt2

TEMPLATE = torch.tensor([1, -1, -1, 2, -1, 3])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def language_model(width=16):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertModel(BertConfig(vocab_size=30, hidden_size=width, **sizes), add_pooling_layer=False).eval()


def text(tokens="continuous", width=16, template=TEMPLATE, **options):
    table = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.3
    return TextGenerator(language_model(width), table, template, tokens=tokens, **options)


def drawn(generator, rows=4, seed=0):
    return generator.draw(rows, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [16, 8, 24])
@pytest.mark.parametrize("tokens", ["continuous", "soft", "hard"])
def test_text_has_the_template_and_the_embeddings_of_its_tokens(tokens, width):
    generator = text(tokens, width, inputs={"token_type_ids": torch.tensor([0, 0, 0, 0, 1, 1])})
    x = generator(drawn(generator))
    assert list(x) == ["inputs_embeds", "attention_mask", "token_type_ids"]
    assert x["inputs_embeds"].shape == (4, 6, 16)
    fixed = TEMPLATE >= 0
    assert torch.equal(x["inputs_embeds"][2, fixed], generator.table[TEMPLATE[fixed]])
    assert x["attention_mask"].tolist() == [[1] * 6] * 4
    assert x["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]] * 4


def test_hard_tokens_are_rows_of_the_table_with_the_gradient_of_soft_ones():
    soft, hard = text("soft"), text("hard")
    hard.load_state_dict(soft.state_dict())
    z, found = drawn(soft), []
    for generator in (soft, hard):
        x = generator(z)["inputs_embeds"]
        weights = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
        found.append((x.detach(), torch.autograd.grad((x * weights).sum(), generator.adapter.weight)[0]))
    assert torch.equal(found[0][1], found[1][1])
    distance = (found[1][0][:, TEMPLATE < 0, None] - hard.table).square().sum(-1).min(-1).values
    assert float(distance.max()) < 1e-10  # soft + (hard - soft): two roundings
    # Soft tokens lie within the convex hull: no coordinate passes the table's.
    x = found[0][0][:, TEMPLATE < 0]
    assert bool((x <= hard.table.max(0).values + 1e-6).all())
    assert bool((x >= hard.table.min(0).values - 1e-6).all())


def test_soft_tokens_are_the_softmax_of_the_distances():
    generator = text("soft", temperature=2.0)
    z = drawn(generator)
    h = generator.language_model(input_ids=z).last_hidden_state
    normal = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    v = generator.table.mean(0) + generator.table.std(0, correction=0) * (normal @ generator.adapter.weight.T)
    distance = (v[:, :, None] - generator.table).square().sum(-1)
    p = (-distance / (2 * 2.0 * generator.table.var(0, correction=0).mean())).softmax(-1)
    expected = (p @ generator.table)[:, TEMPLATE < 0]
    torch.testing.assert_close(generator(z)["inputs_embeds"][:, TEMPLATE < 0], expected, rtol=1e-4, atol=1e-5)


def test_continuous_tokens_start_at_the_scale_of_real_ones_and_may_leave_it():
    generator = text()
    x = generator(drawn(generator, 64))
    v = (x["inputs_embeds"][:, TEMPLATE < 0] - generator.mean) / generator.std
    assert float(v.square().mean().detach()) == pytest.approx(1.0, abs=0.01)  # LayerNorm, and A = 1
    assert generator.outside(x) < 0.5
    with torch.no_grad():
        generator.adapter.weight *= 10
    assert generator.outside(generator(drawn(generator))) == 1.0
    assert text("soft").outside(x={"inputs_embeds": generator.table[None, :6]}) == 0.0


@pytest.mark.parametrize(("trained", "expected"), [("all", {True}), ("adapter", {False}), ("language_model", {True})])
def test_what_is_trained_is_an_argument(trained, expected):
    generator = text(trained=trained)
    assert {p.requires_grad for p in generator.language_model.parameters()} == expected
    assert generator.adapter.weight.requires_grad == (trained != "language_model")


def test_draws_follow_from_the_random_generator_and_hold_the_given_ids():
    generator = text(vocabulary=torch.tensor([4, 9]))
    assert set(drawn(generator, 9).ravel().tolist()) == {4, 9}
    assert torch.equal(drawn(generator), drawn(generator))
    assert not torch.equal(drawn(generator), drawn(generator, seed=1))
    assert int(drawn(text(template=5), 99).max()) == 29
    images = ImageGenerator(latent=3, size=4)
    assert torch.equal(drawn(images), drawn(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "words"}, r"`tokens` must be one of continuous, soft, hard, got 'words'\."),
        ({"trained": "none"}, r"`trained` must be one of all, adapter, language_model, got 'none'\."),
        ({"temperature": 0.0}, r"`temperature` must be above 0, got 0\.0\."),
        (
            {"template": torch.tensor([1, 2])},
            r"`template` must be a length, or ids of shape \(length,\) below 40 with -1",
        ),
        ({"template": torch.tensor([40, -1])}, r"`template` must be a length, .*, got \[40, -1\]\."),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        text(**options)


def test_an_image_generator_makes_normalized_images():
    generator = ImageGenerator(latent=3, channels=2, size=12, width=4)
    x = generator(drawn(generator, 64))
    assert x.shape == (64, 2, 12, 12)
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert x.var((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1], abs=1e-3)  # eps of BatchNorm
    with pytest.raises(ValueError, match=r"`size` must be a multiple of 4, got 6\."):
        ImageGenerator(size=6)


def decoder():
    return GPT2Model(GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=1, n_head=2)).eval()


@pytest.mark.parametrize(
    ("task", "build", "model"), [(BERT, bert, language_model), (GPT2, gpt2, decoder)], ids=["bert", "gpt2"]
)
def test_an_encoder_and_a_decoder_learn_from_their_teacher(task, build, model):
    """GPT-2 by the divergence of each position; every trained part of the generator moves, and the teacher does not."""
    teacher, student = build(), build()
    generator = TextGenerator(model(), teacher.get_input_embeddings(), 6)
    qsam.quantize_(student, bits=3)
    qsam.calibrate(student, [generator(drawn(generator))])
    before = {name: p.detach().clone() for name, p in generator.named_parameters()}
    fixed = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    adam = torch.optim.Adam(generator.parameters(), lr=1e-3)
    optimizer = SamSga(qsam.SAQ(student, torch.optim.AdamW, lr=1e-3, rho=0.01), adam)
    report = distill(teacher, student, generator, optimizer, steps=2, rows=4)
    assert report.history[-1]["outside"] < 1.0
    moved = {name for name, p in generator.named_parameters() if not torch.equal(p, before[name])}
    assert "adapter.weight" in moved
    assert any(name.startswith("language_model") for name in moved)
    assert all(torch.equal(p, fixed[name]) for name, p in teacher.named_parameters())
    assert isinstance(generator, nn.Module)
    assert not [key for key in generator.state_dict() if not key.startswith(("language_model", "adapter"))]
