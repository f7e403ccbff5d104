import itertools

import numpy as np
import pandas as pd
import pytest

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.evidence import Evidence
from diablo_theory.reporting.figures import ENTRIES
from diablo_theory.reporting.plans import NothingToDrawError
from diablo_theory.reporting.steps import aims, draw_steps, read_steps, readable_steps, side_measures, summarise

WORK = "smollm2, 8 layers"


@pytest.fixture
def saved(tmp_path):
    """Eight rounds in which DiaBlo takes 1.03 and LoRA 1.1 of a floor that itself drifts."""
    seconds = {"floor": 1.0, "DiaBlo N=64": 1.03, "LoRA r=5": 1.1, "einsum N=64": 1.2}
    names = ["floor", "diablo", "lora", "einsum"]
    shares = {"forward": 0.4, "backward": 0.5, "optimizer": 0.1, "step": 1.0}
    times = [
        {"workload": WORK, "num_blocks": 64, "round": index, "method": method, "phase": phase}
        | {"seconds": whole * share * (1 + 0.1 * index)}
        for index, (method, whole), (phase, share) in itertools.product(range(8), seconds.items(), shares.items())
    ]
    contenders = [
        {"workload": WORK, "num_blocks": 64, "name": name, "method": method, "trainable": 1000 * place}
        | {"tokens": 1024, "static_mib": 100.0 + place, "step_peak_mib": 50.0, "inputs_mib": 0.5, "trainable_mib": 0.1}
        for place, (name, method) in enumerate(zip(names, seconds, strict=True))
    ]
    pd.DataFrame(times).to_csv(tmp_path / "times.csv", index=False)
    here = {"cpu": "c", "threads": 2, "torch": "2", "commit": "", "dirty": False}
    here |= {"device": "cpu", "dtype": "float32", "date": "2026-11-29"}
    pd.DataFrame(contenders).assign(**here).to_csv(tmp_path / "contenders.csv", index=False)
    return tmp_path


def test_ratios_are_paired_so_a_drift_does_not_matter(saved):
    summary = summarise(*read_steps(saved)).set_index("name")
    assert summary.loc["diablo", "over_floor"] == pytest.approx(1.03)
    assert summary.loc["diablo", "over_floor_low"] == pytest.approx(1.03)
    assert summary.loc["diablo", "over_lora"] == pytest.approx(1.03 / 1.1)
    assert summary.loc["diablo", "over_einsum"] == pytest.approx(1.03 / 1.2)
    assert summary.loc["floor", "over_floor"] == 1.0
    assert summary.loc["floor", "tokens_per_second"] == pytest.approx(1024 / 1.35)
    assert summary.loc["lora", "forward"] == pytest.approx(0.4 * 1.1 * 1.35)


def test_the_table_says_it_in_words(saved):
    lines = readable_steps(summarise(*read_steps(saved))).set_index("Method")
    assert lines.loc["DiaBlo N=64", "Step over floor"] == "1.030 (1.030 to 1.030)"
    assert lines.loc["LoRA r=5", "Over LoRA"] == "1.000"
    assert lines.loc["LoRA r=5", "Memory (MiB)"] == "152"


def test_a_reference_that_was_not_run_has_no_ratio(saved):
    times, contenders = read_steps(saved)
    summary = summarise(times, contenders[contenders["name"] != "einsum"])
    assert "over_einsum" not in summary
    assert set(readable_steps(summary)["Over einsum"]) == {"—"}


