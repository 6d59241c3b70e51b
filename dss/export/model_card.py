"""Writes the model card of an exported student: its use, training, scores and reproduction."""

import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from dss import __version__
from dss.data.examples import read_json_lines
from dss.data.released import RELEASED
from dss.data.vocabulary import BYTES, load_vocabulary
from dss.errors import DssError
from dss.evaluation.significance import wilson_interval
from dss.interop.huggingface_export import SPIECE
from dss.mixtures.methods import Method, Mixture
from dss.mixtures.tasks import CONCLUSION, EXPLAIN
from dss.paths import CONFIG_FILE, PREDICTIONS
from dss.runs.directory import Run
from dss.student.network import num_parameters
from dss.training.metrics import read_metrics

__all__ = ["USES", "model_card"]

PAPER = "[Hsieh et al., 2023](https://arxiv.org/abs/2305.02301)"
USES = {  # code that generates with a student, by format
    "hf": """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

FOLDER = "."  # this folder, or its name on the hub
TEXTS = ["the text of an example"]

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSeq2SeqLM.from_pretrained(FOLDER).eval()
texts = [PREFIX + text for text in TEXTS]
inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
outputs = model.generate(**inputs)
print(tokenizer.batch_decode(outputs, skip_special_tokens=True))
""",
    "ctranslate2": """\
import ctranslate2
from transformers import AutoTokenizer

FOLDER = "."  # this folder
TEXTS = ["the text of an example"]

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
translator = ctranslate2.Translator(FOLDER)
ids = tokenizer([PREFIX + text for text in TEXTS], truncation=True).input_ids
pieces = [tokenizer.convert_ids_to_tokens(row) for row in ids]
results = translator.translate_batch(pieces, beam_size=BEAMS, max_decoding_length=LENGTH)
tokens = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
print(tokenizer.batch_decode(tokens, skip_special_tokens=True))
""",
}
CHOSEN = """\
Where the possible labels are known, `dss` predicts the most probable of them; `generate` is not
limited to them, so its predictions may differ.
"""
NLI = ("anli1", "esnli")
VOCABULARY = f" --gin.Experiment.vocabulary={SPIECE}"
METHODS = {
    Method.FINETUNE: "finetuning on labels",
    Method.DISTILL: "finetuning on labels",
    Method.STEP_BY_STEP: f"distilling step-by-step ({PAPER}): labels and rationales, two tasks",
    Method.SINGLE_TARGET: "a rationale and then the label, as one target",
    Method.RATIONALE: "rationales alone",
}
METHODS[Method.STEP_BY_STEP_UNLABELED] = METHODS[Method.STEP_BY_STEP]


