"""What the generated idioms rely on in their word lists."""

from bridges.data import words

LISTS = {name: value for name, value in vars(words).items() if name.isupper()}


def test_no_word_stands_twice_in_a_list():
    assert len(LISTS) == 11
    for name, entries in LISTS.items():
        assert len(set(entries)) == len(entries) or name == "WORDS", name


def test_endings_are_in_no_other_list_of_running_text():
    """Else the closing quote would not be nearly certain after them."""
    assert not set(words.ENDINGS) & set(words.WORDS)


def test_file_names_say_what_is_done_with_the_file():
    assert not set(words.READ_NAMES) & set(words.WRITE_NAMES)


def test_names_are_identifiers():
    for entries in (words.NAMES, words.COLLECTIONS, words.VERBS, words.CLASSES, words.ERRORS):
        assert all(entry.isidentifier() for entry in entries)
