"""``blocks.cpp``, built on first use for the CPU at hand where there is a C++ compiler with OpenMP.

On a CPU the time of DiaBlo's own part is not arithmetic but strided reading and the cost of many small calls; a page
of C++ halves it. Everything here has a counterpart in plain torch, which is used without a compiler, in other dtypes
and on other devices. ``DIABLO_THEORY_COMPILED=0`` in the environment turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from diablo_theory.files import atomic_path, cache_folder, write_text

SOURCE = Path(__file__).with_name("blocks.cpp")
SWITCH = "DIABLO_THEORY_COMPILED"
#: What this says in the environment comes behind FLAGS, and so prevails.
MORE_FLAGS = "DIABLO_THEORY_CXXFLAGS"
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17")
#: Of the file beside a library that holds its SHA-256.
DIGEST = ".sha256"
#: Seconds after which a compiler is given up; it needs one.
PATIENCE = 120
#: The most floats of a vector in blocks.cpp, whatever the CPU.
LANES = 16
#: Blocks with a shorter side than this are faster here than as a batched product, by measurement: at the sizes of
#: language models a third to two thirds of the time where x comes from memory, as it does in training.
SHORT = 48
#: Numbers of x and g below which they lie in the cache, where the batched product is as fast or faster.
FAR = 2**19

#: Subclasses of Tensor (fake or distributed ones) need not have their numbers where data_ptr points.
PLAIN = (Tensor, torch.nn.Parameter)
#: A function in C and its arguments.
Write = tuple[Callable[..., Any], tuple[Any, ...]]

_POINTER, _INTEGER, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "diablo_product": (_POINTER, _INTEGER, _POINTER, *[_INTEGER] * 3, _POINTER, *[_INTEGER] * 6, _FLAG),
    "diablo_gradient": (_POINTER, _INTEGER, _POINTER, _INTEGER, _INTEGER, _POINTER, *[_INTEGER] * 3),
    "diablo_write": (_POINTER, *[_INTEGER] * 6, _POINTER, _POINTER),
    "diablo_restore": (_POINTER, *[_INTEGER] * 6, _POINTER),
}


class _UnavailableError(Exception):
    """Why there is no library."""


def status() -> str:
    """Whether compiled kernels are in use, and if not why: for reports and benchmarks. Builds them if need be."""
    library, reason = _library()
    return "compiled" if library else f"torch ({reason})"


def product(x: Tensor, blocks: Tensor, out: Tensor, *, add: bool) -> bool:
    """Write ``x D`` into the first k d2 columns of ``out``, or add it to them.

    Args:
        x: Shape (tokens, at least k d1).
        blocks: Shape (k, d1, d2), any strides.
        out: Shape (tokens, at least k d2).
        add: Add.

    Returns:
        Whether it was done; False where the compiled kernel does not apply.
    """
    k, d1, d2 = blocks.shape
    if d1 == 1 or not _worthwhile(x.shape[0], k, d1, d2):
        return False
    if not (_rows(x, k * d1) and _rows(out, k * d2) and out.shape[0] == x.shape[0] and _readable(blocks)):
        return False
    library = _usable()
    return library is not None and not library.diablo_product(
        *(x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), out.shape[1], x.shape[0]),
        *(blocks.data_ptr(), *blocks.stride(), k, d1, d2, add),
    )


def gradient(x: Tensor, g: Tensor, k: int, d1: int, d2: int) -> Tensor | None:
    """The first k diagonal blocks of ``x^T g``, each d1 x d2.

    Args:
        x: Shape (tokens, at least k d1).
        g: Shape (tokens, at least k d2).
        k: Blocks.
        d1: Rows of each.
        d2: Columns of each.

    Returns:
        Shape (k, d1, d2), or None where the compiled kernel does not apply. Every sum of tokens is formed in an order
        that does not depend on the number of threads.
    """
    if not _worthwhile(x.shape[0], k, d1, d2) or g.stride(0) < LANES:
        return None
    if not (_rows(x, k * d1) and _rows(g, k * d2) and g.shape[0] == x.shape[0]):
        return None
    library = _usable()
    if library is None:
        return None
    if 3 * _vectors(d1) * d2 < 2 * _vectors(d2) * d1:  # the other side fills vectors much better
        turned = gradient(g, x, k, d2, d1)
        return None if turned is None else turned.mT
    out = x.new_empty(k, d1, d2)
    failed = library.diablo_gradient(
        *(x.data_ptr(), x.stride(0), g.data_ptr(), g.stride(0), x.shape[0]),
        *(out.data_ptr(), k, d1, d2),
    )
    return None if failed else out


class Swap:
    """Both ways prepared in C: adding blocks to the diagonal of a weight, and putting back what was there.

    Valid for as long as :func:`whereabouts` of the two stays what it was.

    Attributes:
        write: Function and arguments; copies what is there first. Returns 0, or 1 where there was no memory for the
            copy and nothing was done.
        restore: Function and arguments; bit for bit, and nothing where nothing was written.
    """

    def __init__(self, library: ctypes.CDLL, weight: Tensor, inputs_first: bool, blocks: Tensor) -> None:
        k, d1, d2 = blocks.shape
        of_input, of_output = weight.stride() if inputs_first else weight.stride()[::-1]
        #: Address of the copy while there is one; belongs to C.
        self._slot = ctypes.c_void_p()
        place = (weight.data_ptr(), d1 * of_input + d2 * of_output, of_input, of_output, k, d1, d2)
        slot = ctypes.addressof(self._slot)
        self.write: Write = library.diablo_write, (*place, blocks.data_ptr(), slot)
        self.restore: Write = library.diablo_restore, (*place, slot)


def swap(weight: Tensor, inputs_first: bool, blocks: Tensor) -> Swap | None:
    """Prepare a :class:`Swap`.

    Args:
        weight: Shape (m1, m2) if inputs come first, (m2, m1) otherwise, at least as large as the blocks' diagonal.
        inputs_first: See weight.
        blocks: Shape (k, d1, d2).

    Returns:
        None where the compiled functions do not apply.
    """
    # Contiguous in one order or the other: an expanded weight holds several entries in one place.
    dense = weight.is_contiguous() or weight.T.is_contiguous()
    if not (dense and _readable(weight) and _readable(blocks) and blocks.is_contiguous()):
        return None
    library = _usable()
    return None if library is None else Swap(library, weight, inputs_first, blocks)


def whereabouts(weight: Tensor, blocks: Tensor) -> tuple[Any, ...]:
    """All that a :class:`Swap` depends on; cheap, because it is asked for in every product."""
    return (
        *(weight.data_ptr(), weight.is_cpu, weight.is_neg(), weight.dtype, weight.shape, weight.stride()),
        *(blocks.data_ptr(), blocks.is_cpu, blocks.is_neg(), blocks.dtype, blocks.shape, blocks.stride()),
        # Whoever looks on (a tracer, a counter of operations) sees operations of torch only.
        is_in_torch_dispatch_mode(),
    )


def _worthwhile(tokens: int, k: int, d1: int, d2: int) -> bool:
    return max(d1, d2) > 1 and min(d1, d2) < SHORT and tokens * k * (d1 + d2) >= FAR


def _rows(rows: Tensor, columns: int) -> bool:
    return rows.shape[1] >= columns and rows.stride(1) == 1 and rows.stride(0) >= 0 and _readable(rows)


def _readable(tensor: Tensor) -> bool:
    """Whether the numbers lie in memory as they are meant: no views that negate, zeros without memory, batches."""
    return (
        tensor.dtype is torch.float32
        and tensor.is_cpu
        and type(tensor) in PLAIN
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        and torch._C._has_storage(tensor)
        and (tensor.data_ptr() != 0 or tensor.numel() == 0)  # its storage was freed
    )


def _usable() -> ctypes.CDLL | None:
    return None if is_in_torch_dispatch_mode() else _library()[0]


def _vectors(size: int) -> int:
    return -(-size // LANES)


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    try:
        return _load(), ""
    except _UnavailableError as reason:
        return None, str(reason)
    except (OSError, RuntimeError, ValueError, AttributeError) as error:  # a file, a home folder, a quote is missing
        return None, f"{type(error).__name__}: {error}"


def _load() -> ctypes.CDLL:
    if os.environ.get(SWITCH, "1") == "0":
        raise _UnavailableError(f"{SWITCH}=0")
    command = [*_compiler(), *FLAGS, *shlex.split(os.environ.get(MORE_FLAGS, ""))]
    # The file's name holds all that its content depends on, the instructions of this CPU included.
    macros = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256("\n".join([*command, macros, SOURCE.read_text()]).encode()).hexdigest()[:16]
    file = cache_folder() / "compiled" / f"blocks-{key}.so"
    try:
        if not _whole(file):
            with atomic_path(file) as aside:
                _run([*command, str(SOURCE), "-o", str(aside)])
                digest = hashlib.sha256(aside.read_bytes()).hexdigest()
            write_text(file.with_suffix(DIGEST), digest)
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise _UnavailableError(f"{file}: {error.strerror or error}") from None
    for name, arguments in _ARGUMENTS.items():
        getattr(library, name).argtypes = arguments
    return library


def _whole(file: Path) -> bool:
    """Whether a library is there as it was built: the system ends a process that loads a damaged one."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest() == file.with_suffix(DIGEST).read_text()
    except (OSError, UnicodeDecodeError):
        return False


def _compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        raise _UnavailableError("no C++ compiler: neither CXX in the environment nor c++, g++ or clang++")
    return [found]


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["it said nothing"])[0]
        raise _UnavailableError(f"{command[0]} failed: {said}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _UnavailableError(f"{command[0]} did not run: {error}") from None
    return done.stdout
