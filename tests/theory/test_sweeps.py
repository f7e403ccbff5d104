import numpy as np
import pytest
import torch

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import optima, sweeps
from diablo_theory.theory.arithmetic import gaussian, seeded
from diablo_theory.theory.problems import LinearProblem, low_rank_inputs

COLUMNS = [
    "rank_x",
    "num_blocks",
    "block_rows",
    "diablo_params",
    "lora_rank",
    "lora_params",
    "diablo_gap",
    "lora_gap",
    "in_theorem",
]


@pytest.fixture(scope="module")
def default_map():
    return sweeps.gap_map()


def test_the_default_map_has_every_cell(default_map):
    assert list(default_map.columns) == COLUMNS
    assert len(default_map) == len(sweeps.RANKS) * len(sweeps.BLOCK_COUNTS)
    assert set(zip(default_map.rank_x, default_map.num_blocks, strict=True)) == {
        (r, n) for r in sweeps.RANKS for n in sweeps.BLOCK_COUNTS
    }


def test_diablo_is_exact_inside_the_theorem_and_only_there(default_map):
    assert (default_map.in_theorem == (default_map.rank_x <= default_map.block_rows)).all()
    assert default_map[default_map.in_theorem].diablo_gap.max() < 1e-18
    assert default_map[~default_map.in_theorem].diablo_gap.min() > 0.1


def test_outside_the_gap_is_the_expected_share(default_map):
    """L7: E gap = 1/2 s^2 m2 (r - min(r, d1)), so its share of the captured 1/2 s^2 m2 r is 1 - min(r, d1)/r."""
    expected = 1 - np.minimum(default_map.rank_x, default_map.block_rows) / default_map.rank_x
    # missed/captured of m2 (= 64) x targets (= 3) x rank independent squares: standard deviation under 0.7/sqrt(192)
    assert (default_map.diablo_gap - expected).abs().max() < 4 * 0.7 / np.sqrt(192)


def test_lora_without_a_rank_captures_nothing_and_never_exceeds_the_budget(default_map):
    assert (default_map.lora_rank > 0).all()  # the default grid compares equal parameters everywhere
    without = sweeps.gap_map(block_counts=[64])
    assert (without.lora_rank == 0).all()
    assert (without.lora_gap - 1).abs().max() < 1e-13
    assert (default_map.lora_params <= default_map.diablo_params).all()
    assert (default_map.lora_params == default_map.lora_rank * 128).all()


def test_both_sides_of_the_map_exist(default_map):
    assert (default_map.diablo_gap < default_map.lora_gap - 0.01).any()
    assert (default_map.lora_gap < default_map.diablo_gap - 0.01).any()


def test_a_cell_equals_the_closed_forms_of_its_problem():
    frame = sweeps.gap_map(ranks=[5], block_counts=[3, 4], rows=17, size=11, targets=2, seed=3)
    generator = seeded(3 * 1009 + 5)
    X = low_rank_inputs(17, 11, 5, generator)
    targets = [gaussian(17, 11, generator) for _ in range(2)]
    for row in frame.itertuples():
        layout = BlockLayout(11, 11, row.num_blocks)
        problems = [LinearProblem(X, torch.zeros(11, 11).double(), T, layout) for T in targets]
        diablo = np.mean([optima.diablo_optimum(p).relative_gap for p in problems])
        lora = np.mean([optima.lora_optimum(p, row.lora_rank).relative_gap for p in problems])
        assert row.diablo_gap == pytest.approx(diablo, rel=1e-10, abs=1e-25)
        assert row.lora_gap == pytest.approx(lora, rel=1e-10, abs=1e-25)
        assert row.diablo_params == layout.num_parameters


def test_a_seed_fixes_the_map_and_progress_is_told():
    told = []
    arguments = {"ranks": [2, 6], "block_counts": [1, 4], "rows": 16, "size": 8}
    first = sweeps.gap_map(**arguments, progress=told.append)
    assert first.equals(sweeps.gap_map(**arguments))
    assert not first.equals(sweeps.gap_map(**arguments, seed=1))
    assert told == ["rank 2 of up to 6", "rank 6 of up to 6"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": 0}, "targets must be at least 1, got 0"),
        ({"ranks": [0]}, r"ranks must lie from 1 to min\(rows, size\) = 64, got 0"),
        ({"ranks": [65]}, r"ranks must lie from 1 to min\(rows, size\) = 64, got 65"),
        ({"block_counts": [65]}, "num_blocks must be at most 64"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sweeps.gap_map(**arguments)
