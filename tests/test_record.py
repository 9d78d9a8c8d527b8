"""The recorder of benchmarks, on two that print a line: what it writes, what it leaves, what a failure does."""

import os
import platform

import pytest
import record

GOOD = '''"""Two figures beside each other: python benchmarks/bench_good.py"""
import sys
print(f"| figure |\\n|---|\\n| {sys.argv[1:]} |")
'''
OTHER = '"""Another, without torch.\n\n`python benchmarks/bench_other.py`\n"""\nprint("other figures")\n'
WITH_TORCH = "import torch\ntorch.set_num_threads(1)\n"
BAD = '"""Fails."""\nprint("half a table")\nraise SystemExit("no figures")\n'


@pytest.fixture
def folder(tmp_path):
    for name, text in {"good": GOOD, "other": OTHER, "bad": BAD}.items():
        (tmp_path / f"bench_{name}.py").write_text(text)
    return tmp_path


def recorded(folder, *arguments):
    status = record.main(arguments, folder, folder / "RESULTS.md")
    return status, (folder / "RESULTS.md").read_text()


def changed_by_hand(text):
    """The commands of sections whose checksum is not that of their text, or is missing."""
    return [name for name, one in record.sections(text).items() if one.checksum != record.checksum(one.text)]


def test_a_section_names_command_machine_and_commit_and_has_what_was_printed(folder):
    with (folder / "bench_good.py").open("a") as file:
        file.write(WITH_TORCH)
    status, text = recorded(folder, "bench_good.py", "--rounds", "3", "bench_other.py")
    assert status == 0 and text.startswith(record.HEAD)
    lines = text.splitlines()
    start = next(
        i for i, line in enumerate(lines) if line.startswith("<!-- command: bench_good.py --rounds 3; sha256: ")
    )
    assert lines[start + 1] == "## Two figures beside each other"
    caption = lines[start + 3]
    assert caption.startswith("`python benchmarks/bench_good.py --rounds 3`, 20")
    assert ", 1 thread; torch " in caption and f"{os.cpu_count()} core" in caption and record.commit() in caption
    assert platform.node() not in text
    assert lines[start + 5 : start + 8] == ["| figure |", "|---|", "| ['--rounds', '3'] |"]
    other = record.sections(text)["bench_other.py"].text
    assert other.startswith("\n## Another, without torch\n") and "thread" not in other
    assert other.endswith("\n\nother figures\n")


def test_a_benchmark_may_start_processes_that_import_it_anew(folder):
    (folder / "bench_pool.py").write_text(
        '"""Another process."""\nimport multiprocessing, other\n\n\ndef double(x):\n    return other.TWO * x\n\n\n'
        'if __name__ == "__main__":\n    with multiprocessing.get_context("spawn").Pool(1) as pool:\n'
        "        print(pool.apply(double, (21,)))\n"
    )
    (folder / "other.py").write_text("TWO = 2\n")
    assert recorded(folder, "bench_pool.py")[1].endswith("\n\n42\n")


def test_the_same_command_replaces_its_section_and_other_sections_stay(folder):
    recorded(folder, "bench_good.py", "bench_other.py")
    (folder / "bench_good.py").write_text('"""New."""\nprint("new figures")\n')
    before = (folder / "RESULTS.md").read_text()
    _, text = recorded(folder, "bench_good.py")
    assert text.count("<!-- command:") == 2 and "new figures" in text and "| figure |" not in text
    assert record.sections(text)["bench_other.py"] == record.sections(before)["bench_other.py"]
    _, text = recorded(folder, "bench_good.py", "--quick")  # another command
    assert text.count("<!-- command:") == 3 and text.count("new figures") == 2
    assert list(record.sections(text)) == ["bench_good.py", "bench_other.py", "bench_good.py --quick"]


def test_a_section_has_a_checksum_that_another_digit_does_not_fit(folder):
    _, text = recorded(folder, "bench_good.py", "bench_other.py", "bench_good.py", "--quick")
    assert len(record.sections(text)) == 3 and changed_by_hand(text) == []
    assert changed_by_hand(text.replace("other figures", "other figure5")) == ["bench_other.py"]
    assert changed_by_hand(text.rstrip() + "\n\n") == []


def test_sections_without_a_checksum_stay_until_they_are_recorded_anew(folder):
    old = "<!-- command: bench_{}.py -->\n## Old\n\nold {} figures\n"
    (folder / "RESULTS.md").write_text(
        "\n".join(["# Old head\n", old.format("good", "good"), old.format("bad", "bad")])
    )
    _, text = recorded(folder, "bench_good.py")
    assert text.startswith(record.HEAD) and "old good figures" not in text
    assert text.endswith(old.format("bad", "bad")) and list(record.sections(text)) == ["bench_good.py", "bench_bad.py"]
    assert changed_by_hand(text) == ["bench_bad.py"]


def test_a_benchmark_that_fails_changes_nothing_and_the_rest_are_recorded(folder, capfd):
    _, before = recorded(folder, "bench_good.py")
    status, text = recorded(folder, "bench_bad.py")
    assert status == 1 and text == before
    assert "bench_bad.py ended with status 1" in capfd.readouterr().err
    status, text = recorded(folder, "bench_bad.py", "bench_other.py")
    assert status == 1 and "other figures" in text and "half a table" not in text and before.strip() in text


def test_what_is_no_benchmark_is_refused_before_any_runs(folder):
    with pytest.raises(ValueError, match="'--quick' must be the name of a benchmark"):
        recorded(folder, "--quick")
    with pytest.raises(ValueError, match=r"no benchmark bench_none\.py"):
        recorded(folder, "bench_good.py", "bench_none.py")
    assert not (folder / "RESULTS.md").exists()


def test_without_a_gpu_its_list_is_skipped_in_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(record.torch.cuda, "is_available", lambda: False)
    assert record.main(["--gpu"], folder, folder / "RESULTS.md") == 0
    assert capsys.readouterr().out == "no GPU: nothing is measured\n"


def test_the_lists_name_benchmarks_with_headings_and_the_results_of_all_are_as_they_were_written():
    for command in (*record.BENCH, *record.BENCH_GPU):
        assert 10 < len(record.title(record.FOLDER / command.split()[0])) < 120
    text = record.RESULTS.read_text()
    found = record.sections(text)
    assert text.startswith(record.HEAD) and text.count("\n## ") == len(found)
    assert set(record.BENCH) <= set(found)
    assert changed_by_hand(text) == []
