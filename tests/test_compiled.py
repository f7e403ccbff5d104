"""The compiled kernels compute what plain torch computes, touch nothing else, and are done without where need be."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_blocks import layouts
from torch.utils.flop_counter import FlopCounterMode

from diablo_theory import ops
from diablo_theory.blocks import BlockLayout
from diablo_theory.ops import compiled, kernels

needs_compiler = pytest.mark.skipif(compiled.status() != "compiled", reason=compiled.status())


@pytest.fixture(scope="module", autouse=True)
def always():
    """For small inputs too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "FAR", 1)
        patch.setattr(compiled, "SHORT", 10**6)
        yield


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def within(value, exact, scale, terms):
    """A sum of so many float32 products, whatever their order: gamma_n |x|^T |y| (Higham, 2002, section 3.1)."""
    bound = 2 * terms * torch.finfo(torch.float32).eps * scale + 1e-30
    assert float(((value.double() - exact).abs() / bound).max()) <= 1


#: Around the tile of 12 tokens and the vector of 16 floats.
TOKENS = st.sampled_from([1, 2, 3, 11, 12, 13, 24, 25, 40])
WIDTHS = st.integers(1, 60)


@needs_compiler
@given(k=st.integers(1, 5), d1=WIDTHS, d2=WIDTHS, tokens=TOKENS, extra=st.integers(0, 20), seed=st.integers(0, 3))
def test_gradient_is_the_sum_of_products(k, d1, d2, tokens, extra, seed):
    x = normal(tokens, k * d1 + extra, seed=seed)
    g = normal(tokens, k * d2 + max(extra, compiled.LANES), seed=seed + 1)
    blocks = compiled.gradient(x, g, k, d1, d2)
    if d1 == d2 == 1:
        assert blocks is None
        return
    xs, gs = (kernels._groups(part.double(), k, size) for part, size in ((x, d1), (g, d2)))
    within(blocks, xs.mT @ gs, xs.abs().mT @ gs.abs(), tokens)


@needs_compiler
@given(
    k=st.integers(1, 5),
    d1=WIDTHS,
    d2=WIDTHS,
    tokens=TOKENS,
    extra=st.integers(0, 20),
    add=st.booleans(),
    turned=st.booleans(),
    seed=st.integers(0, 3),
)
def test_product_is_the_sum_of_products_and_leaves_other_columns(k, d1, d2, tokens, extra, add, turned, seed):
    x, out = normal(tokens, k * d1 + extra, seed=seed), normal(tokens, k * d2 + extra, seed=seed + 1)
    blocks = normal(k, d2, d1, seed=seed + 2).mT if turned else normal(k, d1, d2, seed=seed + 2)
    before = out.clone()
    if not compiled.product(x, blocks, out, add=add):
        assert d1 == 1
        assert torch.equal(out, before)
        return
    assert torch.equal(out[:, k * d2 :], before[:, k * d2 :])
    xs, exact = kernels._groups(x.double(), k, d1), blocks.double()
    old = before[:, : k * d2].double() * add
    change, scale = ((a @ b).transpose(0, 1).flatten(1) for a, b in ((xs, exact), (xs.abs(), exact.abs())))
    within(out[:, : k * d2], old + change, old.abs() + scale, d1 + 1)


