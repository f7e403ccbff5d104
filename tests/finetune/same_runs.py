"""What two run folders have to agree on, whatever happened on the way."""

import json

import pandas as pd
import torch
from safetensors.torch import load_file

from diablo_theory.finetune import scoring, train


def deterministic(folder):
    log = pd.read_csv(folder / "log.csv").drop(columns="seconds")
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["train_seconds"], metrics["run_id"], metrics["provenance"]
    items = {file.stem: scoring.read_predictions(file) for file in sorted((folder / "predictions").glob("*.csv"))}
    return log, items, metrics, load_file(folder / train.WEIGHTS)


def assert_same_result(first, second):
    log, items, metrics, weights = deterministic(first)
    other_log, other_items, other_metrics, other_weights = deterministic(second)
    pd.testing.assert_frame_equal(log, other_log, check_exact=True)
    assert items.keys() == other_items.keys() == metrics["scores"].keys()
    for task in items:
        pd.testing.assert_frame_equal(items[task], other_items[task], check_exact=True)
    assert metrics == other_metrics
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
