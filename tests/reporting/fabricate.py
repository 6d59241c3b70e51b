"""Writes run directories like those of `dss train` and `dss eval`, without training."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from dss.config.experiment import DataConfig, Experiment
from dss.config.gin_files import save_config
from dss.training.config import TrainerConfig
from tests.conftest import tiny_config, write_jsonl

STEPS, TEST = 40, 100  # steps of a run, test examples


def verdicts(right: int) -> list[float]:
    """Returns 0/1 scores of the test examples, of which the first `right` are correct."""
    return [1.0] * right + [0.0] * (TEST - right)


def write_run(
    folder: Path,
    method: str,
    right: int | None,
    *,
    examples: int = 1000,
    total: int = 1000,
    unlabelled: int = 0,
    seed: int = 0,
    width: int = 16,
    steps: int = STEPS,
    outcome: str | None = "done",
    dataset: str = "toy",
    texts: Sequence[str] = (),
    teacher_right: int | None = 90,
    metrics: bool = True,
    **changes: Any,
) -> Path:
    """Writes a run directory into `folder`.

    Args:
      folder: folder of the runs.
      method: method and teacher, such as "finetune" or "step_by_step_rules".
      right: number of correct test predictions; None for a run without an evaluation.
      examples: number of training examples.
      total: number of training examples of the whole dataset.
      unlabelled: number of `examples` with a rationale but no label.
      seed: seed of the experiment.
      width: d_model of the student.
      steps: number of completed steps.
      outcome: outcome of the session; None for a killed one.
      dataset: name of the dataset.
      texts: predictions to write instead of yes and no.
      teacher_right: number of the teacher's correct labels; None without a teacher.
      metrics: whether to write metrics.
      changes: further fields of the experiment.
    """
    run = folder / f"{dataset}-{method}-{width}-{examples}-{seed}"
    experiment = Experiment(
        mixture=f"{dataset}_{method}",
        run_dir=str(run),
        student=tiny_config(d_model=width),
        vocabulary="bytes",
        seed=seed,
        data=DataConfig(dataset_path=f"/data/{dataset}", fraction=min(1, (examples + 0.5) / total)),
        trainer=TrainerConfig(train_steps=STEPS, eval_period=STEPS // 2, log_period=STEPS // 4),
    )
    run.mkdir(parents=True)
    save_config(dataclasses.replace(experiment, **changes), epath.Path(run))
    kinds = ["label"] + (["rationale"] if method.startswith("step") else [])
    if metrics:
        lines: list[dict] = []
        for step in range(STEPS // 4, steps + 1, STEPS // 4):
            losses = {f"train/{kind}_loss": 2 / step for kind in kinds}
            lines.append({"step": step, "train/loss": 2 / step, **losses})
            if step % (STEPS // 2) == 0:
                losses = {f"valid/{kind}_loss": 3 / step for kind in kinds}
                lines.append({"step": step, **losses, "valid/accuracy": step / STEPS / 2})
        write_jsonl(run / "metrics.jsonl", lines)
    tasks = [
        {
            "kind": kind,
            "teacher": None if kind == "label" else "rules",
            "examples": examples - (3 if k else unlabelled),
            "input_tokens": 10 * examples,
            "target_tokens": 4 * examples,
            "cut_inputs": 2,
            "cut_targets": 0,
            "ledger": {
                "rows": examples,
                "fates": {"trained": examples - 3, "unparsed": 2, "missing": 1}
                if k
                else {"trained": examples - unlabelled, "no label": unlabelled},
            },
            "usage": k
            and {
                "outputs": 994,
                "prompt_tokens": 50_000,
                "completion_tokens": 10_000,
                "cost": 4.0,
                "currency": "EUR",
            },
        }
        for k, kind in enumerate(kinds)
    ]
    begin = {
        "event": "begin", "step": 0, "device": "TPU v4", "devices": 8, "processes": 2,
        "versions": {"dss": "0.1.0", "jax": "9.9"},
        "data": {
            "dataset": dataset,
            "examples": examples - (unlabelled if len(kinds) == 1 else 0),
            "tasks": tasks,
        },
    }  # fmt: skip
    end = [{"event": "end", "outcome": outcome, "seconds": 75.0}] if outcome else []
    write_jsonl(run / "sessions.jsonl", [begin, *end])
    if right is not None:
        write_predictions(run, f"{dataset}_{method}", steps, verdicts(right), texts, teacher_right)
    return run


def write_predictions(
    run: Path,
    mixture: str,
    step: int,
    scores: Sequence[float],
    texts: Sequence[str] = (),
    teacher_right: int | None = 90,
    split: str = "test",
) -> Path:
    """Writes an evaluation. All targets are yes; the teacher's last labels are yes, others no."""
    rows = []
    for i, score in enumerate(scores):
        row: dict[str, Any] = {
            "id": f"{split}-{i}",
            "input": f"is {i} good",
            "target": "yes",
            "prediction": texts[i] if i < len(texts) else ("yes" if score else "no"),
            "score": score,
        }
        if teacher_right is not None:
            label = "yes" if i >= len(scores) - teacher_right else "no"
            row["teachers"] = {"rules": {"label": label, "rationale": f"{i} is odd"}}
        rows.append(row)
    path = write_jsonl(run / "predictions" / f"{mixture}-{split}-{step}.jsonl", rows)
    teachers = {}
    if teacher_right is not None:
        teachers["rules"] = {
            "metric": "accuracy", "value": teacher_right / len(scores), "interval": [0.8, 0.95],
            "examples": len(scores), "p_value": 0.5,
        }  # fmt: skip
    half = len(scores) // 2
    summary = {
        "metric": "accuracy",
        "teachers": teachers,
        "confusion": {
            "labels": ["yes", "no"],
            "counts": [[half, 0, 0], [len(scores) - half, 0, 0]],
        },
    }
    path.with_suffix(".json").write_text(json.dumps(summary))
    return path
