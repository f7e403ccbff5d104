import numpy as np
import pandas as pd
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from strategies import layouts

from diablo_theory.errors import ConfigError
from diablo_theory.theory.maps import Grid, cell_problem, map_cells
from diablo_theory.theory.problems import TARGETS
from diablo_theory.theory.tolerances import tolerance


def cells(**fields):
    return pd.DataFrame([cell for task in Grid(**fields).tasks() for cell in map_cells(**task)])


@pytest.fixture(scope="module")
def default_map():
    return cells()


def test_the_default_map_has_every_cell_once(default_map):
    grid = Grid()
    assert len(default_map) == grid.num_cells == len(grid.ranks) * len(grid.block_counts)
    assert set(zip(default_map.rank_x, default_map.num_blocks, strict=True)) == {
        (r, n) for r in grid.ranks for n in grid.block_counts
    }


def test_diablo_is_exact_inside_the_theorem_and_only_there(default_map):
    assert (default_map.in_theorem == (default_map.rank_x <= default_map.block_rows)).all()
    assert default_map[default_map.in_theorem].diablo_gap.max() < 1e-18
    assert default_map[~default_map.in_theorem].diablo_gap.min() > 0.1


def test_a_frozen_factor_has_the_theorems_region_too(default_map):
    """L6: at DiaBlo's budget LoRA with a frozen generic A is exact where rank X <= d1, and only there."""
    assert (default_map.frozen_params == default_map.diablo_params).all()
    assert default_map[default_map.in_theorem].frozen_gap.max() < 1e-18
    assert default_map[~default_map.in_theorem].frozen_gap.min() > 0.1


def test_outside_the_gap_is_the_expected_share(default_map):
    """L7: E gap = 1/2 s^2 m2 (r - min(r, d1)), so its share of the captured 1/2 s^2 m2 r is 1 - min(r, d1)/r."""
    expected = 1 - np.minimum(default_map.rank_x, default_map.block_rows) / default_map.rank_x
    # missed/captured of m2 (= 64) x draws (= 3) x rank independent squares: standard deviation under 0.7/sqrt(192)
    assert (default_map.diablo_gap - expected).abs().max() < 4 * 0.7 / np.sqrt(192)


def test_no_method_exceeds_the_budget(default_map):
    assert (default_map.lora_params == default_map.lora_rank * 128).all()
    assert (default_map.lora_params <= default_map.diablo_params).all()
    assert (default_map.lora_rank > 0).all()
    without = cells(block_counts=[64])
    assert (without.lora_rank == 0).all()
    assert (without.lora_gap - 1).abs().max() < 1e-13


def test_both_sides_of_the_map_exist(default_map):
    assert (default_map.diablo_gap < default_map.lora_gap - 0.01).any()
    assert (default_map.lora_gap < default_map.diablo_gap - 0.01).any()


def plain_gaps(task, num_blocks, target_rank, noise):
    """One cell by scipy, method by method, from X and R as a reader would write it down."""
    problem, factor = cell_problem(task, num_blocks, target_rank, noise)
    X, R, A, layout = problem.X.numpy(), problem.R.numpy(), factor.numpy(), problem.layout

    def missed(inputs, targets):
        fitted = inputs @ scipy.linalg.lstsq(inputs, targets, cond=1e-11)[0] if inputs.any() else 0 * targets
        return np.linalg.norm(targets - fitted) ** 2

    full = missed(X, R)
    captured = np.linalg.norm(R) ** 2 - full
    diablo = sum(missed(X[:, layout.rows(i)], R[:, layout.cols(i)]) for i in range(layout.count))
    Q = scipy.linalg.orth(X, rcond=1e-11)
    rho = layout.num_parameters // (layout.in_features + layout.out_features)
    lora = np.sum(np.linalg.svd(Q.T @ R, compute_uv=False)[rho:] ** 2)
    return (diablo - full) / captured, lora / captured, (missed(X @ A, R) - full) / captured


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sizes", [(11, 11), (12, 7), (7, 12)])
def test_cells_equal_a_plain_loop_over_scipy(target, sizes):
    several = {"target_ranks": (1, 3)} if target == "low-rank" else {}
    noises = (0.0, 0.3) if target in ("low-rank", "block-aligned", "sparse") else (0.0,)
    grid = Grid(
        ranks=(3, 6),
        block_counts=(1, 3, 5),
        conditions=(1.0, 100.0),
        target=target,
        noises=noises,
        rows=17,
        size=sizes[0],
        outputs=sizes[1],
        draws=1,
        seed=3,
        **several,
    )
    for task in grid.tasks():
        for cell in map_cells(**task):
            rank = cell["target_rank"] or 1
            expected = plain_gaps(task, cell["num_blocks"], rank, cell["noise"])
            found = (cell["diablo_gap"], cell["lora_gap"], cell["frozen_gap"])
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), cell


def test_block_aligned_targets_are_diablos_and_low_rank_ones_loras():
    """L5: at full rank of X who is ahead depends on the target alone."""
    aligned = cells(ranks=[64], block_counts=[8], target="block-aligned").iloc[0]
    dense = cells(ranks=[64], block_counts=[8], target="low-rank").iloc[0]
    assert aligned.diablo_gap < 1e-18 < 0.1 < aligned.lora_gap
    assert dense.lora_gap < 1e-18 < 0.1 < dense.diablo_gap


