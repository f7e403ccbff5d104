import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diablo_theory.blocks import BlockLayout


@st.composite
def layouts(draw):
    m1, m2 = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    return BlockLayout(m1, m2, draw(st.integers(1, max(m1, m2))))


def entry_mask(layout):
    """Entry (a, b) is trained where a and b fall in the same group."""
    rows = torch.arange(layout.in_features)[:, None] // -(-layout.in_features // layout.num_blocks)
    cols = torch.arange(layout.out_features)[None, :] // -(-layout.out_features // layout.num_blocks)
    return rows == cols


@given(layouts())
def test_scatter_of_gather_keeps_the_blocks_and_nothing_else(layout):
    matrix = torch.arange(1.0, layout.in_features * layout.out_features + 1).reshape(layout.in_features, -1)
    assert torch.equal(layout.scatter(*layout.gather(matrix)), matrix * entry_mask(layout))
    assert layout.num_parameters == int(entry_mask(layout).sum())


@given(layouts())
def test_slices_cover_every_row_and_column_once_in_order(layout):
    for size, part in ((layout.in_features, layout.rows), (layout.out_features, layout.cols)):
        covered = [index for i in range(layout.count) for index in range(size)[part(i)]]
        assert covered == list(range(size))


@given(layouts())
def test_block_i_is_the_slice_of_rows_i_and_cols_i(layout):
    matrix = torch.randn(layout.in_features, layout.out_features, generator=torch.Generator().manual_seed(0))
    blocks, tail = layout.gather(matrix)
    for i, block in enumerate(blocks):
        assert torch.equal(block, matrix[layout.rows(i), layout.cols(i)])
    if tail is not None:
        assert torch.equal(tail, matrix[layout.rows(layout.complete), layout.cols(layout.complete)])


@pytest.mark.parametrize(
    ("sizes", "complete", "tail", "parameters"),
    [
        ((12, 8, 4), 4, None, 24),
        ((12, 8, 1), 1, None, 96),
        ((5, 5, 5), 5, None, 5),
        ((10, 10, 4), 3, (1, 1), 28),
        ((13, 7, 3), 2, (3, 1), 33),
        ((20, 3, 5), 3, None, 12),
        ((1, 1, 1), 1, None, 1),
        ((2, 9, 9), 2, None, 2),
    ],
)
def test_known_geometries(sizes, complete, tail, parameters):
    layout = BlockLayout(*sizes)
    assert (layout.complete, layout.tail, layout.num_parameters) == (complete, tail, parameters)


def test_views_write_into_the_matrix_and_gather_does_not():
    for matrix in (torch.zeros(7, 5), torch.zeros(5, 7).T, torch.zeros(9, 8)[1:8, 2:7]):
        layout = BlockLayout(7, 5, 3)
        for part in layout.gather(matrix):
            part.fill_(1.0)
        assert not matrix.any()
        for part in layout.views(matrix):
            part.fill_(1.0)
        assert torch.equal(matrix.bool(), entry_mask(layout))


def test_layouts_of_equal_sizes_are_equal_and_frozen():
    assert BlockLayout(6, 4, 2) == BlockLayout(6, 4, 2) != BlockLayout(6, 4, 1)
    with pytest.raises(AttributeError, match="num_blocks"):
        BlockLayout(6, 4, 2).num_blocks = 3


@pytest.mark.parametrize(
    ("sizes", "kind", "message"),
    [
        ((0, 4, 1), ValueError, "in_features must be at least 1, got 0"),
        ((4, -1, 1), ValueError, "out_features must be at least 1, got -1"),
        ((4, 3, 0), ValueError, "num_blocks must be at least 1, got 0"),
        ((4, 3, 5), ValueError, "num_blocks must be at most 4 for a 4 x 3 matrix, got 5"),
        ((4.0, 3, 1), TypeError, "in_features must be an integer, got 4.0 of type float"),
        ((4, 3, True), TypeError, "num_blocks must be an integer, got True of type bool"),
        ((4, "3", 1), TypeError, "out_features must be an integer, got '3' of type str"),
    ],
)
def test_bad_sizes_are_named(sizes, kind, message):
    with pytest.raises(kind, match=message):
        BlockLayout(*sizes)


def test_shapes_that_do_not_fit_are_named():
    layout = BlockLayout(13, 7, 3)
    blocks, tail = layout.gather(torch.zeros(13, 7))
    with pytest.raises(ValueError, match="matrix must be 13 x 7, got 7 x 13"):
        layout.views(torch.zeros(7, 13))
    with pytest.raises(ValueError, match=r"blocks must have shape \(2, 5, 3\), got \(1, 5, 3\)"):
        layout.scatter(blocks[:1], tail)
    with pytest.raises(ValueError, match=r"tail must be \(3, 1\), got None"):
        layout.scatter(blocks)
    with pytest.raises(ValueError, match=r"tail must be None, got \(1, 1\)"):
        BlockLayout(4, 4, 2).scatter(torch.zeros(2, 2, 2), torch.zeros(1, 1))


@given(layouts())
def test_gradients_flow_through_scatter_to_blocks_and_tail(layout):
    weight = torch.arange(1.0, layout.in_features * layout.out_features + 1).reshape(layout.in_features, -1)
    leaves = [part.requires_grad_() for part in layout.gather(torch.ones_like(weight)) if part is not None]
    (layout.scatter(*leaves) * weight).sum().backward()
    for leaf, expected in zip(leaves, layout.gather(weight), strict=False):
        assert torch.equal(leaf.grad, expected)