@needs_compiler
@given(layouts(), TOKENS, st.integers(0, 5))
def test_layers_are_the_same_with_and_without(layout, tokens, seed):
    x, weight = normal(tokens, layout.in_features, seed=seed), normal(tokens, layout.out_features, seed=seed + 1)
    values = []
    for kernels_off in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if kernels_off:
                patch.setattr(compiled, "_library", lambda: (None, "off"))
            blocks, tail = layout.gather(normal(layout.in_features, layout.out_features, seed=seed + 2))
            leaves = [part.requires_grad_() for part in (x.clone(), blocks, tail) if part is not None]
            out = ops.block_product(leaves[0], leaves[1], leaves[2] if tail is not None else None, layout)
            values.append([out.detach(), *torch.autograd.grad((weight * out).sum(), leaves)])
    for ours, plain in zip(*values, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_block(bad):
    x, g, blocks = normal(30, 27), normal(30, 33, seed=1), normal(3, 9, 11, seed=2)
    x[7, 12] = bad  # in the second block
    gradient = compiled.gradient(x, g, 3, 9, 11)
    assert not torch.isfinite(gradient[1, 3]).any()
    assert torch.isfinite(gradient[[0, 2]]).all()
    for add in (False, True):
        out = normal(30, 33, seed=3)
        assert compiled.product(x, blocks, out, add=add)
        assert not torch.isfinite(out[7, 11:22]).any()
        out[7, 11:22] = 0
        assert torch.isfinite(out).all()


@needs_compiler
def test_threads_change_nothing():
    x, g, blocks = normal(1024, 576), normal(1024, 1536, seed=1), normal(64, 9, 24, seed=2)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = g.clone()
        assert compiled.product(x, blocks, out, add=True)
        results.append((compiled.gradient(x, g, 64, 9, 24), out))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


GUARDED = """
import ctypes, mmap, numpy, sys, torch
from diablo_theory.ops import compiled
compiled.FAR, compiled.SHORT = 1, 10**6
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE

def guarded(rows, columns):
    "A matrix that ends where a page begins that must not be touched, and that begins behind another one."
    size = -(-rows * columns * 4 // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for edge in (start, start + page + size):
        assert libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0) == 0
    flat = numpy.frombuffer(memory, numpy.float32, rows * columns, page + size - rows * columns * 4)
    return torch.from_numpy(flat.reshape(rows, columns)).normal_()

done = 0
for k, d1, d2 in ((3, 9, 9), (2, 36, 36), (1, 5, 17), (4, 7, 1), (16, 1, 3), (2, 20, 50)):
    for tokens in (2, 12, 13, 25):
        x, y = guarded(tokens, k * d1), guarded(tokens, k * d2)
        done += compiled.gradient(x, y, k, d1, d2) is not None
        done += compiled.product(x, guarded(k * d1, d2).view(k, d1, d2), y, add=True)
        done += compiled.product(x, guarded(k * d2, d1).view(k, d2, d1).mT, y, add=False)
print(done)
"""


@needs_compiler
def test_nothing_outside_is_read_or_written():
    if not sys.platform.startswith("linux"):
        pytest.skip("mprotect as Linux has it")
    ended = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) >= 50


def test_inputs_that_the_kernels_cannot_read_are_left_to_torch():
    """Each of these once was a crash or a wrong number."""
    x, g, blocks = normal(20, 32), normal(20, 32, seed=1), normal(4, 8, 8, seed=2)
    assert (compiled.gradient(x, g, 4, 8, 8) is None) == (compiled.status() != "compiled")
    assert compiled.gradient(x.double(), g.double(), 4, 8, 8) is None
    assert compiled.gradient(x, g[:1].expand(20, 32), 4, 8, 8) is None
    assert compiled.gradient(x.T.contiguous().T, g, 4, 8, 8) is None
    assert compiled.gradient(x[:0], g[:0], 4, 8, 8) is None
    assert compiled.gradient(x, g, 5, 8, 8) is None, "more blocks than columns"
    for wrong in (x.double(), x.T.contiguous().T):
        assert not compiled.product(wrong, blocks, g.clone(), add=True)
    assert not compiled.product(x, blocks.double(), g.clone(), add=True)
    assert not compiled.product(x, blocks, g[:, :31], add=True)
    zeros, negated = torch._efficientzerotensor(20, 32), torch.complex(x, g).conj().imag
    for wrong in (g[:19], zeros, negated, g.to("meta")):
        assert compiled.gradient(x, wrong, 4, 8, 8) is None
        assert compiled.gradient(wrong, x, 4, 8, 8) is None
        assert not compiled.product(wrong, blocks, g.clone(), add=True)
    for wrong in (blocks.to("meta"), torch._efficientzerotensor(4, 8, 8), torch.complex(blocks, blocks).conj().imag):
        assert not compiled.product(x, wrong, g.clone(), add=True)
        assert compiled.swap(normal(32, 32), False, wrong) is None
    assert compiled.swap(normal(32, 1).expand(32, 32), False, blocks) is None
    freed = blocks.clone()
    freed.untyped_storage().resize_(0)
    assert compiled.swap(normal(32, 32), False, freed) is None
    with FlopCounterMode(display=False) as counted:
        assert compiled.gradient(x, g, 4, 8, 8) is None
        kernels.gradient(x, g, BlockLayout(32, 32, 4))
    assert counted.get_total_flops() == 2 * 20 * 32 * 8


