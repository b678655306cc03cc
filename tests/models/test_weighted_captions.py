"""Weighted captions: the grammar of brackets, and hidden states times the weights."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.models.families.sd.tokenizer import CaptionTokenizer
from lorakit.models.prompt_weights import weighted_fragments
from tests.models.building import stable_diffusion

GRAMMAR = {
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", 1.1), (" word", 1)],
    "(unbalanced": [("unbalanced", 1.1)],
    "[unbalanced": [("unbalanced", 1 / 1.1)],
    r"\(literal\]": [("(literal]", 1)],
    r"back\\slash \n": [(r"back\slash n", 1)],
    r"\a(b\:1.5)\\": [("a", 1), ("b", 1.5), ("\\", 1)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.4641), (".", 1.1),
    ],
    "(a (b:2):3)": [("a ", 3), ("b", 6)],
    "[a [b]]": [("a ", 1 / 1.1), ("b", 1 / 1.21)],
    "(a: .5 )(b:+2.)(c:-1)": [("a", 0.5), ("b", 2), ("c", -1)],
    "time 12:30, :1.2) and ) or ]": [("time 12:30, :1.2) and ) or ]", 1)],
    "(a:b:1.2)": [("a:b", 1.2)],
    "(a:one)": [("a:one", 1.1)],
    "(a [b) c]": [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)],
    "(a:1.2.3)": [("a:1.2.3", 1.1)],
    "()[](:2)": [],
    "": [],
}  # fmt: skip


@pytest.mark.parametrize("caption", GRAMMAR)
def test_grammar(caption: str) -> None:
    """Each rule of the grammar, and what looks like it and is none, gives the words and weights that it says."""
    found = weighted_fragments(caption)
    assert [words for words, _ in found] == [words for words, _ in GRAMMAR[caption]]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in GRAMMAR[caption]])


TEXTS = st.text(st.sampled_from("ab ,()[]\\"), min_size=1, max_size=5)
WEIGHTS = st.decimals("0.1", "9.9", places=1).map(str)
TREES = st.recursive(
    TEXTS,
    lambda inner: st.tuples(st.sampled_from("(["), st.none() | WEIGHTS, st.lists(inner, max_size=3)),
    max_leaves=12,
)


def written(tree: str | tuple) -> str:
    """A tree of brackets as a caption."""
    if isinstance(tree, str):
        return re.sub(r"([\\()\[\]])", r"\\\1", tree)
    bracket, weight, children = tree
    inner = "".join(map(written, children))
    if bracket == "[":
        return f"[{inner}]"
    return f"({inner}:{weight})" if weight else f"({inner})"


def weights_in(tree: str | tuple, outer: float = 1.0) -> list[tuple[str, float]]:
    """Each character of a tree's texts with the product of the factors around it."""
    if isinstance(tree, str):
        return [(character, outer) for character in tree]
    bracket, weight, children = tree
    factor = 1 / 1.1 if bracket == "[" else float(weight or 1.1)
    return [pair for child in children for pair in weights_in(child, outer * factor)]


@given(trees=st.lists(TREES, max_size=4))
def test_nested_brackets_multiply(trees: list[str | tuple]) -> None:
    """Of any balanced nesting, every character has the product of the factors of the brackets around it."""
    found = weighted_fragments("".join(map(written, trees)))
    characters = [(character, weight) for words, weight in found for character in words]
    expected = [pair for tree in trees for pair in weights_in(tree)]
    assert [character for character, _ in characters] == [character for character, _ in expected]
    assert [weight for _, weight in characters] == pytest.approx([weight for _, weight in expected])


@given(text=st.text(st.sampled_from("a:1.2 ()[]\\") | st.characters(), max_size=40))
def test_any_text_is_read(text: str) -> None:
    """Whatever is written, nothing fails, no words are added, and what is escaped is kept with the weight 1."""
    found = weighted_fragments(text)
    remaining = iter(text)
    assert all(character in remaining for words, _ in found for character in words)
    assert all(words for words, _ in found)
    escaped = re.sub(r"([\\()\[\]])", r"\\\1", text)
    assert weighted_fragments(escaped) == ([(text, 1.0)] if text else [])


def test_weights_stand_where_their_tokens_do() -> None:
    """Each token of a caption has its fragment's weight; start, end, padding and what is cut off have none."""
    tokenizer = CaptionTokenizer(max_length=150)
    captions = ["a (cat:1.5), [dog]", " ".join(["(cat:2)"] * 80), "a cat", "", " ".join(["(cat:2)"] * 200)]
    ids, weights = tokenizer.weighted(captions)
    plain = tokenizer(["a cat, dog", " ".join(["cat"] * 80), "a cat", "", " ".join(["cat"] * 150)])
    assert torch.equal(ids, plain)
    assert (weights.shape, weights.dtype) == ((5, 2, 77), torch.float32)
    assert weights[0, 0, :7].tolist() == pytest.approx([1, 1, 1.5, 1, 1 / 1.1, 1, 1])
    for row, tokens in ((1, 80), (2, 0), (3, 0), (4, 150)):
        inner = weights[row, :, 1:-1].flatten()
        assert inner.tolist() == [2.0] * tokens + [1.0] * (150 - tokens)
        assert weights[row, :, [0, -1]].eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [75, 150])
def test_hidden_states_are_multiplied(tiny_sd1_file: Path, dtype: torch.dtype, length: int) -> None:
    """Hidden states are those of the caption without brackets times the weights, rounded once; no mean is restored."""
    encoder = stable_diffusion(tiny_sd1_file, dtype, max_token_length=length).text_encoder
    weighted = encoder.encode(encoder.tokenize(["a (cat:1.5), [dog]"], weighted=True))["hidden_states"]
    plain = encoder.encode(encoder.tokenize(["a cat, dog"]))["hidden_states"]
    factors = torch.ones(1, length + 2, 1, dtype=torch.float64)
    factors[0, 2], factors[0, 4] = 1.5, 1 / 1.1
    assert torch.equal(weighted, (plain * factors.float()).to(dtype))
    torch.testing.assert_close(weighted.double(), plain.double() * factors, rtol=torch.finfo(dtype).eps, atol=0)


def test_captions_that_are_not_weighted_carry_no_weights(tiny_sd1_file: Path) -> None:
    """Without the option there is one tensor, in which brackets are tokens."""
    encoder = stable_diffusion(tiny_sd1_file).text_encoder
    tokens = encoder.tokenize(["a (cat)"])
    assert tokens.keys() == {"ids"}
    assert torch.equal(tokens["ids"], CaptionTokenizer()(["a (cat)"]))
    assert not torch.equal(tokens["ids"], encoder.tokenize(["a (cat)"], weighted=True)["ids"])


def test_the_grammar_needs_no_torch() -> None:
    """Captions can be looked into before anything heavy is imported."""
    program = "import sys, lorakit.models.prompt_weights; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_lengths_of_captions(weighted: bool) -> None:
    """They are the numbers of tokens up to the first that ends the caption, whatever spaces and brackets there are."""
    captions = ["", "a cat", "1girl,  (red:1.3)hair\u3000x\ty", "été ~~ isn't [it](so) 2024", "(a (b c):2) d\n e"]
    tokenizer = CaptionTokenizer()
    ids = tokenizer.weighted(captions)[0] if weighted else tokenizer(captions)
    ends = [row.tolist().index(tokenizer.end) - 1 for row in ids.flatten(1)]
    assert tokenizer.lengths(captions, weighted) == ends
