import importlib.util
from pathlib import Path

import pytest

from diablo_theory.errors import ResultsError

SCRIPT = Path(__file__).parents[1] / "figures" / "make_figures.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("make_figures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_elsewhere_it_draws_and_leaves_the_readme_alone(main, tmp_path, capsys, monkeypatch):
    readme = (SCRIPT.parents[1] / "README.md").stat().st_mtime_ns
    monkeypatch.setitem(main.__globals__, "draw_figures", lambda root, out: ([out / "a.svg"], {"b": "`c` makes it"}))
    assert main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'a.svg'}\nskipped b: `c` makes it\n"
    assert (SCRIPT.parents[1] / "README.md").stat().st_mtime_ns == readme


def test_damaged_results_are_a_plain_message(main, tmp_path, capsys, monkeypatch):
    def damaged(root, out):
        raise ResultsError("rows.csv cannot be read")

    monkeypatch.setitem(main.__globals__, "draw_figures", damaged)
    assert main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: rows.csv cannot be read\n"


def test_help_teaches(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert "figures" in said
    assert "example:" in said
