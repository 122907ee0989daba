"""Files: their sizes in words, and that they are there as a whole or not at all."""

import pytest

from peft_func.cli.files import readable_size
from peft_func.interop.atomic import renamed_into


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail():
        with renamed_into(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"
    with renamed_into(path) as temporary:
        temporary.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "new"


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB")])
def test_sizes(tmp_path, size, text):
    path = tmp_path / "a"
    path.write_bytes(bytes(size))
    assert readable_size(path) == text
