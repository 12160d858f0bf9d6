"""The benchmarks of speed and memory run, their arithmetic is right, and docs/speed.md says what the kept files say."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import qsam
from benchmarks import ablation, bert, kernels, memory, post_training, saq_cases, step
from benchmarks.__main__ import main
from benchmarks.formulas import lsq
from benchmarks.measure import (
    ROOT,
    Variant,
    compared,
    in_new_process,
    interleaved,
    machine,
    ratios,
    read_json,
    spread,
    write_json,
)  # fmt: skip
from benchmarks.page import NAMES, NOT_YET, PAGE, blocks, marks, read_results, rewritten
from benchmarks.targets import ahead, targets
from benchmarks.training import Missing, methods
from qsam.functional import fake_quantize
from recipes.training import parse_options
from recipes.vision import VisionOptions

# Compiling takes seconds, and two packages are not of the test environment: these run in the long test.
HEAVY = {"LSQ in the graph, torch.compile", "torchao QAT", "brevitas"}
LIGHT = [name for name in methods() if name not in HEAVY]


# --- arithmetic ---------------------------------------------------------------------------------------------------------


def test_the_ratio_is_the_median_of_the_ratios_of_each_round():
    ours, reference = [2.0, 6.0, 3.0], [1.0, 2.0, 3.0]
    assert ratios(ours, reference)["median"] == 2.0  # of 2, 3, 1; the medians' ratio is 1.5
    assert compared({"a": ours, "b": reference}, "b")["b"]["ratio"] == {"median": 1.0, "quartiles": [1.0, 1.0]}
    assert compared({"a": ours, "b": reference}, "b")["a"]["milliseconds"]["median"] == 3000.0


def test_a_machine_that_slows_down_for_a_while_leaves_the_ratio():
    reference = [1.0, 1.0, 5.0, 5.0, 5.0]
    assert ratios([1.5 * t for t in reference], reference) == {"median": 1.5, "quartiles": [1.5, 1.5]}


def test_quartiles_are_inclusive_and_one_value_is_its_own():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "quartiles": [2.0, 4.0]}
    assert spread([7.0]) == {"median": 7.0, "quartiles": [7.0, 7.0]}


def test_rounds_of_unequal_number_are_refused():
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


def test_each_round_times_each_variant_once_and_only_its_run():
    now, done = [0.0], []

    def takes(name, seconds):
        return lambda: (done.append(name), now.__setitem__(0, now[0] + seconds))

    variants = [
        Variant("short", takes("short", 1.0), prepare=takes("-", 100.0)),
        Variant("long", takes("long", 6.0), units=3),
        Variant("none", takes("none", 0.5)),
    ]
    times = interleaved(variants, rounds=5, warmup=2, clock=lambda: now[0])
    assert times == {"short": [1.0] * 5, "long": [2.0] * 5, "none": [0.5] * 5}
    order = [name for name in done if name != "-"]
    rounds = (
        list(itertools.batched(order, 3)) if sys.version_info >= (3, 12) else [*zip(*[iter(order)] * 3, strict=True)]
    )
    assert len(rounds) == 7
    assert all(sorted(names) == ["long", "none", "short"] for names in rounds)
    assert len(set(rounds)) > 1, "the order is drawn anew"


# --- files and facts ----------------------------------------------------------------------------------------------------


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_json(tmp_path, "step", {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path, "step", {"a": torch.ones(1)})
    assert read_json(tmp_path, "step") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step.json"]
    assert read_json(tmp_path, "memory") is None


def test_the_machine_is_described_and_survives_json():
    facts = machine(quick=True)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["copy_gigabytes_per_second"] > 0
    assert facts["threads"] == torch.get_num_threads()
    assert facts["processor"]


def test_a_process_that_fails_is_an_error_with_its_words():
    with pytest.raises(RuntimeError, match=r"`python -m benchmarks.nothing` failed:(.|\n)*No module named"):
        in_new_process("benchmarks.nothing")


# --- what is measured ---------------------------------------------------------------------------------------------------


def test_the_formula_in_the_graph_is_the_quantizer_that_it_is_compared_with():
    x, grad = torch.randn(40, 30), torch.randn(40, 30)
    found = []
    for way in (lsq, fake_quantize):
        leaves = x.clone().requires_grad_(), torch.tensor([0.3], requires_grad=True)
        out = way(*leaves, -8, 7, 0.01)
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    for formula, ours in zip(*found, strict=True):
        torch.testing.assert_close(formula, ours)


@pytest.mark.long
def test_every_way_to_fake_quantize_is_timed_against_three_copies():
    found = kernels.fake_quantization("weight", (20, 30), torch.float32, 4, rounds=2)
    assert found["case"] == "weight 20x30 float32"
    assert list(found["variants"])[:2] == ["three copies", "three copies into new memory"]
    assert len(found["variants"]) == 7
    assert found["variants"]["three copies"]["ratio"]["median"] == 1.0


@pytest.fixture(scope="module")
def steps():
    return step.measure(quick=True, names=LIGHT)


def test_every_method_trains_a_step(steps):
    (case,) = steps["cases"]
    assert set(case["variants"]) == set(steps["methods"]) == set(LIGHT)
    assert all(figures["milliseconds"]["median"] > 0 for figures in case["variants"].values())


@pytest.mark.parametrize("name", LIGHT)
def test_a_period_makes_the_passes_that_the_table_says(name):
    method, (size,) = methods()[name], bert.QUICK.batches
    model, calls = bert.build(bert.QUICK), []
    model.register_forward_hook(lambda *_: calls.append(1))
    run_period = method.ready(model, bert.batch_of(bert.QUICK, *size))
    for _ in range(3):  # a direction of one pass is known from the second step on
        calls.clear()
        run_period()
    assert len(calls) == pytest.approx(method.passes * method.period)


def test_a_package_that_is_not_installed_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(Missing, match="torchao"):
        methods()["torchao QAT"].ready(bert.build(bert.QUICK), {})
    (case,) = step.measure(quick=True, names=["torchao QAT"])["cases"]
    assert "torchao" in case["variants"]["torchao QAT"]["missing"]
    assert case["variants"]["fp32"]["ratio"]["median"] == 1.0


def test_the_profile_gives_exact_totals():
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = torch.empty(1000)
        before = torch.empty(500)
        with record_function(memory.STEP):
            del before
            large = torch.empty(3000)
            del large
            small = torch.empty(1)
        later = torch.empty(9000)
    assert memory.totals(profiler) == {"standing": 6000, "peak": 16000}
    assert kept.numel() + small.numel() + later.numel() == 10001


def test_the_budget_counts_weights_and_inputs_of_the_encoder():
    found = memory.budget(bert.QUICK, fp32_peak=1000)
    weights, inputs = 6 * 32 * 32 * 4, 6 * 2 * 8 * 32 * 4
    assert found == {"fp32": 1000, "weights": weights, "inputs": inputs, "budget": 1000 + weights + inputs}


def test_the_memory_of_qat_holds_the_latents():
    (plain, ours) = (memory.weigh(methods()[name], bert.QUICK) for name in ("fp32", "QAT"))
    assert plain["peak"] >= plain["standing"] > 0
    assert ours["peak"] >= plain["peak"] + 6 * 32 * 32 * 4


# --- tables -------------------------------------------------------------------------------------------------------------


def figures(ratio):
    return {"milliseconds": spread([1.0]), "ratio": spread([ratio])}


def step_result(**by_name):
    facts = {name: {"period": 1, "passes": 1, "peer": False} for name in by_name}
    variants = {n: figures(v) if isinstance(v, float) else {"missing": v} for n, v in by_name.items()}
    return {"methods": facts, "cases": [{"case": "32x64", "rounds": 1, "variants": variants}]}


def test_a_target_is_met_up_to_its_limit_and_missed_above():
    met, missed = (targets({"step": step_result(QAT=value)})[0] for value in (1.05, 1.0501))
    assert (met.limit, met.met, missed.met) == (1.05, True, False)


def test_a_missed_target_and_a_peer_that_is_ahead_are_said():
    result = step_result(QAT=1.2, **{"torchao QAT": 1.1, "brevitas": "No module named 'brevitas'"})
    made = blocks({"step": {**result, "machine": machine(quick=True)}})
    assert "| QAT, a step at 32x64, against fp32 | 1.05x | 1.200x | **missed** |" in made["targets"]
    assert "- a step at 32x64: torchao QAT is ahead of QAT, 1.1 against 1.2." in made["targets"]
    assert "| brevitas | 1 | missing: No module named 'brevitas' |" in made["step"]
    assert made["memory"] == made["kernels"] == [NOT_YET]


def test_nobody_is_ahead_of_himself_or_of_a_method_that_does_more():
    assert ahead({"step": step_result(QAT=1.05, SAQ=2.0, **{"SAM of pytorch_optimizer, fp32": 1.9})}) == []


def test_without_results_each_block_says_so():
    assert all(lines == [NOT_YET] for lines in blocks({}).values())


def test_the_page_says_what_the_kept_files_say():
    text, results = PAGE.read_text(encoding="utf-8"), read_results()
    assert rewritten(text, results) == text
    assert all(not result["quick"] for result in results.values())


def test_every_block_has_its_place_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    for mark in itertools.chain.from_iterable(marks(name) for name in blocks({})):
        assert text.count(mark) == 1


def test_a_benchmark_keeps_its_file(tmp_path, steps):
    write_json(tmp_path, "step", {"machine": machine(quick=True), **steps})
    assert f"| {LIGHT[-1]} (peer) | 2 |" in "\n".join(blocks(read_results(tmp_path))["step"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["steps"], "there is no benchmark steps: choose from kernels"), (["--quick", "--tables"], "one of --quick")],
)
def test_a_wrong_command_line_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err


def kept_files():
    return {
        path: path.stat().st_mtime_ns
        for folder in ("benchmarks/results", "docs")
        for path in (ROOT / folder).rglob("*")
    }


@pytest.mark.long
def test_the_quick_run_runs_everything_and_writes_nothing_into_the_repository():
    before = kept_files()
    command = [sys.executable, "-m", "benchmarks", "--quick", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert NOT_YET not in done.stdout
    assert all(f"## {name}" in done.stdout for name in NAMES)
    assert all(name in done.stdout for name in methods())
    assert kept_files() == before


@pytest.mark.long
def test_a_cold_process_compiles_the_kernels_and_a_warm_one_finds_them():
    found = kernels.first_uses()
    assert found["cold"] > found["warm"] > 0  # what it compiles takes ten times as long as all the rest


def test_each_trick_can_be_left_out():
    size, (batch,) = bert.QUICK, bert.QUICK.batches
    named = {method.name: method for method in ablation.variants()}
    assert len(named) == 9
    for method in named.values():
        method.ready(bert.build(size), bert.batch_of(size, *batch))()


def test_the_layers_are_those_of_the_preset():
    assert len(bert.encoder_linears(bert.build(bert.QUICK))) == 6
    assert bert.encoder_linears(nn.Linear(2, 2)) == {}


# --- SAQ's cases -----------------------------------------------------------------------------------------------------


def test_the_page_of_saqs_cases_is_what_its_results_say():
    found = json.loads(saq_cases.KEPT.read_text(encoding="utf-8"))
    assert saq_cases.PAGE.read_text(encoding="utf-8") == "\n".join(saq_cases.page(found)) + "\n"


def test_every_method_of_saqs_cases_starts_from_the_full_precision_run_of_its_seed():
    commands = list(saq_cases.commands("x.npz", saq_cases.RUNS, [0, 1], saq_cases.BITS))
    options = [parse_options(VisionOptions, {}, words) for words in commands]
    assert [o.method for o in options] == 2 * [["fp32"], list(saq_cases.METHODS), list(saq_cases.METHODS)]
    assert [(o.seed, o.bits) for o in options][1:3] == [([0], 2), ([0], 4)]
    assert len({(o.fp32_epochs, o.fp32_lr, o.batch_size, o.weight_decay, o.rho) for o in options}) == 1


def test_a_difference_is_called_one_from_two_standard_errors_on():
    def run(method, seed, metric):
        config = {"method": method, "seed": seed, "bits": 2}
        return {"config": config, "metric": metric, "sharpness": [{"value": 0.5}]}

    apart = [run("lsq", i, 0.5 + i / 100) for i in range(3)] + [run("squat", i, 0.6 + i / 99) for i in range(3)]
    close = [run("saq:case=1", i, (0.5, 0.6, 0.7)[i]) for i in range(3)] + [
        run("saq:case=3", i, (0.6, 0.5, 0.8)[i]) for i in range(3)
    ]
    text = "\n".join(saq_cases.verdict(apart + close))
    assert "SQuAT, fused above LSQ (W2A2)" in text
    assert "case 3 above SAQ, case 1" not in text
    assert "These pairs differ in sharpness by more than two standard errors: none." in text


# --- rounding after training ------------------------------------------------------------------------------------------


def test_the_page_of_rounding_after_training_is_what_its_results_say():
    found = read_json(post_training.RESULTS, post_training.NAME)
    assert post_training.PAGE.read_text(encoding="utf-8") == "\n".join(post_training.page(found)) + "\n"


@pytest.mark.parametrize("granularity", post_training.GRANULARITIES)
def test_every_quantizer_is_measured_once_with_those_that_round_alike(granularity):
    samples = [torch.randn(8, 256, generator=torch.Generator().manual_seed(0))]
    groups = post_training.alike("weights", granularity, 4, samples)
    found = [pair for group in groups for pair in group]
    inputs_only = {"pact", "per_token"} | ({"gobo"} if granularity == "per_channel" else set())
    names = set(qsam.list_quantizers()) - {"identity", "per_channel"} - inputs_only
    assert sorted(found) == sorted((name, init) for name in names for init in post_training.INIT_RULES)
    group_of = {pair: i for i, group in enumerate(groups) for pair in group}
    assert group_of["lsq", "mse"] == group_of["fixed_step", "mse"] == group_of["diffq", "mse"]
    assert group_of["stretched", "mse"] == group_of["liq", "mse"] != group_of["lsq", "mse"]
    assert len({group_of["minmax_ema", init] for init in post_training.INIT_RULES}) == 1


def test_rounding_after_training_goes_on_where_it_was_and_prints_every_cell(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(16, 16)
    expected, calls = model(x).detach(), []

    def score(quantized):
        calls.append(1)
        return float((quantized(x) - expected).square().mean())

    subject = post_training.Subject("tiny", "error", 16, model, [x], score, [("*", {})], ("weights", "inputs"))
    monkeypatch.setattr(post_training, "RESULTS", tmp_path)
    monkeypatch.setattr(post_training, "BITS", (8, 2))  # of the table
    monkeypatch.setattr(post_training, "INIT_RULES", ("absmax", "lsq"))  # those that search nothing
    before = {name: value.clone() for name, value in model.state_dict().items()}
    post_training.measure(subject, {}, float("inf"), (8, 2))
    cells = read_json(tmp_path, post_training.NAME)["subjects"]["tiny"]["cells"]
    assert len(calls) == 1 + len(cells)  # the float model, and one per cell
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    post_training.measure(subject, {}, float("inf"), (8, 2))
    assert len(calls) == 1 + len(cells), "nothing is measured twice"
    rows = list(post_training.part_table([cell for cell in cells if cell["part"] == "weights"]))
    assert len([row for row in rows if "`lsq`" in row and "| absmax" in row]) == 2  # per tensor and per channel
    assert "not run" not in "".join(rows)
    best = {cell["bits"]: min(c["score"] for c in cells if c["bits"] == cell["bits"]) for cell in cells}
    assert best[8] < best[2]
