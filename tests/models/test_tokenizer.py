"""Captions to token ids, against transformers' tokenizer and the rules for long captions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from lorakit.errors import ModelError
from lorakit.models.families.sd.tokenizer import CaptionTokenizer
from tests.models.building import stable_diffusion

CAPTIONS = [
    "",
    "a photo of a cat",
    "  two   spaces\tand a tab\nand a line  ",
    "A CAT IN CAPITALS, MiXeD",
    "it's the dog's, they're we've I'm you'll he'd isn't O'Neill ''",
    "1girl, 1024x768, 3.14, 20 years, ½ ² Ⅷ ٣",
    "smile :) (brackets:1.2) [x] {y} <lora:z:1> a_b-c/d\\e|f @user #tag 50% a&b",
    "猫 と 犬 한국어 العربية русский ελληνικά हिन्दी",
    "café naïve Ünïcode ﬁne e\u0301 Å",
    "👍🏽 👩\u200d👩\u200d👧 🇩🇪 🐱\ufe0f",
    "non\u00a0breaking\u2003space \u200bzero width\ufeff",
    "<|startoftext|> quoted <|endoftext|> tokens",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "\x00\x1f control",
]


@pytest.fixture(scope="module")
def reference(tiny_sd1: Path) -> CLIPTokenizer:
    """The tokenizer of transformers with CLIP's vocabulary."""
    return CLIPTokenizer.from_pretrained(tiny_sd1 / "tokenizer")


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    """The tokenizer with the vocabulary that comes with the package."""
    return CaptionTokenizer()


