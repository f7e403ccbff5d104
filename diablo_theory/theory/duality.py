"""S2 as S1 of the transposed layer: how the geometry of the blocks transposes.

With ``G = X^T g`` the full gradient of a layer, ``G^T = g^T X`` is that of a layer whose inputs are g and whose output
gradient is X. Its i-th input group is ``g_{Y_i}``, its i-th output group ``X_i``, and its diagonal blocks are
``g_{Y_i}^T X_i = (grad D_i)^T``. So S1 for the transposed layer is S2, and S3 becomes: with ``E_i = g_{Y_i}^+ g``,

    g = g_{Y_i} E_i + (I - P_{g_{Y_i}}) g,   hence   g^T X_i = E_i^T (grad D_i)^T + ((I - P_{g_{Y_i}}) g)^T X_i,

and the Frobenius norm over all i gives ``||grad W||_F <= max_i ||E_i||_2 ||grad D||_F + leak`` with
``leak = (sum_i ||((I - P_{g_{Y_i}}) g)^T X_i||_F^2)^{1/2}``, which is zero where ``rank g_{Y_i} = rank g`` for all i.
Block sizes depend on N and on each side alone, so block i of the transposed layout is block i transposed, whether
whole, cut or empty.
"""

from __future__ import annotations

from diablo_theory.blocks import BlockLayout


def transposed(layout: BlockLayout) -> BlockLayout:
    """The layout of ``D^T``."""
    return BlockLayout(layout.out_features, layout.in_features, layout.num_blocks)
