"""`lorakit caption` on real files: captions of a guest's captioner, edits, and what is never overwritten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from lorakit.captioning.edits import CaptionEdits
from lorakit.captioning.folder import CaptionOptions, edit_captions
from lorakit.cli import options
from lorakit.cli.group import cli
from lorakit.errors import ConfigError, DataError, PluginError
from tests.guests import install

GUEST = '''
from attrs import field, frozen
from attrs import validators as v
from lorakit.api import CaptionerConfig, hookimpl


class Colours:
    """Names the colour in the middle, and how many images came with it."""

    def __init__(self, config, device):
        self.config, self.device = config, device

    def caption(self, images):
        if self.config.fails:
            return ["one too many"] * (len(images) + 1)
        mode = {image.mode for image in images}
        return [
            f"{self.config.word} {image.getpixel((image.width // 2, 0))}\\n of {len(images)} {mode} on {self.device}"
            for image in images
        ]


@frozen(kw_only=True)
class ColoursConfig(CaptionerConfig):
    """Names colours."""

    name = "colours"

    word: str = "colour"
    """The first word."""
    fails: bool = False
    """Whether it returns nonsense."""
    strength: float = field(default=1.0, validator=v.ge(0))
    """At least 0."""

    def build(self, device):
        """The captioner."""
        return Colours(self, device)


@hookimpl
def register_captioners():
    return [ColoursConfig]
'''

Caption = Callable[..., Result]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A red, a lime and a blue image; the first has a caption."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in {"a": "red", "b": "lime", "c": "blue"}.items():
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("long hiar, cat, watermark\n")
    return folder


@pytest.fixture
def caption(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Caption:
    """A function that runs `lorakit caption` on the folder, with the guest installed."""
    monkeypatch.syspath_prepend(str(install(tmp_path / "site", "colour-words", colour_words=GUEST)))
    monkeypatch.chdir(tmp_path)
    options.catalog.cache_clear()
    yield lambda *arguments: CliRunner().invoke(cli, ["caption", "photos", *arguments])
    options.catalog.cache_clear()


def captions(folder: Path) -> dict[str, str]:
    """The caption files."""
    return {
        path.name: path.read_text() for path in sorted(folder.iterdir()) if path.suffix in (".txt", ".caption", ".tags")
    }


OLD = "long hiar, cat, watermark\n"
LIME, BLUE = ("colour (0, 255, 0) of 1 {'RGB'} on auto\n", "colour (0, 0, 255) of 1 {'RGB'} on auto\n")


def test_images_without_captions_get_one(photos: Path, caption: Caption) -> None:
    """One line each, as training reads them; a caption that is there stays, and is counted."""
    result = caption("--with", "colours")
    assert result.exit_code == 0, result.output
    assert captions(photos) == {"a.txt": OLD, "b.txt": LIME, "c.txt": BLUE}
    assert result.output.splitlines()[-1] == "Wrote 2 captions; 1 there already (--overwrite replaces them)"
    assert f"photos/b.txt: {LIME}" in result.output


def test_overwriting_batches_options_and_edits(photos: Path, caption: Caption) -> None:
    """Asked for, all are written; the captioner gets its options, device and batches, and edits follow."""
    result = caption(
        "--with", "colours", "--overwrite", "--batch-size", "2", "--option", "word=hue", "--device", "cpu",
        "--prefix", "photo, ", "--replace", "hue=tone",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    counts = {"a.txt": 2, "b.txt": 2, "c.txt": 1}
    colours = {"a.txt": "(255, 0, 0)", "b.txt": "(0, 255, 0)", "c.txt": "(0, 0, 255)"}
    assert captions(photos) == {
        name: f"photo, tone {colours[name]} of {count} {{'RGB'}} on cpu\n" for name, count in counts.items()
    }
    assert "photos/a.txt:\n  - long hiar, cat, watermark\n  + photo, tone" in result.output


def test_a_dry_run_writes_nothing(photos: Path, caption: Caption) -> None:
    """It shows all that would be written."""
    before = {path: path.stat().st_mtime_ns for path in photos.iterdir()}
    written = caption("--with", "colours", "--dry-run").output
    assert written.splitlines()[-1] == "Would write 2 captions; 1 there already (--overwrite replaces them)"
    assert f"photos/c.txt: {BLUE}" in written
    assert caption("--prefix", "x, ", "--dry-run").output == (
        "photos/a.txt:\n  - long hiar, cat, watermark\n  + x, long hiar, cat, watermark\n"
        "Would write 1 caption; 2 images without a caption file\n"
    )
    assert {path: path.stat().st_mtime_ns for path in photos.iterdir()} == before


def test_edits_in_bulk(photos: Path, caption: Caption) -> None:
    """Captions that are there are edited; images without one stay without; an unchanged file is not touched."""
    (photos / "b.txt").write_text("cat,dog")
    before = (photos / "b.txt").stat().st_mtime_ns
    result = caption("--remove-tag", "watermark", "--replace", "hiar=hair")
    assert result.output.splitlines()[-1] == "Wrote 1 caption; 1 left as it was; 1 image without a caption file"
    assert captions(photos) == {"a.txt": "long hair, cat\n", "b.txt": "cat,dog"}
    assert (photos / "b.txt").stat().st_mtime_ns == before


def test_extensions(photos: Path, caption: Caption) -> None:
    """Captions in `.caption` files count as there; others are written as asked for."""
    (photos / "b.caption").write_text("green")
    assert caption("--with", "colours").exit_code == 0
    assert [*captions(photos)] == ["a.txt", "b.caption", "c.txt"]
    assert caption("--with", "colours", "--extension", "tags").exit_code == 0
    assert [*captions(photos)] == ["a.tags", "a.txt", "b.caption", "b.tags", "c.tags", "c.txt"]
    assert caption("--prefix", "dark ").exit_code == 0
    assert captions(photos)["b.caption"] == "dark green\n"
    assert not captions(photos)["b.tags"].startswith("dark")


def test_images_of_one_name(photos: Path, caption: Caption) -> None:
    """Two images that share a caption file: the first is captioned, and the file written once."""
    Image.new("RGB", (8, 8), "white").save(photos / "b.webp")
    result = caption("--with", "colours")
    assert result.output.count("b.txt") == 1
    assert captions(photos)["b.txt"] == LIME


def test_transparency_and_rotation(photos: Path, caption: Caption) -> None:
    """A captioner sees images as training does: upright, and white where they are transparent."""
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(photos / "b.png")
    sideways = Image.new("RGB", (32, 16), "red")
    sideways.paste("blue", (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways.save(photos / "c.png", exif=exif)
    assert caption("--with", "colours").exit_code == 0
    assert captions(photos)["b.txt"].startswith("colour (255, 255, 255)")
    assert captions(photos)["c.txt"].startswith("colour (0, 0, 255)")


def test_what_cannot_be_read_is_named_and_passed_over(photos: Path, caption: Caption) -> None:
    """A damaged image and a caption that is no text; the others are done, and the status says that not all were."""
    (photos / "b.png").write_bytes(b"nothing")
    result = caption("--with", "colours", "--batch-size", "5")
    assert result.exit_code == 1
    assert "skipped: photos/b.png: is not a" in result.output
    assert result.output.splitlines()[-1].startswith("Wrote 1 caption; 1 there already")
    assert result.output.splitlines()[-1].endswith("; 1 file skipped")
    (photos / "a.txt").write_bytes(b"\xff\xfe\x00")
    result = caption("--prefix", "x ")
    assert result.exit_code == 1
    assert "skipped: photos/a.txt: is not UTF-8 text" in result.output
    assert (photos / "c.txt").read_text() == f"x {BLUE}"


def test_files_that_cannot_be_written(photos: Path, caption: Caption) -> None:
    """A caption that is a folder is not replaced: it has no text, and the error names it."""
    (photos / "b.txt").mkdir()
    result = caption("--with", "colours", "--overwrite")
    assert result.exception is not None
    assert "b.txt" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --with NAME to write captions, or an edit such as --prefix"),
        (["--prefix", "a", "--overwrite"], "--overwrite is for captioners: choose one, --with NAME"),
        (["--prefix", "a", "--option", "word=x"], "--option is for captioners"),
        (["--prefix", "a", "--batch-size", "1"], "--batch-size is for captioners"),
        (["--with", "colours", "--option", "word"], "must be KEY=VALUE, not 'word'"),
        (["--replace", "=cat"], "must be OLD=NEW, not '=cat'"),
        (["--with", "colours", "--batch-size", "0"], "0 is not in the range"),
        (["--with", "colours", "--overwrite", "--extension", ".PNG"], "must not be that of images, '.PNG'"),
        (["--with", "colours", "--extension", "a.png"], "must not be that of images"),
        (["--with", "colours", "--extension", "/../x.txt"], "must be an extension such as \".txt\", not '/../x.txt'"),
        (["--prefix", "a", "--extension", ""], "must be an extension"),
    ],
)
def test_wrong_usage(photos: Path, caption: Caption, arguments: list[str], message: str) -> None:
    """What has no effect or no meaning is refused."""
    result = caption(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert captions(photos) == {"a.txt": OLD}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--with", "nobody"], PluginError, "no captioner is called 'nobody'"),
        (["--with", "colours", "--option", "wrod=x"], ConfigError, "captioner colours: wrod: is not a known key"),
        (["--with", "colours", "--option", "strength=-1"], ConfigError, "strength: must be at least 0, not -1"),
        (["--with", "colours", "--option", "fails=true"], PluginError, "it returned 3 captions of 2 images"),
    ],
)
def test_wrong_captioners(
    photos: Path, caption: Caption, arguments: list[str], error: type[Exception], message: str
) -> None:
    """Unknown ones, wrong options, and one that returns nonsense."""
    result = caption(*arguments, "--batch-size", "2")
    assert isinstance(result.exception, error), result.output
    problems = result.exception.problems if isinstance(result.exception, ConfigError) else [result.exception]
    assert message in str(problems[0])
    assert captions(photos) == {"a.txt": OLD}


@pytest.mark.parametrize(("name", "plugin"), [("tagger", "lorakit-tagger"), ("vlm", "lorakit-vlm")])
def test_captioners_of_plugins_are_named(caption: Caption, name: str, plugin: str) -> None:
    """Those in the repository are named with how to install them, where they are not."""
    options.catalog()
    result = caption("--with", name)
    if isinstance(result.exception, PluginError):
        assert f"pip install ./plugins/{plugin}" in str(result.exception)


def test_folders_without_images(photos: Path, caption: Caption) -> None:
    """A folder that is missing or empty is named."""
    for path in photos.iterdir():
        path.unlink()
    assert "contains no images" in str(caption("--prefix", "a").exception)
    photos.rmdir()
    result = caption("--prefix", "a")
    assert isinstance(result.exception, DataError)
    assert (
        str(result.exception) == "photos: cannot be listed: No such file or directory (check its path and permissions)"
    )


def test_images_are_never_written(photos: Path, caption: Caption) -> None:
    """Also from Python, captions do not replace the images that they are about."""
    before = (photos / "a.png").read_bytes()
    wanted = CaptionOptions(extension="png", edits=CaptionEdits(prefix="x "))
    with pytest.raises(DataError, match="caption_extension: must not be that of images"):
        edit_captions(photos, wanted)
    assert (photos / "a.png").read_bytes() == before


def test_captions_of_several_lines_are_shown_as_one_block(photos: Path, caption: Caption) -> None:
    """Their lines are below each other."""
    (photos / "a.txt").write_text("cat\ndog\n")
    assert "  - cat\n    dog\n  + x cat\n    x dog\n" in caption("--prefix", "x ", "--dry-run").output
