import collections
import json
import subprocess
import sys

import pytest

from dss.data.datasets import Dataset
from dss.data.equations import plain_equation
from dss.data.examples import Example
from dss.data.metrics import is_readable
from dss.data.released import RELEASED
from dss.errors import DssError
from dss.teacher.outputs import read_sample
from dss.teacher.prompt import Parsed, load_prompt, prompt_names, read_prompt
from dss.teacher.reply import read_reply
from dss.testing import chat_reply
from tests.conftest import SHARED

SPLITS = {
    "cqa": ("train", "test"),
    "svamp": ("train", "test"),
    "esnli": ("valid", "test"),
    "anli1": ("valid", "test"),
}
TEXT = """
labels: [good, bad]
stop: ["\\nText:"]
form:
  question: "Text: {{ input }}\\nWhy:"
  answer: " {{ rationale }}\\nLabel: {{ label }}"
  pattern: '(?s)\\A\\s*(?P<rationale>.*?)\\s*(?:Label: (?P<label>[^\\n]*))?\\Z'
exemplars:
  - {input: sun, rationale: It shines., label: good}
"""


def read(text: str):
    return read_prompt("p.yaml", "p", text)


@pytest.mark.parametrize("name", prompt_names())
def test_shipped_prompts_have_balanced_exemplars_whose_answers_parse(name):
    prompt = load_prompt(name)  # parses each exemplar's own answer
    assert prompt.hint is not None
    inputs = [exemplar.input for exemplar in prompt.exemplars]
    assert len(set(inputs)) == len(inputs)
    if prompt.labels.closed:
        counts = collections.Counter(exemplar.label for exemplar in prompt.exemplars)
        assert set(counts) == set(prompt.labels.closed)
        assert len(set(counts.values())) == 1
    if name in RELEASED or name == "cqa":
        assert 7 <= len(inputs) <= 10


def test_exemplars_of_cqa_and_svamp_are_balanced_over_letters_and_operations():
    cqa = load_prompt("cqa")
    letters = [cqa.choices(exemplar.input).index(exemplar.label) for exemplar in cqa.exemplars]
    assert sorted(collections.Counter(letters).values()) == [2] * 5
    svamp = load_prompt("svamp")
    operations = collections.Counter(exemplar.label.split()[1] for exemplar in svamp.exemplars)
    assert operations == dict.fromkeys("+-*/", 2)
    assert all(
        svamp.labels.is_right(s.label, f"( {s.label.strip('()')} )") for s in svamp.exemplars
    )


@pytest.mark.parametrize("name", SPLITS)
def test_no_exemplar_is_from_a_split_of_the_dataset(name, data_root):
    prompt, dataset = load_prompt(name), Dataset.released(name)
    seen = {
        part.strip().casefold()
        for split in SPLITS[name]
        for example in dataset.source.examples(split)
        for part in (example.input, *example.input.split("</s>"), example.input.split("\n")[0])
    }
    for exemplar in prompt.exemplars:
        for part in (exemplar.input, *exemplar.input.split("</s>"), exemplar.input.split("\n")[0]):
            assert part.strip().casefold() not in seen


@pytest.mark.parametrize("name", SPLITS)
def test_shipped_prompts_have_the_metric_and_the_labels_of_their_dataset(name):
    prompt, form = load_prompt(name), RELEASED[name]
    assert prompt.labels == form.labels


def plain(label):
    return label.casefold().strip().removesuffix(".")


@pytest.mark.parametrize("name", SPLITS)
def test_released_texts_parse_as_in_the_released_code(name, data_root):
    """Rationales are the same, and so are labels that are possible for the input."""
    prompt, dataset = load_prompt(name), Dataset.released(name)
    different = collections.Counter()
    for split in SPLITS[name]:
        outputs = dataset.source.outputs(split, "palm")
        for example, output in zip(dataset.source.examples(split), outputs, strict=True):
            parsed = prompt.parse(output.raw, example)
            choices = dataset.choices(example.input)
            label = (output.label or "").strip() or None
            if choices and label not in choices:  # the prompt ignores the case of a choice
                folded = [c for c in choices if plain(c) == plain(label or "")]
                label = folded[0].strip() if folded else None
            if dataset.labels.metric == "equation" and label is not None:
                label = plain_equation(label) if is_readable("equation", label) else None
            different["rationale"] += parsed.rationale != output.rationale.strip()
            different["label"] += parsed.label != label
            different["rows"] += 1
    # One of 19,666 texts in e-SNLI is truncated within the next `Premise`.
    allowed = {"esnli": (0, 1)}.get(name, (0, 0))
    assert (different["rationale"], different["label"]) == allowed
    assert different["rows"] > 900


