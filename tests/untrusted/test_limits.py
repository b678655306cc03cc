"""Files that would take all memory or all time: refused within little of both."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

from lorakit.checkpoints import summarize
from lorakit.errors import ModelError
from lorakit.models.weights.load import open_tensors
from tests.untrusted.hostile import safetensors_bytes

DOUBLED = b")" + b"2\x86" * 100
"""A tuple of twice a tuple of twice a tuple …, whose hash takes 2¹⁰⁰ steps."""
EMPTY_LISTS = b"[" + b"[]," * 3_000_000 + b"[]]"

LONG_TEXT = b"X" + struct.pack("<I", 4_000_000) + b"a" * 4_000_000


def zipped(program: bytes) -> bytes:
    """A PyTorch archive with 16 float32 as storage 0, which the program finds in its memo at 255."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x10tQq\xff0"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("archive/data.pkl", b"\x80\x02" + storage + program)
        made.writestr("archive/data/0", bytes(64))
    return file.getvalue()


def crowded_archive() -> bytes:
    """An archive with a list of 400,000 entries."""
    fields = struct.Struct("<4s4B4HL2L5H2L")
    names = (f"{number:06}".encode() for number in range(400_000))
    entries = b"".join(fields.pack(b"PK\1\2", *[0] * 11, 6, *[0] * 6) + name for name in names)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, len(entries), 4, 0)
    return b"PK\3\4" + entries + end


BOMBS = {
    "length": safetensors_bytes(b"{}", length=1 << 62),
    "nesting": safetensors_bytes(b'{"a":' + b"[" * 20_000_000),
    "lists": safetensors_bytes(b'{"a":' + EMPTY_LISTS + b"}"),
    "long header": safetensors_bytes(b" " * 34_000_000 + b"{}"),
    "product": safetensors_bytes(
        b'{"a":{"dtype":"F32","data_offsets":[0,8],"shape":[' + b"9000000000000000000," * 400_000 + b"9]}}", bytes(8)
    ),
    "digits": safetensors_bytes(b'{"a":{"dtype":"F32","data_offsets":[0,8],"shape":[' + b"9" * 100_000 + b"]}}"),
    "names": safetensors_bytes({f"encoder.layers.{index}.x": {} for index in range(100_000)}),
    "memo": b"\x80\x02]r\xff\xff\xff\x7f.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 34) + b".",
    "hash": b"\x80\x02}" + DOUBLED + b"K\x01s.",
    "hash in a set": b"\x80\x02c__builtin__\nset\n]" + DOUBLED + b"a\x85R.",
    "text": b"\x80\x02}X" + struct.pack("<I", 0xFFFFFFFF) + b"a.",
    "number": b"\x80\x02\x8b" + struct.pack("<i", 0x7FFFFFFF) + b"1.",
    "frame": b"\x80\x05\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "marks": b"\x80\x02" + b"(" * 5_000_000,
    "memos": b"\x80\x04N" + b"\x94" * 5_000_000,
    "empty lists": b"\x80\x02" + b"]" * 5_000_000,
    "long names": b"\x80\x04" + LONG_TEXT + b"q\0" + b"h\0\x930h\0" * 300_000 + b".",
    "long keys of storages": zipped(
        LONG_TEXT + b"q\0ctorch\nFloatStorage\nq\x01" + b"(X\x07\0\0\0storageh\x01h\0NK\x10tQ" * 200_000 + b"."
    ),
    "arguments": zipped(
        b"ctorch._utils\n_rebuild_tensor_v2\nq\0(" + b"N" * 500_000 + b"tq\x01" + b"h\0h\x01R" * 400_000 + b"."
    ),
    "sides": zipped(
        b"ctorch._utils\n_rebuild_tensor_v2\nq\0("
        + b"K\1" * 300_000
        + b"tq\x01"
        + b"h\0(h\xffK\0h\x01h\x01tR" * 180_000
        + b"."
    ),
    "joined names": zipped(
        b"}(" + LONG_TEXT + b"}(" + b"".join(b"V%d\nN" % n for n in range(100_000)) + b"uX\x01\0\0\0xNu."
    ),
    "entries": crowded_archive(),
}


def test_summaries_take_bounded_memory_and_time(tmp_path: Path) -> None:
    """Headers and pickles that ask for the impossible are refused in less than 700 MB and 60 s, all together."""
    for index, content in enumerate(BOMBS.values()):
        (tmp_path / f"{index}.ckpt").write_bytes(content)
    script = """
        import resource, sys
        from pathlib import Path
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        from lorakit.checkpoints import summarize
        from lorakit.errors import ModelError
        for index in range(int(sys.argv[2])):
            try:
                found = summarize(Path(sys.argv[1]) / f"{index}.ckpt")
                assert not found.tensors
            except ModelError as error:
                assert "()" not in str(error) and len(str(error)) < 1000, (index, str(error)[:1000])
        assert "torch" not in sys.modules
        # The process's own: what getrusage tells counts that of the one which started it.
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
        print(int(peak.split()[1]) // 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path, str(len(BOMBS))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 700


def archive(
    path: Path,
    edit: dict[bytes, bytes],
    compression: int = zipfile.ZIP_STORED,
    twice: str = "",
    folder: str = "archive",
) -> Path:
    """A `.ckpt` file of a tensor of 16 float32, its pickle edited, packed, or with an entry of its data twice."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(16)}, buffer)
    with zipfile.ZipFile(buffer) as sound, zipfile.ZipFile(path, "w", compression) as made:
        for entry in sound.infolist():
            content = sound.read(entry)
            for old, new in edit.items() if entry.filename.endswith("data.pkl") else ():
                assert old in content
                content = content.replace(old, new)
            made.writestr(entry.filename, content)
            if twice and entry.filename.endswith(twice):
                made.writestr(entry.filename.replace("archive", folder), content)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("edit", "more", "reason"),
    [
        ({b"K\x10tq": b"Kdtq"}, {}, "storage 0 does not have the 100 elements that it claims"),
        ({b"K\x10\x85q": b"Kd\x85q"}, {}, "a tensor of shape (100,) has 16 numbers only"),
        ({b"K\x10\x85q": b"J\0\0\0\x7f\x85q", b"K\x01\x85q": b"K\x00\x85q"}, {}, "many times larger than the file"),
        ({b"QK\x00": b"QK\x08"}, {}, "a tensor of shape (16,) has 16 numbers only"),
        ({}, {"compression": zipfile.ZIP_DEFLATED}, "its content is compressed"),
        ({}, {"twice": "data/0"}, "it has two entries of one name"),
        ({}, {"twice": "data.pkl"}, "it has two entries of one name"),
        ({}, {"twice": "data.pkl", "folder": "other"}, "the archive has no data.pkl of a usual size"),
    ],
)
def test_archives_that_lie(tmp_path: Path, edit: dict[bytes, bytes], more: dict[str, object], reason: str) -> None:
    """An archive whose pickle and content disagree is refused, by who reads the names and by who reads the weights."""
    path = archive(tmp_path / "x.ckpt", edit, **more)  # type: ignore[arg-type]
    for read in (summarize, open_tensors):
        with pytest.raises(ModelError) as caught:
            read(path)
        assert reason in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_sound_archive_passes(tmp_path: Path) -> None:
    """What the archives above are made from is read."""
    path = archive(tmp_path / "x.ckpt", {})
    assert summarize(path).tensors == {"a": (16,)}
    assert open_tensors(path)("a").tolist() == [0.0] * 16


