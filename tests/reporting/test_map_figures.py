import io

import pandas as pd
import pytest
from rich.console import Console

from diablo_theory.errors import ResultsError
from diablo_theory.reporting import maps
from diablo_theory.reporting.captures import capture_figure, layer_table, measured_at
from diablo_theory.reporting.verdicts import verdict_margins


def point(rank_x=1, num_blocks=1, diablo=0.0, lora=0.0, frozen=0.0, inside=True, **others):
    return {
        "rank_x": rank_x,
        "num_blocks": num_blocks,
        "diablo_gap": diablo,
        "lora_gap": lora,
        "frozen_gap": frozen,
        "in_theorem": inside,
    } | others


def four(**others):
    return [
        point(1, 1, **others),
        point(2, 1, lora=0.3, **others),
        point(1, 2, lora=0.3, frozen=0.1, **others),
        point(2, 2, diablo=0.5, frozen=0.6, inside=False, **others),
    ]


def words(axes):
    return {(text.get_position()): text.get_text() for text in axes.texts}


def rendered(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def test_letters_name_the_smallest_gap_in_the_right_cell():
    figure = maps.theory_map(pd.DataFrame(four()))
    assert words(figure.axes[3]) == {(0, 0): "=", (1, 0): "DF", (0, 1): "D", (1, 1): "L"}
    assert words(figure.axes[0])[(1, 1)] == "50"
    assert words(figure.axes[2])[(0, 1)] == "10"


def test_gaps_within_one_per_cent_are_no_lead():
    close = [point(1, 1, diablo=0.200, lora=0.209, frozen=0.5), point(2, 1, diablo=0.2, lora=0.211, frozen=0.5)]
    assert words(maps.theory_map(pd.DataFrame(close)).axes[3]) == {(0, 0): "=", (1, 0): "D"}


def test_cells_that_differ_in_nothing_shown_are_averaged():
    twice = [point(diablo=0.2, lora=1, frozen=1), point(diablo=0.4, lora=1, frozen=1)]
    assert words(maps.theory_map(pd.DataFrame(twice)).axes[0]) == {(0, 0): "30"}


def test_a_coordinate_that_varies_unseen_is_refused():
    cells = pd.DataFrame(four(noise=0.0) + four(noise=1.0))
    with pytest.raises(ResultsError, match="noise varies as well"):
        maps.theory_map(cells)
    assert len(maps.lead_maps(cells, "rank_x", "num_blocks", "noise").axes) == 2
    with pytest.raises(ResultsError, match=r"no coordinate .ranks. in the map\. Known: rank_x"):
        maps.theory_map(cells, x="ranks")
    with pytest.raises(ResultsError, match="holds no cells"):
        maps.theory_map(cells.iloc[:0])


def test_small_maps_stand_in_the_order_of_their_values():
    cells = pd.DataFrame([row for t in (4, 1) for n in (1.0, 0.0) for row in four(noise=n, target_rank=t)])
    drawn = maps.lead_maps(cells, "rank_x", "num_blocks", "target_rank", "noise")
    titles = [axes.get_title(loc="left") for axes in drawn.axes]
    assert titles == [
        "target rank 1, noise 1",
        "target rank 4, noise 1",
        "target rank 1, noise 0",
        "target rank 4, noise 0",
    ]


@pytest.mark.parametrize(
    ("extra", "stems"),
    [
        ([{}], ["map_gaps"]),
        ([{"noise": 0.0}, {"noise": 0.5}], ["map_leads", "map_gaps_noise_0"]),
        (
            [{"noise": n, "target_rank": t, "condition": c} for n in (0, 1) for t in (1, 2) for c in (1, 9)],
            ["map_gaps_target_rank_1_noise_0_condition_1"],
        ),
    ],
)
def test_figures_are_named_by_what_they_hold_fixed(extra, stems):
    base = {"noise": 0.0, "target_rank": 1, "condition": 1.0}
    cells = pd.DataFrame([row for others in extra for row in four(**(base | others))])
    assert [stem for stem, _ in maps.draw_map(cells)] == stems


def test_the_table_counts_every_cell_once():
    text = rendered(maps.map_table(pd.DataFrame(four())))
    inside = next(line for line in text.splitlines() if "inside" in line)
    outside = next(line for line in text.splitlines() if "outside" in line)
    assert [word for word in inside.replace("│", " ").split() if word.isdigit()] == ["3", "1", "1", "0", "0", "1"]
    assert [word for word in outside.replace("│", " ").split() if word.isdigit()] == ["1", "0", "0", "0", "1", "0"]


def test_failed_verdicts_are_ringed():
    rows = [
        {"check": "L2", "role": "claim", "claim_margin": 3.0, "passed": True},
        {"check": "L2", "role": "control", "claim_margin": 2.0, "passed": False},
    ]
    labels = {line.get_label() for line in verdict_margins(pd.DataFrame(rows)).axes[0].lines}
    assert "failed verdict" in labels
    labels = {line.get_label() for line in verdict_margins(pd.DataFrame(rows[:1])).axes[0].lines}
    assert "failed verdict" not in labels


def test_captures_are_drawn_where_they_are():
    rows = [
        {"layer": f"model.layers.{i}.mlp.up_proj", "method": method, "start": start, "capture": capture}
        for i in range(2)
        for method, start, capture in (("diablo", "zero", 0.2 + 0.1 * i), ("lora", "any", 0.9))
    ]
    about = measured_at(pd.DataFrame({"num_blocks": [64, 64], "tokens": [1800, 1800]}), "A model")
    figure = capture_figure(pd.DataFrame(rows), about)
    assert figure.get_supxlabel().startswith("Measured here: A model, 2 layers, 1,800 tokens, N = 64. All methods at")
    axes = figure.axes[0]
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert lines["DiaBlo"] == pytest.approx([0.2, 0.3])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.up_proj", "1.up_proj"]


def test_the_layer_table_survives_a_layer_without_a_gradient():
    row = {"layer": "model.layers.0.mlp.up_proj", "block_rows": 9, "energy_rank": 30, "premise_holds": False}
    row |= {"leak_share": 0.0}
    row |= {f"capture_{name}": 0.25 for name in ("diablo", "lora_set", "lora_tangent", "lora_frozen")}
    assert "0.up_proj" in rendered(layer_table(pd.DataFrame([row])))
