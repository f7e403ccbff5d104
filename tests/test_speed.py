import numpy as np
import pytest

from diablo_theory import speed
from diablo_theory.theory.maps import Grid, cell_problem, map_cells

SMALL = Grid(
    ranks=(2, 5), target="low-rank", target_ranks=(1, 2), noises=(0.0, 0.5), block_counts=(1, 3), rows=20, size=12,
    outputs=9, draws=1,
)  # fmt: skip


def test_the_large_grid_is_the_promised_one():
    grid = speed.LARGE_GRID
    assert (grid.num_cells, grid.rows, grid.size, grid.outputs) == (10_000, 256, 128, 128)


def test_the_plain_loop_finds_the_maps_numbers():
    for task in SMALL.tasks():
        for cell in map_cells(**task):
            plain = speed.plain_gaps(*cell_problem(task, cell["num_blocks"], cell["target_rank"], cell["noise"]))
            found = [cell[f"{name}_gap"] for name in ("diablo", "lora", "frozen")]
            np.testing.assert_allclose(found, plain, rtol=1e-9, atol=1e-12)


def test_the_map_is_compared_input_by_input():
    told = []
    lines = speed.map_against_loop(SMALL, sample=3, progress=told.append).set_index("quantity")
    assert told == ["input 1 of 2", "input 2 of 2"]
    assert lines.loc["largest difference of a relative gap", "value"] < 1e-9
    assert lines.loc["the same, input by input", "n"] == 2
    assert (lines[["value", "low"]] >= 0).all(axis=None)


def test_a_layer_is_measured_beside_its_bare_algebra():
    lines = speed.layer_at_scale(width=64, tokens=512, batch=128, num_blocks=(4, 8), pairs=2, rounds=2).set_index(
        "quantity"
    )
    assert lines.loc["accumulation over bare products", "n"] == 2
    assert lines.loc["rank X", "value"] == 64
    assert (lines["low"] > 0).all()
    assert (lines["low"] <= lines["value"]).all()
    assert (lines["value"] <= lines["high"]).all()


@pytest.mark.parametrize("tokens", [0, 128, 300])
def test_tokens_that_do_not_fill_batches_are_named(tokens):
    with pytest.raises(ValueError, match=f"tokens must be a multiple of batch = 128, at least 256, got {tokens}"):
        speed.layer_at_scale(width=64, tokens=tokens, batch=128)


def test_an_exponent_is_the_slope_of_log_time():
    sizes, power = (1, 2, 4, 8), 2.5
    assert speed.exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)


def test_growth_measures_every_promised_exponent(monkeypatch):
    monkeypatch.setattr(speed, "GROWTH", {"cells, map": ((1, 2, 4), speed.cells_of, "at most 1")})
    lines = speed.growth(repeats=2)
    assert lines["quantity"].tolist() == ["exponent in cells, map"]
    assert lines.loc[0, "n"] == 2
    assert np.isfinite(lines["value"]).all()
