"""A report on a dataset, in text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

from lorakit.dataset_report.report import DataReport, ImageReport, SubsetReport
from lorakit.utils.text_table import columns
from lorakit.utils.wording import counted, labelled, some

_LABEL_WIDTH = 13
_NAMED = 5
"""Images that are named of those that a line is about."""
_GROUPS = 10
"""Groups of images that look alike, and misspelled tags, that are named."""
_TAGS = 40
"""Tags that are listed."""
_NOTED = 0.1
"""The share of an image above which its loss is worth a line."""
_BAR = 40
"""Characters of the longest bar."""
_SENTENCE = 5
"""Words that the parts of a caption have on average from which on they are sentences, and no tags."""


def report_lines(report: DataReport) -> Iterator[str]:
    """All lines of a report, for terminals of 80 columns and more."""
    several = len({subset.dataset for subset in report.subsets}) > 1
    for subset in report.subsets:
        yield from _subset(report, subset, several)
        yield ""
    yield from _alike(report)
    yield from ("", *_captions(report))
    yield from ("", *_tags(report))


def _subset(report: DataReport, subset: SubsetReport, several: bool) -> Iterator[str]:
    """The images of a subset, bucket by bucket, and by name what may be wanted otherwise."""
    name = f"{subset.place}, dataset {subset.dataset + 1}" if several else subset.place
    if not subset.images:
        yield f"{name}: no image is used"
        return
    held_out = len(subset.select(lambda image: image.held_out))
    epoch = sum(image.appearances for image in subset.images)
    parts = [counted(len(subset.images), "image") + (" for regularisation" if subset.is_reg else "")]
    parts += [f"{held_out} held out for validation"] if held_out else []
    yield f"{name}: {', '.join(parts)}; {epoch} an epoch, repeats counted"
    titles = ("bucket", "images", "an epoch", "cropped, mean", "most", "enlarged", "no caption", "cut captions")
    yield from columns(titles, [_bucket(report, size, images) for size, images in subset.by_bucket.items()])
    yield from labelled(list(_remarks(report, subset)), _LABEL_WIDTH)


def _bucket(report: DataReport, size: tuple[int, int], images: Sequence[ImageReport]) -> tuple[str, ...]:
    """The row of a bucket."""
    cropped = [image.cropped for image in images if image.cropped is not None]
    return (
        f"{size[0]}x{size[1]}",
        str(len(images)),
        str(sum(image.appearances for image in images)),
        f"{fmean(cropped):.0%}" if cropped else "varies",
        f"{max(cropped):.0%}" if cropped else "varies",
        str(sum(image.is_enlarged for image in images)),
        str(sum(not image.caption for image in images)),
        str(sum(map(report.is_cut, images))),
    )


def _remarks(report: DataReport, subset: SubsetReport) -> Iterator[tuple[str, str]]:
    """The images of a subset that are cropped, enlarged, without a caption, or with one that is cut; worst first."""
    cropped = subset.select(lambda image: (image.cropped or 0) > _NOTED)
    if cropped:
        worst = sorted(cropped, key=lambda image: -(image.cropped or 0))
        lost = [f"{image.path.name} by {image.cropped or 0:.0%}" for image in worst]
        yield "cropped", f"{len(cropped)} by more than {_NOTED:.0%}: {some(lost, _NAMED)}"
    enlarged = sorted(subset.select(lambda image: image.is_enlarged), key=lambda image: -image.enlarged)
    if enlarged:
        yield "enlarged", f"{len(enlarged)}: {some([_enlarged(image) for image in enlarged], _NAMED)}"
    for words, test in _CAPTIONLESS.items():
        if without := subset.select(test):
            yield words, f"{len(without)}: {some([image.path.name for image in without], _NAMED)}"
    cut = sorted(subset.select(report.is_cut), key=lambda image: -(image.tokens or 0))
    if cut:
        longest = [f"{image.path.name} of {image.tokens}" for image in cut]
        yield "cut captions", f"{len(cut)}, after {report.token_limit} tokens: {some(longest, _NAMED)}"


_CAPTIONLESS: dict[str, Callable[[ImageReport], bool]] = {
    "class tokens": lambda image: not image.has_caption and bool(image.caption),
    "no caption": lambda image: not image.has_caption and not image.caption,
    "empty": lambda image: image.has_caption and not image.caption,
}
"""Ways to be without a caption of one's own, with class tokens in its place or not."""