def test_a_label_that_is_not_possible_is_none_and_case_is_ignored():
    prompt = read(TEXT)
    example = Example("1", "moon", "bad")
    assert prompt.parse(" Dark.\nLabel: Bad", example) == Parsed("Dark.", "bad")
    assert prompt.parse(" Dark.\nLabel: dim", example) == Parsed("Dark.", None)
    assert prompt.parse(" Dark.\nLabel: bad\nText: more\nLabel: good", example).label == "bad"
    assert prompt.parse("", example) == Parsed("", None)


def test_a_hint_shows_the_gold_label_and_another_conclusion_has_no_label():
    prompt = load_prompt("svamp")
    example = Example("1", "2 and 2\nSum?", "( 2.0 + 2.0 )")
    assert "( 2.0 + 2.0 )" in prompt.question(example, hinted=True)
    assert "( 2.0 + 2.0 )" not in prompt.question(example)
    assert prompt.parse("Add them.", example, hinted=True) == Parsed("Add them.", example.label)
    agreeing = prompt.parse("Add. The answer is (2 + 2).", example, hinted=True)
    assert agreeing == Parsed("Add.", example.label)
    other = prompt.parse("Subtract. The answer is (2 - 2).", example, hinted=True)
    assert other == Parsed("Subtract.", None)
    with pytest.raises(DssError, match="example '1' has no label"):
        prompt.question(Example("1", "2 and 2\nSum?"), hinted=True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("labels: [good, bad]", "labels: [yes, no]", "True is a bool; put text in quotes"),
        ("labels:", "lables:", "did you mean 'labels'"),
        ("{{ input }}", "{{ inptu }}", "'inptu' is undefined"),
        ("{{ input }}", "{{ input", "not a Jinja template"),
        ("{{ input }}", "{{ input.__class__.__mro__ }}", "unsafe"),
        ("(?P<label>", "(?P<label", "not a regular expression"),
        ("(?P<rationale>", "(?P<reason>", "no group"),
        ("form:", 'instruction: "\\ud83d"\nform:', "half a character"),
        ("Label: (?P", "Answer: (?P", "exemplar 1: its own answer"),
        ("label: good}", "label: great}", "exemplar 1: its own answer"),
        ("rationale: It shines., ", "", "exemplar 1: has no `rationale`"),
        ("form:", "metric: f1\nform:", "unknown metric"),
        ("form:", "form: [", "not YAML"),
        ("form:", "parameters: {a: 2024-13-45}\nform:", "not YAML"),
        ("form:", "choices_pattern: '(a)(b)'\nform:", "has 2 groups; give it one"),
        ("(?P<label>", "(?P<answer>", "has no group"),
        ('["\\nText:"]', '[""]', "an empty text would end every answer"),
        ('stop: ["\\nText:"]', "stop: text", "should be a list"),
        ("form:", "parameters: 3\nform:", "parameters: should be NAME: VALUE"),
    ],
)
def test_an_invalid_prompt_is_a_one_line_error(old, new, message):
    assert old in TEXT
    with pytest.raises(DssError, match=message) as caught:
        read(TEXT.replace(old, new))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("p.yaml") or "prompt p: exemplar" in str(caught.value)


PATHOLOGICAL = [
    *("\n" * 20_000, " " * 20_000 + "x", "So the answer is (a) a. " * 2000 + "\nx"),
    *("The answer is (1 " * 2000, "(" * 4000, "Answer: " * 3000, "Label:" * 3000),
    *("So the answer is x" + " " * 16_000 + "y", "Label: a" + " " * 16_000 + "b", "**" * 9000),
    *(
        "# x" + " " * 16_000 + "y:z",
        "<think>" * 4000,
        "{" * 9000,
        "#" * 9000 + " x",
        "sorry " * 4000,
        "```\n" * 4000,
    ),
]


def test_pathological_texts_are_parsed_in_time():
    """Backtracking patterns take minutes on these texts; only a process can be stopped."""
    code = (
        "import json, sys\n"
        "from dss.data.examples import Example; from dss.teacher.prompt import *\n"
        "example, texts = Example('1', 'a</s>b', '(1)'), json.load(sys.stdin)\n"
        "for name in prompt_names():\n"
        "    prompt = load_prompt(name)\n"
        "    print(name, flush=True)\n"
        "    for text in texts:\n"
        "        for hinted in (False, True): prompt.parse(text, example, hinted=hinted)"
    )
    command = [sys.executable, "-c", code]
    subprocess.run(command, input=json.dumps(PATHOLOGICAL), text=True, check=True, timeout=120)


def labeled_texts():
    """Texts of classification and free-form teachers, with their expected parse."""
    path = SHARED / "faults" / "teacher_texts.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def test_thoughts_markdown_json_and_refusals_are_recognized(shared):
    rows = labeled_texts()
    assert len(rows) >= 13
    for row in rows:
        prompt = load_prompt("classification" if row["labels"] else "free_form")
        reply = read_reply(200, chat_reply(row["raw"]).body.decode())
        sample = read_sample(prompt, Example("1", "x"), reply, hinted=False)
        parsed = {name: getattr(sample, name) for name in ("rationale", "label", "status")}
        assert parsed == {name: row[name] for name in parsed}, row["raw"]


