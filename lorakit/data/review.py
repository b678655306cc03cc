"""What may not be meant with a dataset's images and captions, although they can be used.

The warnings count files and name some. Imports no torch and decodes no image.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TypeVar

from lorakit.config.datasets import DatasetConfig, SubsetConfig
from lorakit.data.cache.file_cache import FileStatCache, content_digest
from lorakit.data.captions import by_lower_extension, caption_extensions, longest_captions
from lorakit.data.index import Example, IndexedDataset, Source
from lorakit.data.sources.folders import kinds_of, unread_images
from lorakit.data.sources.metadata_files import METADATA_FILES
from lorakit.errors import Problem
from lorakit.utils.safe_paths import list_files
from lorakit.utils.wording import counted_in, shown_path, some, some_names

T = TypeVar("T")
KeyT = TypeVar("KeyT", bound=Hashable)

_CAPTION_LIKE = (".txt", ".caption", ".captions", ".tags", ".tag", ".text", ".cap", ".prompt", ".md")
"""Extensions that files with captions may have; the first two also behind the image's own, as in `a.png.txt`."""


_ENLARGED = 2.0
"""How many times as large an image may become without a word."""
_KEPT = 0.5
"""How much of an image must be left after cropping."""


def review(datasets: Sequence[IndexedDataset], memo: FileStatCache | None = None) -> list[Problem]:
    """All that may not be meant, each thing once though it is the same in several datasets."""
    found: list[Problem] = []
    for dataset in datasets:
        examples = [*dataset.examples, *dataset.held_out]
        for number, own in _groups(examples, lambda example: example.sample_id.split("/", 2)[1]).items():
            subset = dataset.config.subsets[int(number)]
            names = [] if subset.metadata_file or subset.source else sorted(list_files(subset.image_dir))
            unread = unread_images(names)
            if unread:
                kinds = f", {kinds_of(unread)}" if len(unread) > 3 else ""
                message = f"{counted_in(len(unread), 'file', subset.place)} not read{kinds}: {some(unread)}"
                found.append(Problem("", message, "convert images to JPEG or PNG"))
            found += _captions(subset, own, names)
            several = [example.image for example in own if example.source and example.source.image.has_frames]
            if several:
                message = f"several frames or pages, of which the first is used: {some_names(several)}"
                message = f"{counted_in(len(several), 'image', subset.place, 'have')} {message}"
                found.append(Problem("", message))
            found += _sizes(dataset.config, subset, own)
        found += _equal_images(examples, memo)
        found += _settings(dataset)
    return list(dict.fromkeys(found))


def _sizes(dataset: DatasetConfig, subset: SubsetConfig, examples: Sequence[Example]) -> Iterator[Problem]:
    """Images that are much enlarged, and those of which most is cropped away; crops that vary show all in the end."""
    if subset.face_crop_aug_range:
        return

    def count(worst: Sequence[object]) -> str:
        return f"{len(worst)} of {len(examples)} images in {subset.place} {'is' if len(worst) == 1 else 'are'}"

    sizes = [(example, example.source.image.size) for example in examples if example.source]
    enlarged = [(example.placement.resized[0] / size[0], example.image, size) for example, size in sizes]
    enlarged = sorted((item for item in enlarged if item[0] > _ENLARGED), reverse=True)
    if enlarged:
        times, worst, (width, height) = enlarged[0]
        message = f"enlarged more than twice: {worst.name}, of {width}x{height} pixels, {times:.1f} times"
        hint = "use larger ones, or lower resolution"
        yield Problem("", f"{count(enlarged)} {message}{', …' if len(enlarged) > 1 else ''}", hint)
    areas = ((prod(example.placement.bucket), prod(example.placement.resized)) for example, _ in sizes)
    kept = [(left / area, example.image, size) for (left, area), (example, size) in zip(areas, sizes, strict=True)]
    kept = sorted(item for item in kept if item[0] < _KEPT)
    if kept and not subset.random_crop:
        share, worst, (width, height) = kept[0]
        message = f"cropped to less than half: {worst.name}, of {width}x{height} pixels, to {share:.0%}"
        hint = "crop them yourself" if dataset.enable_bucket else "set enable_bucket = true, or crop them yourself"
        yield Problem("", f"{count(kept)} {message}{', …' if len(kept) > 1 else ''}", hint)


def equal_images(examples: Sequence[Example], memo: FileStatCache | None = None) -> list[list[Path]]:
    """Groups of files with the same bytes; only those of one length and with the same bytes at the end are read."""
    digest = memo.digest if memo else content_digest
    facts = {example.image: example.source.image for example in examples if example.source}
    groups: list[list[Path]] = []
    for alike in _groups(facts, lambda path: (facts[path].length, facts[path].ending)).values():
        if len(alike) > 1:
            groups += (same for same in _groups(alike, digest).values() if len(same) > 1)
    return groups


def _equal_images(examples: Sequence[Example], memo: FileStatCache | None) -> Iterator[Problem]:
    """Files with the same bytes."""
    groups = equal_images(examples, memo)
    if groups:
        pairs = "; ".join(" = ".join(path.name for path in group[:3]) for group in groups[:3])
        count, folder = sum(len(group) - 1 for group in groups), shown_path(groups[0][0].parent)
        message = f"the same as another: {pairs}{'; …' if len(groups) > 3 else ''}"
        yield Problem("", f"{counted_in(count, 'image', folder)} {message}", "keep one; num_repeats repeats images")


