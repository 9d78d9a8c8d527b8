"""What the generated idioms rely on in their word lists."""

from bridges.data import words

LISTS = {name: value for name, value in vars(words).items() if name.isupper()}


def test_no_list_but_that_of_running_text_holds_a_word_twice():
    assert len(LISTS) == 11
    for name, entries in LISTS.items():
        assert len(set(entries)) == len(entries) or name == "WORDS", name


def test_a_last_word_never_occurs_within_a_string():
    """Otherwise a closing quote would not be nearly certain after it."""
    assert not set(words.ENDINGS) & set(words.WORDS)


def test_no_file_name_is_both_read_and_written():
    assert not set(words.READ_NAMES) & set(words.WRITE_NAMES)


def test_names_are_identifiers():
    for entries in (words.NAMES, words.COLLECTIONS, words.VERBS, words.CLASSES, words.ERRORS):
        assert all(entry.isidentifier() for entry in entries)
