import csv
import itertools
import re
import sys

import pytest

from dss.errors import DssError
from dss.reporting.analysis import analyse
from dss.reporting.collect import collect
from dss.reporting.figures import STYLES, Figure, draw_figures, save_figures
from tests.reporting.fabricate import write_run


def _draw(folder):
    (group,) = analyse(collect([str(folder)]))
    return group, draw_figures(group)


def test_a_sweep_is_drawn_by_data_and_size_with_its_losses(tmp_path):
    for width, examples, seed in itertools.product((16, 32), (500, 1000), (0, 1)):
        for method, right in (("finetune", 60), ("step_by_step_rules", 80)):
            place = {"width": width, "examples": examples, "seed": seed}
            write_run(tmp_path / "runs", method, right + seed, **place)
    group, figures = _draw(tmp_path / "runs")
    assert [f.kind for f in figures] == ["data", "data", "size", "curves", "curves"]
    save_figures(figures, tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"{f.name}.{suffix}" for f in figures for suffix in ("svg", "png", "csv")}
    data = figures[0]
    for text in ("training examples (logarithmic)", "accuracy on the test split, %", "finetuning",
                 "teacher rules: 90.0%", "most frequent: 50.0%", "1,000"):  # fmt: skip
        assert f">{text}<" in data.svg
    for text in ("step", "loss, nats per token (log)", "loss of the rationale task"):
        assert f">{text}<" in figures[-1].svg
    with (tmp_path / "figures" / f"{data.name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    cell = next(c for c in group.cells if c.method == "step-by-step")
    row = next(r for r in rows if r["method"] == "step-by-step")
    assert float(row["accuracy"]) == cell.mean == 0.805
    assert (float(row["low95"]), float(row["high95"])) == pytest.approx(cell.interval)
    assert row["accuracy_by_seed"] == "0:0.8000 1:0.8100"
    assert (tmp_path / "figures" / f"{data.name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_runs_give_the_same_figures(tmp_path):
    write_run(tmp_path, "finetune", 60)
    first, second = _draw(tmp_path)[1], _draw(tmp_path)[1]
    assert [f.svg for f in first] == [f.svg for f in second]


def test_neighbouring_methods_differ_in_lightness_marker_and_line_style():
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for (a, _, _), (b, _, _) in itertools.pairwise(STYLES):
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        assert (high + 0.05) / (low + 0.05) > 1.6, (a, b)
    for part in range(3):
        assert len({str(style[part]) for style in STYLES}) == len(STYLES)


def test_dollar_signs_in_names_are_not_mathematics(tmp_path):
    write_run(tmp_path, "step_by_step_a$b^{$<i>", 60)
    write_run(tmp_path, "step_by_step_c", 60)
    _, figures = _draw(tmp_path)
    assert "step-by-step (a$b^{$&lt;i&gt;)" in figures[0].svg


def test_runs_without_evaluations_have_losses_only(tmp_path):
    write_run(tmp_path / "a", "finetune", None)
    assert [f.kind for f in _draw(tmp_path / "a")[1]] == ["curves"]
    write_run(tmp_path / "b", "finetune", None, metrics=False)
    assert _draw(tmp_path / "b")[1] == []


def test_a_missing_matplotlib_is_a_user_error(tmp_path, monkeypatch):
    write_run(tmp_path, "finetune", 60)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DssError, match=re.escape("pip install 'dss[report]'")):
        _draw(tmp_path)


def test_names_are_not_formulas_in_a_spreadsheet(tmp_path):
    figure = Figure("f", "curves", "t", "", b"", ("name", "value"), (("=1+1", -0.5), ("@x", 2.0)))
    save_figures([figure], tmp_path)
    assert (tmp_path / "f.csv").read_text().splitlines()[1:] == ["'=1+1,-0.5", "'@x,2.0"]