def _enlarged(image: ImageReport) -> str:
    width, height = image.size
    return f"{image.path.name} ({width}x{height}) {image.enlarged:.1f} times"


def _alike(report: DataReport) -> Iterator[str]:
    """Images that are equal, nearly equal, or damaged."""
    held_out = {image.path for image in report.images if image.held_out}
    yield "IMAGES THAT LOOK ALIKE"
    rows = [("equal", _groups(report.alike.equal, " = ", held_out))]
    if report.alike.nearly_equal is None:
        rows.append(("nearly equal", "not looked for; pip install imagehash, and they are"))
    else:
        rows.append(("nearly equal", _groups(report.alike.nearly_equal, " ~ ", held_out)))
    rows += [("damaged", message) for message in report.alike.damaged]
    yield from labelled(rows, _LABEL_WIDTH)


def _groups(groups: Sequence[Sequence[Path]], sign: str, held_out: set[Path]) -> str:
    """Groups of images by name; where only a part of one trains, those held out for validation are marked."""
    texts = []
    for group in groups:
        is_split = 0 < sum(path in held_out for path in group) < len(group)
        names = [f"{path.name}{' (held out)' if is_split and path in held_out else ''}" for path in group]
        texts.append(some(names, _NAMED, f"{sign}…", sign))
    return f"{len(groups)}: {some(texts, _GROUPS, '; …', '; ')}" if groups else "none"


def _captions(report: DataReport) -> Iterator[str]:
    """How many captions there are of each length."""
    unit = "words" if report.token_limit is None else "tokens"
    lengths = [len(image.caption.split()) if image.tokens is None else image.tokens for image in report.images]
    limit = report.token_limit or 75
    step = limit // 3
    ranges = [(0, 0)] + [(low + 1, low + step) for low in range(0, limit, step)]
    last = (limit + 1, max([*lengths, limit + 1]))
    yield f"{counted(len(lengths), 'caption').upper()}, {fmean(lengths or [0]):.0f} {unit.upper()} ON AVERAGE"
    counts = Counter(next((own for own in ranges if length <= own[1]), last) for length in lengths)
    most = max(counts.values(), default=1)
    for low, high in (*ranges, last):
        count = counts[low, high]
        name = str(low) if low == high else f"{low}-{high}"
        name = f"{name}, cut" if (low, high) == last and report.token_limit and count else name
        bar = "#" * -(-count * _BAR // most)
        if count or (low, high) != last:
            yield f"  {name:>{_LABEL_WIDTH}} {unit}  {count:>6}  {bar}".rstrip()


def _tags(report: DataReport) -> Iterator[str]:
    """The tags, and those that may be misspelled."""
    total = sum(tag.count for tag in report.tags)
    words = sum(len(tag.tag.split()) * tag.count for tag in report.tags) / max(total, 1)
    if words > _SENTENCE:
        yield f"NO TAGS: THE PARTS OF CAPTIONS HAVE {words:.0f} WORDS ON AVERAGE"
        return
    once = sum(tag.count == 1 for tag in report.tags)
    yield f"{counted(len(report.tags), 'TAG', 'TAGS')}, {once} OF THEM ONCE"
    rows = []
    if report.tags:
        shown = [f"{tag.tag} {tag.count}" for tag in report.tags]
        rows.append(("most frequent", some(shown, _TAGS, ", and {} more")))
    slips = [f"{slip.tag} {slip.count} (meant: {slip.meant} {slip.meant_count}?)" for slip in report.misspellings]
    if slips:
        rows.append(("misspelled?", f"{len(slips)}: {some(slips, _GROUPS)}"))
    yield from labelled(rows, _LABEL_WIDTH)
