from dss.cli.eval_command import TABLE_CLASSES, _print_classes
from dss.cli.tables import make_console
from dss.evaluation.classes import ClassMetrics
from dss.evaluation.confusion import Confusion

TARGETS, PREDICTIONS = ["[no]", "yes", "yes"], ["[no]", "[no]", "maybe"]


def printed(capsys, closed=(), targets=TARGETS, predictions=PREDICTIONS) -> list[str]:
    confusion = Confusion.of(closed, targets, predictions) if closed else None
    _print_classes(make_console(), ClassMetrics.of(closed, targets, predictions), confusion)
    return capsys.readouterr().out.splitlines()


def rows(lines: list[str]) -> list[str]:
    return [
        " ".join(line.split()) for line in lines if line.strip() and not set(line) <= {" ", "─"}
    ]


def test_a_closed_set_has_scores_by_class_and_the_confusion_matrix(capsys):
    lines = printed(capsys, ("[no]", "yes", "never"))
    assert lines[0] == (
        "macro F1 33.33%, weighted F1 22.22%, balanced accuracy 50.00%; "
        "most frequent label 'yes': 66.67%"
    )
    title, header, *table = rows(lines[1:])
    assert title == "by label (-> predicted label)"
    columns = "label examples recall 95% CI precision F1 -> [no] -> yes -> never -> other"
    assert header == columns
    assert table == [
        "[no] 1 100.0% 20.7% to 100.0% 50.0% 66.7% 1 0 0 0",
        "yes 2 0.0% 0.0% to 65.8% 0.0% 1 0 0 1",
        "never 0 0 0 0 0",
    ]


def test_an_open_set_has_no_confusion_matrix(capsys):
    title, header, *table = rows(printed(capsys)[1:])
    assert title == "by label"
    assert header == "label examples recall 95% CI precision F1"
    assert [row.split()[0] for row in table] == ["[no]", "yes"]


def test_many_classes_have_no_table(capsys):
    labels = [f"label {i}" for i in range(TABLE_CLASSES + 1)]
    (line,) = printed(capsys, targets=labels, predictions=labels)
    assert line.startswith("macro F1 100.00%, ")
