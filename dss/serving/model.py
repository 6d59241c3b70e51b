"""A student that is served: a run, or an export for transformers or CTranslate2."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import dss
from dss.config.data import open_mixture
from dss.config.gin_files import load_config
from dss.data.vocabulary import BYTES, EOS, Vocabulary, is_cut, load_vocabulary
from dss.errors import DssError
from dss.evaluation.evaluator import Answer, Engine, Predictor
from dss.interop.huggingface_export import SPIECE
from dss.mixtures.methods import Mixture
from dss.paths import CONFIG_FILE
from dss.runs.student import answer, explain

__all__ = ["MODEL_FILE", "ServedModel", "open_model"]

MODEL_FILE = "model.bin"  # of a CTranslate2 export
SIZES = (1, 8, 32)  # batch sizes; a batch is padded to the next one
LENGTHS = 8  # input lengths that batches are padded to


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A student that answers batches of texts.

    Attributes:
      name: name of the model in requests.
      engines: engine for each batch size of `SIZES`.
      mixture: mixture that the student was trained on.
      length: longest input in tokens.
    """

    name: str
    engines: tuple[Engine, ...]
    mixture: Mixture
    length: int

    @property
    def vocabulary(self) -> Vocabulary:
        """The student's vocabulary."""
        return self.engines[0].vocabulary

    @property
    def labels(self) -> tuple[str, ...]:
        """The closed set of labels; empty for none."""
        return self.mixture.dataset.labels.closed

    @property
    def explains(self) -> bool:
        """Whether the student generates rationales."""
        return any(task.kind != "label" for task in self.mixture.tasks)

    def answer(self, texts: Sequence[str]) -> list[Answer]:
        """Returns the prediction for each text."""
        return answer(self._engine(len(texts)), self.mixture, texts, self.length)

    def explain(self, texts: Sequence[str]) -> list[str]:
        """Returns the rationale that the student generates for each text.

        Raises:
          DssError: if the student was not trained to generate rationales.
        """
        return explain(self._engine(len(texts)), self.mixture, texts, self.length)

    def is_cut(self, text: str) -> bool:
        """Returns whether a text is longer than the longest input."""
        return is_cut(self.vocabulary, self.mixture.tasks[0].prefix + text, self.length)

    def warm(self, say: Callable[[str], None]) -> None:
        """Compiles all batch shapes of predictions; rationales compile when first requested.

        Args:
          say: function that shows a message.
        """
        for size, engine in zip(SIZES, self.engines, strict=True):
            if not isinstance(engine, Predictor):  # which compiles nothing
                continue
            multiple = engine.decoding.length_multiple
            for length in range(multiple, self.length + multiple, multiple):
                say(f"compiling batches of {size} inputs of {length} tokens")
                inputs = [[EOS + 2] * (length - 1) + [EOS]] * size
                if self.labels and engine.decoding.closed:
                    engine.choose(inputs, [self.labels] * size)
                else:
                    engine.generate(inputs, max_length=engine.decoding.max_length)

    def _engine(self, count: int) -> Engine:
        fitting = (e for e, size in zip(self.engines, SIZES, strict=True) if size >= count)
        return next(fitting, self.engines[-1])


def open_model(source: str, checkpoint: str = "best", name: str | None = None) -> ServedModel:
    """Opens the student of a run or of an export.

    Args:
      source: a run directory, a folder of `dss export`, or a source of `dss.load`.
      checkpoint: "best", "latest" or a step of a run directory.
      name: name of the model in requests; None for the folder's.

    Raises:
      DssError: if the source has no student, or the student no task.
    """
    folder = Path(source).expanduser()
    if (folder / MODEL_FILE).is_file():
        engine, mixture, length = _open_ctranslate2(folder)
    else:
        student = dss.load(source, checkpoint=checkpoint)
        if not student.experiment.has_task:
            raise DssError(f"{source}: an imported checkpoint without a task; train it first")
        engine = student.run.predictor(checkpoint)[0]
        mixture = student.run.mixture(must_exist=False)
        length = student.experiment.data.inputs_length
    multiple = max(engine.decoding.length_multiple, -(-length // LENGTHS))
    engines = tuple(
        dataclasses.replace(
            engine,
            decoding=dataclasses.replace(
                engine.decoding, batch_size=size, length_multiple=multiple
            ),
        )
        for size in SIZES
    )
    return ServedModel(name or folder.name, engines, mixture, length)


def _open_ctranslate2(folder: Path) -> tuple[Engine, Mixture, int]:
    from dss.export.ctranslate2_engine import load_engine

    if not (folder / CONFIG_FILE).is_file():
        raise DssError(f"{folder}: no {CONFIG_FILE}; export the student again with dss")
    experiment = load_config(folder)
    spiece = folder / SPIECE
    vocabulary = load_vocabulary(str(spiece) if spiece.is_file() else BYTES)
    engine = load_engine(folder, vocabulary, experiment.decoding)
    return engine, open_mixture(experiment, must_exist=False), experiment.data.inputs_length
