"""What may not be meant with captions: images without one, files that are not read or only in part, long ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lorakit.config.datasets import SubsetConfig
from lorakit.data.captions import by_lower_extension, caption_extensions, longest_captions
from lorakit.data.index import Example, IndexedDataset, Source
from lorakit.data.sources.metadata_files import METADATA_FILES
from lorakit.errors import Problem
from lorakit.utils.wording import counted_in, some_names

_CAPTION_LIKE = (".txt", ".caption", ".captions", ".tags", ".tag", ".text", ".cap", ".prompt", ".md")
"""Extensions that files with captions may have; the first two also behind the image's own, as in `a.png.txt`."""


def review_captions(subset: SubsetConfig, examples: Sequence[Example], names: Sequence[str]) -> Iterator[Problem]:
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
    """The captions that are trained on, each as long as it can be, by the names of their images."""
    examples = [example for dataset in datasets for example in (*dataset.examples, *dataset.held_out)]
    return {str(example.image): max(longest_captions(example.caption, example.subset), key=len) for example in examples}


def _missing(
    subset: SubsetConfig, missing: Sequence[Path], known: Sequence[tuple[Example, Source]], names: Sequence[str]
) -> Iterator[Problem]:
    """Images without captions; behind class tokens only where captions seem to be meant to be there."""
    others = _other_captions(missing, names) if missing else Counter()
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
        hint = _how_to_read(subset, *others.most_common(1)[0])
    elif metadata:
        hint = f'to read {metadata}, set metadata_file = "{(subset.image_dir / metadata).as_posix()}"'
    else:
        hint = f"write {missing[0].stem}{caption_extensions(subset)[0]} …"
        hint += "" if subset.class_tokens else ', or set class_tokens = "photo of my_dog"'
    yield Problem("", message, hint)


def _other_captions(images: Sequence[Path], names: Sequence[str]) -> Counter[str]:
    """How many images have a file beside them that may be their caption, by the end of its name behind the image's."""
    files = by_lower_extension(names)
    return Counter(
        end
        for image in images
        for end in (*_CAPTION_LIKE, *(image.suffix.lower() + extension for extension in _CAPTION_LIKE[:2]))
        if image.stem + end in files
    )


def _how_to_read(subset: SubsetConfig, extension: str, count: int) -> str:
    """What to set so that files of another extension are read as captions."""
    files = f"there {'is' if count == 1 else 'are'} {count} {extension} file{'' if count == 1 else 's'}"
    if subset.caption_extension is None:
        return f'{files}: set caption_extension = "{extension}"'
    cure = f'set it to "{extension}"' + (", or leave it out" if extension in (".txt", ".caption") else "")
    return f'caption_extension = "{subset.caption_extension}" does not find them, but {files}: {cure}'
