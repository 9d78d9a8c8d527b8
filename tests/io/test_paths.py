from pathlib import Path

import pytest

from bridges.io.paths import fetch_folder, local_folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder that is also the working directory, with a folder `b` and a file `f` in it."""
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "f").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", ["b", "./b", "~/b", "b/", "b/../b", "b/c", "~/b/c", Path("b"), Path("~/b"), "."])
def test_an_existing_folder_is_found_however_it_is_written(path, home):
    found = local_folder(path)
    assert found is not None and found.resolve() == Path(str(path).replace("~", str(home))).resolve()
    assert local_folder(home / "b") == home / "b" == local_folder(str(home / "b"))


@pytest.mark.parametrize("hub_id", ["gpt2", "someone/model", "Some-One/model_v1.5", Path("someone/model")])
def test_what_is_not_here_but_looks_like_a_hub_id_is_one(hub_id, home):
    assert local_folder(hub_id) is None


@pytest.mark.parametrize("path", ["~/nothing", "./nothing", "../nothing", "/nothing/here", "a/b/c", "b/", "a b", ""])
def test_what_looks_like_a_path_must_exist(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        local_folder(path)
    assert str(caught.value) == f"path={path!r} must be an existing folder or a hub id (name or owner/name)"


def test_a_file_is_refused(home):
    with pytest.raises(NotADirectoryError, match="path='f' is a file; give the folder that it is in"):
        local_folder("f")


def test_a_hub_id_is_downloaded_and_a_folder_is_not(home, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k)) or str(home / "b"))
    assert fetch_folder("b/c", revision="v1") == Path("b/c") and asked == []
    assert fetch_folder("someone/model", revision="v1") == home / "b"
    assert asked == [(("someone/model",), {"revision": "v1"})]


def test_a_hub_that_does_not_answer_gives_one_line(monkeypatch):
    def snapshot_download(*_args, **_options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(OSError) as caught:
        fetch_folder("someone/model")
    expected = "path='someone/model' is not a folder, and could not be downloaded from the hub: no route to host"
    assert str(caught.value) == expected
