"""What a base that stores integers holds: torchao's weight-only formats, in all layers of :func:`bases.layers_of`.

The simulated ways (rtn, optq, magr-*) stay floats and are plain to a plan. Quantising itself is not counted anywhere.
"""

from __future__ import annotations

from diablo_theory import methods
from diablo_theory.errors import ConfigError
from diablo_theory.finetune.planning.flow import Flow
from diablo_theory.finetune.planning.shapes import Shapes
from diablo_theory.finetune.planning.work import DTYPE_BYTES, Work

#: Of a scale of torchao-int8, whatever the model's dtype.
_FLOAT32 = 4


def check_base(shapes: Shapes, work: Work) -> None:
    """Refuse what a run on this base would.

    Raises:
        ConfigError: If the method cannot serve integers, or torchao's groups do not divide a layer's inputs.
    """
    if work.quantise is None or not work.stores_integers:
        return
    if reason := methods.why_unquantised(work.method):
        raise ConfigError(f"method {work.method} cannot serve a base of {work.quantise.method}: {reason}")
    for name, (inputs, _) in shapes.matrices.items():
        work.quantise.check_inputs(name, inputs)


def stored_bytes(shapes: Shapes, work: Work) -> int:
    """All matrices of one layer as they lie in memory: a byte for each weight, also for one of 4 bits, and the grids.

    A grid (one for a group of inputs, or for all of an output) has a scale and a zero point of one byte.
    """
    if work.quantise is None or not work.stores_integers:
        return dense_bytes(shapes, work)
    group = work.quantise.group_size
    grid = 1 + (DTYPE_BYTES[work.dtype] if group else _FLOAT32)
    return sum(m1 * m2 + m2 * (m1 // group if group else 1) * grid for m1, m2 in shapes.matrices.values())


def dense_bytes(shapes: Shapes, work: Work) -> int:
    """All matrices of one layer as floats."""
    return shapes.layer_products * DTYPE_BYTES[work.dtype]


def kept_dense_bytes(shapes: Shapes, flow: Flow, work: Work) -> int:
    """Dense copies that autograd keeps of one layer: torchao's product makes one, and its backward pass needs it."""
    if not work.stores_integers:
        return 0
    reached = (m1 * m2 for name, (m1, m2) in shapes.matrices.items() if flow.reaches_input_of(name))
    return DTYPE_BYTES[work.dtype] * sum(reached)


def largest_dense_bytes(shapes: Shapes, work: Work) -> int:
    """The dense copy that one product needs for itself."""
    if not work.stores_integers:
        return 0
    return DTYPE_BYTES[work.dtype] * max(m1 * m2 for m1, m2 in shapes.matrices.values())
