import os

import pytest

from dss.errors import DssError
from dss.paths import check_no_pipes, is_stream, replacing, write_whole


def test_what_is_written_to_and_not_replaced(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    assert [is_stream(tmp_path / name) for name in ("file", "pipe", "none")] == [False, True, False]
    assert is_stream("/dev/stdout")  # also where it leads to a file


def test_a_pipe_is_found_and_what_goes_meanwhile_is_none(tmp_path):
    check_no_pipes(tmp_path / "none")
    (tmp_path / "below").mkdir()
    os.mkfifo(tmp_path / "below" / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    check_no_pipes(tmp_path, below=False)
    with pytest.raises(DssError, match="below/pipe: a named pipe"):
        check_no_pipes(tmp_path)


def test_a_file_takes_its_place_whole_and_not_through_a_link(tmp_path):
    path, kept = tmp_path / "out.txt", tmp_path / "kept"
    kept.write_text("mine")
    (tmp_path / "out.txt.partial").symlink_to(kept)
    write_whole(path, "half \ud800")
    assert path.read_text() == "half ?"
    assert kept.read_text() == "mine"
    path.unlink()
    path.symlink_to(kept)
    with pytest.raises(KeyError), replacing(path):
        raise KeyError
    assert path.is_symlink()
    with replacing(path) as file:
        file.write("2")
    assert (path.read_text(), kept.read_text()) == ("2", "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "out.txt"]
