"""The examples of the README and the pages, run as a new user would; trained for fewer steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SHORTER = {
    "--gin.TRAIN_STEPS=200": "--gin.TRAIN_STEPS=4 --gin.Experiment.eval_examples=16",
    "--gin.EVAL_PERIOD=100": "--gin.EVAL_PERIOD=4",
    "dss eval runs/cqa-tiny": "dss eval runs/cqa-tiny --split=valid",
}


def blocks(page: str, section: str | None = None) -> list[str]:
    """Returns the fenced blocks of a page, or of one section of it, as shell scripts."""
    text = (ROOT / page).read_text()
    if section is not None:
        text = re.split(rf"^##+ {section}$", text, flags=re.MULTILINE)[1]
        text = re.split(r"^##", text, maxsplit=1, flags=re.MULTILINE)[0]
    fenced = re.findall(r"^```(bash|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [
        code if kind == "bash" else f"python - <<'PYTHON'\n{code}PYTHON\n" for kind, code in fenced
    ]


def shell(script: str, folder: Path, **env: Path) -> str:
    bin_folder = Path(sys.executable).parent
    env = os.environ | {k: str(v) for k, v in env.items()}
    env["PATH"] = f"{bin_folder}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tickets(tmp_path_factory) -> tuple[Path, str]:
    """A folder in which the example on your own data was run, and what that printed."""
    folder = tmp_path_factory.mktemp("tickets")
    write, train, _ = blocks("docs/data.md", "A worked example")
    shell(write, folder)
    return folder, shell(train, folder)


def test_the_report_of_a_spreadsheet_is_the_pages(tmp_path):
    (block,) = blocks("docs/data.md", "From a spreadsheet")
    section = (ROOT / "docs/data.md").read_text().split("## JSON lines")[0]
    wanted = re.search(r"prints\n\n((?: {4}.*\n)+)", section)[1]
    out = shell(block, tmp_path)
    assert out.startswith(re.sub(r"^ {4}", "", wanted, flags=re.MULTILINE))
    assert (tmp_path / "tickets/train.jsonl").read_text().count("\n") == 5


def test_the_example_on_your_own_data(tickets):
    folder, out = tickets
    assert "step 60 done" in out
    assert "tickets_step_by_step_rules test" in out
    assert '"label": "b' in out
    assert '"rationale": "' in out
    (of_readme,) = blocks("README.md", "3. Train on your own data")
    for annotate in (blocks("docs/data.md", "A worked example")[2], of_readme):
        out = shell(annotate, folder)
        assert "Message: The invoice shows the wrong amount" in out
        assert "requests: 6, of which 0 have an answer" in out


def test_the_examples_in_python_agree_with_the_command_line(tickets):
    folder, out = tickets
    label, rationale = re.search(r'"label": "(.*?)", "rationale": "(.*?)"', out).groups()
    accuracy = float(re.search(r"accuracy ([\d.]+)%", out)[1]) / 100
    (of_readme,) = blocks("README.md", "From Python")
    assert shell(of_readme, folder).splitlines() == [f"{label} | {rationale}", f"{accuracy}"]
    (of_page,) = blocks("docs/serving.md", "Predicting")
    first, second = shell(of_page, folder).splitlines()
    assert first.startswith(f"{label} {{'")
    assert second.startswith(("billing {'", "bug {'"))


def test_the_examples_of_the_page_on_hugging_face_work_and_agree(tickets):
    """Those of docs/huggingface.md, one after another on the run of docs/data.md."""
    folder, _ = tickets
    scripts = blocks("docs/huggingface.md")
    printed = [shell("export HF_HUB_OFFLINE=1\n" + script, folder).strip() for script in scripts]
    exported, transformers, predicted, _, ctranslate2, imported = printed
    assert exported.endswith("tickets-student: step 20")
    label = re.search(r'"label": "(.*?)"', predicted)[1]
    assert transformers.startswith(f"['{label}', '")
    assert ctranslate2 == f"['{label}']"
    assert f'"label": "{label}"' in imported


@pytest.mark.parametrize("dataset", ["cqa", pytest.param("svamp", marks=pytest.mark.exhaustive)])
def test_the_example_on_the_released_data(shared, vocab_path, tmp_path, dataset):
    inspect, train = blocks("docs/training.md", "The released data on a laptop")
    for before, after in SHORTER.items():
        assert before in train
        train = train.replace(before, after)
    script = (inspect + train).replace("cqa", dataset)
    out = shell(script, tmp_path, DATA=shared / "data" / "datasets", VOCAB=vocab_path)
    accuracy = {"cqa": "77.23%", "svamp": "74.00%"}[dataset]
    for wanted in (accuracy, "step 4 done", f"{dataset}_step_by_step_palm valid", '"label": "'):
        assert wanted in out, wanted
