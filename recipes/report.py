"""Compare finished runs."""
from __future__ import annotations
from pathlib import Path
from recipes.runs import read_json

def report(folder, task):
    for path in sorted(Path(folder).glob(f"{task}-*/results.json")):
        r = read_json(path)
        print(path.parent.name, r["metric_name"], round(r["metric"], 4), "dev", round(r["dev_loss"], 4), "train", round(r["train_loss"], 4), "passes", r["passes"], "s", round(r["seconds"]))
