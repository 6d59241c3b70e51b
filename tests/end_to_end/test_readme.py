"""The README's examples and a page's, run as a new user would; trained for fewer steps."""

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


def blocks(section: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"^## {section}$(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    return re.findall(r"^```bash\n(.*?)^```", found[1], re.DOTALL | re.MULTILINE)


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
    write, train, _ = blocks("Your own data")
    shell(write, folder)
    return folder, shell(train, folder)


def test_the_example_on_your_own_data(tickets):
    folder, out = tickets
    assert "step 60 done" in out
    assert "tickets_step_by_step_rules test" in out
    assert '"label": "b' in out
    assert '"rationale": "' in out
    out = shell(blocks("Your own data")[2], folder)
    assert "Message: The invoice shows the wrong amount" in out
    assert "requests: 6, of which 0 have an answer" in out


def test_the_examples_of_the_page_on_hugging_face_work_and_agree(tickets):
    """Those of docs/huggingface.md, one after another on the README's run."""
    folder, _ = tickets
    page = (ROOT / "docs" / "huggingface.md").read_text()
    printed = []
    for language, code in re.findall(
        r"^```(bash|python)\n(.*?)^```", page, re.DOTALL | re.MULTILINE
    ):
        script = code if language == "bash" else f"python - <<'END'\n{code}END\n"
        printed.append(shell("export HF_HUB_OFFLINE=1\n" + script, folder).strip())
    exported, transformers, predicted, _, ctranslate2, imported = printed
    assert exported.endswith("tickets-student: step 20")
    label = re.search(r'"label": "(.*?)"', predicted)[1]
    assert transformers.startswith(f"['{label}', '")
    assert ctranslate2 == f"['{label}']"
    assert f'"label": "{label}"' in imported


@pytest.mark.parametrize("dataset", ["cqa", pytest.param("svamp", marks=pytest.mark.exhaustive)])
def test_the_example_on_the_released_data(shared, vocab_path, tmp_path, dataset):
    inspect, train = blocks("The released data: CommonsenseQA")
    for before, after in SHORTER.items():
        assert before in train
        train = train.replace(before, after)
    script = (inspect + train).replace("cqa", dataset)
    out = shell(script, tmp_path, DATA=shared / "data" / "datasets", VOCAB=vocab_path)
    accuracy = {"cqa": "77.23%", "svamp": "74.00%"}[dataset]
    for wanted in (accuracy, "step 4 done", f"{dataset}_step_by_step_palm valid", '"label": "'):
        assert wanted in out, wanted
