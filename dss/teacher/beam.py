"""Annotation as an Apache Beam transform, for millions of examples or many endpoints.

    {"examples": examples, "attempts": earlier} | Annotate(...)  ->  outputs, attempts

Every worker process sends requests within limits of its own. Attempts are identified by their
request's key, so a pipeline that reads the attempts of earlier ones sends no answered request
again. Requests that a failed worker was processing are sent again.
"""

import asyncio
import dataclasses
import itertools
import json
import logging
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics, MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions

from dss.data.examples import Example
from dss.errors import DssError, TeacherError
from dss.paths import replacing
from dss.teacher.annotate import Annotator, Limits
from dss.teacher.client import Client, api_key
from dss.teacher.job import Job
from dss.teacher.journal import Attempt, Journal
from dss.teacher.outputs import annotations, write_jsonl
from dss.teacher.prompt import Prompt, read_prompt
from dss.teacher.reply import FINAL, Reply
from dss.teacher.request import Teacher, Writer

__all__ = ["Annotate", "attempt_line", "read_attempt_line", "run_pipeline"]

EXAMPLES, KNOWN = "examples.jsonl", "known.jsonl"  # input files of a pipeline
ATTEMPTS = "attempts"  # tag of the second output
BATCH = 256  # questions that a worker processes at a time
UNANSWERED = Metrics.counter("dss.annotate", "unanswered")


def attempt_line(question: str, attempt: Attempt) -> str:
    """Returns an attempt as a line of JSON, with the key of its question."""
    return json.dumps({"question": question, **dataclasses.asdict(attempt)})


