import torch
from hypothesis import given
from hypothesis import strategies as st

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.arithmetic import gaussian, seeded
from diablo_theory.theory.duality import transposed


@given(st.integers(1, 15), st.integers(1, 15), st.data())
def test_blocks_of_the_transposed_matrix_are_the_transposed_blocks(m1, m2, data):
    layout = BlockLayout(m1, m2, data.draw(st.integers(1, max(m1, m2))))
    dual, matrix = transposed(layout), gaussian(m1, m2, seeded(0))
    (blocks, tail), (turned, turned_tail) = layout.gather(matrix), dual.gather(matrix.T)
    assert torch.equal(turned, blocks.mT)
    assert (tail is None) is (turned_tail is None)
    if tail is not None:
        assert torch.equal(turned_tail, tail.mT)
    assert dual.count == layout.count
    for i in range(layout.count):
        assert (dual.rows(i), dual.cols(i)) == (layout.cols(i), layout.rows(i))
    assert transposed(dual) == layout
