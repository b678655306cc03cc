"""The captions of a folder: written by a captioner, edited, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit.captioning.edits import CaptionEdits
from lorakit.config.datasets import SubsetConfig
from lorakit.data.cache.parallel import map_prefetch
from lorakit.data.captions import caption_extensions, read_caption
from lorakit.data.images.decode import load_upright
from lorakit.data.index import default_workers
from lorakit.data.sources.folders import FolderSource
from lorakit.errors import DataError
from lorakit.plugins.failures import plugin_errors
from lorakit.utils.atomic_io import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

    from lorakit.api.captioner import Captioner, CaptionerConfig


@frozen(kw_only=True)
class CaptionOptions:
    """How captions are written."""

    extension: str | None = None
    """Extension of caption files, no image's; `.txt` if absent, where no `.caption` file is there already."""
    overwrite: bool = False
    """Whether captions that are there already are written again."""
    dry_run: bool = False
    """Whether nothing is written."""
    batch_size: int = field(default=1, validator=v.ge(1))
    """Images that a captioner is given at once."""
    edits: CaptionEdits = field(factory=CaptionEdits)
    """What is done to each caption, new or old."""


@frozen
class CaptionChange:
    """A caption file that was written, or would be."""

    path: Path
    """The file."""
    before: str | None
    """The caption that was there; None if there was no file."""
    after: str
    """The new caption."""


@frozen(kw_only=True)
class CaptionResult:
    """What became of the captions of a folder."""

    changes: tuple[CaptionChange, ...]
    """The captions that were written, or would be."""
    kept: int
    """Captions that were left as they are."""
    without: int = 0
    """Images without a caption file, where captions are edited only."""
    unreadable: tuple[str, ...]
    """What is wrong with images and caption files that were passed over."""


@frozen
class _Item:
    """An image and its caption file, which need not exist."""

    image: Path
    caption: Path


def edit_captions(
    folder: Path, options: CaptionOptions, notify: Callable[[CaptionChange | DataError], None] = lambda _: None
) -> CaptionResult:
    """Edit the captions that the images of a folder have; a caption that an edit leaves as it is is not written.

    `notify` is called with each change once it is made, and with each error. Raises DataError where there are no
    images, and OutputError where a file cannot be written.
    """
    listed = _items(folder, options)
    items = [item for item in listed if item.caption.is_file()]
    changes: list[CaptionChange] = []
    errors: list[str] = []
    for item in items:
        try:
            before = read_caption(item.caption)
        except DataError as error:
            errors.append(str(error))
            notify(error)
            continue
        after = options.edits.apply(before)
        if after != before:
            changes.append(_write(CaptionChange(item.caption, before, after), options))
            notify(changes[-1])
    kept = len(items) - len(changes) - len(errors)
    without = len(listed) - len(items)
    return CaptionResult(changes=tuple(changes), kept=kept, without=without, unreadable=tuple(errors))


def write_captions(
    folder: Path,
    captioner: tuple[CaptionerConfig, Captioner],
    options: CaptionOptions,
    notify: Callable[[CaptionChange | DataError], None] = lambda _: None,
) -> CaptionResult:
    """Caption the images of a folder that have no caption, or all with `overwrite`; edits are applied to the results.

    `captioner` is the component, which messages name, with what it built. `notify` and errors are those of
    `edit_captions`; PluginError where the captioner fails. Images of which one is named as another share a caption
    file, and the first one is captioned.
    """
    items = _items(folder, options)
    wanted = [item for item in items if options.overwrite or not item.caption.exists()]
    changes: list[CaptionChange] = []
    errors: list[str] = []
    for batch in _loaded(wanted, options.batch_size):
        readable = [(item, image) for item, image in batch if not isinstance(image, DataError)]
        for image in (image for _, image in batch if isinstance(image, DataError)):
            errors.append(str(image))
            notify(image)
        captions = _captions(*captioner, [image for _, image in readable])
        for (item, _), caption in zip(readable, captions, strict=True):
            before = _before(item.caption)
            changes.append(_write(CaptionChange(item.caption, before, options.edits.apply(caption)), options))
            notify(changes[-1])
    return CaptionResult(changes=tuple(changes), kept=len(items) - len(wanted), unreadable=tuple(errors))


def _items(folder: Path, options: CaptionOptions) -> list[_Item]:
    """The images of a folder by the caption files that they have or are to get, each file once."""
    subset = SubsetConfig(image_dir=folder, caption_extension=options.extension)
    problems: list[str] = []
    found: dict[Path, _Item] = {}
    for listed in FolderSource(subset).list_images(problems):
        usual = listed.image.with_name(listed.image.stem + caption_extensions(subset)[0])
        caption = listed.caption if isinstance(listed.caption, Path) else usual
        found.setdefault(caption, _Item(listed.image, caption))
    return list(found.values())


def _loaded(items: Sequence[_Item], batch_size: int) -> Iterator[list[tuple[_Item, Image | DataError]]]:
    """The images in batches, decoded ahead by threads; an error in the place of one that cannot be read."""

    def load(item: _Item) -> tuple[_Item, Image | DataError]:
        try:
            return item, load_upright(item.image)
        except DataError as error:
            return item, error

    workers = default_workers()
    with ThreadPoolExecutor(workers) as pool:
        batch = []
        for loaded in map_prefetch(pool, load, items, workers + batch_size):
            batch.append(loaded)
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


def _captions(config: CaptionerConfig, captioner: Captioner, images: Sequence[Image]) -> list[str]:
    """The captions of images, each in one line. Raises PluginError where the captioner fails."""
    if not images:
        return []
    with plugin_errors(config, "caption"):
        captions = captioner.caption(images)
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise TypeError("it returned something else than a list of texts")
        if len(captions) != len(images):
            raise ValueError(f"it returned {len(captions)} captions of {len(images)} images")
    return [" ".join(caption.split()) for caption in captions]


def _before(path: Path) -> str | None:
    """The caption in a file that is to be overwritten; empty if it cannot be read."""
    if not path.exists():
        return None
    try:
        return read_caption(path)
    except DataError:
        return ""


def _write(change: CaptionChange, options: CaptionOptions) -> CaptionChange:
    if not options.dry_run:
        write_atomically(change.path, f"{change.after}\n".encode())
    return change