def read_attempt_line(line: str) -> tuple[str, Attempt]:
    """Returns the question's key and the attempt in a line of `attempt_line`."""
    value = json.loads(line)
    question, reply = value.pop("question"), Reply(**value.pop("reply"))
    return question, Attempt(reply=reply, **value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spec:
    """Settings, sent to each worker, for its prompt, client and journal."""

    prompt_name: str
    prompt_source: str
    teacher: Teacher
    name: str
    limits: Limits
    key_variable: str
    folder: str | None

    def writer(self) -> Writer:
        prompt = read_prompt(f"prompt {self.prompt_name}", self.prompt_name, self.prompt_source)
        return Writer(prompt, self.teacher)


class _ByQuestion(beam.DoFn):
    """Keys each example by its first request, so that identical questions are sent once."""

    def __init__(self, spec: _Spec):
        self._spec = spec

    def setup(self) -> None:
        self._writer = self._spec.writer()

    def process(self, example: Example) -> Iterator[tuple[str, Example]]:
        yield self._writer.requests(example)[0].key, example


class _Ask(beam.DoFn):
    """Sends the requests of a batch of questions, each with its examples and earlier attempts."""

    def __init__(self, spec: _Spec):
        self._spec = spec
        self._stopped = False

    def setup(self) -> None:
        self._writer = self._spec.writer()
        self._key = api_key(self._spec.key_variable, self._spec.teacher.base_url)

    def process(
        self, batch: list[tuple[str, dict[str, list[Any]]]]
    ) -> Iterator[dict[str, Any] | beam.pvalue.TaggedOutput]:
        examples = [example for _, inputs in batch for example in inputs["examples"]]
        earlier = [attempt for _, inputs in batch for attempt in inputs["attempts"]]
        requests = [self._writer.requests(example) for example in examples]
        question_of = {request.key: samples[0].key for samples in requests for request in samples}
        with tempfile.TemporaryDirectory(prefix="dss-annotate-") as folder:
            journal = Journal(Path(folder) / "journal.sqlite")
            journal.describe(self._writer)
            journal.add([request for samples in requests for request in samples], earlier)
            last_earlier = journal.last_attempt()
            self._send_requests(journal, examples)
            UNANSWERED.inc(len(question_of) - len(journal.final_among(list(question_of))))
            new = [(question_of[a.key], a) for a in journal.attempts_after(last_earlier)]
            self._save_attempts(new)
            for pair in new:
                yield beam.pvalue.TaggedOutput(ATTEMPTS, pair)
            for output in annotations(journal, self._writer, examples):
                yield output.line(self._spec.name)
            journal.close()

    def _save_attempts(self, attempts: list[tuple[str, Attempt]]) -> None:
        """Writes attempts to a new file, so that they survive a failure of the pipeline."""
        if self._spec.folder is None or not attempts:
            return
        path = Path(self._spec.folder) / f"attempts-{uuid.uuid4().hex}.jsonl"
        with replacing(path) as file:
            file.writelines(attempt_line(question, a) + "\n" for question, a in attempts)

    def _send_requests(self, journal: Journal, examples: list[Example]) -> None:
        """Sends the requests; an error is logged, so that the bundle's replies are kept."""
        if self._stopped:
            return
        client = Client(self._spec.teacher, self._key, self._spec.limits.timeout)
        annotator = Annotator(journal, self._writer, client, self._spec.limits)
        try:
            asyncio.run(annotator.run(examples, len(examples)))
        except DssError as error:
            self._stopped = True
            logging.getLogger(__name__).error("stopped sending requests: %s", error)
        self._stopped = self._stopped or annotator.state.stopped is not None


class Annotate(beam.PTransform):
    """Annotates examples with a teacher.

    The input is a dictionary of two collections: `examples` (of `Example`) and `attempts` (of
    earlier pipelines). The result is a dictionary of `outputs` (the JSON objects that training
    reads) and `attempts` (new ones, to be saved for the next pipeline). An attempt is a pair of its
    question's key and the `Attempt`; see `attempt_line`.
    """

    def __init__(
        self,
        prompt: Prompt,
        teacher: Teacher,
        name: str,
        limits: Limits,
        key_variable: str,
        folder: str | None = None,
    ):
        """Makes the transform.

        Args:
          prompt: prompt of the task.
          teacher: model to query.
          name: name of the teacher in the outputs.
          limits: limits of each worker process.
          key_variable: environment variable of the workers that holds the API key.
          folder: folder visible to all workers, which also receives each batch's attempts; None
            for none.
        """
        super().__init__()
        self._spec = _Spec(
            prompt_name=prompt.name,
            prompt_source=prompt.source,
            teacher=teacher,
            name=name,
            limits=limits,
            key_variable=key_variable,
            folder=folder,
        )

    def expand(self, inputs):
        """See `beam.PTransform`."""
        by_question = inputs["examples"] | "ByQuestion" >> beam.ParDo(_ByQuestion(self._spec))
        results = (
            {"examples": by_question, "attempts": inputs["attempts"]}
            | "WithEarlier" >> beam.CoGroupByKey()
            | "Asked" >> beam.Filter(lambda item: item[1]["examples"])
            | "Batch" >> beam.BatchElements(min_batch_size=BATCH, max_batch_size=BATCH)
            | "Ask" >> beam.ParDo(_Ask(self._spec)).with_outputs(ATTEMPTS, main="outputs")
        )
        return {"outputs": results["outputs"], "attempts": results[ATTEMPTS]}


def run_pipeline(
    job: Job, journal: Journal, limits: Limits, key_variable: str, options: Sequence[str]
) -> int:
    """Annotates a job's examples in a pipeline that reads and updates the job's journal.

    This process and the workers exchange files in a folder beside the journal, which all workers
    must see: the examples, the final attempts in the journal, and the new attempts. Attempts that a
    failed pipeline left there are read first.

    Args:
      job: examples, prompt and teacher.
      journal: journal open for writing, after a call of `describe`.
      limits: limits of each worker process.
      key_variable: environment variable of the workers that holds the API key.
      options: options of Beam, such as "--runner=DirectRunner".

    Returns:
      Number of requests without an answer.

    Raises:
      TeacherError: if the key or the options are invalid.
    """
    api_key(key_variable, job.writer.teacher.base_url)
    journal.make_room()
    folder = job.file("pipeline")
    folder.mkdir(parents=True, exist_ok=True)
    _read_attempts(folder, journal)
    write_jsonl(folder / EXAMPLES, map(dataclasses.asdict, job.examples()))
    with (folder / KNOWN).open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in _known_attempts(job, journal))
    teacher = job.writer.teacher
    annotate = Annotate(
        job.writer.prompt, teacher, job.name, limits, key_variable, str(folder.absolute())
    )
    try:
        pipeline = beam.Pipeline(options=PipelineOptions(list(options)))
    except (ValueError, SystemExit) as error:
        raise TeacherError(f"`pipeline_options`: {' '.join(str(error).split())}") from None

    def read(name: str) -> beam.PCollection:
        source = beam.io.ReadFromText(str((folder / name).absolute()))
        return pipeline | f"Read {name}" >> source

    examples = read(EXAMPLES) | "Decode" >> beam.Map(lambda line: Example(**json.loads(line)))
    attempts = read(KNOWN) | "DecodeKnown" >> beam.Map(read_attempt_line)
    _ = {"examples": examples, "attempts": attempts} | annotate
    result = pipeline.run()
    result.wait_until_finish()
    _read_attempts(folder, journal)
    shutil.rmtree(folder)
    counters = result.metrics().query(MetricsFilter().with_metric(UNANSWERED))["counters"]
    return sum(counter.committed or 0 for counter in counters)


def _known_attempts(job: Job, journal: Journal) -> Iterator[str]:
    """Adds the job's requests to the journal; yields their final attempts, a line each."""
    examples = job.examples()
    while chunk := list(itertools.islice(examples, BATCH)):
        requests = [job.writer.requests(example) for example in chunk]
        journal.add([request for samples in requests for request in samples], [])
        for samples in requests:
            for request in samples:
                outcome = journal.outcome(request.key)
                if outcome is not None and outcome.reply.status in FINAL:
                    yield attempt_line(samples[0].key, outcome)


def _read_attempts(folder: Path, journal: Journal) -> None:
    for path in sorted(folder.glob("attempts-*.jsonl")):
        attempts = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            _, attempt = read_attempt_line(line)
            attempts.append(dataclasses.replace(attempt, origin=f"pipeline:{path.stem}:{number}"))
        journal.add([], attempts)
        path.unlink()
