"""Vision-language models, tiny ones with random weights: one that answers in a chat, one that continues a caption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch
from lorakit_vlm.component import VLMConfig
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lorakit.api import ModelError
from lorakit.testing.contracts import CaptionerContract

WORDS = ["a", "photo", "of", "cat", "dog", "red", "blue", "on", "the", "grass", "describe", "this", ".", "user", ":"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
CHAT = (
    "{% for message in messages %}user : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
SIDE, PATCH = 16, 8


def make_llava(folder: Path) -> Path:
    """A LLaVA with a chat template and a vocabulary of a few words."""
    torch.manual_seed(0)
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", chat_template=CHAT,
        num_additional_image_tokens=1,
    )  # fmt: skip
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH, projection_dim=32),
        text_config=LlamaConfig(**sizes, vocab_size=len(vocabulary), num_key_value_heads=2, pad_token_id=0),
        image_token_index=vocabulary["<image>"],
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # as weights begin they are too small to tell one question from another
            torch.nn.init.normal_(parameter, std=0.5)
    model.generation_config.suppress_tokens = list(range(len(SPECIAL)))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_blip(folder: Path) -> Path:
    """A BLIP, which has no chat template."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words))
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = BertTokenizerFast(vocab=vocabulary, additional_special_tokens=["[DEC]"])
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "encoder_hidden_size": 32, "bos_token_id": 5, "pad_token_id": 0}
    config = BlipConfig(
        text_config={**text, "eos_token_id": 3, "sep_token_id": 3, "max_position_embeddings": 64},
        vision_config={**sizes, "image_size": SIDE, "patch_size": PATCH},
        projection_dim=32,
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaVA."""
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BLIP."""
    return make_blip(tmp_path_factory.mktemp("blip"))


class TestLlava(CaptionerContract):
    """A model that is asked in a chat."""

    config = VLMConfig(model="llava", prompt="describe this .", max_new_tokens=4)

    @pytest.fixture(autouse=True)
    def _with_a_model(self, _in_a_folder_of_its_own: None, llava: Path) -> None:
        self.config = attrs.evolve(self.config, model=str(llava))


def caption(model: Path, **options: object) -> list[str]:
    """The captions of two images."""
    images = [Image.new("RGB", (20, 30), "red"), Image.new("RGB", (40, 20), "blue")]
    config = VLMConfig(model=str(model), **options)  # type: ignore[arg-type]
    assert list(config.problems()) == []
    return config.build("cpu").caption(images)


def test_answers_without_the_question(llava: Path) -> None:
    """An answer is as many words as may be generated, and the question is not among them."""
    answers = caption(llava, prompt="describe this photo .", max_new_tokens=5)
    assert [len(answer.split()) for answer in answers] == [5, 5]
    assert all(set(answer.split()) <= set(WORDS) for answer in answers)
    assert len(caption(llava, prompt="describe this photo .", max_new_tokens=2)[0].split()) == 2


def test_the_prompt_counts(llava: Path) -> None:
    """Another question has other answers."""
    answers = {tuple(caption(llava, prompt=prompt, max_new_tokens=8)) for prompt in ("describe this .", "dog", "grass")}
    assert len(answers) > 1


def test_a_model_without_a_chat(blip: Path) -> None:
    """What it is given is how captions begin; it may be nothing."""
    begun = caption(blip, prompt="a photo of", max_new_tokens=3)
    assert all(text.startswith("a photo of") for text in begun)
    assert len(caption(blip, prompt="", max_new_tokens=3)) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_data_types(llava: Path, dtype: str) -> None:
    """Weights and images are of one data type."""
    assert len(caption(llava, dtype=dtype, prompt="dog", max_new_tokens=2)) == 2


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    """A missing folder and one without a model are named, with what to give."""
    (missing,) = VLMConfig(model=str(tmp_path / "none")).problems()
    assert str(missing).startswith(f"model: {tmp_path / 'none'} does not exist (give a folder that transformers saved")
    (empty,) = VLMConfig(model=str(tmp_path)).problems()
    assert empty.message == f"{tmp_path} has no config.json"
    assert not list(VLMConfig(model="someone/some-model").problems())


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _of_another_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))


@pytest.mark.parametrize("spoil", [_without_weights, _of_another_kind])
def test_models_that_cannot_be_read(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """A folder without weights and a model of another kind end in one message that names the folder."""
    folder = make_llava(tmp_path / "model")
    spoil(folder)
    with pytest.raises(ModelError, match="model cannot be read as a vision-language model"):
        VLMConfig(model=str(folder)).build("cpu")


def test_devices(llava: Path) -> None:
    """A device that is not there is named."""
    with pytest.raises(ModelError, match="device 'none' cannot be used"):
        VLMConfig(model=str(llava)).build("none")