def _front_matter(run: Run, form: str) -> str:
    library = "transformers" if form == "hf" else form
    lines = [f"library_name: {library}", "tags: [t5, distilling-step-by-step]"]
    base = (run.experiment.initial_checkpoint or "").removeprefix("hf:")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) and not Path(base).exists():  # on the hub
        lines.append(f"base_model: {base}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _shape(run: Run) -> str:
    config = run.config
    kind = "T5 1.1" if config.gated else "T5 1.0"
    return (
        f"A {kind} student of {num_parameters(config) / 1e6:.1f}M parameters, "
        f"{config.num_encoder_layers} + {config.num_decoder_layers} layers of {config.d_model}"
    )


def _training(run: Run, mixture: Mixture, step: int) -> Iterator[tuple[str, str]]:
    """Yields (name, value) rows of the training's data, method and hyperparameters."""
    experiment, dataset = run.experiment, mixture.dataset.name
    yield "data", f"{dataset}, released with the paper" if dataset in RELEASED else dataset
    if experiment.data.fraction < 1:
        yield "fraction of the training data", f"{experiment.data.fraction:g}"
    yield "mixture", f"`{mixture.name}`"
    yield "method", METHODS[mixture.method]
    for task in mixture.tasks:
        source = f"the teacher {task.teacher}" if task.teacher else "gold labels"
        yield f"{task.kind.replace('_', ' ')} from", source
    if len(mixture.tasks) > 1:
        label, rationale = mixture.rates
        end = "" if experiment.alpha_end is None else f", annealed to {experiment.alpha_end:g}"
        yield "alpha", f"{label:g} for the label loss, {rationale:g} for the rationale loss{end}"
    yield "initial checkpoint", experiment.initial_checkpoint or "none: randomly initialised"
    yield (
        "steps",
        f"{step} of {experiment.trainer.train_steps}, with {experiment.batch_size} examples each",
    )
    optimizer = experiment.optimizer
    yield "optimizer", f"{optimizer.name}, {optimizer.schedule} {optimizer.learning_rate:g}"
    yield "seed", f"{experiment.seed}"


def _scores(run: Run, mixture: Mixture, step: int) -> Iterator[tuple[str, str]]:
    """Yields (name, value) rows of this step's scores, in training and by `dss eval`."""
    values: dict[str, float] = {}
    for line in read_metrics(run.folder / "metrics.jsonl"):
        values |= line if line["step"] == step else {}
    for name in ("accuracy", "rouge_l", "loss"):
        if (value := values.get(f"valid/{name}")) is not None:
            shown = f"{value:.4f}" if name == "loss" else f"{value:.2%}"
            yield f"valid {name.replace('_', '-')}, in training", shown
    for split in ("valid", "test"):
        path = run.folder / PREDICTIONS / f"{mixture.name}-{split}-{step}.jsonl"
        if not path.is_file():
            continue
        rows = list(read_json_lines(path))
        scores = [_score(where, row) for where, row in rows]
        if not scores:
            continue
        mean = sum(scores) / len(scores)
        if mixture.short_names[0] == "rationale":
            yield f"{split} ROUGE-L", f"{mean:.2%} of {len(rows)}"
        else:
            low, high = wilson_interval(int(sum(scores)), len(scores))
            interval = f"95% CI: {low:.2%} to {high:.2%}; {int(sum(scores))} of {len(scores)}"
            yield f"{split} accuracy", f"{mean:.2%} ({interval})"


def _score(where: str, row: dict[str, Any]) -> float:
    score = row.get("score")
    if not isinstance(score, int | float):
        raise DssError(f"{where}: no score; delete the file and evaluate the run again")
    return score


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


def _use(run: Run, form: str, prefix: str) -> str:
    decoding = run.experiment.decoding
    code = USES[form]
    values = {
        "PREFIX": json.dumps(prefix),
        "BEAMS": decoding.num_beams,
        "LENGTH": decoding.max_length,
    }
    for name, value in values.items():
        code = code.replace(name, str(value))
    return f"```python\n{code}```\n"


def _notes(run: Run, mixture: Mixture) -> str:
    notes = ["A text is an example's input in the data of `dss`."]
    if mixture.dataset.name in NLI:
        notes.append("It is the premise, `</s>` and the hypothesis.")
    if "rationale" in mixture.short_names[1:]:
        task = mixture.tasks[1]
        condition = f"With the prefix `{EXPLAIN}`"
        if task.mark:
            start = task.start_id(load_vocabulary(run.vocabulary_source))
            condition = f"With the decoder start id {start} instead of 0,"
        notes.append(f"{condition} the student generates the rationale.")
    if mixture.short_names[0] == "rationale_then_label":
        notes.append(f"The label is the text after `{CONCLUSION}`.")
    return textwrap.fill(" ".join(notes), 100) + "\n"


def _command(run: Run) -> str:
    experiment = run.experiment
    data = "dataset_path" if experiment.data.dataset_path is not None else "root"
    vocabulary = "" if experiment.vocabulary == BYTES else VOCABULARY
    lines = [
        f"dss train --gin_file={CONFIG_FILE} --gin.Experiment.run_dir=runs/again",
        f"  --gin.DataConfig.{data}=$DATA{vocabulary}",
    ]
    command = " \\\n".join(lines)
    return f"In this folder, with the data in `$DATA`:\n\n```bash\n{command}\n```\n"


def model_card(
    run: Run, step: int, form: str = "hf", verified: Sequence[tuple[str, str]] = ()
) -> str:
    """Returns a model card in Markdown, with the hub's front matter.

    Args:
      run: the run with the student.
      step: the step of the exported checkpoint.
      form: the format, a key of `USES`.
      verified: (name, value) rows of a quantized export's agreement with the student.
    """
    experiment = run.experiment
    parts = [_front_matter(run, form), f"# {run.folder.name}\n", f"{_shape(run)}.\n"]
    if not experiment.has_task:
        parts.append("It was imported, not trained by `dss`.\n")
        parts += ["## Use\n", _use(run, form, "")]
    else:
        mixture = run.mixture(must_exist=False)
        parts += ["## Use\n", _use(run, form, mixture.tasks[0].prefix), _notes(run, mixture)]
        parts += ["## Training\n", _table(_training(run, mixture, step))]
        scores = list(_scores(run, mixture, step))
        if scores:
            parts += ["## Scores\n", _table(scores), CHOSEN if experiment.decoding.closed else ""]
        if verified:
            parts += ["## Quantization\n", _table(verified)]
        parts += ["## Reproduction\n", _command(run)]
    versions = {"dss": __version__, "jax": jax.__version__}
    parts.append("Exported by " + ", ".join(f"{n} {v}" for n, v in versions.items()) + ".\n")
    return "\n".join(part for part in parts if part)
