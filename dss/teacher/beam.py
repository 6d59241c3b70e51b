"""The same work as an Apache Beam transform, for millions of examples or many endpoints.

    {"examples": examples, "attempts": earlier} | Annotate(...)  ->  outputs, attempts

Every worker asks for itself, with the limits of one process. An attempt is known by its request's
key, so a pipeline that reads the attempts of earlier ones pays for no answer twice; a bundle that a
runner tries again, because its machine died, is asked again.
"""

import asyncio
import dataclasses
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics, MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions

from dss.data.examples import Example, read_example, read_json
from dss.errors import UserError
from dss.teacher.annotate import Annotator, Limits
from dss.teacher.client import Client, api_key
from dss.teacher.job import Job
from dss.teacher.journal import Attempt, Journal
from dss.teacher.outputs import annotations
from dss.teacher.prompt import Prompt, read_prompt
from dss.teacher.reply import Reply
from dss.teacher.request import Teacher, Writer

__all__ = ["Annotate", "attempt_line", "read_attempt_line", "read_example_line", "run_pipeline"]

ATTEMPTS = "attempts"  # tag of the second output
BATCH = 256  # questions that a worker has in hand
UNANSWERED = Metrics.counter("dss.annotate", "unanswered")


def read_example_line(line: str, labels: Sequence[str] = ()) -> Example:
    """Returns the example on a line of JSON, which must have an id.

    Raises:
      UserError: it has none, or is no example.
    """
    where = f"input line {line[:60]!r}"
    value = read_json(where, line)
    if not isinstance(value, dict) or value.get("id") is None:
        raise UserError(f"{where}: has no `id`, which a pipeline needs: its lines have no numbers")
    return read_example(where, value, "", labels)


def attempt_line(question: str, attempt: Attempt) -> str:
    """Returns an attempt as a line of JSON, with the key of the question it belongs to."""
    return json.dumps({"question": question, **dataclasses.asdict(attempt)}, ensure_ascii=False)


