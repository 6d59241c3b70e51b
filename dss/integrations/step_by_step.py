"""A TFDS builder of the released datasets, or of a user's own JSON lines.

    tfds build step_by_step --imports=dss.integrations.step_by_step --config=svamp --manual_dir=DIR

DIR is the folder of the released datasets, or with `--config=jsonl` the folder of `train.jsonl` and
the other files of `dss.data.datasets.JsonlSource`. The splits are those of `dss train`. The
dataset's metadata have the number of outputs by status and the teachers' accuracy.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from dss.batches.statistics import measure_split
from dss.data.datasets import SPLITS, Dataset, JsonlSource
from dss.data.released import RELEASED
from dss.errors import missing_package

try:
    import tensorflow_datasets as tfds
except ModuleNotFoundError as error:
    raise missing_package("the TFDS builder", error.name, "tfds") from None

__all__ = ["StepByStep"]

HOMEPAGE = "https://arxiv.org/abs/2305.02301"  # the default would be a page of TFDS's catalogue


class StepByStep(tfds.core.GeneratorBasedBuilder):
    """Examples with the labels and rationales of their teachers."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Examples, gold labels and every teacher's outputs with status."}  # noqa: RUF012
    BUILDER_CONFIGS = [  # noqa: RUF012
        *(tfds.core.BuilderConfig(name=name) for name in RELEASED),
        tfds.core.BuilderConfig(name="jsonl", description="A user's own JSON lines."),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "The folder of the released datasets, or for the config `jsonl` a folder with train.jsonl."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        output = dict.fromkeys(("teacher", "rationale", "label", "raw", "status"), text)
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "id": text,
                    "input": text,
                    "label": text,  # empty where has_label is false
                    "has_label": tfds.features.Scalar(dtype=np.bool_),
                    "outputs": tfds.features.Sequence(output),
                }
            ),
            metadata=tfds.core.MetadataDict(),
            homepage=HOMEPAGE,
        )

    def _dataset(self, manual_dir: Any) -> Dataset:
        if self.builder_config.name == "jsonl":
            return Dataset("jsonl", JsonlSource(manual_dir))
        return Dataset.released(self.builder_config.name, manual_dir)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        dataset = self._dataset(dl_manager.manual_dir)
        splits = {}
        for split in SPLITS:
            if not dataset.has(split):
                continue
            teachers = [t for t in dataset.source.teachers if dataset.has(split, t)]
            measured = measure_split(dataset, split, teachers)
            self.info.metadata[split] = dataclasses.asdict(measured)
            splits[split] = self._generate_examples(dataset, split, teachers)
        return splits

    def _generate_examples(
        self, dataset: Dataset, split: str, teachers: list[str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        outputs = {teacher: dataset.outputs(split, teacher) for teacher in teachers}
        for example in dataset.examples(split):
            written = [outputs[t][example.id] for t in teachers if example.id in outputs[t]]
            yield (
                example.id,
                {
                    "id": example.id,
                    "input": example.input,
                    "label": example.label or "",
                    "has_label": example.label is not None,
                    "outputs": [
                        {
                            "teacher": o.teacher,
                            "rationale": o.rationale,
                            "label": o.label or "",
                            "raw": o.raw,
                            "status": o.status,
                        }
                        for o in written
                    ],
                },
            )
