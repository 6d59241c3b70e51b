"""A run in a bucket, on data in a bucket."""

import os
import signal

from tests.integration.bucket import MAIN, download, local_bucket, upload
from tests.integration.runs import finish, start


def test_a_run_in_a_bucket_goes_on_where_it_was_stopped(train, undisturbed, toy_folder):
    with local_bucket() as (url, variables):
        for file in toy_folder.iterdir():
            upload(url, f"toy/{file.name}", file.read_bytes())
        options = {"env": os.environ | variables, "code": MAIN}
        run, data = "gs://bucket/runs/toy", "--gin.DATASET_PATH=gs://bucket/toy"
        process = train(run, data, **options)
        for line in process.stdout:
            if line.startswith("step 20/60"):
                process.send_signal(signal.SIGTERM)
                break
        assert "SIGTERM: saved at step" in finish(process, 128 + signal.SIGTERM)
        assert "step 60 done" in finish(train(run, data, "--resume=must", **options))
        metrics = download(url, "runs/toy/metrics.jsonl").decode()
        assert metrics == (undisturbed / "metrics.jsonl").read_text()
        said = finish(start("eval", run, **options))
        assert "predictions: gs://bucket/runs/toy/predictions/" in said
