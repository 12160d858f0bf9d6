"""Small networks through the whole recipe, on the 8x8 digits that come with scikit-learn."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from recipes import offline, training, vision
from recipes.training import Shuffled, parse_options
from recipes.vision import (
    EMBEDDED_LITE0,
    ImageClassification,
    VisionOptions,
    build,
    load_model,
    load_pictures,
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
    more = ["--method", *COSTS, "--rho", 0.01, "--sharpness", 0.01, "--label-smoothing", 0.1, "--warmup-epochs", 1]
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
    source = vision.Arrays(np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8), [0, 1, 2])
    transform = vision.transform_of(look_of("resnet20", 8, None), "crop")
    pictures = vision.Pictures(source, [2, 0], transform)
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
    more = ["--optimizer", "adamw", "--model", model, "--augment", "timm", "--auto-augment", "rand-m3-n1"]
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


def npz(path: Path, **changes: np.ndarray | None) -> Path:
    chance = np.random.default_rng(0)
    arrays = {"images": chance.integers(0, 256, (20, 10, 12, 3), dtype=np.uint8), "labels": np.arange(20) % 3} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_an_npz_file_is_split_and_its_pixels_are_kept(tmp_path: Path) -> None:
    found = load_pictures(options_of("--data", npz(tmp_path / "own.npz", names=np.array(["a", "b", "c"]))))
    assert (len(found.train), len(found.dev), found.names) == (16, 4, ["a", "b", "c"])
    assert sorted([*found.train.rows, *found.dev.rows]) == list(range(20))
    images = np.load(tmp_path / "own.npz")["images"]
    for some in (found.train, found.dev):
        for i, row in enumerate(some.rows):
            image, label = some[i]
            assert (np.array(image) == images[row]).all()
            assert label == row % 3


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
    changes: dict[str, np.ndarray | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load_pictures(options_of("--data", npz(tmp_path / "own.npz", **changes)))


def class_folders(path: Path, **classes: int) -> None:
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (9, 7), (i, 0, 0)).save(path / name / f"{i}.png")


def test_folders_keep_their_classes_also_if_the_second_part_lacks_one(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", ant=3, bee=2, cow=2)
    class_folders(tmp_path / "val", cow=2)
    found = load_pictures(options_of("--data", tmp_path))
    assert (len(found.train), found.names, found.key) == (7, ["ant", "bee", "cow"], "val")
    assert [found.dev[i][1] for i in range(2)] == [2, 2]
    class_folders(tmp_path / "val", dog=1)
    with pytest.raises(ValueError, match=r"has the class 'dog', which .*train has not"):
        load_pictures(options_of("--data", tmp_path))


def test_a_folder_without_parts_is_split_and_an_empty_one_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "all", ant=6, bee=4)
    found = load_pictures(options_of("--data", tmp_path / "all"))
    assert (len(found.train), len(found.dev), found.names) == (8, 2, ["ant", "bee"])
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="is not a folder of class folders with images"):
        load_pictures(options_of("--data", tmp_path / "none"))


def test_other_pixels_are_other_data(tmp_path: Path) -> None:
    paths = [npz(tmp_path / "a.npz"), npz(tmp_path / "b.npz", images=np.zeros((20, 10, 12, 3), np.uint8))]
    digests = [load_pictures(options_of("--data", path)).digest.hexdigest() for path in paths]
    assert digests[0] != digests[1]


# --- models and bad input ---------------------------------------------------------------------------------------------


def test_resnet20_has_the_papers_size() -> None:
    model = build("resnet20", 10, 32, pretrained=False)
    assert sum(p.numel() for name, p in model.named_parameters() if "bn" not in name) == 268_346
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == 20


@pytest.mark.skipif(not (offline.cache_dir() / offline.LITE0).is_file(), reason="the archive is not in the cache")
def test_the_embedded_network_has_its_weights() -> None:
    model = build(EMBEDDED_LITE0, 1000, 224, pretrained=False).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224)).isfinite().all()
    assert sum((p == 0).all().item() for p in model.parameters() if p.dim() == 4) == 0


def test_label_smoothing_is_of_the_training_only() -> None:
    experiment = ImageClassification(options_of("--data", "digits", "--label-smoothing", 0.5))
    batch = experiment.collate([experiment.part[i] for i in range(8)])
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    losses = [experiment.loss(model.train(mode), batch)[0].item() for mode in (True, False)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    "case",
    [
        (["--data", "nowhere"], r"`--data nowhere` is no folder, no \.npz file, and none of mnist5k, digits, cifar10"),
        (["--model", "resnet21"], r"`--model resnet21`: neither ours nor timm's\. Near: resnet"),
        (["--pretrained"], r"there are no pretrained weights of resnet20: leave `--pretrained` out\."),
        (["--momentum", "1"], r"`--momentum` must be in \[0, 1\), got 1\.0\."),
        (["--weight-decay", "-1"], r"`--weight-decay` must be not negative, got -1\.0\."),
        (["--image-size", "4"], r"`--image-size` must be at least 8, got 4\."),
        (["--auto-augment", "rand"], r"`--auto-augment` needs `--augment timm`, got `--augment crop`\."),
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