def test_the_figure_has_a_row_of_panels_for_each_block_count(saved):
    times, contenders = read_steps(saved)
    twice = [pd.concat([table, table.assign(num_blocks=16)]) for table in (times, contenders)]
    figure = draw_steps(summarise(*twice))
    assert len(figure.axes) == 4
    assert [axes.get_title(loc="left") for axes in figure.axes[::2]] == ["N = 16", "N = 64"]
    dots = figure.axes[0].collections[1].get_offsets()
    assert np.allclose(sorted(dots[:, 0]), [1.0, 1.03, 1.1, 1.2])
    assert [text.get_text() for text in figure.axes[1].texts] == ["153", "152", "151", "150"]
    said = " ".join(figure.get_supxlabel().split())
    assert said.startswith(
        f"Measured here: {WORK}. Machine: c, 2 threads, torch 2, float32. Light blue, einsum: DiaBlo's layer"
    )
    without = summarise(times, contenders[contenders["name"] != "einsum"])
    assert "einsum" not in draw_steps(without).get_supxlabel()


def test_aims_are_met_by_whole_intervals_and_by_sums(saved):
    lines = aims(*read_steps(saved)).set_index("Measure")
    assert lines.loc["step, diablo over floor", "Measured"] == "1.030 (1.030 to 1.030)"
    met = {"floor": "yes", "lora": "yes", "einsum": "yes"}  # 1.03 of 1.04; 1.03 / 1.1 of 0.98; 1.03 / 1.2 of 0.93
    assert {name: lines.loc[f"step, diablo over {name}", "Met"] for name in met} == met
    # Noise that goes either way says neither yes nor no.
    times, contenders = read_steps(saved)
    slow = (times["method"] == "DiaBlo N=64") & (times["phase"] == "step") & (times["round"] % 2 == 0)
    times.loc[slow, "seconds"] *= 1.1
    assert aims(times, contenders).set_index("Measure").loc["step, diablo over floor", "Met"] == "open"
    # 151 MiB, beside LoRA's 152 and 150 + 0.5 + 6 x 0.1
    assert lines.loc["memory, diablo beside lora", "Met"] == "yes"
    assert lines.loc["memory, diablo beside floor + inputs + 6 x trainable", "Asked (at most)"] == "151.1 MiB"
    times, contenders = read_steps(saved)
    times.loc[times["method"] == "DiaBlo N=64", "seconds"] *= 1.02
    lines = aims(times, contenders.assign(static_mib=contenders["static_mib"] + [0, 2, 0, 0])).set_index("Measure")
    assert set(lines["Met"].drop(["step, diablo over lora", "step, diablo over einsum"])) == {"no"}


def test_side_measures_in_words(tmp_path):
    kernel = {"m1": 8, "m2": 4, "num_blocks": 2, "smallest": 0.5, "largest": 1.2}
    rows = [kernel | {"kernel": "product", "ratio": ratio} for ratio in (0.6, 0.9, 1.1)]
    pd.DataFrame(rows).to_csv(tmp_path / "kernels.csv", index=False)
    with pytest.raises(ResultsError, match=r"growth\.csv cannot be read .*bench --growth"):
        side_measures(tmp_path)
    growth = [{"varied": "num_blocks", "num_blocks": n, "tokens": 512, "exponent": -0.91} for n in (1, 4)]
    growth += [row | {"varied": "tokens", "exponent": 0.8} for row in growth]
    pd.DataFrame(growth).to_csv(tmp_path / "growth.csv", index=False)
    loading = {"num_blocks": 64, "adapter_mib": 40.0, "parameters": 1.2e9, "model_mib": 2400.0}
    loading |= {"load_seconds": 0.2, "merge_seconds": 0.1, "over_adapter": 4.0, "over_model": 0.1}
    pd.DataFrame([loading]).to_csv(tmp_path / "loading.csv", index=False)
    said = side_measures(tmp_path)["Measured"].tolist()
    assert said[0] == "median 0.90, best 0.60, worst 1.10 (8 x 4, N = 2; its rounds: 0.50 to 1.20)"
    assert said[1] == "-0.91 (operations alone: -1)"
    assert said[3] == "0.30 s, 4.00 of reading and writing the adapter's bytes, 0.100 of the model's"


