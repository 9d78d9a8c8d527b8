import pytest

from bridges.data.python_source import is_heldout, module_files, python_source


def test_heldout_and_train_are_disjoint_and_make_the_whole():
    train, heldout = python_source("train"), python_source("heldout")
    assert set(train).isdisjoint(heldout)
    assert len(train) + len(heldout) == len(python_source("all"))
    assert len(train) > 10 * len(heldout) > 0


def test_about_one_module_in_twenty_is_held_out():
    names = module_files()
    share = sum(map(is_heldout, names)) / len(names)
    assert 0.025 < share < 0.1


def test_the_split_of_a_module_never_changes():
    # Written down once: a changed hash would leak held-out text of bundled models into their training text.
    names = ("ast", "codecs", "html.__init__", "json.decoder", "tempfile", "typing")
    assert [name for name in names if is_heldout(name)] == ["codecs", "html.__init__", "tempfile"]


def test_texts_are_real_modules_in_order_of_their_names():
    texts = python_source()
    ordered_dict, decoder = (
        next(i for i, text in enumerate(texts) if cue in text) for cue in ("class OrderedDict", "class JSONDecoder")
    )
    assert ordered_dict < decoder  # collections.__init__ before json.decoder
    assert sum(map(len, texts)) > 5_000_000


def test_tables_tests_and_installed_packages_are_left_out():
    folders = {part for name in module_files() for part in name.split(".")}
    assert folders.isdisjoint({"site-packages", "test", "tests", "pydoc_data", "encodings", "idle_test"})


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='validation'"):
        python_source("validation")