def _settings(dataset: IndexedDataset) -> Iterator[Problem]:
    """A folder that is in several subsets, and a validation split without images."""
    config = dataset.config
    active = [subset for subset in config.subsets if subset.num_repeats and not (subset.metadata_file or subset.source)]
    for folder, subsets in _groups(active, lambda subset: subset.image_dir.resolve()).items():
        if len(subsets) > 1:
            message = (
                f"{shown_path(folder)} is in {len(subsets)} subsets of one dataset, so its images train as often more"
            )
            yield Problem("", message, "remove one of the subsets; num_repeats repeats images")
    if config.validation_split and not dataset.held_out:
        count = len(dataset.examples)
        message = f"of {config.validation_split:g} holds out none of {count} images: no subset has enough of them"
        yield Problem("data.validation_split", message)


def _groups(items: Iterable[T], key: Callable[[T], KeyT]) -> dict[KeyT, list[T]]:
    """The items by their keys, in their order."""
    groups: dict[KeyT, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _captions(subset: SubsetConfig, examples: Sequence[Example], names: Sequence[str]) -> Iterator[Problem]:
    """Warnings of the captions of one subset, the names of whose files are given."""
    known = [(example, example.source) for example in examples if example.source]
    yield from _missing(subset, [example.image for example, source in known if source.caption is None], known, names)
    files = [(example, source.caption) for example, source in known if isinstance(source.caption, Path)]
    place = subset.place
    empty = [file for example, file in files if not example.caption]
    if empty:
        hint = "write captions" + (", or remove the files to train with class_tokens" if subset.class_tokens else "")
        yield Problem("", f"{counted_in(len(empty), 'caption', place)} empty: {some_names(empty)}", hint)
    cut = [
        source.caption if isinstance(source.caption, Path) else example.image
        for example, source in known
        if source.has_more_lines
    ]
    if cut:
        message = f"several lines, of which the first is used: {some_names(cut)}"
        hint = "write one line, or set enable_wildcard = true to use one of them at random"
        yield Problem("", f"{counted_in(len(cut), 'caption', place, 'have')} {message}", hint)
    uses = Counter(file for _, file in files)
    shared = [example.image for example, file in files if uses[file] > 1]
    if shared:
        message = f"a caption with another of the same name: {some_names(shared, 4)}"
        yield Problem(
            "", f"{counted_in(len(shared), 'image', place, 'share')} {message}", "rename one with its own caption"
        )


def longest_by_image(datasets: Sequence[IndexedDataset]) -> Mapping[str, str]:
    """The captions that are trained on, each as long as it can be, by their images as messages show them."""
    examples = [example for dataset in datasets for example in (*dataset.examples, *dataset.held_out)]
    folders = {folder: Path(shown_path(folder)) for folder in {example.image.parent for example in examples}}
    return {
        str(folders[example.image.parent] / example.image.name): max(
            longest_captions(example.caption, example.subset), key=len
        )
        for example in examples
    }


def _missing(
    subset: SubsetConfig, missing: Sequence[Path], known: Sequence[tuple[Example, Source]], names: Sequence[str]
) -> Iterator[Problem]:
    """Images without captions; behind class tokens only where captions seem to be meant to be there."""
    files = by_lower_extension(names)
    others = Counter(
        end
        for image in missing
        for end in (*_CAPTION_LIKE, *(image.suffix.lower() + extension for extension in _CAPTION_LIKE[:2]))
        if image.stem + end in files
    )
    metadata = next((name for name in METADATA_FILES if name in names), None)
    is_meant = subset.class_tokens and len(missing) == len(known) and not others and not metadata
    if not missing or is_meant:
        return
    place = subset.place
    verb = "has no caption and trains" if len(missing) == 1 else "have no caption and train"
    caption = f'class_tokens, "{subset.class_tokens}"' if subset.class_tokens else "an empty one"
    message = f"{len(missing)} of {len(known)} images in {place} {verb} on {caption}: {some_names(missing)}"
    if subset.source:
        hint = ""
    elif subset.metadata_file:
        hint = "its keys caption, text, prompt and tags are read"
    elif others:
        extension, count = others.most_common(1)[0]
        found = f"there {'is' if count == 1 else 'are'} {count} {extension} file{'' if count == 1 else 's'}"
        hint = f'{found}: set caption_extension = "{extension}"'
        if subset.caption_extension is not None:
            cure = f'set it to "{extension}"' + (", or leave it out" if extension in (".txt", ".caption") else "")
            hint = f'caption_extension = "{subset.caption_extension}" does not find them, but {found}: {cure}'
    elif metadata:
        hint = f'to read {metadata}, set metadata_file = "{(subset.image_dir / metadata).as_posix()}"'
    else:
        hint = f"write {missing[0].stem}{caption_extensions(subset)[0]} …"
        hint += "" if subset.class_tokens else ', or set class_tokens = "photo of my_dog"'
    yield Problem("", message, hint)
