"""A BERT of two layers and rows in the official formats: what every test of the recipe trains on, and reads back."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = [f"w{i}" for i in range(20)]
TRAIN_ROWS, DEV_ROWS = 22, 10
MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
STSB = "index genre filename year old_index source1 source2 sentence1 sentence2 score"

COLA = "source label star sentence"

# folder, header of train; CoLA's files have none
FORMATS = {
    "cola": ("CoLA", COLA),
    "sst2": ("SST-2", "sentence label"),
    "mrpc": ("MRPC", "Quality #1_ID #2_ID #1_String #2_String"),
    "stsb": ("STS-B", STSB),
    "qqp": ("QQP", "id qid1 qid2 question1 question2 is_duplicate"),
    "mnli": ("MNLI", f"{MNLI} sentence1 sentence2 label1 gold_label"),
    "qnli": ("QNLI", "index question sentence label"),
    "rte": ("RTE", "index sentence1 sentence2 label"),
}
TWO = ["entailment", "not_entailment"]
LABELS = {"mnli": ["entailment", "neutral", "contradiction"], "qnli": TWO, "rte": TWO}
METRICS = {"cola": ["matthews"], "stsb": ["pearson", "spearman"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"]}


def cell(column: str, task: str, chance: random.Random) -> str:
    if column in {"label", "Quality", "is_duplicate", "gold_label", "score"}:
        return f"{chance.uniform(0, 5):.3f}" if task == "stsb" else chance.choice(LABELS.get(task, ["0", "1"]))
    is_text = any(word in column for word in ("entence", "String", "question"))
    return " ".join(chance.choices(WORDS, k=chance.randint(2, 9))) if is_text else "x"


def write_rows(path: Path, task: str, header: str, count: int, chance: random.Random) -> None:
    columns = header.split()
    lines = ["\t".join(cell(column, task, chance) for column in columns) for _ in range(count)]
    if header != COLA:
        lines.insert(0, "\t".join(column.replace("_String", " String").replace("_ID", " ID") for column in columns))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig" if task == "mrpc" else "utf-8")


@pytest.fixture(scope="session")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the GLUE download makes it, with a few rows of nonsense a task."""
    root = tmp_path_factory.mktemp("glue")
    for task, (folder, header) in FORMATS.items():
        (root / folder).mkdir()
        chance = random.Random(task)
        write_rows(root / folder / "train.tsv", task, header, TRAIN_ROWS, chance)
        for name in ["dev_matched", "dev_mismatched"] if task == "mnli" else ["dev"]:
            dev = header.replace("label1", "label1 label2")  # MNLI's
            write_rows(root / folder / f"{name}.tsv", task, dev, DEV_ROWS, chance)
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with a vocabulary of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    return folder


def words(glue: Path, tiny: Path, out: Path, *more: object, task: str = "cola", steps: int = 5) -> list[str]:
    settings = {"task": task, "glue-dir": glue, "model": tiny, "output-dir": out, "max-steps": steps, "batch-size": 4}
    settings |= {"threads": 1, "precision": "fp32", "fp32-lr": 1e-3, "lr": 1e-3, "epochs": 100, "fp32-epochs": 100}
    return [*(str(word) for name, value in settings.items() for word in (f"--{name}", value)), *map(str, more)]


def results(out: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / name / "results.json").read_text(encoding="utf-8"))
    return content


def weights(out: Path, name: str) -> bytes:
    return (out / name / "model" / "model.safetensors").read_bytes()


def comparable(found: dict[str, Any]) -> dict[str, Any]:
    """Everything but the time that it took, and the commit, which may have changed since."""
    epochs = [{key: value for key, value in entry.items() if key != "seconds"} for entry in found["epochs"]]
    rest = {key: value for key, value in found.items() if key not in {"seconds", "versions", "commit"}}
    return rest | {"epochs": epochs}
