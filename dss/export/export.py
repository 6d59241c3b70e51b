"""Exports a run's student to the formats of other programs.

hf            a Hugging Face directory: config.json, safetensors, tokenizer, model card
t5x           a T5X checkpoint (Orbax), with Adafactor's state if the run has one
ctranslate2   a CTranslate2 model, with the tokenizer
"""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from etils import epath

from dss.config.gin_files import save_config
from dss.data.vocabulary import load_vocabulary
from dss.errors import DssError, first_line, unknown_name
from dss.export import comparison
from dss.export.agreement import Agreement, measure
from dss.export.model_card import model_card
from dss.interop import ctranslate2_export, huggingface_export, t5x_export
from dss.interop.disassemble import Params
from dss.paths import absolute, in_bucket
from dss.runs.directory import Run
from dss.student.network import abstract_params
from dss.training.checkpoints import Checkpoints
from dss.training.checksums import path_names

__all__ = ["FORMATS", "Exported", "Quantization", "export"]


@dataclasses.dataclass(frozen=True)
class Exported:
    """A written export."""

    path: Path  # the export's folder; for T5X the checkpoint in it
    step: int
    note: str = ""  # for the user; empty if there is nothing to note


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """The form of an export's weights, and what is verified before it is written.

    Attributes:
      form: one of `dss.interop.ctranslate2_export.QUANTIZATIONS`.
      min_agreement: share of validation examples whose label must equal the student's, in [0, 1].
      examples: number of validation examples, at most.
    """

    form: str
    min_agreement: float = 0.99
    examples: int = 400

    def __post_init__(self) -> None:
        if self.form not in ctranslate2_export.QUANTIZATIONS:
            raise unknown_name("quantization", self.form, ctranslate2_export.QUANTIZATIONS)
        if not 0 <= self.min_agreement <= 1:
            raise DssError(f"`min_agreement={self.min_agreement:g}`: give a share from 0 to 1")
        if self.examples < 1:
            raise DssError(f"`examples={self.examples}`: give at least 1")


