"""The two ways to apply an update: additive (a block product beside the frozen layer) and merged (inside its weight).

Both are autograd functions on strided views, so that neither input nor weight is copied. ``products`` differentiates,
``writing`` puts blocks into a weight for one product, ``kernels`` computes, and ``compiled`` computes a part of it
faster on a CPU that has a C++ compiler.
"""

from diablo_theory.ops.products import additive, block_gradient, block_product
from diablo_theory.ops.writing import BlockWriter, merged

__all__ = ["BlockWriter", "additive", "block_gradient", "block_product", "merged"]
