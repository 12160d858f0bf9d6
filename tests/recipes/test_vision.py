"""Small networks through the whole recipe, on the 8x8 digits that come with scikit-learn."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qsam
from recipes.archives import default_cache_dir
from recipes.picture_batches import evaluation_transform
from recipes.pictures import load_pictures
from recipes.progress import Progress, save_checkpoint
from recipes.runs import Run
from recipes.vision import ImageClassification, main
from recipes.vision_model import EMBEDDED_LITE0, LITE0, load_model, look_of, new_model, renamed
from recipes.vision_options import parse_vision_options
from tests.recipes.tiny_glue import comparable, results, weights
from tests.recipes.tiny_vision import TRAIN, words

COSTS = {
    "rtn": (0, 0),
    "lsq": (4, 4),
    "squat": (4, 8),
    "saq:case=1,granularity=per_channel": (4, 8),
}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vision")
    more = ["--method", *COSTS, "--rho", 0.01, "--sharpness", 0.01, "--label-smoothing", 0.1, "--warmup-epochs", 1]
    assert main(words(out, *more)) == 0
    return out


@pytest.mark.parametrize(("method", "steps", "passes"), [(m, *cost) for m, cost in COSTS.items()])
def test_every_method_writes_what_it_found(method: str, steps: int, passes: int, comparison: Path) -> None:
    name = f"digits-resnet20-{re.sub('[:,]', '-', method)}-w4a4-seed0"
    found = results(comparison, name)
    assert (found["steps"], found["passes"]) == (steps, passes)
    assert found["metric"] == found["dev"]["dev"]["top1"]
    assert list(found["dev"]["dev"]) == ["loss", "top1"]
    assert found["train_loss_rows"] == TRAIN
    assert [entry["rho"] for entry in found["sharpness"]] == [0.01]
    assert found["sharpness"][0]["loss_start"] == pytest.approx(found["train_loss"], rel=1e-4)
    assert found["versions"]["timm"]
    assert (comparison / "digits-resnet20.png").is_file()


@pytest.mark.parametrize("method", ["fp32", "squat-w4a4"])
def test_the_reloaded_model_has_the_runs_metric(method: str, comparison: Path) -> None:
    folder = comparison / f"digits-resnet20-{method}-seed0"
    images = load_pictures("digits", train_rows=TRAIN)
    options = parse_vision_options(words(comparison))
    found = ImageClassification(images, look_of("resnet20", 8, None), options).evaluate(
        load_model(folder / "model"), "fp32"
    )
    assert found == results(comparison, folder.name)["dev"]


def test_the_saved_weights_are_on_the_grid_and_input_layer_and_head_have_8_bits(comparison: Path) -> None:
    model = load_model(comparison / "digits-resnet20-squat-w4a4-seed0" / "model", quantized=False)
    counts = {name: p.unique().numel() for name, p in model.named_parameters() if p.dim() >= 2}
    assert len(counts) == 20
    assert all(count <= (256 if name in {"conv1.weight", "fc.weight"} else 16) for name, count in counts.items())
    assert counts["conv1.weight"] > 16


def test_inputs_after_relu_are_unsigned(comparison: Path) -> None:
    spec = json.loads((comparison / "digits-resnet20-lsq-w4a4-seed0" / "model" / "qsam.json").read_text())
    signs = re.findall(r'"signed": (true|false)', json.dumps(spec))
    assert signs.count("false") >= 19


def test_a_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 3 steps an epoch; a checkpoint after the 4th, in the middle of the second
    more = ["--method", "squat", "--schedule", "next_batch", "--rho", 0.05, "--save-every", 2]
    name = "digits-resnet20-squat-w4a4-seed0"
    assert main(words(tmp_path / "apart", *more, steps=8)) == 0
    shutil.copytree(
        tmp_path / "apart" / "digits-resnet20-fp32-seed0", tmp_path / "stopped" / "digits-resnet20-fp32-seed0"
    )
    arguments = words(tmp_path / "stopped", *more, "--resume", steps=8)
    with monkeypatch.context() as patch:
        patch.setattr("recipes.training.save_checkpoint", interrupted_after(4))
        assert main(arguments) == 130
    assert (tmp_path / "stopped" / name / "checkpoint.pt").is_file()
    assert main(arguments) == 0
    assert comparable(results(tmp_path / "stopped", name)) == comparable(results(tmp_path / "apart", name))
    assert weights(tmp_path / "stopped", name) == weights(tmp_path / "apart", name)


def interrupted_after(step: int) -> Callable[..., None]:
    def save(run: Run, progress: Progress, parts: dict[str, Any]) -> None:
        save_checkpoint(run, progress, parts)
        if progress.step == step:
            raise KeyboardInterrupt

    return save


@pytest.mark.long
@pytest.mark.parametrize("model", ["vit_small_image", "mobilenetv3_small_050"])
def test_other_models_train_too(model: str, tmp_path: Path) -> None:
    more = ["--optimizer", "adamw", "--model", model, "--augment", "timm", "--auto-augment", "rand-m3-n1"]
    more += ["--image-size", 32, "--granularity", "per_channel", "--method", "squat", "--reestimate-batchnorm", 0]
    assert main(words(tmp_path, *more, steps=2)) == 0
    folder = tmp_path / f"digits-{model}-squat-w4a4-seed0"
    assert results(tmp_path, folder.name)["config"]["image_size"] == 32
    assert load_model(folder / "model")(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.long
def test_a_process_that_loads_the_images_changes_no_bit(tmp_path: Path) -> None:
    name = "digits-resnet20-lsq-w4a4-seed0"
    for count in (0, 1):
        more = ["--method", "lsq", "--augment", "timm", "--image-size", 16, "--workers", count]
        assert main(words(tmp_path / str(count), *more)) == 0
    assert weights(tmp_path / "1", name) == weights(tmp_path / "0", name)
    assert results(tmp_path / "1", name)["dev"] == results(tmp_path / "0", name)["dev"]


@pytest.mark.long
def test_batchnorm_may_be_measured_anew_after_training(tmp_path: Path) -> None:
    for count in (0, 3):  # one full-precision run for both
        more = ["--method", "lsq", "--reestimate-batchnorm", count, "--tag", f"n{count}"]
        assert main(words(tmp_path, *more)) == 0
    name = "digits-resnet20-lsq-w4a4-n{}-seed0"
    before, after = (load_model(tmp_path / name.format(count) / "model").state_dict() for count in (0, 3))
    moved = {key.rpartition(".")[2] for key, value in after.items() if not torch.equal(value, before[key])}
    assert {"running_mean", "running_var"} <= moved <= {"running_mean", "running_var", "num_batches_tracked"}


# --- data -----------------------------------------------------------------------------------------------------------


def npz(path: Path, **changes: np.ndarray) -> Path:
    chance = np.random.default_rng(0)
    arrays = {"images": chance.integers(0, 256, (20, 10, 12, 3), dtype=np.uint8), "labels": np.arange(20) % 3} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_an_npz_file_is_split_and_its_pixels_are_kept(tmp_path: Path) -> None:
    found = load_pictures(str(npz(tmp_path / "own.npz", names=np.array(["a", "b", "c"]))))
    assert (len(found.train), len(found.dev["dev"]), found.names, found.side) == (16, 4, ["a", "b", "c"], 10)
    assert sorted(found.train.rows + found.dev["dev"].rows) == list(range(20))
    images = np.load(tmp_path / "own.npz")["images"]
    for some in (found.train, found.dev["dev"]):
        for i, row in enumerate(some.rows):
            assert (np.array(some.image(i)) == images[row]).all()
            assert some.labels[i] == row % 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "has no array 'labels'; it has images"),
        ({"images": np.zeros((20, 3, 8, 8), np.float32)}, "must be uint8 of shape .* got float32 of shape"),
        ({"labels": np.zeros(3, int)}, r"must be 20 integers >= 0, got int64 of shape \(3,\)"),
        ({"labels": np.full(20, -1)}, "must be 20 integers >= 0"),
        ({"names": np.array(["a"])}, "has labels up to 2, but 1 names"),
    ],
)
def test_an_npz_file_of_something_else_is_refused(
    changes: dict[str, np.ndarray], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path, data=npz(tmp_path / "own.npz", **changes))) == 2
    assert re.search(message, capsys.readouterr().err)


def photos(folder: Path, counts: dict[str, int]) -> Path:
    from PIL import Image

    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L" if i else "RGB", (12, 9), 50 * number).save(folder / name / f"{i}.png")
    return folder


def test_a_folder_of_class_folders_is_split(tmp_path: Path) -> None:
    found = load_pictures(str(photos(tmp_path / "pets", {"cat": 6, "dog": 4})))
    assert (found.names, len(found.train), len(found.dev["dev"]), found.name) == (["cat", "dog"], 8, 2, "pets")
    assert found.train.image(0).mode == "RGB"


def test_folders_train_and_val_are_kept_apart_and_classes_go_by_name(tmp_path: Path) -> None:
    photos(tmp_path / "train", {"ant": 1, "cat": 2, "dog": 3})
    photos(tmp_path / "val", {"cat": 1, "dog": 2})
    found = load_pictures(str(tmp_path))
    assert found.train.labels == [0, 1, 1, 2, 2, 2]
    assert found.dev["dev"].labels == [1, 2, 2]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": {"cat": 1}, "val": {"rat": 1}}, "has the class 'rat', which"),
        ({"train": {"cat": 1}}, "has a folder train but neither val nor test"),
        ({"train": {"cat": 0}, "val": {}}, "the class folder cat has no images"),
        ({"train": {}, "val": {}}, "is not a folder of class folders with images"),
    ],
)
def test_a_folder_of_something_else_is_refused(
    parts: dict[str, dict[str, int]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, counts in parts.items():
        photos(tmp_path / "data" / part, counts).mkdir(parents=True, exist_ok=True)
    assert main(words(tmp_path / "out", data=tmp_path / "data")) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photos(tmp_path / "pets", {"cat": 5, "dog": 5})
    for path in folder.rglob("*.png"):
        path.write_bytes(b"not a picture")
    assert main(words(tmp_path / "out", data=folder)) == 2
    assert re.search(r"\d\.png cannot be read as an image", capsys.readouterr().err)


def test_a_holdout_is_cut_from_the_training_images() -> None:
    everything, held = load_pictures("digits"), load_pictures("digits", holdout=0.25)
    assert sorted(held.train.rows + held.dev["holdout"].rows) == sorted(everything.train.rows)
    assert "held out of training" in held.evaluated_on


def test_an_image_is_a_function_of_seed_epoch_and_its_number() -> None:
    images = load_pictures("digits", train_rows=8)
    experiment = ImageClassification(
        images, look_of("resnet20", 8, 16), parse_vision_options(words(Path("x"), "--augment", "timm"))
    )
    config = {"augment": "timm", "auto_augment": None, "seed": 1}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    (first, labels), (second, _) = experiment.loaded([[0, 1], [2, 3]], config, 0)
    assert torch.equal(torch.get_rng_state(), state)
    ((again, _),) = experiment.loaded([[2, 3]], config, 0)
    assert torch.equal(second, again)
    ((other, _),) = experiment.loaded([[2, 3]], config, 1)
    assert not torch.equal(second, other)
    assert labels.tolist() == images.train.labels[:2]
    assert first.shape == (2, 3, 16, 16)


def test_evaluation_does_not_change_images_of_the_models_size() -> None:
    images = load_pictures("digits", train_rows=2)
    look = look_of("resnet20", 8, None)
    pixels = evaluation_transform(look)(images.train.image(0)) * 0.25 + 0.5
    assert torch.equal((pixels * 255).round().to(torch.uint8)[0], torch.tensor(np.array(images.train.image(0))[..., 0]))


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "cifar11"], "no folder, no .npz file, and none of the sets mnist5k"),
        (["--model", "resnet19"], "neither ours nor timm's. Near: resnet18"),
        (["--pretrained"], "there are no pretrained weights of resnet20"),
        (["--label-smoothing", "1"], "`--label-smoothing` must be below 1, got 1.0"),
        (["--momentum", "1"], "`--momentum` must be below 1"),
        (["--weight-decay", "-1"], "`--weight-decay` must be finite and not negative"),
        (["--image-size", "4"], "`--image-size` must be at least 8, got 4"),
        (["--workers", "-1"], "`--workers` must not be negative"),
        (["--auto-augment", "rand-m9"], "`--auto-augment` needs `--augment timm`, got `--augment crop`"),
        (["--sharpness", "0"], "`--sharpness` takes radii above 0"),
        (["--bits", "1"], "`--bits` must be an integer in [2, 8], got 1."),
    ],
)
def test_bad_input_is_refused_in_a_sentence_and_nothing_is_written(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*/results.json"))


def test_a_quantized_model_is_what_the_library_reads(comparison: Path) -> None:
    folder = comparison / "digits-resnet20-lsq-w4a4-seed0" / "model"
    coverage = qsam.quantize_(load_model(folder, quantized=False), spec=folder / "qsam.json")
    assert sum(row.quantizer is not None for row in coverage.inputs) == 20


def test_the_embedded_efficientnet_has_its_imagenet_weights_and_a_new_head_on_request() -> None:
    if not (default_cache_dir() / LITE0.file_name).is_file():
        pytest.skip(f"{LITE0.file_name} is not in the cache")
    whole, own = (new_model(EMBEDDED_LITE0, classes, 224, pretrained=False) for classes in (1000, 10))
    assert torch.equal(whole.state_dict()["conv_stem.weight"], own.state_dict()["conv_stem.weight"])
    assert own.get_classifier().weight.shape == (10, 1280)
    # A trained stem tells an edge from its mirror image; at random no BatchNorm has a mean other than 0.
    assert all(module.running_mean.abs().max() > 0 for module in whole.modules() if isinstance(module, nn.BatchNorm2d))


def test_tensors_of_another_network_are_not_renamed() -> None:
    one, other = nn.Conv2d(3, 4, 3).state_dict(), nn.Conv2d(3, 4, 5).state_dict()
    with pytest.raises(ValueError, match=r"weight \(4, 3, 3, 3\) is not weight \(4, 3, 5, 5\)\."):
        renamed(one, other)
    with pytest.raises(ValueError, match=r"2 tensors for a model of 1\."):
        renamed(one, {"weight": one["weight"]})
