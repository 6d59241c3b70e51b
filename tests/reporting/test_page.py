import json
import re
import sys
from html.parser import HTMLParser

import pytest

from dss.cli.main import main
from dss.reporting.collect import collect
from dss.reporting.page import write_report
from tests.reporting.fabricate import STEPS, write_predictions, write_run

EVIL = "</script><script>alert(1)</script><!--<script>"
VOID = {"meta", "link", "input", "br"}


class _Checker(HTMLParser):
    """Checks that elements are closed in order, and collects ids, links and texts."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.text, self.scripts = [], [], [], [], 0

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [v for n, v in attrs if n in ("src", "href", "xlink:href", "action")]
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _write(folder, page, **options):
    """Writes a page, checks properties of all pages, and returns its text and JSON data."""
    write_report(collect([str(folder)]), page, **options)
    source = page.read_text(encoding="utf-8")
    checker = _Checker()
    checker.feed(source)
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids), "ids of several figures"
    assert checker.scripts == 2
    assert all(link.startswith(("#", "data:,")) for link in checker.links), "needs a network"
    assert "@import" not in source
    assert "font-face" not in source
    (data,) = re.findall(r'id="data">(.*?)</script>', source, re.DOTALL)
    text = re.sub(r"\s+", " ", " ".join(checker.text))
    return text, json.loads(data)


def test_the_page_has_the_main_result_first_and_all_runs(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path, "finetune", 70, seed=seed)
        for examples, right in ((250, 65), (500, 80)):
            write_run(tmp_path, "step_by_step_rules", right, examples=examples, seed=seed)
    text, data = _write(tmp_path, tmp_path / "report.html", command="dss report x")
    wanted = "Step-by-step needs about 310 (31%) to match finetuning on all 1,000 examples."
    assert wanted in text
    assert (
        text.index(wanted)
        < text.index("Accuracy by training examples")
        < text.index("Comparison of methods")
    )
    for said in ("8 TPU v4, 2 processes", "1 min 15 s", "497 of 500", "dss 0.1.0, jax 9.9",
                 "Experiment.mixture = 'toy_finetune'", "dss report x",
                 "rules: 30,000, cost 2.00 EUR", "none used"):  # fmt: skip
        assert said in text
    assert [len(run["answers"]) for run in data["runs"]] == [100] * 9
    assert data["runs"][0]["label"].endswith("500 examples, seed 0: accuracy 80.0%")
    example = data["examples"][data["runs"][0]["answers"][0][0]]
    assert example == ["test-0", "is 0 good", "yes", [["rules", "no", "0 is odd"]]]
    assert (tmp_path / "report-figures").is_dir()


def test_texts_and_names_are_not_executed(tmp_path):
    run = write_run(tmp_path, "step_by_step_" + EVIL.replace("/", ""), 50, texts=[EVIL] * 100)
    path = next((run / "predictions").glob("*.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["input"] = row["target"] = row["rationale"] = EVIL
        row["teachers"] = {EVIL: {"label": EVIL, "rationale": EVIL}}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "report.html"
    text, data = _write(tmp_path, page)
    assert "<script>alert" not in page.read_text()
    assert data["examples"][0] == ["test-0", EVIL, EVIL, [[EVIL, EVIL, EVIL]]]
    assert data["runs"][0]["answers"][0][1] == EVIL
    assert "Nothing to compare yet." in text


def test_runs_without_an_evaluation_are_shown_as_not_measured(tmp_path):
    write_run(tmp_path, "finetune", None, seed=0)
    write_run(tmp_path, "finetune", None, seed=1, steps=STEPS // 2, outcome="failed: <b>disk</b>")
    write_run(tmp_path, "finetune", None, seed=2, outcome=None, metrics=False)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.gin").write_text("nonsense = [\n")
    text, data = _write(tmp_path, tmp_path / "report.html")
    for said in (
        "No run of toy is finished and evaluated on the test split. Evaluate one with dss eval RUN",
        "failed at step 20 of 40: <b>disk</b>",
        "not started",
        "2 of 3 runs did not finish",
        "1 finished run not evaluated on test:",
        "not measured",
        "validation: 50.0%",
        "over 0 s",
        "Excluded files and runs",
        "/broken",
    ):
        assert said in text, said
    assert data == {"examples": [], "runs": [], "of": 0, "cut": 0}


def test_a_large_page_has_a_sample_of_predictions(tmp_path, monkeypatch):
    monkeypatch.setattr("dss.reporting.page.SHOWN_PREDICTIONS", 60)
    monkeypatch.setattr("dss.reporting.page.SHOWN_TEXT", 10)
    for seed in range(4):
        write_run(tmp_path, "finetune", 50 + seed, seed=seed, texts=["long " * 100] * 100)
    text, data = _write(tmp_path, tmp_path / "report.html")
    assert [run["label"][-5:] for run in data["runs"]] == ["53.0%", "52.0%", "51.0%"]
    assert [len(run["answers"]) for run in data["runs"]] == [20] * 3
    assert data["runs"][0]["answers"][0][1] == "long long … (490 more characters)"
    assert "60 of 400 predictions" in text
    assert "none of 1 further runs" in text


def test_several_datasets_and_another_split(tmp_path):
    for dataset in ("b", "a"):
        run = write_run(tmp_path, "finetune", None, dataset=dataset)
        scores = [1.0] * 8 + [0.0] * 2
        write_predictions(run, f"{dataset}_finetune", STEPS, scores, split="valid")
    text, data = _write(tmp_path, tmp_path / "report.html", split="valid")
    assert text.count("Nothing to compare yet.") == 2
    assert text.count("80.0%") >= 4
    assert [run["label"][:3] for run in data["runs"]] == ["a: ", "b: "]


def test_the_command_writes_the_page_and_prints_the_main_result(tmp_path, capsys):
    write_run(tmp_path / "runs", "finetune", 80)
    write_run(tmp_path / "runs", "step_by_step_rules", 85)
    page = tmp_path / "new" / "page.html"
    assert main(["report", str(tmp_path / "runs"), "-o", str(page)]) == 0
    out = capsys.readouterr().out
    assert "toy: Step-by-step matches finetuning on all 1,000 examples" in out
    assert f"2 runs: {page}; figures: {tmp_path / 'new' / 'page-figures'}" in out
    assert page.is_file()


def test_the_size_of_a_teacher_is_an_option(tmp_path, capsys):
    for width in (16, 32):
        write_run(tmp_path / "runs", "step_by_step_rules", 85, width=width, teacher_right=90)
    page = tmp_path / "page.html"
    options = ["--teacher-size=rules=70B", "--split=test"]
    assert main(["report", str(tmp_path / "runs"), "-o", str(page), *options]) == 0
    text = page.read_text()
    assert "teacher rules (70B): 90.0%" in text
    assert "--teacher-size=rules=70B -o" in text
    for wrong in ("rules", "rules=", "=7B", "rules=70", "rules=0B"):
        assert main(["report", str(tmp_path / "runs"), f"--teacher-size={wrong}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"dss report: --teacher-size={wrong}: give a teacher and its")


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("runs", "a folder; give the name of a file"),
        ("file/report.html", "file: file exists"),
        ("taken/report.html", "report-figures: file exists"),
    ],
)
def test_an_unwritable_output_is_an_error_of_one_line(tmp_path, capsys, output, said):
    write_run(tmp_path / "runs", "finetune", 80)
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "report-figures").touch()
    assert main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_missing_jinja2_is_a_user_error(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "runs", "finetune", 80)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "report.html")]) == 2
    error = "dss report: the report needs jinja2 (not installed): pip install 'dss[report]'\n"
    assert capsys.readouterr().err == error
