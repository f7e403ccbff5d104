"""A check of the tests: each mutant of the library, wrong in one place, must fail the tests named beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from diablo_theory.ops import compiled

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = TESTS.parent / "diablo_theory"

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Mutant:
    """One wrong edit.

    Args:
        file: Below the package.
        right: A snippet that occurs there once.
        wrong: What replaces it.
        tests: The test file that must fail, below tests/.
        only: Its tests that must find the mutant, as an expression for ``pytest -k``.
        reason: What the mutant gets wrong.
    """

    file: str
    right: str
    wrong: str
    tests: str
    only: str
    reason: str


OPTIMA, LAWS = "theory/test_optima.py", "theory/test_optima_laws.py"
SPACES, STATIONARITY = "theory/test_column_space.py", "theory/test_stationarity.py"
STATISTICS, MEASURES = "theory/test_statistics.py", "theory/test_measures.py"
STARTS, CURVATURE = "theory/test_starts.py", "theory/test_curvature.py"
PARAMETRISATIONS = "theory/test_parametrisations.py"
MERGED, COMPILED = "tuner/test_merged.py", "test_compiled.py"
REDUCTION, PROBLEMS, MAPS = "theory/test_reduction.py", "theory/test_problems.py", "theory/test_maps.py"

MUTANTS = [
    Mutant(
        "blocks.py",
        "self.block_rows * self.block_cols + rows * cols",
        "self.block_rows * self.block_cols",
        "test_blocks.py",
        "known_geometries",
        "the tail's parameters are forgotten",
    ),
    Mutant(
        "blocks.py",
        "return -(-self.in_features // self.num_blocks)",
        "return self.in_features // self.num_blocks or 1",
        "test_blocks.py",
        "known_geometries",
        "d1 is rounded down",
    ),
    Mutant(
        "blocks.py",
        "(d1 * row + d2 * col, row, col)",
        "(d1 * row + d2 * col, col, row)",
        "test_blocks.py",
        "scatter_of_gather",
        "blocks are read transposed",
    ),
    Mutant(
        "ops/kernels.py",
        "out[:, layout.cols(k)].addmm_(rows[:, layout.rows(k)], tail)",
        "out[:, layout.cols(k)].addmm_(rows[:, layout.rows(k)], 0 * tail)",
        "test_ops.py",
        "equal_the_dense_product",
        "the tail writes nothing",
    ),
    Mutant(
        "ops/kernels.py",
        "change = torch.bmm(grouped, blocks)",
        "change = torch.bmm(grouped, blocks.roll(1, 0))",
        "test_ops.py",
        "equal_the_dense_product",
        "every block is applied to its neighbour's inputs",
    ),
    Mutant(
        "ops/writing.py",
        "(torch._foreach_copy_, (inside, kept))",
        "(torch._foreach_sub_, (inside, change))",
        MERGED,
        "interrupts_at_a_thousand_moments",
        "W0 is computed back instead of put back",
    ),
    Mutant(
        "ops/writing.py",
        "            try:\n                if write(*written):",
        "            failed = write(*written)\n            try:\n                if failed:",
        MERGED,
        "interrupts_at_a_thousand_moments",
        "an interrupt behind the writing leaves it",
    ),
    Mutant(
        "ops/writing.py",
        "if here != self._prepared[0]:",
        "if not self._prepared[0]:",
        MERGED,
        "weight_and_blocks_may_move",
        "blocks are written to where the weight once was",
    ),
    Mutant(
        "ops/writing.py",
        "_LOCKS.setdefault(place, threading.RLock())",
        "threading.RLock()",
        MERGED,
        "no_other_layer_over_the_same_weight",
        "every writer has a lock of its own",
    ),
    Mutant(
        "ops/compiled.py",
        "d1 * of_input + d2 * of_output",
        "d1 * of_input",
        COMPILED,
        "swap_adds",
        "blocks are written one below the other",
    ),
    Mutant(
        "ops/blocks.cpp",
        "x[last * x_row + b * d1 + i] * y[last * y_row + b * d2 + j]",
        "0 * x[last * x_row + b * d1 + i] * y[last * y_row + b * d2 + j]",
        COMPILED,
        "gradient_is_the_sum",
        "the last token adds nothing",
    ),
    Mutant(
        "ops/blocks.cpp",
        "*(vec *)to = chosen ? (add ? old + sum : sum) : old;",
        "*(vec *)to = add ? old + sum : sum;",
        COMPILED,
        "product_is_the_sum",
        "whole vectors are written over what follows a block",
    ),
    Mutant(
        "ops/writing.py",
        "place.copy_(old + part)",
        "place.copy_(old.to(dtype) + part.to(dtype))",
        MERGED,
        "autocast_computes",
        "W0 and D are rounded before they are added",
    ),
    Mutant(
        "tuner/merging.py",
        "torch._foreach_copy_(inside, kept)\n            del self._undo[done:]",
        "del self._undo[done:]",
        MERGED,
        "interrupts_while_merging",
        "an interrupted merge stays in the weight",
    ),
    Mutant(
        "tuner/injection.py",
        "parameter.requires_grad_(flag)",
        "pass",
        "tuner/test_injection.py",
        "after_the_base_was_frozen",
        "a failed injection leaves the model frozen",
    ),
    Mutant(
        "tuner/model.py",
        "        if merge:\n            self._check_mergeable(adapter_names)",
        "        if merge:\n            pass",
        "tuner/test_injection.py",
        "nan_in_one_layer",
        "a model is merged up to the layer that holds NaN",
    ),
    Mutant(
        "theory/column_space.py",
        "return rhs - self.U @ (self.U.mT @ rhs)",
        "return rhs",
        OPTIMA,
        "diablo_equals",
        "the identity in place of I - P",
    ),
    Mutant(
        "theory/column_space.py",
        "    kept = sigma > cutoff[..., None]\n    return TruncatedSVD",
        "    kept = sigma >= cutoff[..., None]\n    return TruncatedSVD",
        OPTIMA,
        "tangent_without_b",
        "a zero singular value is kept where the cutoff is zero, and with it a direction",
    ),
    Mutant(
        "theory/column_space.py",
        "rank = (sigma > cutoff[..., None]).sum(-1)",
        "rank = (sigma >= cutoff[..., None]).sum(-1)",
        SPACES,
        "basis_times_coordinates",
        "a zero matrix has full rank",
    ),
    Mutant(
        "theory/column_space.py",
        "torch.where(self.sigma > 0, 1 / self.sigma, 0.0)",
        "torch.where(self.sigma > 0, self.sigma, 0.0)",
        OPTIMA,
        "diablo_equals",
        "the transpose in place of the pseudo-inverse",
    ),
    Mutant(
        "theory/column_space.py",
        "cutoff, noise = relative * largest, eps * largest",
        "cutoff, noise = relative * torch.ones_like(largest), eps * largest",
        SPACES,
        "rtol_moves or float32 or sweep or groups",
        "an absolute cutoff in place of a relative one",
    ),
    Mutant(
        "theory/column_space.py",
        "torch.frexp(largest).exponent.long() - 1",
        "torch.frexp(largest).exponent.long()",
        SPACES,
        "exact_at_every_magnitude",
        "the exponent is off by one",
    ),
    Mutant(
        "theory/column_space.py",
        "if layout.cols(i).stop > layout.cols(i).start",
        "if layout.rows(i).stop > layout.rows(i).start",
        SPACES,
        "written_groups",
        "groups with inputs in place of groups with outputs",
    ),
    Mutant(
        "theory/problems.py",
        "return self.T - self.X @ self.W0",
        "return self.T + self.X @ self.W0",
        PROBLEMS,
        "residual_is",
        "the frozen output is added",
    ),
    Mutant(
        "theory/problems.py",
        "T = X @ W0 + signal + noise",
        "T = X @ W0 - signal + noise",
        PROBLEMS,
        "of_the_kind",
        "the target asks for the negative of the truth",
    ),
    Mutant(
        "theory/reduction.py",
        "times_power(0.5 * missed, 2 * self.exponent)",
        "times_power(missed, 2 * self.exponent)",
        REDUCTION,
        "add_up",
        "the loss lacks its 1/2",
    ),
    Mutant(
        "theory/reduction.py",
        "times_power(0.5 * missed, 2 * self.exponent)",
        "times_power(0.5 * missed, self.exponent)",
        REDUCTION,
        "add_up",
        "a squared norm is scaled back once, not twice",
    ),
    Mutant(
        "theory/reduction.py",
        "(self.exponent - self.space.exponent)",
        "(self.exponent + self.space.exponent)",
        REDUCTION,
        "units_of_weights",
        "the scale of X multiplies the update",
    ),
    Mutant(
        "theory/reduction.py",
        "(R - space.basis @ target).square()",
        "R.square()",
        REDUCTION,
        "add_up",
        "what no update can reach includes what full fine-tuning does",
    ),
    Mutant(
        "theory/reduction.py",
        "self.captured > nothing",
        "self.captured > 0",
        OPTIMA,
        "nothing_is_missed",
        "a share of rounding",
    ),
    Mutant(
        "theory/optima.py",
        "    for i in written_groups(layout):\n        cols = layout.cols(i)",
        "    for i in written_groups(layout)[1:]:\n        cols = layout.cols(i)",
        OPTIMA,
        "diablo_equals",
        "the first block is dropped",
    ),
    Mutant(
        "theory/optima.py",
        "    for i in written_groups(layout):\n        cols = layout.cols(i)",
        "    for i in range(layout.complete):\n        cols = layout.cols(i)",
        OPTIMA,
        "diablo_equals",
        "the tail is dropped",
    ),
    Mutant(
        "theory/optima.py",
        "kept = U[..., :rank] @ (sigma[..., :rank, None] * Vh[..., :rank, :])",
        "kept = U[..., : rank + 1] @ (sigma[..., : rank + 1, None] * Vh[..., : rank + 1, :])",
        OPTIMA,
        "lora_equals_eckart",
        "LoRA's update has one rank too many",
    ),
    Mutant(
        "theory/optima.py",
        "sigma[..., rank:].square().sum(-1), _full_update",
        "sigma[..., rank + 1 :].square().sum(-1), _full_update",
        OPTIMA,
        "lora_equals_eckart",
        "LoRA's gap is that of the next rank",
    ),
    Mutant(
        "theory/optima.py",
        "parameters = rank * sum(_sizes(problem))",
        "parameters = rank * _sizes(problem)[0]",
        OPTIMA,
        "lora_equals_eckart",
        "LoRA's B is not counted",
    ),
    Mutant(
        "theory/optima.py",
        "layout.num_parameters // layout.out_features",
        "layout.num_parameters // layout.in_features",
        OPTIMA,
        "budget_ranks",
        "the frozen rank by m1 in place of m2",
    ),
    Mutant(
        "theory/optima.py",
        "missed = readout.outside(beside.mT)",
        "missed = beside.mT",
        OPTIMA,
        "tangent_equals",
        "dA is forgotten",
    ),
    Mutant(
        "theory/optima.py",
        "torch.where(squares > 0, 1 / squares, 0.0)",
        "torch.where(squares > 0, 1 / squares.sqrt(), 0.0)",
        OPTIMA,
        "full_equals",
        "Y^+ divides by a length, not by its square",
    ),
    Mutant(
        "theory/optima.py",
        'basis = truncated_svd(scaled, tolerance("rank", A.dtype).value * _norm(scaled)).U',
        "basis = scaled",
        OPTIMA,
        "can_be_inverted",
        "the conditioning of A costs directions of XA",
    ),
    Mutant(
        "theory/optima.py",
        "image = Y @ basis",
        "image = basis",
        OPTIMA,
        "frozen_lora_equals",
        "col A in place of col XA",
    ),
    Mutant(
        "theory/optima.py",
        "space.basis[:, :r] @ U[:, -1:]",
        "space.basis[:, :r] @ U[:, :1]",
        OPTIMA,
        "worst_case",
        "the worst-case target lies where a block reaches best",
    ),
    Mutant(
        "theory/stationarity.py",
        "all(rank == r for rank in ranks)",
        "any(rank == r for rank in ranks)",
        STATIONARITY,
        "repeated or premise_counts",
        "one block of the full rank is enough",
    ),
    Mutant(
        "theory/stationarity.py",
        "sigma[r - 1]",
        "sigma[r - 2]",
        STATIONARITY,
        "sweep",
        "the margin looks at another singular value",
    ),
    Mutant(
        "theory/stationarity.py",
        "gradient[:, cols] - C_i.mT @ own",
        "gradient[:, cols]",
        STATIONARITY,
        "dense_oracle",
        "everything leaks",
    ),
    Mutant(
        "theory/stationarity.py",
        "self.amplification * self.grad_blocks + self.leak",
        "self.amplification * self.grad_blocks",
        STATIONARITY,
        "dense_oracle",
        "the bound leaves the leak out",
    ),
    Mutant(
        "theory/statistics.py",
        "times_power(times_power(self.sums, rows), powers)",
        "times_power(self.sums, powers)",
        STATISTICS,
        "order_of_scales",
        "squares are brought to another scale by its power, not by its square",
    ),
    Mutant(
        "theory/statistics.py",
        "torch.where(kept, 1 / squares, 0.0)",
        "torch.where(kept, 1 / sigma, 0.0)",
        REDUCTION,
        "sums_over_tokens",
        "M = V^T C in place of S^-1 V^T C",
    ),
    Mutant(
        "theory/statistics.py",
        "outside=(times_power(self.square, -2 * r) - M.square().sum())",
        "outside=times_power(self.square, -2 * r)",
        REDUCTION,
        "sums_over_tokens",
        "what no update can reach includes what full fine-tuning does",
    ),
    Mutant(
        "theory/maps.py",
        "for part in rows) >= rank",
        "for part in rows) > rank",
        MAPS,
        "in_theorem or inside_the_theorem",
        "rank X = d1 lies outside the theorem",
    ),
    Mutant(
        "theory/maps.py",
        "rho = min(optima.lora_rank_at_budget(layout)",
        "rho = min(optima.frozen_rank_at_budget(layout)",
        MAPS,
        "plain_loop",
        "LoRA spends a frozen A's budget",
    ),
    Mutant(
        "theory/measures.py",
        "all(rank.holds for rank in ranks)",
        "any(rank.holds for rank in ranks)",
        MEASURES,
        "every_layer",
        "one layer that meets the premise is enough",
    ),
    Mutant(
        "theory/measures.py",
        "for sign in (1, -1)",
        "for sign in (1,)",
        MEASURES,
        "linear_or_not",
        "an affine output counts as linear",
    ),
    Mutant(
        "theory/starts.py",
        'return Start("pissa", U * root, root[:, None] * Vh)',
        'return Start("pissa", U * sigma, root[:, None] * Vh)',
        STARTS,
        "pissa_is",
        "PiSSA's A takes the singular values whole",
    ),
    Mutant(
        "theory/starts.py",
        'return Start("lora-ga", U[:, :rank], Vh[rank:])',
        'return Start("lora-ga", U[:, :rank], Vh[:rank])',
        STARTS,
        "lora_ga",
        "LoRA-GA's B opens the directions that A opens",
    ),
    Mutant(
        "theory/starts.py",
        "squares.pow(-2), 0.0)",
        "squares.pow(-1), 0.0)",
        STARTS,
        "corda_is",
        "CorDA is taken back through G^(1/2)",
    ),
    Mutant(
        "theory/curvature.py",
        "_squares(space, space.group(layout, i), 1.0, cols.stop - cols.start)",
        "_squares(space, space.group(layout, i), 1.0, 1)",
        CURVATURE,
        "closed_forms_are",
        "each output of a block has no curvature of its own",
    ),
    Mutant(
        "theory/curvature.py",
        "sigma[sigma > 0].square()",
        "sigma[sigma > 0]",
        CURVATURE,
        "closed_forms_are",
        "curvature is the singular value, not its square",
    ),
    Mutant(
        "theory/parametrisations.py",
        "theta[cut:].reshape(B.shape) - offset",
        "theta[cut:].reshape(B.shape)",
        PARAMETRISATIONS,
        "starts_at_the_frozen or dense_product",
        "a start's product is not taken out of the weight",
    ),
    Mutant(
        "theory/recording.py",
        "self._add(name, X, -gradient)",
        "self._add(name, X, gradient)",
        "theory/test_recording.py",
        "uses_of_one_layer",
        "R is the gradient, not the change that lowers the loss",
    ),
    Mutant(
        "theory/diagnosis.py",
        "frozen, optima.frozen_lora_optimum(problem, A, minimiser=False)",
        "frozen, optima.frozen_lora_optimum(problem, A[:, 1:], minimiser=False)",
        "theory/test_diagnosis.py",
        "dense_least_squares",
        "the frozen A has a rank less than it says",
    ),
]


def run_tests(folder: Path, files: list[str], only: str = "") -> subprocess.CompletedProcess[str]:
    """The named tests against the package in a folder, in a process of its own."""
    config = ["-c", str(TESTS.parent / "pyproject.toml"), "-p", "no:cacheprovider", "-p", "no:nbmake"]  # slow to load
    arguments = ["-x", "-q", *config, "--hypothesis-profile=first-failure", "-k", only]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, *(str(TESTS / file) for file in files)],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "DIABLO_THEORY_CACHE": str(folder / "cache"),  # what a mutant compiles goes with it
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__")))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{Path(mutant.file).stem}: {mutant.reason}")
def test_every_mutant_is_found(copy, mutant):
    if mutant.tests == COMPILED and compiled.status() != "compiled":
        pytest.skip(compiled.status())
    file = copy / mutant.file
    text = file.read_text(encoding="utf-8")
    assert text.count(mutant.right) == 1, (
        f"{mutant.right!r} is no longer in {mutant.file} once: bring the table up to date"
    )
    file.write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")
    found = run_tests(copy.parent, [mutant.tests], mutant.only)
    # 1: tests ran and one failed; a mutant that cannot be imported, or tests that are not there, end otherwise
    assert found.returncode == 1, found.stdout[-3000:] + found.stderr[-1000:]


def test_the_unchanged_copy_passes(copy):
    """The control: the same tests, run the same way, find nothing."""
    names = sorted({mutant.tests for mutant in MUTANTS})
    only = " or ".join(sorted({f"({mutant.only})" for mutant in MUTANTS}))
    found = run_tests(copy.parent, names, only)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]
    (copy / "theory" / "optima.py").unlink()  # and it is the copy that they run against
    assert run_tests(copy.parent, [OPTIMA]).returncode not in (0, 1)