def expected(reference: CLIPTokenizer, captions: list[str], length: int = 77) -> torch.Tensor:
    """Ids as transformers gives them, [B, length]."""
    return reference(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def test_ids_are_those_of_transformers(reference: CLIPTokenizer, tokenizer: CaptionTokenizer) -> None:
    """All kinds of text, from contractions to emoji, give the ids that transformers gives."""
    tokens = tokenizer(CAPTIONS)
    assert (tokens.shape, tokens.dtype) == ((len(CAPTIONS), 1, 77), torch.int64)
    for caption, ours, theirs in zip(CAPTIONS, tokens[:, 0], expected(reference, CAPTIONS), strict=True):
        assert ours.tolist() == theirs.tolist(), caption


CLEANED = {
    "a “red” cat’s bow": 'a "red" cat\'s bow',
    "ＡＢＣ ｆｕｌｌ　ｗｉｄｔｈ！": "abc full width!",
    "ﬁne ﬂower": "fine flower",
    "salt &amp; pepper, l&#39;été": "salt & pepper, l'été",
    "1 < 2 &amp; 3": "1 < 2 &amp; 3",
    "cafÃ© â€” bar": "café — bar",
    "ΟΔΟΣ": "οδος",
    "<b> &amp;quot;": "<b> &amp;quot;",
}
"""Captions, and what ftfy and lower case make of them."""


def test_cleaned_captions(reference: CLIPTokenizer, tokenizer: CaptionTokenizer) -> None:
    """With `fix_text`, ids are those of transformers 4, which cleans with ftfy and finds the same words in the rest."""
    import ftfy

    cleaning = CaptionTokenizer(fix_text=True)
    for caption in (*CAPTIONS, *CLEANED):
        clean = re.sub(r"\s+", " ", ftfy.fix_text(caption)).strip().lower()
        assert clean == CLEANED.get(caption, clean)
        assert cleaning([caption])[0, 0].tolist() == expected(reference, [clean])[0].tolist(), caption
        assert cleaning.lengths([caption]) == [len(reference(clean, add_special_tokens=False).input_ids)]
    assert torch.equal(tokenizer(CAPTIONS[1:3]), cleaning(CAPTIONS[1:3]))
    assert not torch.equal(tokenizer(["ﬁne"]), cleaning(["ﬁne"]))


def test_cleaned_words_with_weights() -> None:
    """Words are cleaned once weights are read, as by sd-scripts and web UIs: wide brackets are no weights."""
    caption, plain, cleaning = "(“cat”:1.3) （ﬁne:2）", CaptionTokenizer(), CaptionTokenizer(fix_text=True)
    ids, weights = cleaning.weighted([caption])
    expected_ids, expected_weights = plain.weighted([r'("cat":1.3) \(fine:2\)'])
    assert torch.equal(ids, expected_ids)
    assert torch.equal(weights, expected_weights)
    assert cleaning.lengths([caption], weighted=True) == plain.lengths([r'("cat":1.3) \(fine:2\)'], weighted=True)


@settings(max_examples=200, deadline=None)
@given(caption=st.text(max_size=60))
def test_any_text_gives_the_ids_of_transformers(
    reference: CLIPTokenizer, tokenizer: CaptionTokenizer, caption: str
) -> None:
    """Whatever the characters, the ids are those of transformers."""
    assert torch.equal(tokenizer([caption])[0], expected(reference, [caption]))


def test_known_ids(tokenizer: CaptionTokenizer) -> None:
    """The ids of a common caption are those that CLIP was trained with."""
    assert tokenizer(["a photo of a cat"])[0, 0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert tokenizer.vocabulary_size == 49408


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("words", [0, 1, 74, 75, 76, 149, 150, 151, 224, 225, 300])
def test_long_captions_are_cut_into_chunks(reference: CLIPTokenizer, chunks: int, words: int) -> None:
    """Each chunk is the start token, 75 of the caption's padded ids, and the end token."""
    caption = " ".join(["cat"] * words)
    whole = expected(reference, [caption], 75 * chunks + 2)[0]
    tokens = CaptionTokenizer(max_length=75 * chunks)([caption])[0]
    assert tokens.shape == (chunks, 77)
    for index, chunk in enumerate(tokens):
        inner = whole[1 + 75 * index : 76 + 75 * index]
        assert chunk.tolist() == [49406, *inner.tolist(), 49407]


@pytest.mark.parametrize("words", [0, 1, 73, 74, 75, 76, 100, 149, 150, 151])
def test_chunks_with_other_padding_end_where_the_caption_does(words: int) -> None:
    """With padding that is not the end token, a full chunk ends with the end token and an empty one starts with it."""
    tokens = CaptionTokenizer(max_length=150, pad=0)([" ".join(["cat"] * words)])[0]
    cat, start, end = 2368, 49406, 49407
    content = [cat] * min(words, 150)
    padded = [*content, end, *[0] * 150]
    for index, chunk in enumerate(tokens.tolist()):
        body = padded[75 * index : 75 * index + 75]
        last = end if body[-1] == cat else padded[150] if words >= 150 else 0
        body[0] = end if body[0] == 0 else body[0]
        assert chunk == [start, *body, last]


def test_folders_own_tokenizer_is_used(tiny_sd1: Path, reference: CLIPTokenizer, tmp_path: Path) -> None:
    """A vocabulary in a folder, as `vocab.json` or `tokenizer.json`, is used instead of CLIP's own."""
    reference.save_pretrained(tmp_path)
    captions = ["a cat, it's 42 👍"]
    assert torch.equal(CaptionTokenizer(tmp_path)(captions)[:, 0], expected(reference, captions))
    assert torch.equal(CaptionTokenizer(tiny_sd1 / "tokenizer")(captions)[:, 0], expected(reference, captions))
    merges = (tiny_sd1 / "tokenizer" / "merges.txt").read_text().splitlines()
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_bytes((tiny_sd1 / "tokenizer" / "vocab.json").read_bytes())
    (tmp_path / "merges.txt").write_text("\n".join(merges[:1000]))
    assert CaptionTokenizer(tmp_path)(["photograph"])[0, 0].tolist().index(49407) > 2


@pytest.mark.parametrize("caption", ["wow!", "wow!!", "!", " ! ", "a!b !! c!?", "(cat!:1.2)", "<|endoftext|>!", "!★"])
def test_what_pads_is_a_word_in_captions(tiny_sd2: Path, tmp_path: Path, caption: str) -> None:
    """A tokenizer of Stable Diffusion 2.x that declares `!` special reads it as the text encoder was trained."""
    CLIPTokenizer.from_pretrained(tiny_sd2 / "tokenizer").save_pretrained(tmp_path)
    assert '"content": "!"' in (tmp_path / "tokenizer.json").read_text()
    declared, plain = CaptionTokenizer(tmp_path, pad=0), CaptionTokenizer(pad=0)
    assert torch.equal(declared([caption]), plain([caption]))
    assert all(torch.equal(*both) for both in zip(declared.weighted([caption]), plain.weighted([caption]), strict=True))


def test_an_exclamation_mark_is_its_own_token(tiny_sd2: Path, tmp_path: Path) -> None:
    """`!` at the end of a word is token 256, and two of them 748."""
    CLIPTokenizer.from_pretrained(tiny_sd2 / "tokenizer").save_pretrained(tmp_path)
    assert CaptionTokenizer(tmp_path, pad=0)(["wow! wow!!"])[0, 0, :7].tolist() == [
        49406,
        2781,
        256,
        2781,
        748,
        49407,
        0,
    ]


@pytest.mark.parametrize("at", [0, 74, 75, 149])
def test_a_padding_token_among_words(at: int) -> None:
    """A token of a caption that is the padding's changes nothing at the edges of chunks, only its own place."""
    words = ["cat"] * 150
    tokenizer = CaptionTokenizer(max_length=150, pad=0)
    without = tokenizer([" ".join(words)])[0]
    expected = without.clone()
    expected[at // 75, at % 75 + 1] = 0
    assert torch.equal(tokenizer._in_chunks([[0 if index == at else 2368 for index in range(150)]])[0], expected)


def test_models_bring_their_own_tokenizer(tiny_sd1: Path, tiny_sd1_file: Path) -> None:
    """A model from a folder tokenizes as its single file does, which uses CLIP's vocabulary."""
    own, packaged = (stable_diffusion(path).text_encoder for path in (tiny_sd1, tiny_sd1_file))
    assert torch.equal(own.tokenize(CAPTIONS)["ids"], packaged.tokenize(CAPTIONS)["ids"])


@pytest.mark.parametrize("content", ["{}", "not json", '{"a": 0}'])
def test_broken_tokenizers_are_named(tmp_path: Path, content: str) -> None:
    """A tokenizer that cannot be read, or is not CLIP's, is refused by the folder's name."""
    (tmp_path / "vocab.json").write_text(content)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ModelError, match="tokenizer in") as caught:
        CaptionTokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
