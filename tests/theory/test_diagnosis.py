import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import NonFiniteError
from diablo_theory.theory.arithmetic import gaussian, seeded
from diablo_theory.theory.column_space import column_space
from diablo_theory.theory.diagnosis import CAPTURE_COLUMNS, captures, certificates, lora_starts
from diablo_theory.theory.optima import worst_case_target
from diablo_theory.theory.problems import LinearProblem, low_rank_inputs
from diablo_theory.theory.recording import record
from diablo_theory.theory.reduction import reduce_problem
from diablo_theory.theory.starts import usual_start
from diablo_theory.theory.stationarity import certificate, rank_premise
from diablo_theory.theory.statistics import LayerStatistics

CERTIFICATE_COLUMNS = [
    *("layer", "in_features", "out_features", "tokens", "num_blocks", "block_rows", "rank", "energy_rank"),
    *(
        "premise_holds",
        "premise_margin",
        "grad_full",
        "grad_blocks",
        "amplification",
        "leak",
        "bound",
        "tightness",
        "leak_share",
    ),
]


def reduced(X, R):
    W0 = torch.zeros(X.shape[1], R.shape[1], dtype=torch.float64)
    return reduce_problem(LinearProblem(X, W0, R, BlockLayout(*W0.shape, 1)))


@st.composite
def layers(draw):
    b, m1, m2 = draw(st.integers(1, 12)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = seeded(draw(st.integers(0, 10**6)))
    X = low_rank_inputs(b, m1, draw(st.integers(0, min(b, m1))), generator)
    counts = draw(st.lists(st.integers(1, max(m1, m2)), min_size=1, max_size=3, unique=True))
    return X, gaussian(b, m2, generator), gaussian(m1, m2, generator), counts


def share(design, target, wanted):
    """Of ``wanted``, what a least-squares fit of the target within a design captures."""
    if not wanted > 1e-20:
        return 1.0
    if design.size == 0:
        return 0.0
    return np.linalg.norm(design @ (np.linalg.pinv(design, rcond=1e-10) @ target)) ** 2 / wanted


def brute_force(X, R, num_blocks, A, start):
    """Captured shares from dense design matrices over all trainable entries; ``X dW`` as a vector, row by row."""
    X, R = X.numpy(), R.numpy()
    (m1, m2), target = (X.shape[1], R.shape[1]), R.ravel()
    every = np.kron(X, np.eye(m2))
    wanted = np.linalg.norm(X @ (np.linalg.pinv(X, rcond=1e-10) @ R)) ** 2
    layout = BlockLayout(m1, m2, num_blocks)
    inside = layout.scatter(*layout.gather(torch.ones(m1, m2))).numpy().ravel() > 0
    reach = [np.kron(X @ start.A.numpy(), np.eye(m2)), np.kron(X, start.B.numpy().T)]
    return {
        "diablo": share(every[:, inside], target, wanted),
        "frozen": share(np.kron(X @ A.numpy(), np.eye(m2)), target, wanted),
        "tangent": share(np.concatenate(reach, axis=1), target, wanted),
    }


def one(frame, **wanted):
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1, frame
    return frame.iloc[0]


@given(layers())
def test_captures_are_those_of_dense_least_squares(layer):
    X, R, W0, counts = layer
    problem = reduced(X, R)
    found = captures(problem, counts, seeded(7), W0)
    generator = seeded(7)
    for count in counts:
        rows = found[found["num_blocks"] == count]
        frozen = one(rows, method="lora-frozen-a")
        A = usual_start(*W0.shape, int(frozen["rank"]), generator).A
        for start in lora_starts(problem, int(one(rows, kind="set")["rank"]), generator, W0):
            row = one(rows, method="lora", start=start.name)
            expected = brute_force(X, R, count, A, start)
            assert row["kind"] == "tangent"
            assert row["capture"] == pytest.approx(expected["tangent"], abs=1e-8), start.name
            assert frozen["capture"] == pytest.approx(expected["frozen"], abs=1e-8)
            assert one(rows, method="diablo", kind="both")["capture"] == pytest.approx(expected["diablo"], abs=1e-8)


@given(layers())
def test_loras_set_is_eckart_youngs_and_holds_the_tangents_where_b_is_zero(layer):
    X, R, W0, counts = layer
    found = captures(reduced(X, R), counts, seeded(7), W0)
    squares = np.linalg.svd(X.numpy() @ (np.linalg.pinv(X.numpy(), rcond=1e-10) @ R.numpy()), compute_uv=False) ** 2
    for count in counts:
        rows = found[found["num_blocks"] == count]
        best = one(rows, method="lora", kind="set")
        expected = squares[: best["rank"]].sum() / squares.sum() if squares.sum() > 1e-20 else 1.0
        assert best["capture"] == pytest.approx(expected, abs=1e-9)
        for name in ("usual", "eva"):
            assert one(rows, method="lora", start=name)["capture"] <= best["capture"] + 1e-9


def test_a_tangent_where_b_is_not_zero_may_capture_more_than_the_set():
    X, R = torch.linalg.qr(gaussian(40, 16, seeded(0))).Q, gaussian(40, 16, seeded(1))
    rows = captures(reduced(X, R), [4], seeded(2), gaussian(16, 16, seeded(3)))
    squares = torch.linalg.svdvals(X.T @ R).square()
    best = one(rows, kind="set")
    ga = one(rows, start="lora-ga")
    assert ga["capture"] == pytest.approx(float(squares[: 2 * ga["rank"]].sum() / squares.sum()), rel=1e-10)
    assert ga["capture"] > best["capture"] + 0.1


@given(layers())
def test_every_method_keeps_to_diablos_parameters_and_to_its_range(layer):
    X, R, W0, counts = layer
    found = captures(reduced(X, R), counts, seeded(0), W0)
    assert tuple(found.columns) == CAPTURE_COLUMNS
    assert found["capture"].between(0, 1).all()
    m1, m2 = W0.shape
    for count, rows in found.groupby("num_blocks"):
        layout = BlockLayout(m1, m2, count)
        assert one(rows, method="diablo")["num_parameters"] == layout.num_parameters
        assert one(rows, method="diablo")["rank"] == layout.block_rows
        assert (rows["num_parameters"] <= layout.num_parameters).all()
        per_rank = rows["method"].map({"lora": m1 + m2, "lora-frozen-a": m2}).dropna()
        others = rows.loc[per_rank.index]
        assert (others["num_parameters"] == others["rank"] * per_rank).all()
        assert (others["num_parameters"] + per_rank > layout.num_parameters).all()
        assert set(rows["start"]) >= {"zero", "usual", "eva", "pissa", "corda", "any"}


def test_one_block_captures_everything():
    X, R = gaussian(30, 8, seeded(0)), gaussian(30, 6, seeded(1))
    found = captures(reduced(X, R), [1, 2], seeded(2))
    assert one(found, num_blocks=1, method="diablo")["capture"] == pytest.approx(1.0, abs=1e-14)
    assert one(found, num_blocks=2, method="diablo")["capture"] < 0.9


def test_ranks_above_what_there_is_capture_everything():
    X, R = low_rank_inputs(30, 16, 2, seeded(0)), gaussian(30, 16, seeded(1))
    found = captures(reduced(X, R), [1], seeded(2), gaussian(16, 16, seeded(3)))
    assert one(found, kind="set")["rank"] == 8
    assert found["capture"].tolist() == pytest.approx([1.0] * len(found), abs=1e-9)

    found = captures(reduced(X[:2], R[:2]), [1], seeded(2))
    assert one(found, kind="set")["capture"] == 1


def test_what_cannot_be_reached_is_never_less_than_nothing():
    for seed in range(20):
        layout, generator = BlockLayout(12, 9, 3), seeded(seed)
        X, W0 = low_rank_inputs(20, 12, 5, generator), torch.zeros(12, 9).double()
        problem = reduced(X, worst_case_target(X, W0, layout, column_space(X)))
        assert 0 <= one(captures(problem, [3], generator), method="diablo")["capture"] < 1e-12


def test_where_there_is_nothing_to_capture_all_is_captured():
    for X, R in (
        (torch.zeros(9, 4).double(), gaussian(9, 3, seeded(0))),
        (gaussian(9, 4, seeded(0)), torch.zeros(9, 3).double()),
    ):
        assert (captures(reduced(X, R), [2, 4], seeded(1), gaussian(4, 3, seeded(2)))["capture"] == 1).all()


def test_starts_that_need_more_than_there_is_are_left_out():
    problem, W0 = reduced(gaussian(30, 12, seeded(0)), gaussian(30, 4, seeded(1))), gaussian(12, 4, seeded(2))
    names = [[start.name for start in lora_starts(problem, rank, seeded(3), W0)] for rank in (2, 3)]
    assert names == [["usual", "eva", "lora-ga", "pissa", "corda"], ["usual", "eva", "pissa", "corda"]]
    assert [start.name for start in lora_starts(problem, 2, seeded(3))] == ["usual", "eva", "lora-ga"]


def test_captures_follow_from_their_generator():
    problem, W0 = reduced(gaussian(30, 12, seeded(0)), gaussian(30, 9, seeded(1))), gaussian(12, 9, seeded(2))
    first, second, third = (captures(problem, [2, 3], seeded(seed), W0, iterations=1) for seed in (5, 5, 6))
    assert first.equals(second)
    drawn = first["start"] == "usual"
    assert (first["capture"] != third["capture"])[drawn].all()
    assert first[~drawn].equals(third[~drawn])


def test_captures_from_sums_are_those_from_all_tokens():
    X, R, W0 = gaussian(60, 12, seeded(0)), gaussian(60, 9, seeded(1)), gaussian(12, 9, seeded(2))
    streamed = LayerStatistics.of(zip(X.split(7), R.split(7), strict=True)).reduce()
    one, two = (captures(problem, [2, 5], seeded(3), W0) for problem in (streamed, reduced(X, R)))
    assert one.drop(columns="capture").equals(two.drop(columns="capture"))
    np.testing.assert_allclose(one["capture"], two["capture"], rtol=1e-10)


def test_sketched_starts_are_close_to_exact_ones():
    X = gaussian(90, 30, seeded(0)) * 0.7 ** torch.arange(30, dtype=torch.float64)
    problem, W0 = reduced(X, X @ gaussian(30, 24, seeded(1))), gaussian(30, 24, seeded(2))
    exact, sketched = (captures(problem, [4], seeded(3), W0, iterations) for iterations in (None, 8))
    np.testing.assert_allclose(sketched["capture"], exact["capture"], atol=0.02)


def test_captures_name_what_does_not_fit():
    problem = reduced(gaussian(9, 6, seeded(0)), gaussian(9, 5, seeded(1)))
    with pytest.raises(ValueError, match=r"W0 must have shape \(6, 5\), got \(5, 6\)"):
        captures(problem, [2], seeded(2), torch.zeros(5, 6).double())
    with pytest.raises(NonFiniteError, match="W0 holds a NaN or an infinity"):
        captures(problem, [2], seeded(2), torch.full((6, 5), math.nan))
    with pytest.raises(ValueError, match="num_blocks must be at most 6 for a 6 x 5 matrix, got 7"):
        captures(problem, [2, 7], seeded(2))
    with pytest.raises(ValueError, match="iterations must be at least 0, got -1"):
        captures(problem, [2], seeded(2), torch.zeros(6, 5).double(), iterations=-1)
    assert tuple(captures(problem, [], seeded(2)).columns) == CAPTURE_COLUMNS


# Certificates


class Traced(nn.Module):
    """A network whose inputs X and output gradients g_Y can be read off by hand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 5)]).double()

    def forward(self, x, trace=None):
        for layer in self.layers:
            y = layer(x)
            if trace is not None:
                y.retain_grad()
                trace.append((x.detach(), y))
            x = torch.tanh(y)
        return x


def test_certificates_are_those_of_the_recorded_tensors():
    model, batches = Traced(), [gaussian(7, 6, seeded(seed)) for seed in range(3)]
    found = certificates(record(model, batches, lambda m, b: m(b).square().sum()), 2)
    assert list(found.columns) == CERTIFICATE_COLUMNS
    assert found["layer"].tolist() == ["layers.0", "layers.1"]
    trace = []
    model(torch.cat(batches), trace).square().sum().backward()
    for (X, y), (_, row) in zip(trace, found.iterrows(), strict=True):
        layout = BlockLayout(X.shape[1], y.shape[1], 2)
        expected, premise = certificate(X, y.grad, layout), rank_premise(X, layout)
        for name in ("grad_full", "grad_blocks", "amplification", "leak", "bound"):
            assert row[name] == pytest.approx(getattr(expected, name), rel=1e-9), name
        sizes = (row["in_features"], row["out_features"], row["tokens"], row["num_blocks"], row["block_rows"])
        assert sizes == (X.shape[1], y.shape[1], 21, 2, layout.block_rows)
        assert (row["rank"], row["premise_holds"]) == (premise.rank, premise.holds)
        squares = np.linalg.svd(X.numpy(), compute_uv=False) ** 2
        assert row["energy_rank"] == np.argmax(np.cumsum(squares) >= 0.99 * squares.sum()) + 1
        assert row["tightness"] == pytest.approx(row["grad_full"] / row["bound"], rel=1e-14)
        assert row["leak_share"] == pytest.approx(row["leak"] / row["grad_full"], rel=1e-14)
    weights = [layer.weight.grad for layer in model.layers]
    assert found["grad_full"].tolist() == pytest.approx([float(grad.norm()) for grad in weights], rel=1e-10)


def test_the_premise_of_few_samples_holds_and_leaks_nothing():
    X, R = gaussian(3, 12, seeded(0)), gaussian(3, 9, seeded(1))
    within, beyond = (
        certificates({"few": LayerStatistics.of([(X, R)])}, 3),
        certificates({"few": LayerStatistics.of([(X, R)])}, 6),
    )
    assert within["premise_holds"].all()
    assert not beyond["premise_holds"].any()
    assert within["premise_margin"][0] > 0 > beyond["premise_margin"][0]
    assert within["leak"][0] < 1e-8 * within["grad_full"][0]
    assert beyond["leak"][0] > 0.1 * beyond["grad_full"][0]


@given(
    layers(),
    st.floats(-7.8, -0.1),
    st.sampled_from([1.0, 1e3, 1e6]),
    st.sampled_from([(1.0, 1.0), (1e-100, 1e50), (1e100, 1e-160)]),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_the_bound_holds_of_the_whole_gradient_at_any_cutoff(layer, decades, outlier, scales, dtype):
    X, R, _, counts = layer
    X[:, 0] *= outlier
    X, R = X.to(dtype), R.to(dtype)
    whole = np.linalg.norm(X.double().numpy().T @ R.double().numpy())
    if dtype == torch.float64:
        X, R, whole = X * scales[0], R * scales[1], whole * (scales[0] * scales[1])
    sums = {"layer": LayerStatistics.of([(X, R)])}
    scale = float(X.double().norm()) * float(R.double().norm())
    for count in counts:
        for rtol in (None, 10**decades):
            row = certificates(sums, count, rtol).iloc[0]
            assert row["grad_full"] == pytest.approx(whole, rel=1e-10, abs=1e-13 * scale)
            assert whole <= row["bound"] * (1 + 1e-12) + 1e-13 * scale
            assert 0 <= row["tightness"] <= 1 + 1e-10


def test_gradients_that_vanish_meet_the_bound():
    row = certificates({"dead": LayerStatistics.of([(torch.ones(4, 6), torch.zeros(4, 5))])}, 2).iloc[0]
    assert (row["grad_full"], row["bound"], row["tightness"]) == (0.0, 0.0, 1.0)
    assert row["leak_share"] == 0.0


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_shares_are_free_of_units_where_float64_cannot_hold_the_norms(scale):
    X, R = gaussian(12, 6, seeded(0)), gaussian(12, 5, seeded(1))
    plain, far = (certificates({"fc": LayerStatistics.of([(X * s, R * s)])}, 3).iloc[0] for s in (1.0, scale))
    assert far["grad_full"] == (math.inf if scale > 1 else 0.0)
    assert 0.1 < plain["tightness"] < 1
    assert far["tightness"] == pytest.approx(plain["tightness"], rel=1e-9)
    assert far["leak_share"] == pytest.approx(plain["leak_share"], rel=1e-9)


def test_certificates_name_what_does_not_fit():
    sums = LayerStatistics.of([(torch.ones(4, 6), torch.ones(4, 5))])
    with pytest.raises(ValueError, match="layers must hold at least one layer's statistics, got none"):
        certificates({}, 2)
    with pytest.raises(ValueError, match="num_blocks must be at most 6 for a 6 x 5 matrix, got 7"):
        certificates({"fc": sums}, 7)
    with pytest.raises(ValueError, match="rtol must be at least sqrt"):
        certificates({"fc": sums}, 2, rtol=2.0)
    with pytest.raises(ValueError, match="the statistics hold no tokens"):
        certificates({"fc": LayerStatistics.empty(6, 5)}, 2)