@contextlib.contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`, renamed to it unless an error is raised."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial"
    if partial.is_symlink():
        partial.unlink()
    shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
    partial.mkdir()
    try:
        yield partial
        if folder.exists():  # `_new_folder` has checked that it is empty
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _new_folder(path: epath.PathLike) -> Path:
    if in_bucket(path):
        raise DssError(
            f"{path}: cannot export into a bucket; export to this machine, then copy the folder"
        )
    folder = Path(absolute(path))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DssError(f"{path}: not empty; export into a new folder")
    return folder


def _write_model(run: Run, checkpoints: Checkpoints, step: int, folder: Path) -> str:
    experiment, vocabulary = run.experiment, load_vocabulary(run.vocabulary_source)
    length = experiment.data.inputs_length
    huggingface_export.write_tokenizer(folder, run.config, vocabulary, length)
    note = huggingface_export.check_tokenizer(folder, vocabulary)
    params = checkpoints.leaves(step, "params")
    huggingface_export.write_model(folder, run.config, params, experiment.decoding)
    return note


def _write_card(
    run: Run, step: int, form: str, folder: Path, verified: Agreement | None = None
) -> None:
    """Writes the model card, and the run's configuration without this machine's paths."""
    rows = [] if verified is None else verified.rows()
    (folder / "README.md").write_text(model_card(run, step, form, rows), encoding="utf-8")
    experiment = run.experiment
    data = dataclasses.replace(experiment.data, root=None, dataset_path=None)
    save_config(dataclasses.replace(experiment, run_dir=None, data=data), epath.Path(folder))


def _hugging_face(run: Run, checkpoints: Checkpoints, step: int, folder: Path) -> str:
    note = _write_model(run, checkpoints, step, folder)
    _write_card(run, step, "hf", folder)
    return note


def _t5x(run: Run, checkpoints: Checkpoints, step: int, folder: Path) -> str:
    params, opt_state = (checkpoints.leaves(step, item) for item in ("params", "opt_state"))
    state, kept = t5x_export.train_state(run.config, params, opt_state, step)
    t5x_export.write_checkpoint(folder, state, step)
    return "" if kept else "without the run's optimizer state: Adafactor's statistics are initial"


def _ctranslate2(
    run: Run,
    checkpoints: Checkpoints,
    step: int,
    folder: Path,
    quantization: Quantization | None = None,
) -> str:
    ctranslate2_export.check_installed()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as huggingface:
        note = _write_model(run, checkpoints, step, Path(huggingface))
        folder.rmdir()  # the converter creates it
        form = None if quantization is None else quantization.form
        ctranslate2_export.convert(Path(huggingface), folder, run.config, form)
    verified = None if quantization is None else _verify(run, step, folder, quantization)
    _write_card(run, step, "ctranslate2", folder, verified)
    return "; ".join(filter(None, (note, "" if verified is None else str(verified))))


def _verify(run: Run, step: int, folder: Path, quantization: Quantization) -> Agreement:
    """Returns the agreement of an export with the student.

    Raises:
      DssError: if too few labels are equal.
    """
    found = measure(run, folder, step, quantization.examples)
    if found.share < quantization.min_agreement:
        raise DssError(
            f"{quantization.form}: {found}; nothing was written, as `min_agreement` is "
            f"{quantization.min_agreement:g}"
        )
    return found


# A new format also needs a branch in `comparison.check` and code in `model_card.USES`.
FORMATS: dict[str, Callable[[Run, Checkpoints, int, Path], str]] = {
    "hf": _hugging_face,
    "t5x": _t5x,
    "ctranslate2": _ctranslate2,
}


def _compare(run: Run, params: Params, to: str, written: Path) -> str:
    """Compares a few logits of an export, computed by its own program, with the student's.

    Returns:
      The reason why they could not be compared; empty if they were.

    Raises:
      DssError: if they differ.
    """
    config, vocabulary = run.config, load_vocabulary(run.vocabulary_source)
    if not comparison.enough_memory(config):
        return "not compared with the student's logits, for lack of memory"
    probes = comparison.Probes.of(vocabulary.size)
    try:  # on the CPU, whose memory was checked, whatever mesh the run was trained on
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            tree = jax.tree_util.tree_map_with_path(
                lambda path, _: params[path_names(path)], abstract_params(config)
            )
            ours = comparison.logits(config, tree, probes)
            comparison.check(to, written, ours, probes, config)
    except DssError:
        raise
    except Exception as error:  # such as an incompatible version, or a lack of memory
        return f"not compared with the student's logits: {first_line(error)}"
    return ""


def export(
    run: Run,
    to: str,
    folder: epath.PathLike,
    which: str = "best",
    quantization: Quantization | None = None,
) -> Exported:
    """Writes a run's student in another program's format, atomically.

    Before the folder appears, a few logits of the export are compared with the student's: computed
    by that program if it is installed, for T5X by dss's reader. If that fails, the note has the
    reason. A quantized export is verified by its labels instead.

    Args:
      run: the run with the student.
      to: the format, a key of `FORMATS`.
      folder: a new or empty folder on this machine.
      which: the checkpoint: "best", "latest" or a step.
      quantization: the form of the weights, only for CTranslate2; None for float32.

    Raises:
      DssError: if the format is unknown or has no quantization, too few labels of a quantized
        export equal the student's, the folder is not empty or is in a bucket, there is no
        such checkpoint or it is of another size, the format cannot represent the student, or the
        export's logits differ.
    """
    if to not in FORMATS:
        raise unknown_name("format", to, FORMATS)
    if quantization is not None and to != "ctranslate2":
        raise DssError(f"`quantization` is for CTranslate2; the format {to} has none")
    target = _new_folder(folder)
    if jax.process_count() > 1:
        raise DssError("an export needs a single process; start it without the others")
    with contextlib.closing(run.checkpoints()) as checkpoints:
        step = checkpoints.find(which)
        checkpoints.check_shapes(step, abstract_params(run.config))
        name = f"checkpoint_{step}" if to == "t5x" else ""
        with _atomic_folder(target) as partial:
            if quantization is not None:
                notes = [_ctranslate2(run, checkpoints, step, partial, quantization)]
            else:
                notes = [FORMATS[to](run, checkpoints, step, partial)]
                params = checkpoints.leaves(step, "params")
                notes.append(_compare(run, params, to, partial / name))
    return Exported(target / name, step, "; ".join(filter(None, notes)))
