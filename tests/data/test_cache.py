"""The cache: whole entries or none, whatever happens, and a memo that never lies about a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lorakit.data.cache.file_cache import FileStatCache, content_digest
from lorakit.data.cache.store import Cache, NotFiniteError, content_key, to_storable
from lorakit.errors import DataError, OutputError

KEY = content_key("test", 1)


def entry_file(cache: Cache) -> Path:
    """The only entry of a cache."""
    (path,) = cache.folder.rglob("*.safetensors")
    return path


def test_entry_comes_back_as_it_was(cache: Cache):
    """Names, shapes, number formats and values survive, also of rows and transposed views of larger tensors."""
    whole = torch.randn(4, 3, 5)
    tensors = {"row": whole[1], "transposed": whole[2].T, "half": whole[0].half(), "bf16": whole[0].bfloat16()}
    assert not cache.has(KEY)
    cache.write(KEY, to_storable(tensors))
    assert cache.has(KEY)
    loaded = cache.load(KEY)
    assert loaded.keys() == tensors.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_entry_is_a_safetensors_file_in_a_folder_of_two_digits(cache: Cache):
    """An entry lies in a sub-folder, can be read by anyone, and nothing else is left beside it."""
    cache.write(KEY, to_storable({"a": torch.ones(2)}))
    assert entry_file(cache) == cache.folder / KEY[:2] / f"{KEY}.safetensors"
    assert torch.equal(load_file(entry_file(cache))["a"], torch.ones(2))
    assert [path for path in cache.folder.rglob("*") if path.is_file()] == [entry_file(cache)]


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_entry_counts_as_absent(cache: Cache, keep: int):
    """A file cut at any place is no entry, and can be stored anew."""
    cache.write(KEY, to_storable({"a": torch.ones(20)}))
    entry_file(cache).write_bytes(entry_file(cache).read_bytes()[:keep])
    assert not cache.has(KEY)
    with pytest.raises(DataError, match=rf"{KEY}\.safetensors: was removed or damaged .*start again"):
        cache.load(KEY)
    cache.write(KEY, to_storable({"a": torch.ones(20)}))
    assert cache.has(KEY)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_that_are_not_finite_are_never_stored(cache: Cache, value: float, dtype: torch.dtype):
    """One NaN or infinity refuses the entry."""
    tensor = torch.zeros(9, dtype=dtype)
    tensor[4] = value
    with pytest.raises(NotFiniteError, match="its std holds NaN or infinity"):
        cache.write(KEY, to_storable({"mean": torch.zeros(9), "std": tensor}))
    assert not cache.has(KEY)


def test_folder_that_cannot_be_written(tmp_path: Path):
    """A file in the place of the cache folder is an error that names it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=str(tmp_path / "file")):
        Cache(tmp_path / "file").write(KEY, to_storable({"a": torch.ones(1)}))


def test_keys_tell_their_parts_apart():
    """Keys of different parts differ, also where the parts' texts run together."""
    assert len({content_key("a", "bc"), content_key("ab", "c"), content_key("abc"), content_key("a", "bc", "")}) == 4
    assert content_key((1, 2), True) == content_key((1, 2), True)


def picture(path: Path, colour: str, size: tuple[int, int] = (30, 20)) -> Path:
    """A BMP file, whose length depends on its size alone."""
    Image.new("RGB", size, colour).save(path)
    return path


def test_memo_remembers_over_runs(tmp_path: Path):
    """What one run computed, the next knows although the file can no longer be read as an image."""
    path = picture(tmp_path / "a.bmp", "red")
    memo = FileStatCache(tmp_path / "files.json")
    digest = content_digest(path)
    assert (memo.digest(path), memo.image(path).size) == (digest, (30, 20))
    memo.save()
    status = path.stat()
    path.write_bytes(b"\0" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = FileStatCache(tmp_path / "files.json")
    assert (again.digest(path), again.image(path).size) == (digest, (30, 20))


def test_memo_notices_changes(tmp_path: Path):
    """A file of another length or another time of change is read anew, in the same run and in the next."""
    path = picture(tmp_path / "a.bmp", "red")
    memo = FileStatCache(tmp_path / "files.json")
    before = memo.digest(path)
    memo.save()
    status = path.stat()
    picture(path, "blue")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert path.stat().st_size == status.st_size
    assert memo.digest(path) == FileStatCache(tmp_path / "files.json").digest(path) == content_digest(path) != before
    picture(path, "blue", (31, 21))
    assert memo.image(path).size == (31, 21)


def test_memos_of_two_runs_are_merged(tmp_path: Path):
    """Runs that share a cache do not forget what the other learned."""
    first, second = picture(tmp_path / "a.bmp", "red"), picture(tmp_path / "b.bmp", "blue")
    memos = [FileStatCache(tmp_path / "files.json") for _ in range(2)]
    memos[0].digest(first)
    memos[1].digest(second)
    for memo in memos:
        memo.save()
    first_status = first.stat()
    first.write_bytes(b"\0" * first_status.st_size)
    os.utime(first, ns=(first_status.st_atime_ns, first_status.st_mtime_ns))
    assert FileStatCache(tmp_path / "files.json").digest(first) == memos[0].digest(first) != content_digest(first)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"format": 0, "files": {}}', b'{"format": 1, "files": {"x": 3}}', b"\xff"]
)
def test_damaged_memo_is_no_memo(tmp_path: Path, content: bytes):
    """A memo that cannot be read is begun anew."""
    (tmp_path / "files.json").write_bytes(content)
    path = picture(tmp_path / "a.bmp", "red")
    memo = FileStatCache(tmp_path / "files.json")
    assert memo.image(path).size == (30, 20)
    memo.save()
    assert FileStatCache(tmp_path / "files.json").image(path).size == (30, 20)


def test_memo_of_a_missing_file(tmp_path: Path):
    """A file that is gone is an error that names it."""
    with pytest.raises(DataError, match=r"gone\.png: cannot be read: No such file"):
        FileStatCache(tmp_path / "files.json").digest(tmp_path / "gone.png")


def test_entries_of_another_kind(cache: Cache):
    """An entry without the tensors that are asked for is refused by its file's name."""
    other = content_key("test", 2)
    cache.write(KEY, to_storable({"mean": torch.zeros(4, 8, 8), "std": torch.ones(4, 8, 8)}))
    cache.write(other, to_storable({"mean": torch.zeros(4, 8, 9)}))
    assert set(cache.load(KEY, names=("mean", "std"))) == {"mean", "std"}
    with pytest.raises(DataError, match=rf"{other}.safetensors: does not hold mean and std"):
        cache.load(other, names=("mean", "std"))