def test_batched_gradients_work_at_any_size():
    x, blocks = normal(20, 32), normal(4, 8, 8, seed=1).requires_grad_()
    out = ops.block_product(x, blocks, None, BlockLayout(32, 32, 4))
    directions = normal(3, 20, 32, seed=2)
    (batched,) = torch.autograd.grad(out, blocks, directions, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out, blocks, one, retain_graph=True)[0] for one in directions]
    torch.testing.assert_close(batched, torch.stack(single))


def test_autocast_does_not_choose_the_dtype_again():
    x, blocks, layout = normal(20, 32), normal(4, 8, 8, seed=1).requires_grad_(), BlockLayout(32, 32, 4)
    expected = ops.block_product(x, blocks, None, layout)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_library", lambda: (None, "off"))
        out = ops.block_product(x, blocks, None, layout)
        out.sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(blocks.grad, torch.autograd.grad(expected.sum(), blocks)[0])


@needs_compiler
@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("k", [3, 700])  # by one thread, and by all
def test_swap_adds_and_puts_back_every_bit(inputs_first, k):
    layout = BlockLayout(3 * k, 4 * k, k)
    weight, blocks = normal(layout.in_features, layout.out_features), normal(k, 3, 4, seed=1)
    weight[0, 0], weight[1, 1], weight[2, 2], weight[0, 3] = float("nan"), float("inf"), -0.0, 1e-44
    expected = weight + layout.scatter(blocks)
    stored = weight.clone() if inputs_first else weight.T.contiguous()
    before = stored.view(torch.int32).clone()
    swap = compiled.swap(stored, inputs_first, blocks)
    (write, written), (restore, restored) = swap.write, swap.restore
    restore(*restored)
    assert torch.equal(stored.view(torch.int32), before), "put back without having been written"
    for _ in range(3):
        assert write(*written) == 0
        now = stored if inputs_first else stored.T
        torch.testing.assert_close(now, expected, rtol=0, atol=0, equal_nan=True)
        restore(*restored)
        assert torch.equal(stored.view(torch.int32), before)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({compiled.SWITCH: "0"}, f"{compiled.SWITCH}=0"),
        ({"CXX": "no-such-compiler"}, "no-such-compiler did not run"),
        ({"CXX": "false"}, "false failed: it said nothing"),
        ({"PATH": "", "CXX": ""}, "no C++ compiler"),
        ({"DIABLO_THEORY_CACHE": "/proc/nowhere"}, "/proc/nowhere"),
        ({"CXX": "c++ 'unclosed"}, "ValueError: No closing quotation"),
    ],
)
def test_why_there_is_no_library(environment, reason, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    library, why = compiled._library.__wrapped__()
    if "CXX" not in environment and compiled.status() != "compiled" and compiled.SWITCH not in environment:
        pytest.skip("no compiler to get as far as that")
    assert library is None
    assert reason in why


@needs_compiler
def test_library_is_built_once_and_again_if_it_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("DIABLO_THEORY_CACHE", str(tmp_path))
    assert compiled._library.__wrapped__()[0] is not None
    (file,) = (tmp_path / "compiled").glob("*.so")
    stamp, content = file.stat().st_mtime_ns, file.read_bytes()
    assert compiled._library.__wrapped__()[0] is not None
    assert file.stat().st_mtime_ns == stamp
    # a process ends with a signal if it loads some of these
    for damage in (b"", b"not a library", content[: len(content) // 2], content[:5000] + bytes(len(content) - 5000)):
        file.unlink()  # the old one is in use by this process
        file.write_bytes(damage)
        assert compiled._library.__wrapped__()[0] is not None
        assert file.read_bytes()[:5000] == content[:5000]
        assert file.stat().st_size == len(content)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3"])
def test_processors_with_shorter_vectors_compute_the_same(level, tmp_path):
    if platform.machine() != "x86_64":
        pytest.skip("names of another architecture")
    environment = {**os.environ, compiled.MORE_FLAGS: f"-march={level}", "DIABLO_THEORY_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", __file__]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert " skipped" not in ended.stdout
