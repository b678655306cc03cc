"""Config files that people get wrong: what they are instead, or which line is wrong and how it is written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from lorakit.config.toml_files import LARGEST_FILE, parse_toml, read_toml
from tests.config.conftest import SD1_SHAPES, write_safetensors

MISTAKES = [
    (r'path = "C:\models\v1-5.safetensors"', r"write 'C:\models\v1-5.safetensors' or \"C:/models/v1-5.safetensors\""),
    (r'path = "D:\users\me"', r"write 'D:\users\me' or \"D:/users/me\""),
    (r'path = "C:\xampp"', r"write 'C:\xampp'"),
    (r'dir = "C:\out' + "\\" + '"', r"write 'C:\out' or \"C:/out\""),
    (r"path = C:\models\v1-5.ckpt", r"text needs quotation marks: path = 'C:\models\v1-5.ckpt'"),
    ("path = /home/me/model.ckpt", 'text needs quotation marks: path = "/home/me/model.ckpt"'),
    ("name = lierla", 'name = lierla: text needs quotation marks: name = "lierla"'),
    ("name = lierla  # the network", 'name = lierla: text needs quotation marks: name = "lierla"'),
    ('name = lierla  # "c3lier" adapts more', 'name = lierla: text needs quotation marks: name = "lierla"'),
    ("name = lierla  # it's the network", 'name = lierla: text needs quotation marks: name = "lierla"'),
    (r'path = "C:\my # models\x"  # "here"', r"write 'C:\my # models\x'"),
    ("parts = [unet, text_encoder]", 'text needs quotation marks: parts = ["unet", "text_encoder"]'),
    ("parts = [“unet”]", 'text needs quotation marks: parts = ["unet"]'),
    ("name = “lierla”", 'use straight ones: name = "lierla"'),
    ("name = ‘lierla’", 'use straight ones: name = "lierla"'),
    ('name = "lierla', 'the quotation mark at the end is missing: name = "lierla"'),
    ("name = 'lierla", "the quotation mark at the end is missing: name = 'lierla'"),
    ('name = """lierla', 'must end with """'),
    ("name = 'it's'", 'write name = "it\'s"'),
    ('name = "a "cat""', "write name = 'a \"cat\"'"),
    ("flip_aug = True", "write flip_aug = true"),
    ("flip_aug = FALSE", "write flip_aug = false"),
    ("flip_aug = yes", "write flip_aug = true"),
    ("weights = None", "leave the line out"),
    ("weights = null", "leave the line out"),
    ("lr = 0,0001", "the decimal sign is a point: lr = 0.0001"),
    ("lr = .0001", "lr = 0.0001"),
    ("alpha = 16.", "alpha = 16.0"),
    ("lr = 1e−4", "is a full-width character; write -"),
    ("resolution = 512,768", "two numbers are a list: resolution = [512, 768]"),
    ("resolution = 512x768", "two numbers are a list: resolution = [512, 768]"),
    ("warmup_steps = 5%", "write a share: warmup_steps = 0.05"),
    ("max_steps = 2k", "write all digits: max_steps = 2000"),
    ("max_steps = 2 000", "write the digits together: max_steps = 2000"),
    ("rank = 08", "rank = 8"),
    ("rank = 16,", "nothing may follow a value: rank = 16"),
    ("name = lierla;", 'nothing may follow a value: name = "lierla"'),
    ("rank: 16", "rank = 16"),
    ('"name": "lierla",', 'name = "lierla"'),
    ("name: lierla", 'name = "lierla"'),
    ("rank 16", "= is missing between key and value: rank = 16"),
    ("max steps = 5", "a key has no spaces: max_steps = 5"),
    ("rank", "a value is missing: rank = …"),
    ("rank =", "a value is missing"),
    ("rank =\xa016", "it contains a no-break space"),
    ("rank＝16", "write ="),
    ("// a comment", "a comment begins with #"),
    ("betas = [0.9, 0.99", "a list ends with ]"),
    ("[network", "a section is a name in brackets"),
    ("[network] rank = 4", "go on separate lines"),
]


@pytest.mark.parametrize(("line", "cure"), MISTAKES, ids=[line for line, _ in MISTAKES])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_mistake_is_shown_with_its_line_and_what_to_write(line: str, cure: str, end: str) -> None:
    """The message has the line's number, the line, and what is right, whatever stands before and behind it."""
    for after in ("", f"[training]{end}seed = 1{end}"):
        with pytest.raises(ValueError, match=r"^line 3: ") as caught:
            parse_toml(f"# a config{end}[section]{end}{line}{end}{after}")
        assert str(caught.value).startswith(f"line 3: {line.partition('  #')[0]}".replace("\xa0", " "))
        assert cure.replace('\\"', '"') in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nrank = 1\n[b]\nrank = 1\nrank = 2", "line 5: rank = 2: rank is there already, in line 4"),
        ('[a]\nr = 1  # a "b"\nr = 2  # "c"', "line 3: r = 2: r is there already, in line 2"),
        ("[a]\nx = 1\n[b]\n[a]\ny = 2", "line 4: [a]: the section [a] is there already, in line 1"),
        ("[[o]]\nx = 1\n[[o]]\nx = 1\nx = 2", "line 5: x = 2: x is there already, in line 4"),
        ("[[o]]\nx = 1\n[o]\nx = 1", "line 3: [o]:"),
        ("x = [\n1,\n2\ny = 3", "line 1: x = [: a list ends with ]"),
    ],
)
def test_keys_and_sections_that_are_there_twice(text: str, message: str) -> None:
    """Both lines are named, each section's own keys apart; a list that does not end is named where it begins."""
    with pytest.raises(ValueError, match="line") as caught:
        parse_toml(text)
    assert str(caught.value).startswith(message)