@pytest.mark.parametrize("name", ["anli1", "esnli", "cqa", "svamp"])
def test_every_shipped_prompt_ignores_thoughts_and_markdown(name):
    prompt = load_prompt(name)
    exemplar, (_, answer) = prompt.exemplars[0], prompt.turns()[0]
    example = Example("1", exemplar.input)
    expected = Parsed(exemplar.rationale, exemplar.label)
    bold = answer.replace(exemplar.label, f"**{exemplar.label}**")
    written = json.dumps({"rationale": exemplar.rationale, "label": exemplar.label})
    for text in (
        f"<think>Hm. {prompt.turns()[1][1]}</think>{answer}",
        bold,
        f"```json\n{written}\n```",
    ):
        assert prompt.parse(text, example) == expected, text
    assert prompt.parse("<think>" + answer, example) == Parsed("", None)
    assert prompt.parse("I cannot help with that.", example).is_refusal


def test_the_last_conclusion_is_the_label():
    prompt, example = load_prompt("classification"), Example("1", "It crashes")
    text = "One might first say\nLabel: question\nbut a crash is a defect.\nLabel: bug"
    rationale = "One might first say\nLabel: question\nbut a crash is a defect."
    assert prompt.parse(text, example) == Parsed(rationale, "bug")
    example = Example("1", "a</s>b")
    text = "It may be neutral. So the answer is neutral. But no. So the answer is contradiction."
    assert load_prompt("anli1").parse(text, example).label == "contradiction"
    text = "One. The answer is (1 + 2).\nWait. The answer is (2 + 3)."
    rationale = "One. The answer is (1 + 2).\nWait."
    assert load_prompt("svamp").parse(text, example) == Parsed(rationale, "(2 + 3)")


@pytest.mark.parametrize(
    ("written", "label"),
    [
        (r"\boxed{\frac{1}{2}}", "1/2"),
        (r"$\boxed{\text{Nairobi}}$.", "Nairobi"),
        ("Sorry", "Sorry"),
        ("I'm sorry, but I can't", None),
    ],
)
def test_a_free_form_label_has_no_latex_and_is_no_refusal(written, label):
    parsed = load_prompt("free_form").parse(f"Why.\nAnswer: {written}", Example("1", "x"))
    assert (parsed.label, parsed.is_refusal) == (label, label is None)


@pytest.mark.parametrize(
    "text", ["Why.\n- Label: bug", "> Why.\n> Label: bug", "Why.\n1. Label: bug"]
)
def test_bullets_and_block_quotes_are_removed_from_a_rationale(text):
    assert load_prompt("classification").parse(text, Example("1", "x")) == Parsed("Why.", "bug")


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("bug.", "bug"),
        ('"Bug"', "bug"),
        ("bug (it crashes)", "bug"),
        ("bug, because it crashes", "bug"),
        ("bug or billing", None),
        ("bug, or rather billing", None),
        ("not a bug", None),
        ("bugs", None),
    ],
)
def test_text_around_a_label_is_ignored_unless_it_is_another_label(written, label):
    parsed = load_prompt("classification").parse(f"Why.\nLabel: {written}", Example("1", "x"))
    assert parsed == Parsed("Why.", label)


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("(38 × 27)", "(38 * 27)"),
        ("(1,000 + 27)", "(1000 + 27)"),
        ("(thirty-eight plus 27)", None),
        ("(some - 8)", None),
    ],
)
def test_an_equation_that_the_metric_cannot_read_is_no_label(written, label):
    parsed = load_prompt("svamp").parse(f"Add. The answer is {written}.", Example("1", "x"))
    assert parsed == Parsed("Add.", label)


def test_choices_have_no_surrounding_white_space():
    prompt = load_prompt("cqa")
    example = Example("1", "Where?\r\nAnswer Choices:\r\n(a) here \r\n(b) there\r\n")
    assert prompt.choices(example.input) == ("here", "there")
    parsed = prompt.parse("Why. So the answer is (b) there.", example)
    assert parsed == Parsed("Why.", "there")


def test_a_missing_or_invalid_prompt_file_is_an_error(tmp_path):
    with pytest.raises(DssError, match="did you mean 'svamp'"):
        load_prompt("swamp")
    with pytest.raises(DssError, match="no such file"):
        load_prompt(str(tmp_path / "mine.yaml"))
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(DssError, match="not UTF-8"):
        load_prompt(str(tmp_path / "bad.yaml"))
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(DssError, match="should have exemplars, form"):
        load_prompt(str(tmp_path / "empty.yaml"))


def test_an_input_that_does_not_fit_the_template_is_named():
    with pytest.raises(DssError, match="example 'x7': does not fit the template"):
        load_prompt("esnli").question(Example("x7", "no separator"))
