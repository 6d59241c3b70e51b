import json

import pytest

from dss.cli import main as cli
from dss.data.examples import teacher_files
from dss.errors import DssError
from dss.teacher.request import file_name
from dss.testing import FakeEndpoint
from tests.conftest import write_jsonl
from tests.teacher.conftest import PROMPT, numbers_file
from tests.teacher.test_annotate import failure, right
from tests.teacher.test_batch import result


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Arguments of `dss annotate` in a folder with numbers.jsonl, prompt.yaml and prices.yaml."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    numbers_file(tmp_path, 20)
    (tmp_path / "prompt.yaml").write_text(PROMPT)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "numbers.jsonl").write_text("of another job")
    (tmp_path / "prices.yaml").write_text("currency: EUR\nmodels: {m: {input: 100, output: 200}}")
    return ["annotate", "--input=numbers.jsonl", "--prompt=prompt.yaml", "--teacher=m"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base-url=http://u:p@h/v1"], "contains a user name, a query or a fragment"),
        (["--base-url=localhost:8000"], "give one like https://host/v1"),
        ([], "OPENAI_API_KEY is not set"),
        (["--samples=0"], "--samples=0: give at least 1"),
        (["--samples=3"], "temperature 0 would buy the same answer 3 times"),
        (
            ["--max-cost=1", "--base-url=http://127.0.0.1:9/v1"],
            "--max-cost needs the model's price",
        ),
        (["--concurrency=0", "--base-url=http://127.0.0.1:9/v1"], "--concurrency=0: give at least"),
        (["--param=x", "--base-url=http://127.0.0.1:9/v1"], "--param x: give it as NAME=VALUE"),
        (["--dataset=cqa"], "give what to annotate"),
        (["--prompt=cqq"], "unknown prompt 'cqq'; did you mean 'cqa'"),
        (["--prices=none.yaml"], "none.yaml: no such file"),
        (["--input=none.jsonl"], "none.jsonl: no such file"),
        (["--input=."], "a folder; give one of its files"),
        (["--reparse"], "no such journal; nothing was annotated there yet"),
        (["--report"], "no such journal; nothing was annotated there yet"),
        (["--name=a b", "--dry-run"], "--name=a b: use letters"),
        (["--max-cost=nan", "--base-url=http://127.0.0.1:9/v1"], "--max-cost=nan: give more"),
        (["--batch-export=."], "--batch-export .: give another folder"),
        (["--pipeline-options='", "--base-url=http://127.0.0.1:9/v1"], "--pipeline-options: No"),
        (["--output=other", "--base-url=http://127.0.0.1:9/v1"], "other/numbers.jsonl: exists"),
    ],
)
def test_a_user_error_is_one_line_and_sends_no_request(given, options, message, capsys):
    assert cli.main([*given, *options]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_labels_declared_in_the_folder_are_the_prompts_labels(given, tmp_path, capsys):
    declared = tmp_path / "dataset.json"
    declared.write_text('{"labels": ["odd", "even", "neither"]}')
    assert "labels: [even, odd]\n" in PROMPT
    (tmp_path / "prompt.yaml").write_text(PROMPT.replace("labels: [even, odd]\n", ""))
    with FakeEndpoint(right) as endpoint:
        assert cli.main([*given, f"--base-url={endpoint.url}"]) == 0
        made = tmp_path / "made"
        assert cli.main([*given, f"--base-url={endpoint.url}", f"--output={made}"]) == 0
        assert (made / "dataset.json").read_text() == declared.read_text()
        (made / "dataset.json").write_text("{}")
        assert cli.main([*given, f"--base-url={endpoint.url}", f"--output={made}"]) == 2
        assert "dataset.json: differs from" in capsys.readouterr().err
        reparse = [*given, f"--base-url={endpoint.url}", "--reparse"]
    unchanged = []
    for text in (declared.read_text(), '{"labels": ["odd", "even"]}'):
        declared.write_text(text)
        capsys.readouterr()
        assert cli.main(reparse) == 0
        unchanged.append("unchanged" in capsys.readouterr().out)
    assert unchanged == [True, False]
    with (tmp_path / "numbers.jsonl").open("a") as file:
        file.write('{"id": "x", "input": "7", "label": "seven"}\n')
    assert cli.main([*given, "--dry-run"]) == 2
    assert "label 'seven' is not one of odd, even" in capsys.readouterr().err
    declared.write_text('{"labels": ["odd", "Even"]}')
    assert cli.main([*given, "--dry-run"]) == 2
    assert "exemplar" in capsys.readouterr().err
    declared.write_text('{"labels": ["odd", "even"]}')
    (tmp_path / "prompt.yaml").write_text(PROMPT.replace("[even, odd]", "[even, odd, neither]"))
    assert cli.main([*given, "--dry-run"]) == 2
    printed = capsys.readouterr().err
    assert "dataset.json: its labels are odd, even, but prompt" in printed
    assert printed.count("\n") == 1


def test_an_input_with_an_invalid_line_sends_no_request(given, tmp_path, capsys):
    with (tmp_path / "numbers.jsonl").open("a") as file:
        file.write('{"id": "x", "input": "7", "label": "seven"}\n')
    with FakeEndpoint(right) as endpoint:
        assert cli.main([*given, f"--base-url={endpoint.url}"]) == 2
    assert "numbers.jsonl:21: label 'seven' is not one of even, odd" in capsys.readouterr().err
    assert endpoint.count == 0


def test_an_empty_input_and_a_hint_without_a_label_send_no_request(given, tmp_path, capsys):
    with FakeEndpoint(right) as endpoint:
        url = f"--base-url={endpoint.url}"
        with (tmp_path / "numbers.jsonl").open("a") as file:
            file.write('{"id": "x", "input": "7"}\n')
        assert cli.main([*given, url, "--hint"]) == 2
        assert "example 'x' has no label" in capsys.readouterr().err
        (tmp_path / "numbers.jsonl").write_text("")
        for option in ("--dry-run", "--api=chat"):
            assert cli.main([*given, url, option]) == 2
            assert "numbers.jsonl: no examples" in capsys.readouterr().err
    assert endpoint.count == 0


def test_outputs_are_not_replaced_by_fewer_answers(given, tmp_path, capsys):
    with FakeEndpoint(right) as endpoint:
        url = f"--base-url={endpoint.url}"
        assert cli.main([*given, url]) == 0
    good = (tmp_path / "numbers.m.jsonl").read_text()
    assert len(good.splitlines()) == 20
    assert cli.main([*given, url, "--reparse", "--param=max_tokens=60"]) == 0
    with FakeEndpoint(lambda _: failure(401)) as endpoint:
        assert cli.main([*given, f"--base-url={endpoint.url}"]) == 2
    assert cli.main([*given, url, "--max-cost=1"]) == 2
    assert (tmp_path / "numbers.m.jsonl").read_text() == good


def test_a_changed_prompt_and_few_requests_keep_existing_answers(given, tmp_path, capsys):
    outputs = tmp_path / "numbers.m.jsonl"
    with FakeEndpoint(right) as endpoint:
        url = f"--base-url={endpoint.url}"
        assert cli.main([*given, url]) == 0
        good = outputs.read_text()
        other = [*given, url, "--param=max_tokens=60"]
        capsys.readouterr()
        assert cli.main([*other, "--max-requests=5"]) == 2  # before any request is sent
        assert "not overwritten: 20 of its ok lines" in capsys.readouterr().err
        assert (endpoint.count, outputs.read_text()) == (20, good)
        assert cli.main([*other, "--max-requests=5", "--replace"]) == 0
        assert len(outputs.read_text().splitlines()) == 5
        assert cli.main(other) == 0
        assert len(outputs.read_text().splitlines()) == 20
        assert endpoint.count == 40


def test_an_unreachable_endpoint_keeps_existing_answers_and_is_reported(given, tmp_path, capsys):
    outputs = tmp_path / "numbers.m.jsonl"
    with FakeEndpoint(right) as endpoint:
        assert cli.main([*given, f"--base-url={endpoint.url}"]) == 0
    good = outputs.read_text()
    dead = [*given, "--base-url=http://127.0.0.1:9/v1", "--param=top_p=1", "--attempts=1"]
    assert cli.main([*dead, "--max-requests=2"]) == 2
    assert cli.main([*dead, "--concurrency=1"]) == 2
    assert outputs.read_text() == good
    outputs.unlink()
    with FakeEndpoint(lambda _: failure(500)) as endpoint:
        flags = (f"--base-url={endpoint.url}", "--param=top_p=2", "--max-requests=2")
        assert cli.main([*given, *flags]) == 1
    assert "2 requests got no answer" in capsys.readouterr().out


def test_files_of_other_jobs_are_not_overwritten(given, tmp_path, capsys):
    rows = [{"id": "n1", "rationale": "by hand", "label": "odd"}]
    mine = write_jsonl(tmp_path / "numbers.rules.jsonl", rows).read_text()
    with FakeEndpoint(right) as endpoint:
        url = f"--base-url={endpoint.url}"
        assert cli.main([*given, url, "--name=rules"]) == 2
        assert "journal.sqlite beside it has no record of it" in capsys.readouterr().err
        assert cli.main([*given, url]) == 0
        # Another model with the same name; another file with the same stem, in one folder.
        assert cli.main([*given[:-1], "--teacher=n", url, "--name=m"]) == 2
        assert "from another file of examples or another model" in capsys.readouterr().err
        made = f"--output={tmp_path / 'made'}"
        assert cli.main([*given, url, made]) == 0
        write_jsonl(tmp_path / "b" / "numbers.jsonl", [{"input": "1"}])
        assert cli.main([*given, f"--input={tmp_path / 'b' / 'numbers.jsonl'}", url, made]) == 2
        assert "give another folder with --output" in capsys.readouterr().err
        # Without its journal, an output file is still not overwritten.
        (tmp_path / "journal.sqlite").unlink()
        asked = endpoint.count
        assert cli.main([*given, url]) == 2
        assert endpoint.count == asked
    assert (tmp_path / "numbers.rules.jsonl").read_text() == mine


def test_another_jobs_parquet_file_and_outputs_of_removed_examples_are_kept(
    given, tmp_path, capsys
):
    table = tmp_path / "numbers.m.parquet"
    table.write_bytes(b"mine")
    with FakeEndpoint(right) as endpoint:
        url = f"--base-url={endpoint.url}"
        assert cli.main([*given, url, "--parquet"]) == 2
        assert endpoint.count == 0
        assert cli.main([*given, url]) == 0
        numbers_file(tmp_path, 19)
        assert cli.main([*given, url, "--samples=2", "--temperature=1"]) == 2
        assert endpoint.count == 20
        assert cli.main([*given, url, "--replace"]) == 0
    assert table.read_bytes() == b"mine"
    assert len((tmp_path / "numbers.m.jsonl").read_text().splitlines()) == 19


def test_different_model_names_have_different_file_names(tmp_path):
    assert file_name("模型") != file_name("モデ")
    for name in ("my-model", "my_model"):
        write_jsonl(tmp_path / f"train.{name}.jsonl", [])
    with pytest.raises(
        DssError, match=r"train.my_model.jsonl: both are outputs of teacher 'my_model'"
    ):
        teacher_files(tmp_path / "train.jsonl")


def test_parquet_is_updated_after_the_json_lines(given, tmp_path, capsys):
    import pyarrow.parquet as pq

    with FakeEndpoint(right) as endpoint:
        url = f"--base-url={endpoint.url}"
        assert cli.main([*given, url, "--max-requests=2", "--parquet"]) == 0
        assert cli.main([*given, url]) == 0
        assert cli.main([*given, url, "--parquet"]) == 0
    assert pq.read_table(tmp_path / "numbers.m.parquet").num_rows == 20


def test_a_dry_run_shows_prompts_tokens_and_cost_and_sends_no_request(given, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert cli.main([*given, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("[user] Number: two\nWhy:") == 2
    assert "---- n1" in out
    assert "requests: 20, of which 0 have an answer" in out
    assert "at 4 characters per token; output tokens: at most 1,000" in out
    assert "cost: unknown; give a file" in out
    assert sorted(tmp_path.iterdir()) == before
    with FakeEndpoint(right) as endpoint:
        url = f"--base-url={endpoint.url}"
        assert cli.main([*given, url, "--max-requests=5"]) == 0
        capsys.readouterr()
        assert cli.main([*given, url, "--dry-run", "--prices=prices.yaml"]) == 0
    out = capsys.readouterr().out
    assert "of which 5 have an answer" in out
    # The endpoint counted 100 tokens a prompt; 15 prompts and 15 answers of 50 are left.
    assert "input tokens: about 1,509, by the endpoint's counts so far" in out
    assert "; output tokens: at most 750" in out
    assert "cost: at most about 0.3009 EUR" in out
    assert endpoint.count == 5


def test_a_run_reports_its_progress_and_stops_at_the_limit(given, tmp_path, capsys):
    with FakeEndpoint(right) as endpoint:
        url = f"--base-url={endpoint.url}"
        assert cli.main([*given, url, "--max-requests=7", "--prices=prices.yaml"]) == 0
        out = capsys.readouterr().out
        assert "--max-requests=7 reached; run the same command again to resume" in out
        assert "numbers.m.jsonl: 7 lines: 7 ok" in out
        assert cli.main([*given, url, "--prices=prices.yaml", "--parquet"]) == 0
        out = capsys.readouterr().out
        assert "request 20/20" in out
        assert "EUR of about" in out
        assert "2,100 tokens" in out
        assert "numbers.m.jsonl: 20 lines: 20 ok" in out
        assert (tmp_path / "numbers.m.parquet").is_file()
        assert cli.main([*given, url, "--reparse"]) == 0
    assert endpoint.count == 20
    assert "numbers.m.jsonl: unchanged" in capsys.readouterr().out


def test_a_report_prints_statistics_and_writes_a_page(given, tmp_path, capsys):
    with FakeEndpoint(right) as endpoint:
        url = f"--base-url={endpoint.url}"
        assert cli.main([*given, url]) == 0
        assert cli.main([*given, url, "--report", "--prices=prices.yaml"]) == 0
    out = capsys.readouterr().out
    assert "teacher's accuracy: 100.00% (20 of 20 with a gold label)" in out
    assert "cost: 0.2200 EUR" in out
    assert "n19" in (tmp_path / "numbers.m.html").read_text()


def test_a_batch_is_exported_and_imported(given, tmp_path, capsys):
    url = "--base-url=http://127.0.0.1:9/v1"
    assert cli.main([*given, url, "--batch-export=out"]) == 0
    assert "out/numbers.m.batch-000.jsonl: 20 requests" in capsys.readouterr().out
    requests = [json.loads(t) for t in (tmp_path / "out" / "numbers.m.batch-000.jsonl").open()]
    lines = [json.dumps(result(request, i)) for i, request in enumerate(reversed(requests))]
    (tmp_path / "back.jsonl").write_text("\n".join(lines))
    assert cli.main([*given, url, "--batch-import", "back.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "20 results imported; 0 were imported before, 0 are of requests" in out
    assert "numbers.m.jsonl: 20 lines: 20 ok" in out


def test_usage_is_written_beside_the_outputs_and_a_known_cost_is_kept(given, tmp_path, capsys):
    file = tmp_path / "numbers.m.usage.json"
    with FakeEndpoint(right) as endpoint:
        url = f"--base-url={endpoint.url}"
        assert cli.main([*given, url, "--max-requests=5", "--prices=prices.yaml"]) == 0
        paid = json.loads(file.read_text())
        assert (paid["outputs"], paid["prompt_tokens"], paid["currency"]) == (5, 500, "EUR")
        assert paid["cost"] == pytest.approx((500 * 100 + paid["completion_tokens"] * 200) / 1e6)
        assert cli.main([*given, url, "--reparse"]) == 0
        assert json.loads(file.read_text()) == paid
        assert cli.main([*given, url]) == 0
    later = json.loads(file.read_text())
    assert (later["outputs"], later["prompt_tokens"], later["cost"]) == (20, 2000, None)
