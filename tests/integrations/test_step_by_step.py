"""Tests the TFDS builder with TFDS's test case for builders."""

import pytest
import tensorflow_datasets as tfds

from dss.integrations.step_by_step import StepByStep


@pytest.fixture(scope="module", autouse=True)
def _files(small_root, toy_folder):
    """Sets the folders of the files that a user downloads by hand."""
    TestHeldOut.EXAMPLE_DIR = TestWithValidation.EXAMPLE_DIR = small_root
    TestOwnFiles.EXAMPLE_DIR = toy_folder


class TestHeldOut(tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = StepByStep
    BUILDER_CONFIG_NAMES_TO_TEST = ["cqa", "svamp", "asdiv"]  # noqa: RUF012
    SPLITS = {"train": 18, "valid": 2, "test": 20}  # noqa: RUF012


class TestWithValidation(tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = StepByStep
    BUILDER_CONFIG_NAMES_TO_TEST = ["esnli", "anli1"]  # noqa: RUF012
    SPLITS = {"train": 20, "valid": 20, "test": 20}  # noqa: RUF012


class TestOwnFiles(tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = StepByStep
    BUILDER_CONFIG_NAMES_TO_TEST = ["jsonl"]  # noqa: RUF012
    SPLITS = {"train": 40, "valid": 8, "test": 8}  # noqa: RUF012


def test_a_dataset_has_its_version_statistics_and_statuses(small_root, toy_folder, tmp_path):
    for config, source, rows in (("esnli", small_root, 20), ("jsonl", toy_folder, 40)):
        builder = StepByStep(config=config, data_dir=tmp_path)
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=source)
        )
        assert str(builder.info.version) == "1.0.0"
        assert builder.info.splits["train"].num_examples == rows
        statistics = builder.info.metadata["train"]
        assert statistics["labelled"] == rows
        for teacher in statistics["teachers"].values():
            assert teacher["statuses"] == {"ok": rows}
        read = list(tfds.as_numpy(builder.as_dataset("train")))
        assert all(len(row["outputs"]["rationale"]) for row in read)
