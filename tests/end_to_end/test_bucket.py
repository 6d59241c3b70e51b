"""A run in a bucket, on data in a bucket."""

import os
import signal

import jax
import numpy as np
import pytest

from dss.runs.directory import load_run
from tests.end_to_end.bucket import MAIN, download, local_bucket, upload
from tests.end_to_end.runs import SLOW, call, finish, start


def test_a_run_in_a_bucket_goes_on_where_it_was_stopped(train, toy_folder, tmp_path):
    few_saves = ("--gin.TRAIN_STEPS=30", "--gin.EVAL_PERIOD=15")  # each takes many requests
    finish(train(tmp_path / "disk", *few_saves))
    with local_bucket() as (url, variables):
        for file in toy_folder.iterdir():
            upload(url, f"toy/{file.name}", file.read_bytes())
        options = {"env": os.environ | variables, "code": MAIN}
        run, flags = "gs://bucket/runs/toy", ("--gin.DATASET_PATH=gs://bucket/toy", *few_saves)
        process = train(run, *flags, env=options["env"], code=SLOW + MAIN)
        for line in process.stdout:
            if line.startswith("step 15/30"):
                process.send_signal(signal.SIGTERM)
                break
        assert "SIGTERM: saved at step" in finish(process, 128 + signal.SIGTERM)
        assert "step 30 done" in finish(train(run, *flags, "--resume=must", **options))
        metrics = download(url, "runs/toy/metrics.jsonl").decode()
        assert metrics == (tmp_path / "disk" / "metrics.jsonl").read_text()
        said = finish(start("eval", run, **options))
        assert "predictions: gs://bucket/runs/toy/predictions/" in said


@pytest.mark.parametrize(
    "form", ["t5x legacy", pytest.param("t5x orbax", marks=pytest.mark.exhaustive), "hf"]
)
def test_a_checkpoint_is_imported_from_a_bucket(form, shared, tmp_path):
    kind, _, layout = form.partition(" ")
    if kind == "t5x":
        folder, vocabulary = shared / "fixtures" / "t5x_tiny_v1_1" / layout, "--vocabulary=bytes"
    else:
        folder = shared / "fixtures" / "reference_cqa" / "model"
        vocabulary = f"--vocabulary={shared / 'data' / 'vocab' / 't5_cc_all_32000.model'}"
    with local_bucket() as (url, variables):
        for file in folder.rglob("*"):
            if file.is_file():
                upload(url, f"from/{file.relative_to(folder)}", file.read_bytes())
        options = {"env": os.environ | variables, "code": MAIN}
        source = f"{kind}:gs://bucket/from"
        said = finish(start("import", source, tmp_path / "bucket", vocabulary, **options))
        assert "M parameters" in said
        nothing = finish(
            start("import", f"{kind}:gs://bucket/other", tmp_path / "none", vocabulary, **options),
            status=2,
        )
        assert f"gs://bucket/other: no {'T5X ' * (kind == 't5x')}checkpoint" in nothing
    call("import", f"{kind}:{folder}", tmp_path / "disk", vocabulary)
    params = [load_run(tmp_path / run).predictor()[0].params for run in ("bucket", "disk")]
    jax.tree.map(np.testing.assert_array_equal, *params)
