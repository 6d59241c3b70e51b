"""Agreement of a quantized export with its student, on the labels of validation inputs."""

import dataclasses
from pathlib import Path

from dss.errors import DssError
from dss.evaluation.evaluator import Scored, evaluation_set
from dss.evaluation.significance import paired_bootstrap
from dss.export.ctranslate2_engine import load_engine
from dss.runs.directory import Run
from dss.student.network import num_parameters

__all__ = ["Agreement", "measure"]

FEW = 50  # validation examples below which an agreement says little


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of an export with its student.

    Attributes:
      examples: number of validation examples.
      equal: number of examples with the same predicted label.
      metric: name of the score, "accuracy" or "rouge_l".
      scores: mean score of the student and of the export, in [0, 1].
      difference: the export's mean score minus the student's, with its 95% interval by paired
        bootstrap.
      size: size of the export's weights in bytes.
      float_size: size of the student's parameters in float32, in bytes.
    """

    examples: int
    equal: int
    metric: str
    scores: tuple[float, float]
    difference: tuple[float, float, float]
    size: int
    float_size: int

    @property
    def share(self) -> float:
        """The fraction of examples with the same predicted label, in [0, 1]."""
        return self.equal / self.examples

    def rows(self) -> list[tuple[str, str]]:
        """Returns (name, value) rows for people."""
        student, export = self.scores
        mean, low, high = self.difference
        metric = self.metric.replace("_", "-")
        few = "" if self.examples >= FEW else "; few examples: this says little"
        return [
            (
                "equal labels",
                f"{self.share:.2%} ({self.equal} of {self.examples}, validation{few})",
            ),
            (f"{metric} of the student", f"{student:.2%}"),
            (
                f"{metric} of this export",
                f"{export:.2%} ({mean:+.2%}; 95% CI: {low:+.2%} to {high:+.2%})",
            ),
            (
                "size of the weights",
                f"{self.size / 1e6:.1f} MB ({self.size / self.float_size:.0%} of float32)",
            ),
        ]

    def __str__(self) -> str:
        return "; ".join(f"{name}: {value}" for name, value in self.rows())


def measure(run: Run, folder: Path, step: int, examples: int) -> Agreement:
    """Returns the agreement of a CTranslate2 export with its student.

    Args:
      run: the run with the student.
      folder: the export's folder.
      step: the step of the exported checkpoint.
      examples: number of validation examples, at most.

    Raises:
      DssError: if the run has no mixture or no validation examples.
    """
    experiment, mixture = run.experiment, run.mixture()
    chosen = evaluation_set(
        mixture, "valid", fraction=experiment.data.fraction, seed=experiment.seed
    )[:examples]
    if not chosen:
        raise DssError(f"{mixture.name}: no validation examples to verify the export on")
    predictor, _ = run.predictor(str(step))
    engine = load_engine(folder, predictor.vocabulary, experiment.decoding)
    length = experiment.data.inputs_length
    student, export = (e.predict(mixture, chosen, length) for e in (predictor, engine))
    scored = [
        Scored.of(mixture, chosen, texts, predictor.vocabulary) for texts in (student, export)
    ]
    return Agreement(
        examples=len(chosen),
        equal=sum(a == b for a, b in zip(student, export, strict=True)),
        metric=scored[0].metric,
        scores=(scored[0].value, scored[1].value),
        difference=paired_bootstrap(scored[1].verdicts, scored[0].verdicts),
        size=(folder / "model.bin").stat().st_size,
        float_size=4 * num_parameters(run.config),
    )
