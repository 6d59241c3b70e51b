"""Commands as in an installation without the extras `seqio` and `tfds`."""

import json

from tests.end_to_end.runs import TENSORFLOW_MODULES, finish, start

COMMANDS = f"""
import json, sys
sys.modules.update(dict.fromkeys({TENSORFLOW_MODULES}))  # as if they were not installed
from dss.cli.main import main
for command in json.loads(sys.argv[1]):
    assert main(command) == 0
"""


def test_without_tensorflow_a_run_is_trained_evaluated_and_predicts(train_command, tmp_path):
    run, inputs, outputs = (str(tmp_path / name) for name in ("run", "in.jsonl", "out.jsonl"))
    (tmp_path / "in.jsonl").write_text('{"input": "is 3 good"}\n')
    data = [flag for flag in train_command(run) if "DATASET" in flag]
    commands = [
        ["inspect", "toy_step_by_step_rules", *data, "--gin.VOCABULARY=bytes"],
        train_command(run, "--gin.TRAIN_STEPS=4", "--gin.EVAL_PERIOD=4"),
        ["eval", run],
        ["predict", run, f"--input={inputs}", f"--output={outputs}"],
        ["export", run, "--to=t5x", str(tmp_path / "export")],
    ]
    said = finish(start(json.dumps(commands), code=COMMANDS))
    assert "step 4 done" in said
    assert "test, step 4: accuracy" in said
    assert json.loads((tmp_path / "out.jsonl").read_text())["label"] in ("yes", "no")
