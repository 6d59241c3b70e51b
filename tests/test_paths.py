import pytest

from dss.paths import replacing, write_whole


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