def test_a_cell_depends_on_its_coordinates_and_the_seed_only():
    small = {"rows": 16, "size": 8, "outputs": 8}
    alone = cells(ranks=[6], block_counts=[4], **small)
    among = cells(ranks=[2, 6], block_counts=[1, 4], **small)
    kept = among[(among.rank_x == 6) & (among.num_blocks == 4)].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, kept, check_exact=True)
    assert not alone.equals(cells(ranks=[6], block_counts=[4], seed=1, **small))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"ranks": [0]}, "ranks must lie from 1 to 64, got 0"),
        ({"ranks": [65]}, "ranks must lie from 1 to 64, got 65"),
        ({"ranks": []}, "ranks must hold at least one value"),
        ({"block_counts": [65]}, "block_counts must lie from 1 to 64, got 65"),
        ({"conditions": [0.5]}, "conditions must lie from 1 to 1e.06, got 0.5"),
        ({"conditions": [float("nan")]}, "conditions must lie from 1 to 1e.06, got nan"),
        ({"target": "low-rank", "target_ranks": [65]}, "target_ranks must lie from 1 to 64, got 65"),
        ({"target_ranks": [1, 2]}, "target_ranks must hold one value unless target is 'low-rank'"),
        ({"noises": [0.1]}, "noises must be 0 for target 'generic', which has no signal"),
    ],
)
def test_values_out_of_range_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Grid(**fields)


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ranks": [2.5]}, "ranks must be an integer, got 2.5 of type float"),
        ({"ranks": ["2"]}, "ranks must be an integer, got '2' of type str"),
        ({"block_counts": [True]}, "block_counts must be an integer, got True of type bool"),
        ({"target": "low-rank", "target_ranks": [1.0]}, "target_ranks must be an integer, got 1.0 of type float"),
        ({"draws": 1.5}, "draws must be an integer, got 1.5 of type float"),
        ({"rows": "9"}, "rows must be an integer, got '9' of type str"),
        ({"ranks": 3}, "ranks must be a list or a tuple, got 3"),
        ({"noises": "0"}, "noises must be a list or a tuple, got '0'"),
        ({"block_counts": np.arange(1, 3)}, r"block_counts must be a list or a tuple, got array\(\[1, 2\]\)"),
    ],
)
def test_values_of_another_kind_are_named(fields, message):
    with pytest.raises(TypeError, match=message):
        Grid(**fields)


@given(layouts(), st.sampled_from(TARGETS), st.integers(1, 14), st.data())
def test_what_holds_of_every_cell(layout, target, rows, data):
    rank = data.draw(st.integers(1, min(rows, layout.in_features)))
    noisy = target not in ("generic", "noise")
    grid = Grid(
        ranks=[rank],
        block_counts=[layout.num_blocks],
        conditions=[data.draw(st.sampled_from([1.0, 1e3]))],
        target=target,
        noises=[data.draw(st.sampled_from([0.0, 0.5])) if noisy else 0.0],
        rows=rows,
        size=layout.in_features,
        outputs=layout.out_features,
        draws=2,
    )
    (cell,) = map_cells(**grid.tasks()[0])
    assert cell["diablo_params"] == layout.num_parameters
    assert cell["lora_params"] <= layout.num_parameters < cell["lora_params"] + sum((grid.size, grid.outputs))
    assert cell["frozen_params"] <= layout.num_parameters < cell["frozen_params"] + grid.outputs
    for gap in ("diablo_gap", "lora_gap", "frozen_gap"):
        assert 0 <= cell[gap] <= 1 + 1e-12
    if cell["in_theorem"]:
        assert cell["diablo_gap"] <= tolerance("gap").value
    if rank <= cell["frozen_rank"]:
        assert cell["frozen_gap"] <= tolerance("gap").value
    if target == "low-rank" and not cell["noise"] and cell["lora_rank"]:
        assert cell["lora_gap"] <= tolerance("gap").value
    if target == "block-aligned" and not cell["noise"]:
        assert cell["diablo_gap"] <= tolerance("gap").value


@pytest.mark.parametrize("seed", range(10))
def test_the_worst_conditioning_that_is_allowed_blurs_no_region(seed):
    grid = Grid(ranks=[4, 8, 16, 32], block_counts=[1, 2, 4, 8], conditions=[1e6], draws=1, seed=seed)
    cells = pd.DataFrame([cell for task in grid.tasks() for cell in map_cells(**task)])
    within = cells[cells["in_theorem"]]
    assert within[["diablo_gap", "frozen_gap"]].max(axis=None) < 1e-12
    assert (cells[~cells["in_theorem"]]["diablo_gap"] > 1e-3).all()


def test_an_unknown_target_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown target 'lowrank'\. Did you mean 'low-rank'\?"):
        Grid(target="lowrank")


def test_draws_differ():
    one, three = (cells(ranks=[6], block_counts=[4], draws=d).diablo_gap[0] for d in (1, 3))
    assert one != three
