"""Images: any bytes give a size and pixels, or a DataError that names the file."""

from __future__ import annotations

import io
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lorakit.data.images.buckets import ResizeCrop
from lorakit.data.images.decode import inspect_image, load_mask, load_pixels, load_with_alpha
from lorakit.errors import DataError
from tests.fuzz.mutations import damaged, ends_well, few


def encoded(form: str, mode: str) -> bytes:
    """A small picture of a form and a colour mode, with an EXIF tag."""
    picture = Image.radial_gradient("L").resize((24, 16)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture.save(file, form, **({} if form in ("BMP", "GIF") else {"exif": exif}))
    return file.getvalue()


SOUND = {
    f"{form} {mode}": encoded(form, mode)
    for form, modes in {
        "PNG": ("RGB", "RGBA", "P", "L", "1", "I;16", "LA"), "JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA"),
        "BMP": ("RGB", "P"), "GIF": ("P",), "TIFF": ("RGB", "L", "I;16", "CMYK", "P", "RGBA"), "AVIF": ("RGB", "RGBA"),
    }.items()
    for mode in modes
}  # fmt: skip


@few(150)
@given(data=st.data(), kind=st.sampled_from(list(SOUND)))
def test_images(tmp_path: Path, data: st.DataObject, kind: str) -> None:
    """Whatever is done to the bytes of an image, it is read as a picture or refused by name."""
    path = tmp_path / "image.png"
    path.write_bytes(data.draw(damaged(SOUND[kind]) | st.binary(max_size=60)))
    placement = ResizeCrop((64, 64), (64, 64))

    def act() -> None:
        width, height = inspect_image(path).size
        assert width > 0
        assert height > 0
        assert load_pixels(path, placement).shape == (64, 64, 3)
        assert load_with_alpha(path, placement)[0].shape == (64, 64, 3)
        assert load_mask(path, placement).shape == (64, 64)

    ends_well(f"images ({kind.split(maxsplit=1)[0]})", act, DataError, str(path))
