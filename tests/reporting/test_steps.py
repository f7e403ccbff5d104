import itertools

import numpy as np
import pandas as pd
import pytest

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.steps import draw_steps, read_steps, readable_steps, summarise

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
        | {"tokens": 1024, "static_mib": 100.0 + place, "step_peak_mib": 50.0}
        for place, (name, method) in enumerate(zip(names, seconds, strict=True))
    ]
    pd.DataFrame(times).to_csv(tmp_path / "times.csv", index=False)
    pd.DataFrame(contenders).to_csv(tmp_path / "contenders.csv", index=False)
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


@pytest.mark.parametrize("damage", ["missing", "columns", "bytes"])
def test_damaged_files_are_named(saved, damage):
    file = saved / "times.csv"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"a,b\n1,2\n" if damage == "columns" else b"\xff\xfe\x00")
    with pytest.raises(ResultsError, match=r"times\.csv"):
        read_steps(saved)
