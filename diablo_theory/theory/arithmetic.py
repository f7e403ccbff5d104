"""What tensors a problem may hold: dtype and device, seeded draws, and checks that name what does not fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import ConfigError, NonFiniteError, nearest

DTYPES: tuple[torch.dtype, ...] = (torch.float64, torch.float32)


@dataclass(frozen=True)
class Arithmetic:
    """The precision and the device in which instances are given; closed forms work in float64 on that device.

    Args:
        dtype: float64 or float32.
        device: Where tensors live, such as "cpu" or "cuda:0". Draws are made on the CPU, so that every device sees
            the same numbers.

    Raises:
        ValueError: If the dtype is another one.
    """

    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype}")

    def place(self, matrix: Tensor) -> Tensor:
        """The matrix in this precision, on this device."""
        return matrix.to(self.device, self.dtype)


FLOAT64 = Arithmetic()


def arithmetic_of(dtype: str, device: str) -> Arithmetic:
    """The arithmetic of two names, such as "float32" and "cuda".

    Raises:
        ConfigError: If the precision is not one that problems are given in, or the device cannot be used here.
    """
    known = {str(one).removeprefix("torch."): one for one in DTYPES}
    if dtype not in known:
        raise ConfigError(f"unknown dtype {dtype!r}.{nearest(dtype, known)}")
    try:
        torch.zeros(1, dtype=torch.float64, device=device).item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return Arithmetic(known[dtype], device)


def seeded(seed: int) -> torch.Generator:
    """A generator of its own, so that no draw depends on what else ran."""
    return torch.Generator().manual_seed(seed)


def gaussian(rows: int, cols: int, generator: torch.Generator) -> Float[Tensor, "rows cols"]:
    """Independent standard normal entries, shape (rows, cols), float64."""
    return torch.randn(rows, cols, generator=generator, dtype=torch.float64)


def wide(matrix: Tensor) -> Tensor:
    """The same numbers in float64 on the CPU."""
    return matrix.cpu().double()


def require_layout(layout: BlockLayout, m1: int, m2: int) -> None:
    """Raise ValueError unless a layout is of an m1 x m2 matrix."""
    if (layout.in_features, layout.out_features) != (m1, m2):
        raise ValueError(f"layout must be of a {m1} x {m2} matrix, got {layout.in_features} x {layout.out_features}")


def require_matrix(name: str, value: Tensor) -> None:
    """Raise unless a tensor is a float32 or float64 matrix, or a batch of such, without a NaN or an infinity.

    Raises:
        ValueError: If the dtype or the number of dimensions does not fit, or the tensor is sparse or holds no numbers.
        NonFiniteError: If it holds a NaN or an infinity.
    """
    if value.layout != torch.strided or value.is_meta:
        raise ValueError(f"{name} must be dense and hold numbers, got {value.layout} on {value.device}")
    if value.ndim < 2 or value.dtype not in DTYPES:
        raise ValueError(f"{name} must be a float32 or float64 matrix, got {value.dtype} with {value.ndim} dimensions")
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(f"{name} holds a NaN or an infinity; theory problems need finite numbers")


def require_like(name: str, value: Tensor, shape: tuple[int, int], first: Tensor) -> None:
    """Raise unless a tensor's last two sizes are ``shape`` and its dtype and device are those of the first tensor.

    Raises:
        ValueError: If the shape, the dtype or the device does not fit.
        NonFiniteError: If it holds a NaN or an infinity.
    """
    if tuple(value.shape[-2:]) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if value.dtype != first.dtype:
        raise ValueError(f"{name} must have the dtype of the inputs, {first.dtype}, got {value.dtype}")
    require_device(name, value, first)
    require_matrix(name, value)


def require_device(name: str, value: Tensor, first: Tensor) -> None:
    """Raise ValueError unless a tensor is on the device of the first one."""
    if value.device != first.device:
        raise ValueError(f"{name} must be on the device of the inputs, {first.device}, got {value.device}")


def require_broadcast(**matrices: Tensor) -> None:
    """Raise ValueError, with the names, unless the batch dimensions of matrices broadcast."""
    try:
        np.broadcast_shapes(*(value.shape[:-2] for value in matrices.values()))
    except ValueError:
        *most, last = (f"{name} {tuple(value.shape[:-2])}" for name, value in matrices.items())
        raise ValueError(f"the batch dimensions of {', '.join(most)} and {last} must broadcast") from None


def require_integer(name: str, value: object) -> None:
    """Raise TypeError unless a value is an integer, Python's or numpy's."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
