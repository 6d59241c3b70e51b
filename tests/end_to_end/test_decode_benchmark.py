"""Decoding is timed against transformers and CTranslate2."""

import json
import runpy
import sys

import pytest

from tests.conftest import ROOT
from tests.end_to_end.test_benchmarks import run

TINY = ("decode.py", "--student=tiny", "--inputs=12", "--length=8", "--repeats=1")
CT2 = "ctranslate2"
CASES = ["greedy forced b3", "beam 2 forced b3", "greedy natural b3", "beam 2 natural b3"]


@pytest.mark.exhaustive
def test_decoding_is_timed_against_transformers_and_ctranslate2(tmp_path):
    """That the sides do equal work; the figures are for a quiet machine."""
    done = run(*TINY, "--batch=3", *("--beams", "1", "2"), "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    others = ["transformers", CT2]
    assert list(figures["sides"]) == ["dss", *others]
    rows = figures["decoding"]
    assert len(rows) == len(CASES) * len(figures["sides"])
    assert all(row["seconds"] > 0 for row in rows)
    assert all(row["mean_length"] == 8 for row in rows if row["mode"] == "forced")
    assert all(1 < row["mean_length"] < 8 for row in rows if row["mode"] == "natural")
    for other in others:
        assert list(figures[f"ratio_vs_{other}"]) == CASES
    # CTranslate2 has another rule for when a beam search has ended.
    same = [r for r in rows if r["side"] == "transformers" or (r["side"], r["beams"]) == (CT2, 1)]
    assert [row["agreement"] for row in same] == [1] * 6
    assert [row["candidates"] for row in figures["scoring"]] == [5, 3]
    assert all(row["ratio_vs_greedy_forced"] > 0 for row in figures["scoring"])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--student=huge", "huge.gin"),
        ("--student=t5_1_0_small", "T5 1.0"),
        ("--batch=0", "at least 1"),
        ("--threads=100000", "cores"),
        ("--json=missing/figures.json", "no folder missing"),
    ],
)
def test_what_cannot_be_measured_is_one_line(option, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*TINY, option])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "benchmarks" / TINY[0]), run_name="__main__")
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith("decode: ")
    assert said in printed
