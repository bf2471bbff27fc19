"""A file is the old one or the new one, whatever comes in between; where it is to last, it is on the disk before it shows."""

import os
from pathlib import Path

import pytest

from parallel.atomic import write_atomically


def test_the_file_is_the_old_one_until_all_is_written(tmp_path):
    path = tmp_path / "file"
    with write_atomically(path) as file:
        file.write("one ä")
        assert not path.exists()
    with write_atomically(path, "wb") as file:
        file.write(b"two")
        file.flush()
        assert path.read_text("utf-8") == "one ä"
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_one_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with write_atomically(path) as file:
            file.write("new")
            raise error("planted")

    with pytest.raises(error, match="planted"):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("flushed", [True, False])
def test_what_is_to_last_is_flushed_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch, flushed):
    done, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), done.append((os.fstat(fd).st_ino, os.fstat(fd).st_size))))
    monkeypatch.setattr(Path, "replace", lambda path, to: (replace(path, to), done.append("renamed")))
    path = tmp_path / "file"
    with write_atomically(path, flushed=flushed) as file:
        file.write("all of it")
    info, folder = path.stat(), tmp_path.stat()
    renamed = ["renamed"]
    assert done == ([(info.st_ino, 9), *renamed, (folder.st_ino, folder.st_size)] if flushed else renamed)
