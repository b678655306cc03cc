"""Files and folders that are whole or not there, whenever the process that writes them is killed."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorakit.errors import OutputError
from lorakit.utils.atomic_io import (
    atomic_write,
    commit,
    remove_folder,
    remove_stale_temp_files,
    staging_dir,
    write_atomically,
)

FILES = ("a", "b", "c")

KILLED_AT = """
import os, sys
from pathlib import Path
from lorakit.utils.atomic_io import commit, staging_dir
FILES = ("a", "b", "c")
{body}
left = int(sys.argv[2])
rename = Path.rename
def counted(path, target):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    return rename(path, target)
Path.rename = counted
replace_folder(Path(sys.argv[1]), "new")
"""


def replace_folder(final: Path, content: str) -> None:
    """Write a folder anew, as the script does."""
    with staging_dir(final) as scratch:
        written = scratch / final.name
        written.mkdir()
        for name in FILES:
            (written / name).write_text(content)
        commit(written, final)


def run_python(code: str, *arguments: object) -> int:
    """Run code in a process of its own; gives its exit status."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=False, timeout=60).returncode


def whole(folder: Path) -> str:
    """What all files of a folder say; empty if one is missing or they differ."""
    contents = {(folder / name).read_text() if (folder / name).exists() else "" for name in FILES}
    return contents.pop() if len(contents) == 1 else ""


def test_a_folder_is_replaced_without_a_moment_when_it_is_gone(tmp_path: Path) -> None:
    """Killed before each of the renames, the old or the new folder is there whole, and the next write tidies up."""
    final = tmp_path / "step00000003"
    found = []
    for renames in range(5):
        replace_folder(final, "old")
        status = run_python(KILLED_AT.format(body=inspect.getsource(replace_folder)), final, renames)
        found.append(sorted(whole(path) for path in tmp_path.glob("step*")))
        assert "" not in found[-1]
        replace_folder(final, "newest")
        assert [whole(path) for path in tmp_path.glob("step*")] == ["newest"]
    assert status == 0
    assert found == [["old"], ["new", "old"], ["new"], ["new"], ["new"]]


def test_killed_again_while_tidying_up(tmp_path: Path) -> None:
    """Killed twice, at whatever renames, a whole folder is there."""
    final = tmp_path / "step00000003"
    for first in range(3):
        for second in range(4):
            replace_folder(final, "old")
            for renames in (first, second):
                run_python(KILLED_AT.format(body=inspect.getsource(replace_folder)), final, renames)
            found = {whole(path) for path in tmp_path.glob("step*")}
            assert found
            assert "" not in found


KILLED_WHILE_WRITING = """
import os, sys
from pathlib import Path
from lorakit.utils.atomic_io import atomic_write, staging_dir
with staging_dir(Path(sys.argv[1]) / "x") as scratch, atomic_write(Path(sys.argv[1]) / "x.json") as file:
    (scratch / "half").write_text("half")
    file.write(b"half")
    os._exit(9)
"""


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    """What a killed process was writing is removed; what a living one is writing, and all else, stays."""
    assert run_python(KILLED_WHILE_WRITING, tmp_path) == 9
    (temporary,) = tmp_path.glob(".*.tmp")
    assert len(list(tmp_path.iterdir())) == 2
    os.utime(temporary, (time.time() - 3700,) * 2)
    for name in (".hidden.tmp", "x.12345678.tmp", ".partial", "partial-1"):
        (tmp_path / name).touch()
    with staging_dir(tmp_path / "x") as scratch, atomic_write(tmp_path / "y.json") as file:
        (scratch / "mine").touch()
        file.write(b"whole")
        remove_stale_temp_files(tmp_path)
        assert len(list(tmp_path.iterdir())) == 4 + 2
        assert (scratch / "mine").exists()
    assert (tmp_path / "y.json").read_bytes() == b"whole"
    (tmp_path / ".partial-123-4").mkdir()  # without a lock
    remove_stale_temp_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".hidden.tmp", ".partial", "partial-1", "x.12345678.tmp", "y.json",
    ]  # fmt: skip


def test_nothing_is_left_of_a_scratch_folder(tmp_path: Path) -> None:
    """Nor of one in a folder that was not there, or of a folder that is removed."""
    with staging_dir(tmp_path / "new" / "folder" / "x") as scratch:
        (scratch / "x").touch()
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    replace_folder(tmp_path / "gone", "old")
    remove_folder(tmp_path / "gone")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_the_system_refuses_is_told(tmp_path: Path) -> None:
    """A folder below a file can neither be made nor written to; the message names it, the cause and the cure."""
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=r"file/x cannot be written: Not a directory\. Choose another name or folder"),
        staging_dir(tmp_path / "file" / "x"),
    ):
        pass
    with pytest.raises(OutputError, match="gone cannot be written: No such file"):
        remove_folder(tmp_path / "gone")
    write_atomically(tmp_path / "x", b"1")
    remove_stale_temp_files(tmp_path / "absent")