@pytest.mark.parametrize("damage", ["missing", "columns", "bytes", "rows", "text", "twice"])
def test_damaged_files_are_named(saved, damage):
    file = saved / "times.csv"
    lines = file.read_text().splitlines(keepends=True)
    if damage == "missing":
        file.unlink()
    elif damage in ("rows", "text", "twice"):
        cut = {
            "rows": lines[:1],
            "text": [*lines, lines[-1].rpartition(",")[0] + ",x\n"],
            "twice": [*lines, lines[-1]],
        }
        file.write_text("".join(cut[damage]))
    else:
        file.write_bytes(b"a,b\n1,2\n" if damage == "columns" else b"\xff\xfe\x00")
    with pytest.raises(ResultsError, match=r"times\.csv"):
        read_steps(saved)


def without(column, value):
    return lambda table: table[table[column] != value]


def renamed(column, value, place=5):
    def change(table):
        table = table.astype({column: object})
        table.loc[table.index[place % len(table)], column] = value
        return table

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("contenders", without("name", "floor"), "only one of .* has 'floor' at N = 64 on smollm2"),
        ("contenders", without("name", "lora"), "only one of .* has 'LoRA r=5' at N = 64"),
        ("contenders", renamed("method", "LoRA r=6", 2), "only one of .* has 'LoRA r=5' at N = 64"),
        ("contenders", renamed("num_blocks", 16, 2), "only one of .* has 'LoRA r=5' at N = 16"),
        ("contenders", renamed("name", "lroa", 2), "contenders.csv, line 4: name is 'lroa'; allowed: floor, inputs"),
        ("contenders", renamed("name", "diablo", 2), "lines 3 and 4, are both of workload .*, name diablo"),
        ("contenders", renamed("method", "LoRA r=5", 1), "lines 3 and 4, are both of workload .*, method LoRA r=5"),
        ("times", renamed("phase", "stepp"), "times.csv, line 7: phase is 'stepp'; allowed: forward, backward"),
        ("times", renamed("method", "LoRA r=6"), "only one of .* has 'LoRA r=6' at N = 64"),
        ("times", renamed("num_blocks", 16), "only one of .* has 'DiaBlo N=64' at N = 16"),
        ("times", renamed("num_blocks", 63.5), "num_blocks is 63.5; allowed: a whole number above 0"),
        ("times", renamed("seconds", -1), "seconds is -1.*; allowed: a number above 0"),
        ("times", lambda table: table[:-3], "13 times in round 7 at N = 64 on .*, not 4 of each of 4 methods"),
        ("times", without("phase", "step"), "12 times in round 0"),
    ],
)
def test_a_benchmark_that_is_not_whole_is_refused(saved, name, change, message):
    file = saved / f"{name}.csv"
    change(pd.read_csv(file)).to_csv(file, index=False)
    with pytest.raises(ResultsError, match=message):
        read_steps(saved)


def test_a_benchmark_without_the_floor_is_refused(saved):
    for name, column in (("contenders", "name"), ("times", "method")):
        file = saved / f"{name}.csv"
        without(column, "floor")(pd.read_csv(file)).to_csv(file, index=False)
    with pytest.raises(ResultsError, match=r"contenders\.csv has no floor at N = 64 on smollm2"):
        read_steps(saved)


def test_a_benchmark_of_other_methods_alone_asks_nothing_of_diablo(saved):
    times, contenders = read_steps(saved)
    rest = times[times["method"] != "DiaBlo N=64"], contenders[contenders["name"] != "diablo"]
    assert aims(*rest).empty
    assert len(readable_steps(summarise(*rest))) == 3


def test_without_lora_times_are_not_drawn_beside_published_ones(saved):
    times, contenders = read_steps(saved)
    evidence = Evidence(saved, saved)
    rest = times[times["method"] != "LoRA r=5"], contenders[contenders["name"] != "lora"]
    evidence.__dict__.update(steps=rest, published=None)
    with pytest.raises(NothingToDrawError, match="run without LoRA at its largest N; `diablo-theory bench --out"):
        ENTRIES["time_memory"].draw(evidence)
