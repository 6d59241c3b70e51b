"""`dss train` on the toy data, in processes of its own."""

import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.runs import finish, start

STUDENT = """
Experiment.student = @T5Config()
T5Config.vocab_size = 384
T5Config.d_model = 16
T5Config.d_kv = 8
T5Config.d_ff = 32
T5Config.num_heads = 2
T5Config.num_encoder_layers = 1
T5Config.num_decoder_layers = 1
VOCABULARY = 'bytes'
LEARNING_RATE = 0.01
BATCH_SIZE = 8
TRAIN_STEPS = 60
EVAL_PERIOD = 10
TrainerConfig.log_period = 2
TASK_FEATURE_LENGTHS = {'inputs': 48, 'targets': 24}
"""


@pytest.fixture(scope="session")
def train_command(toy_folder, tmp_path_factory):
    """Returns the arguments of `dss train` on the toy data."""
    gin = tmp_path_factory.mktemp("gin") / "student.gin"
    gin.write_text(STUDENT)

    def command(run: Path | str, *flags: str) -> list[str]:
        return [
            "train",
            f"--gin_file={gin}",
            f"--gin.MODEL_DIR={run}",
            f"--gin.DATASET_PATH={toy_folder}",
            "--gin.DATASET_LABELS=('yes', 'no')",
            "--gin.MIXTURE_OR_TASK_NAME=toy_step_by_step_rules",
            *flags,
        ]

    return command


@pytest.fixture(scope="session")
def train(train_command):
    """Starts `dss train` on the toy data in a process of its own."""

    def train(run: Path | str, *flags: str, **kwargs) -> subprocess.Popen:
        return start(*train_command(run, *flags), **kwargs)

    return train


@pytest.fixture(scope="session")
def undisturbed(train, tmp_path_factory) -> Path:
    """A run of one process that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert "step 60 done" in finish(train(run))
    return run
