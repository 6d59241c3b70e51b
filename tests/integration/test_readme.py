"""The README's examples, run as a new user would; trained for fewer steps."""

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


def test_the_example_on_your_own_data(tmp_path):
    write, train, annotate = blocks("Your own data")
    shell(write, tmp_path)
    out = shell(train, tmp_path)
    assert "step 60 done" in out
    assert "tickets_step_by_step_rules test" in out
    assert '"label": "b' in out
    assert '"rationale": "' in out
    out = shell(annotate, tmp_path)
    assert "Message: The invoice shows the wrong amount" in out
    assert "requests: 6, of which 0 have an answer" in out


@pytest.mark.parametrize("dataset", ["cqa", "svamp"])
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