def test_what_is_right_is_read() -> None:
    """Tabs, a mark of the byte order, line ends of Windows and odd characters inside of text are no mistakes."""
    assert parse_toml("a\t=\t“x”".replace("“x”", '"“x”\xa0"')) == {"a": "“x”\xa0"}
    assert parse_toml("a = 'C:\\x'\r\nb = 1\r\n") == {"a": "C:\\x", "b": 1}


def test_no_escape_sequence_of_a_file_reaches_the_terminal() -> None:
    """A line that would steer the terminal is shown without that."""
    with pytest.raises(ValueError, match="line 1") as caught:
        parse_toml("a = \x1b]0;title\x07\x1b[31mred")
    assert str(caught.value).isprintable()


def image(path: Path, form: str) -> None:
    Image.new("RGB", (8, 8), "teal").save(path, form)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_an_image_is_no_config(tmp_path: Path, form: str) -> None:
    """An image of any format is called one, whatever its name."""
    for name in ("photo.jpg", "config.toml"):
        image(tmp_path / name, form)
        with pytest.raises(ValueError, match=r"^is an image, not a config$"):
            read_toml(tmp_path / name)


def test_other_files_are_no_configs(tmp_path: Path) -> None:
    """Models, archives, command lines, YAML, JSON under another name and enormous files are called what they are."""
    write_safetensors(tmp_path / "model.safetensors", SD1_SHAPES)
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "binary.bin").write_bytes(b"abc\0\1\2")
    (tmp_path / "train.bat").write_text("accelerate launch train_network.py --network_dim=8")
    (tmp_path / "config.yaml").write_text("network:\n  rank: 8\n")
    (tmp_path / "config.toml").write_text(json.dumps({"network": {"rank": 8}}))
    with (tmp_path / "large.toml").open("wb") as file:
        file.write(b"# " + b" " * LARGEST_FILE)
    words = {
        "model.safetensors": "is a model or LoRA file", "model.ckpt": "is a model file", "old.pt": "is a model file",
        "binary.bin": "is a binary file", "train.bat": "lorakit from-kohya", "config.yaml": "is YAML",
        "config.toml": "is JSON; give it a name that ends in .json", "large.toml": "is larger than 16 MiB",
    }  # fmt: skip
    for name, expected in words.items():
        with pytest.raises(ValueError, match=expected):
            read_toml(tmp_path / name)


@pytest.mark.parametrize(
    ("encoding", "readable"),
    [("utf-8", True), ("utf-8-sig", True), ("utf-16", False), ("utf-16-le", False), ("cp1251", False), ("gbk", False)],
)
def test_other_encodings_are_named_or_refused(tmp_path: Path, encoding: str, readable: bool) -> None:
    """UTF-8 is read with or without a mark; other encodings are told to be saved as UTF-8."""
    path = tmp_path / "config.toml"
    text = 'name = "кот"\n' if encoding != "gbk" else 'name = "猫和狗"\n'
    path.write_bytes((text * 1 + "rank = 8\n").encode(encoding))
    if readable:
        assert read_toml(path) == {"name": "кот", "rank": 8}
        return
    with pytest.raises(ValueError, match="save it as UTF-8"):
        read_toml(path)


def test_folders_and_missing_files_name_what_is_there(tmp_path: Path) -> None:
    """A folder names the configs in it, a missing file one of nearly its name."""
    with pytest.raises(ValueError, match="is a folder, not a file; `lorakit init` writes a config"):
        read_toml(tmp_path)
    for name in ("config.toml", "other.json"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"name a config in it: config\.toml, other\.json"):
        read_toml(tmp_path)
    for name in ("confg.toml", "config", "Config.tml"):
        with pytest.raises(ValueError, match=r"did you mean .*config\.toml\?"):
            read_toml(tmp_path / name)
    with pytest.raises(ValueError, match=r"^cannot be read: No such file or directory$"):
        read_toml(tmp_path / "elsewhere" / "x.toml")
