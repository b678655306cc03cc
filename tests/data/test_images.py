"""Images: sizes, orientation, transparency, number formats, resampling, and every kind of bad file."""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile, ImageOps

from lorakit.data.images.buckets import ResizeCrop
from lorakit.data.images.decode import inspect_image, load_pixels
from lorakit.errors import DataError

Photograph = Callable[..., Image.Image]


def as_is(size: tuple[int, int]) -> ResizeCrop:
    """The placement that changes nothing."""
    return ResizeCrop(size, size)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif", "avif"])
def test_orientation_is_honoured(tmp_path: Path, photograph: Photograph, orientation: int, extension: str):
    """Size and pixels are those of the upright image, as Pillow's own rotation makes it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a.{extension}"
    photograph().save(path, exif=exif)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    assert inspect_image(path).size == upright.size
    assert np.array_equal(load_pixels(path, as_is(upright.size)), np.asarray(upright))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_broken_tags_do_not_spoil_an_image(tmp_path: Path, photograph: Photograph, exif: bytes):
    """An image whose tags cannot be read is taken as it lies."""
    path = tmp_path / "a.jpg"
    photograph().save(path, exif=exif)
    assert inspect_image(path).size == (96, 64)
    assert load_pixels(path, as_is((96, 64))).shape == (64, 96, 3)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "avif"])
def test_size_is_read_from_the_header(tmp_path: Path, photograph: Photograph, extension: str):
    """The size of a file is known although its pixels are garbage, as long as it has its end: none is decoded."""
    path = tmp_path / f"a.{extension}"
    photograph().save(path)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(400) + content[middle + 400 :])
    assert inspect_image(path).size == (96, 64)
    with pytest.raises(DataError, match=r"a\..*: is damaged") if extension == "png" else nullcontext():
        load_pixels(path, as_is((96, 64)))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_transparency_shows_white(tmp_path: Path, photograph: Photograph, name: str):
    """Half transparent pixels are half white, as the formula of compositing says."""
    picture = photograph()
    alpha = np.linspace(0, 255, 96, dtype=np.uint8)[None].repeat(64, axis=0)
    picture.putalpha(Image.fromarray(alpha))
    picture.save(tmp_path / name)
    share = alpha[..., None] / 255
    expected = np.asarray(picture)[..., :3] * share + 255 * (1 - share)
    assert np.abs(load_pixels(tmp_path / name, as_is((96, 64))) - expected).max() < 1.01


def test_grey_transparency_shows_white(tmp_path: Path):
    """Grey images with an alpha channel are composited too."""
    pixels = np.zeros((8, 8, 2), dtype=np.uint8)
    pixels[:4, :, 1] = 255
    Image.fromarray(pixels, "LA").save(tmp_path / "a.png")
    loaded = load_pixels(tmp_path / "a.png", as_is((8, 8)))
    assert (loaded[:4] == 0).all()
    assert (loaded[4:] == 255).all()


@pytest.mark.parametrize(
    ("mode", "extension"), [("P", "png"), ("L", "png"), ("RGB", "png"), ("P", "gif"), ("L", "gif")]
)
def test_transparent_colour_shows_white(tmp_path: Path, mode: str, extension: str):
    """A colour declared transparent, in a palette or in grey or colour images, shows white."""
    image = Image.new("RGB", (8, 8), (40, 40, 40))
    image.paste((200, 200, 200), (0, 0, 8, 4))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    clear = image.getpixel((0, 7))
    image.save(tmp_path / f"a.{extension}", transparency=clear)
    loaded = load_pixels(tmp_path / f"a.{extension}", as_is((8, 8)))
    assert (loaded[4:] == 255).all()
    assert np.abs(loaded[:4].astype(int) - 200).max() <= 1


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey_is_scaled(tmp_path: Path, name: str):
    """All 65536 greys become v / 257, rounded; none is clipped."""
    grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(grey).save(tmp_path / name)
    loaded = load_pixels(tmp_path / name, as_is((256, 256)))
    assert np.array_equal(loaded, np.round(grey / 257.0).astype(np.uint8)[..., None].repeat(3, axis=2))


def test_transparent_sixteen_bit_grey_shows_white(tmp_path: Path):
    """The grey that a 16-bit image declares transparent shows white."""
    grey = np.full((8, 8), 1000, dtype=np.uint16)
    grey[4:] = 30_000
    Image.fromarray(grey).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    chunk = b"tRNS" + (1000).to_bytes(2, "big")
    chunk = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    loaded = load_pixels(tmp_path / "a.png", as_is((8, 8)))
    assert (loaded[:4] == 255).all()
    assert (loaded[4:] == round(30_000 / 257)).all()


@pytest.mark.parametrize(
    ("mode", "extension"),
    [
        ("1", "png"),
        ("CMYK", "jpg"),
        ("L", "bmp"),
        ("P", "bmp"),
        ("L", "jpg"),
        ("L", "jfif"),
        ("P", "gif"),
        ("RGB", "avif"),
        ("1", "tif"),
        ("L", "tif"),
        ("P", "tiff"),
        ("RGB", "tif"),
        ("CMYK", "tif"),
        ("YCbCr", "tif"),
    ],
)
def test_other_colour_modes(tmp_path: Path, photograph: Photograph, mode: str, extension: str):
    """Black and white, CMYK, grey and palette images become what Pillow's conversion to RGB makes of them."""
    path = tmp_path / f"a.{extension}"
    photograph().convert(mode).save(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(load_pixels(path, as_is((96, 64))), expected)


def test_format_is_told_by_the_content(tmp_path: Path, photograph: Photograph):
    """A PNG file that is called .jpg is read as what it is."""
    photograph().save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(load_pixels(tmp_path / "a.jpg", as_is((96, 64))), np.asarray(photograph()))


@pytest.mark.parametrize(
    ("resized", "bucket"),
    [((96, 64), (64, 64)), ((71, 48), (64, 48)), ((193, 129), (192, 128)), ((150, 100), (150, 64))],
)
def test_pixels_are_resized_then_cropped_at_the_centre(
    tmp_path: Path, photograph: Photograph, resized: tuple[int, int], bucket: tuple[int, int]
):
    """The pixels are those of resizing the whole image and cropping its centre, to a rounding."""
    photograph().save(tmp_path / "a.png")
    left, top = (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2
    whole = photograph().resize(resized, Image.Resampling.LANCZOS)
    expected = np.asarray(whole.crop((left, top, left + bucket[0], top + bucket[1]))).astype(int)
    loaded = load_pixels(tmp_path / "a.png", ResizeCrop(resized, bucket))
    assert loaded.shape == (bucket[1], bucket[0], 3)
    assert np.abs(loaded - expected).max() <= 1


def test_shrinking_averages(tmp_path: Path):
    """A fine chessboard shrinks to even grey and not to a coarse pattern."""
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "a.png")
    inner = load_pixels(tmp_path / "a.png", ResizeCrop((32, 32), (32, 32)))[4:-4, 4:-4]
    assert np.abs(inner.astype(int) - 128).max() <= 2


def test_extreme_shapes_cost_no_memory(tmp_path: Path):
    """Of an image one pixel high, only the part that is kept is enlarged."""
    Image.new("RGB", (20_000, 1), "red").save(tmp_path / "a.png")
    placement = ResizeCrop((20_000 * 1024, 1024), (64, 1024))
    assert (load_pixels(tmp_path / "a.png", placement) == (255, 0, 0)).all()


BAD = {
    "empty.png": (b"", r"is empty \(restore or remove it\)"),
    "text.png": (b"not an image at all", "is not a PNG, JPEG, WebP, AVIF, TIFF, BMP or GIF image"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a PNG"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("read", [inspect_image, lambda path: load_pixels(path, as_is((8, 8)))])
def test_bad_files_are_named(tmp_path: Path, name: str, read: Callable[[Path], object]):
    """Files that hold no image are errors that name the file and the cause."""
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: {message}"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("extension", "settings"),
    [
        ("png", {}), ("jpg", {}), ("jpg", {"progressive": True}), ("webp", {}), ("webp", {"lossless": True}),
        ("bmp", {}), ("gif", {}), ("avif", {}), ("tif", {}), ("tif", {"compression": "tiff_lzw"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("left", [0.3, 0.7, 0.95])
def test_truncated_files_are_named(
    tmp_path: Path, photograph: Photograph, extension: str, settings: dict[str, object], left: float
):
    """A file of which a part is missing is an error when it is looked at, and when it is decoded."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    path = tmp_path / f"a.{extension}"
    photograph(size=(300, 200)).save(path, **settings)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
    for read in (inspect_image, lambda path: load_pixels(path, as_is((96, 64)))):
        with pytest.raises(DataError, match=rf"a\.{extension}: is .* \((replace|convert) .*remove it\)"):
            read(path)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "bmp", "gif", "avif", "tif"])
@pytest.mark.parametrize("tail", [bytes(300), b"\r\n", b"SEFT made by a telephone"])
def test_what_lies_behind_the_end_does_not_matter(tmp_path: Path, photograph: Photograph, extension: str, tail: bytes):
    """What telephones and disks leave behind an image's end spoils neither its look nor its pixels."""
    path = tmp_path / f"a.{extension}"
    photograph().save(path)
    facts, pixels = inspect_image(path), load_pixels(path, as_is((96, 64)))
    path.write_bytes(path.read_bytes() + tail)
    assert inspect_image(path)[:3] == facts[:3] == (96, 64, False)
    assert np.array_equal(load_pixels(path, as_is((96, 64))), pixels)


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photograph: Photograph):
    """An image with more pixels than Pillow thinks safe is an error that says so."""
    photograph().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"a\.png: has 0 megapixels; at most 0 are read \(make it"):
        inspect_image(tmp_path / "a.png")


def test_missing_file(tmp_path: Path):
    """A file that is not there is an error that names it."""
    with pytest.raises(DataError, match=r"a\.png: cannot be read: No such file"):
        inspect_image(tmp_path / "a.png")


@pytest.mark.parametrize("extension", ["png", "webp", "gif", "avif", "tif"])
def test_of_several_frames_the_first_is_read(tmp_path: Path, photograph: Photograph, extension: str):
    """Animations and pages are known for what they are, and give the pixels of their first picture."""
    first, second = photograph(), photograph("coffee.png")
    lossless = {"webp": {"lossless": True}, "avif": {"quality": 100, "subsampling": "4:4:4"}}.get(extension, {})
    first.save(tmp_path / f"one.{extension}", **lossless)
    first.save(tmp_path / f"two.{extension}", save_all=True, append_images=[second], **lossless)
    assert inspect_image(tmp_path / f"one.{extension}")[:3] == (96, 64, False)
    assert inspect_image(tmp_path / f"two.{extension}")[:3] == (96, 64, True)
    pixels = load_pixels(tmp_path / f"two.{extension}", as_is((96, 64))).astype(int)
    assert np.abs(pixels - load_pixels(tmp_path / f"one.{extension}", as_is((96, 64)))).max() <= 2


def test_second_pictures_of_jpeg_files_are_no_frames(tmp_path: Path, photograph: Photograph):
    """What cameras put behind a JPEG file's picture, such as a map of its brightness, makes it no animation."""
    photograph().save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[photograph("coffee.png")])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO"
    assert inspect_image(tmp_path / "a.jpg")[:3] == (96, 64, False)
    assert load_pixels(tmp_path / "a.jpg", as_is((96, 64))).shape == (64, 96, 3)


DISGUISED = {
    "a HEIC image": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "a HEIC image ": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic",
    "a JPEG XL image": b"\xff\x0a\xfa\x7f",
    "a JPEG XL image ": b"\0\0\0\x0cJXL \r\n\x87\n",
    "a Photoshop file": b"8BPS\0\x01",
    "a video": b"\0\0\0\x20ftypisom\0\0\2\0",
    "a web page": b"\n<!DOCTYPE html><html>404</html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
    "a ZIP archive": b"PK\x03\x04\x14\0",
}


@pytest.mark.parametrize("kind", DISGUISED)
def test_other_files_that_are_called_images(tmp_path: Path, kind: str):
    """A file of another kind under an image's name is called what it is, with the cure."""
    (tmp_path / "a.jpg").write_bytes(DISGUISED[kind] + bytes(100))
    with pytest.raises(DataError, match=rf"a\.jpg: is {kind.strip()}.* \(convert it to JPEG or PNG, or remove it\)"):
        inspect_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_colours_that_are_not_read(tmp_path: Path, mode: str):
    """Colours that no rule brings to RGB are refused when the file is looked at."""
    Image.new(mode, (8, 8)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"a\.tif: has an unsupported colour mode, {mode} \(convert"):
        inspect_image(tmp_path / "a.tif")


def test_large_images_are_read_without_a_word(tmp_path: Path):
    """Between Pillow's two limits an image is read, and nothing is printed; beyond the second its size is told."""
    Image.new("1", (12_000, 10_000)).save(tmp_path / "a.png")
    Image.new("1", (14_000, 14_000)).save(tmp_path / "b.png")
    code = (
        "import sys; from pathlib import Path; from lorakit.data.images.decode import inspect_image\n"
        "for path in sys.argv[1:]:\n try: print(inspect_image(Path(path)))\n except Exception as e: print(e)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert "width=12000" in result.stdout
    assert "b.png: has 196 megapixels; at most 179 are read (make it smaller, or remove it)" in result.stdout