def read_attempt_line(line: str) -> tuple[str, Attempt]:
    """Returns what `attempt_line` wrote."""
    value = json.loads(line)
    question, reply = value.pop("question"), Reply(**value.pop("reply"))
    return question, Attempt(reply=reply, **value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spec:
    """What a worker makes its own prompt, client and journal of."""

    prompt_name: str
    prompt_source: str
    teacher: Teacher
    name: str
    limits: Limits
    key_variable: str

    def writer(self) -> Writer:
        prompt = read_prompt(f"prompt {self.prompt_name}", self.prompt_name, self.prompt_source)
        return Writer(prompt, self.teacher)


class _ByQuestion(beam.DoFn):
    """Gives each example the key of its first request: the same question is asked once."""

    def __init__(self, spec: _Spec):
        self._spec = spec

    def setup(self) -> None:
        self._writer = self._spec.writer()

    def process(self, example: Example) -> Iterator[tuple[str, Example]]:
        yield self._writer.requests(example)[0].key, example


class _Ask(beam.DoFn):
    """Asks about a batch of questions, each with its examples and its earlier attempts."""

    def __init__(self, spec: _Spec):
        self._spec = spec
        self._stopped = False

    def setup(self) -> None:
        self._writer = self._spec.writer()
        self._key = api_key(self._spec.key_variable, self._spec.teacher.base_url)

    def process(
        self, batch: list[tuple[str, dict[str, list[Any]]]]
    ) -> Iterator[dict[str, Any] | beam.pvalue.TaggedOutput]:
        examples = [example for _, found in batch for example in found["examples"]]
        earlier = [attempt for _, found in batch for attempt in found["attempts"]]
        asked = [self._writer.requests(example) for example in examples]
        question_of = {request.key: samples[0].key for samples in asked for request in samples}
        with tempfile.TemporaryDirectory(prefix="dss-annotate-") as folder:
            journal = Journal(Path(folder) / "journal.sqlite")
            journal.describe(self._writer)
            journal.add([request for samples in asked for request in samples], earlier)
            before = journal.last_attempt()
            self._ask(journal, examples)
            for attempt in journal.attempts_after(before):
                pair = question_of[attempt.key], attempt
                yield beam.pvalue.TaggedOutput(ATTEMPTS, pair)
            for found in annotations(journal, self._writer, examples):
                yield found.line(self._spec.name)
            journal.close()

    def _ask(self, journal: Journal, examples: list[Example]) -> None:
        """Asks; an error that ends the asking is logged, so that the bundle keeps its answers."""
        if self._stopped:
            return
        client = Client(self._spec.teacher, self._key, self._spec.limits.timeout)
        annotator = Annotator(journal, self._writer, client, self._spec.limits)
        try:
            asyncio.run(annotator.run(examples, len(examples)))
        except UserError as error:
            self._stopped = True
            logging.getLogger(__name__).error("stopped asking: %s", error)
        state = annotator.state
        UNANSWERED.inc(state.total - state.done + state.no_answer)


class Annotate(beam.PTransform):
    """Asks a teacher about examples.

    Takes a dictionary of two collections, `examples` (of `Example`) and `attempts` (those of
    earlier pipelines), and returns one of `outputs` (the JSON objects that training reads) and
    `attempts` (those that were made, to be kept for the next pipeline). An attempt is a pair: the
    key of its question and the `Attempt`; see `attempt_line`.
    """

    def __init__(
        self, prompt: Prompt, teacher: Teacher, name: str, limits: Limits, key_variable: str
    ):
        """Makes the transform.

        Args:
          prompt: says what is asked.
          teacher: who is asked.
          name: of the teacher in the outputs.
          limits: of each worker process.
          key_variable: the environment variable of the workers that holds the key.
        """
        super().__init__()
        self._spec = _Spec(
            prompt_name=prompt.name,
            prompt_source=prompt.source,
            teacher=teacher,
            name=name,
            limits=limits,
            key_variable=key_variable,
        )

    def expand(self, inputs: Mapping[str, beam.PCollection]) -> dict[str, beam.PCollection]:
        """See `beam.PTransform`."""
        by_question = inputs["examples"] | "ByQuestion" >> beam.ParDo(_ByQuestion(self._spec))
        found = (
            {"examples": by_question, "attempts": inputs["attempts"]}
            | "WithEarlier" >> beam.CoGroupByKey()
            | "Asked" >> beam.Filter(lambda item: item[1]["examples"])
            | "Batch" >> beam.BatchElements(min_batch_size=BATCH, max_batch_size=BATCH)
            | "Ask" >> beam.ParDo(_Ask(self._spec)).with_outputs(ATTEMPTS, main="outputs")
        )
        return {"outputs": found["outputs"], "attempts": found[ATTEMPTS]}


def run_pipeline(job: Job, limits: Limits, key_variable: str, options: Sequence[str]) -> int:
    """Runs a job as a pipeline and writes its outputs, in no particular order.

    The attempts are kept in a folder beside the outputs, and those of earlier pipelines are read
    from there. Files are local or on a file system that all workers see; for other ones put
    `Annotate` between transforms of your own.

    Args:
      job: what is asked about, and of whom.
      limits: of each worker process.
      key_variable: the environment variable of the workers that holds the key.
      options: Beam's, such as "--runner=DirectRunner".

    Returns:
      How many requests brought no answer.
    """
    attempts = job.file("attempts")
    attempts.mkdir(parents=True, exist_ok=True)
    earlier = [str(path) for path in sorted(attempts.glob("*.jsonl"))]
    labels = job.writer.prompt.labels
    prompt, teacher = job.writer.prompt, job.writer.teacher
    pipeline = beam.Pipeline(options=PipelineOptions(list(options)))
    if job.rows is None:
        lines = pipeline | "Read" >> beam.io.ReadFromText(str(job.source.absolute()))
        examples = lines | "Decode" >> beam.Map(read_example_line, labels)
    else:
        examples = pipeline | "Examples" >> beam.Create(job.rows)
    files = pipeline | "EarlierFiles" >> beam.Create(earlier)
    known = files | beam.io.ReadAllFromText() | "DecodeEarlier" >> beam.Map(read_attempt_line)
    annotate = Annotate(prompt, teacher, job.name, limits, key_variable)
    found = {"examples": examples, "attempts": known} | annotate
    encoded = found["outputs"] | "Encode" >> beam.Map(json.dumps, ensure_ascii=False)
    target = str(job.file("jsonl").absolute())
    _ = encoded | "Write" >> beam.io.WriteToText(target, num_shards=1, shard_name_template="")
    made = found["attempts"] | "EncodeAttempts" >> beam.MapTuple(attempt_line)
    prefix = str(attempts.absolute() / f"{time.time_ns()}")
    _ = made | "WriteAttempts" >> beam.io.WriteToText(prefix, file_name_suffix=".jsonl")
    result = pipeline.run()
    result.wait_until_finish()
    counters = result.metrics().query(MetricsFilter().with_metric(UNANSWERED))["counters"]
    return sum(counter.committed or 0 for counter in counters)
