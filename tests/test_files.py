import pytest

from mdnorm.files import atomic_path, write_text_atomically


def test_replaces_the_file_in_one_step(tmp_path):
    path = tmp_path / "a.txt"
    write_text_atomically(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new ü", encoding="utf-8")
        assert temporary.suffix == ".txt"
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "new ü"
    assert path.stat().st_mode & 0o600 == 0o600


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text_atomically(path, "old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fail()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