def test_a_packed_bomb_is_not_opened(tmp_path: Path) -> None:
    """A file of a megabyte that would unpack to one gigabyte is refused."""
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made, made.open("archive/data/0", "w") as entry:
        for _ in range(256):
            entry.write(bytes(1 << 20))
    with pytest.raises(ModelError, match="compressed"):
        summarize(path)


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}',
         6, "shares bytes with another"),
        (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}',
         6, "2 bytes in front of tensor 'b' belong to no tensor"),
        (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
         2, "header cannot be read"),
        (b'{"a":{"dtype":"U8","shape":[-2],"data_offsets":[2,0]}}', 2, "is invalid"),
        (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,0]}}', 2, "is invalid"),
        (b'{"a":{"dtype":NaN,"shape":[2],"data_offsets":[0,2]}}', 2, "is invalid"),
        (b'{"a":{"dtype":"U8","shape":[2.0],"data_offsets":[0,2]}}', 2, "is invalid"),
        (b'{"a":{"dtype":"U8","shape":[true,2],"data_offsets":[0,2]}}', 2, "is invalid"),
        (b'{"a":{"dtype":"U8","shape":"","data_offsets":[0,1]}}', 1, "is invalid"),
        (b'{"a":{"dtype":"U8","shape":{},"data_offsets":[0,1]}}', 1, "is invalid"),
    ],
)  # fmt: skip
def test_headers_that_lie(tmp_path: Path, header: bytes, data: int, reason: str) -> None:
    """Tensors that overlap, leave gaps, are named twice or have nonsense for numbers are refused by name."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(header, bytes(data)))
    with pytest.raises(ModelError) as caught:
        summarize(path)
    assert reason in str(caught.value)
