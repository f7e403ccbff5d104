"""Figures of descents, certificates and the method."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.certificates import certificates, read_layers
from diablo_theory.reporting.convergence import convergence, read_descent
from diablo_theory.reporting.method_diagram import method_diagram

SAVED = Path(__file__).resolve().parents[2] / "paper_results"


def layers(**changes):
    table = {"layer": ["model.layers.0.mlp.up_proj", "model.layers.9.mlp.up_proj"], "num_blocks": 64, "tokens": 1800}
    table |= {"premise_holds": [True, False], "grad_full": [2.0, 4.0], "grad_blocks": [1.0, 1.0]}
    table |= {"amplification": [2.0, 4.0], "leak": [0.0, 2.0], "bound": [2.0, 6.0]}
    return pd.DataFrame(table | changes)


def test_certificates_stand_in_units_of_the_full_gradient():
    figure = certificates(layers(), "A model")
    (axes,) = figure.axes
    drawn = {line.get_label(): list(np.asarray(line.get_xdata(), float)) for line in axes.lines}
    assert drawn["amplification x blocks' gradient"] == [1, 1]
    assert drawn["leak"] == [0.5]  # the other is zero, which a logarithm has not
    assert drawn["their sum, the bound"] == [1, 1.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.up_proj", "9.up_proj *"]
    said = " ".join(figure.get_supxlabel().split())
    assert said.startswith("Measured here: A model, 2 layers, 1,800 tokens, N = 64. ")
    assert said.endswith("The premise (every X_i has the rank of X) fails at *, so that a leak remains.")


@pytest.mark.parametrize(
    ("holds", "end"), [(False, "fails at every layer, so that a leak remains."), (True, "bound.")]
)
def test_a_star_stands_only_where_it_tells_layers_apart(holds, end):
    figure = certificates(layers(premise_holds=holds), "A model")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0.up_proj", "9.up_proj"]
    assert figure.get_supxlabel().endswith(end)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("layer\nx\n", "lacks the column"), (",".join(layers().columns) + "\n", "has no rows")],
)
def test_damaged_layers_are_told_with_their_producer(tmp_path, content, message):
    file = tmp_path / "layers.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ResultsError, match=rf"layers\.csv .*{message}.*`diablo-theory diagnose` writes it"):
        read_layers(file)


def test_convergence_shows_every_method_and_its_prediction():
    above, beyond, rates, _ = convergence(read_descent(SAVED / "descent")).axes
    assert above.get_title(loc="left") == "Premise holds: rank of X is 6"
    assert beyond.get_title(loc="left") == "Premise fails: rank of X is 16"
    assert len(above.lines) == len(rates.lines) == 2 * 4  # four methods, each with what is predicted of it
    for measured, predicted in zip(rates.lines[::2], rates.lines[1::2], strict=True):
        steps, left = predicted.get_data()
        own = np.interp(
            steps, *(np.asarray(values, float) for values in (measured.get_xdata(), np.log(measured.get_ydata())))
        )
        slopes = np.diff(own), np.diff(np.log(left))
        assert slopes[0] == pytest.approx(slopes[1], rel=0.05)


def test_convergence_says_the_sizes_of_its_data():
    table = read_descent(SAVED / "descent")
    said = " ".join(convergence(table).get_supxlabel().split())
    assert "32 x 32, N = 4, so that an X_i has rank 8 at most; 256 parameters each (full: 1,024); 2,000 steps" in said
    smaller = table[table["iteration"] <= 100].assign(parameters=table["parameters"].replace({1024: 2304, 256: 288}))
    said = " ".join(convergence(smaller).get_supxlabel().split())
    assert "48 x 48, N = 8, so that an X_i has rank 6 at most; 288 parameters each (full: 2,304); 100 steps" in said


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), ("premise\nholds\n", "lacks the column")])
def test_a_damaged_descent_is_told_with_its_producer(tmp_path, content, message):
    if content is not None:
        (tmp_path / "descent.csv").write_text(content)
    with pytest.raises(ResultsError, match=rf"{message}.*`diablo-theory descend` writes it"):
        read_descent(tmp_path)


def test_a_descent_cut_short_is_told(tmp_path):
    pd.read_csv(SAVED / "descent" / "descent.csv")[:1].to_csv(tmp_path / "descent.csv", index=False)
    with pytest.raises(
        ResultsError, match=r"no step of \w+ where the premise \w+, or .*`diablo-theory descend` writes it"
    ):
        read_descent(tmp_path)


def test_the_diagram_counts_parameters_of_both_methods():
    words = [text.get_text() for axes in method_diagram().axes for text in axes.texts]
    assert r"trained: $m_1 m_2 \, / \, N$ entries" in words
    assert r"trained: $r\,(m_1 + m_2)$ entries" in words
