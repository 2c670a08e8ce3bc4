"""Pieces that are absent, doubled, of another family or of another format: the class of the error, and its words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_families import FIXTURES, MINIGPT4, TINY, load_tiny

import lavish
from lavish.common.errors import CheckpointError, ConfigError, LavishError, MediaError, PromptError
from lavish.common.video import read_frames

# peft 0.21 asks transformers 5.23 under the attribute's old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
CLIP_QWEN = FIXTURES / "clip_qwen/open/checkpoint"
GLM_ADAPTER = FIXTURES / "glm4v/open/adapter"
PICTURE = Image.new("RGB", (32, 24), "red")


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target / source.name))


def adapter_without_base(tmp_path: Path) -> None:
    folder = copy(GLM_ADAPTER, tmp_path)
    config = folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "base_model_name_or_path": "../nowhere"}))
    lavish.load(folder, device="cpu")


def adapter_that_names_no_base(tmp_path: Path) -> None:
    folder = copy(GLM_ADAPTER, tmp_path)
    config = folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "base_model_name_or_path": None}))
    lavish.load(folder, device="cpu")


def adapter_of_another_family(tmp_path: Path) -> None:
    lavish.load(TINY["cogvlm"].folder, adapter=GLM_ADAPTER, device="cpu")


def adapter_for_what_holds_no_conversation(tmp_path: Path) -> None:
    lavish.load(FIXTURES / "blip_caption/open/checkpoint", adapter=GLM_ADAPTER, device="cpu")


def projector_absent(tmp_path: Path) -> None:
    folder = copy(CLIP_QWEN, tmp_path)
    (folder / "checkpoint-27000/other_params.bin").unlink()
    lavish.load(
        folder / "checkpoint-27000",
        llm=folder / "Qwen-7B-Chat",
        vision_tower=folder / "clip-vit-large-patch14",
        device="cpu",
    )


def trained_piece_absent(tmp_path: Path) -> None:
    folder = copy(FIXTURES / "minigpt4qwen/open/checkpoint", tmp_path)
    (folder / "checkpoint_9.pth").unlink()
    lavish.load(folder, device="cpu", **MINIGPT4)


def llm_absent(tmp_path: Path) -> None:
    lavish.load(FIXTURES / "minigpt4qwen/open/checkpoint", config=MINIGPT4["config"], device="cpu")


def piece_given_twice(tmp_path: Path) -> None:
    folder = FIXTURES / "minigpt4qwen/open/checkpoint"
    lavish.load(folder, eva=folder / "eva/eva_vit_g.pth", device="cpu", **MINIGPT4)


def piece_there_twice(tmp_path: Path) -> None:
    folder = copy(CLIP_QWEN, tmp_path)
    copy(CLIP_QWEN / "Qwen-7B-Chat", tmp_path / "other")
    shutil.move(tmp_path / "other/Qwen-7B-Chat", folder / "Qwen-14B-Chat")
    lavish.load(folder, device="cpu")


def piece_of_a_whole_folder(tmp_path: Path) -> None:
    lavish.load(TINY["glm4v_9b"].folder, llm=FIXTURES / "qwen/llm", device="cpu")


def tokenizer_of_no_rank_file(tmp_path: Path) -> None:
    folder = copy(TINY["glm4v_9b"].folder, tmp_path)
    shutil.copy(FIXTURES / "cogvlm/open/checkpoint/tokenizer.model", folder / "tokenizer.model")
    lavish.load(folder, device="cpu")


def tokenizer_of_no_qwen(tmp_path: Path) -> None:
    folder = copy(FIXTURES / "qwen/llm", tmp_path)
    shutil.copy(FIXTURES / "cogvlm/open/checkpoint/tokenizer.model", folder / "qwen.tiktoken")
    lavish.load(FIXTURES / "minigpt4qwen/open/checkpoint", device="cpu", **{**MINIGPT4, "llm": folder})


def tokenizer_of_no_sentencepiece(tmp_path: Path) -> None:
    folder = copy(FIXTURES / "cogvlm/open/checkpoint", tmp_path)
    shutil.copy(FIXTURES / "qwen/llm/qwen.tiktoken", folder / "tokenizer.model")
    lavish.load(folder, device="cpu")


def tokenizer_of_no_bert(tmp_path: Path) -> None:
    folder = copy(FIXTURES / "blip_caption/open/checkpoint", tmp_path)
    shutil.copy(FIXTURES / "qwen/llm/qwen.tiktoken", folder / "bert-base-uncased/vocab.txt")
    lavish.load(folder, config={"vision_config": {"num_attention_heads": 4}}, device="cpu")


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (adapter_without_base, ConfigError, r"'\.\./nowhere' is not on this machine.*base="),
        (adapter_that_names_no_base, ConfigError, r"names no base .*base="),
        (adapter_of_another_family, CheckpointError, r"of another family or size"),
        (adapter_for_what_holds_no_conversation, ConfigError, r"family 'blip', which takes no adapter="),
        (projector_absent, ConfigError, r"no other_params\.bin \(the projector\)"),
        (trained_piece_absent, ConfigError, r"the piece that was trained is absent"),
        (llm_absent, ConfigError, r"the piece 'llm' is absent.*llm="),
        (piece_given_twice, ConfigError, r"eva=.* was given, and .* holds that piece too"),
        (piece_there_twice, ConfigError, r"'llm' twice.*llm="),
        (piece_of_a_whole_folder, ConfigError, r"'llm'.* is one network without pieces"),
        (tokenizer_of_no_rank_file, CheckpointError, r"tokenizer\.model is no rank file"),
        (tokenizer_of_no_qwen, CheckpointError, r"qwen\.tiktoken is no rank file"),
        (tokenizer_of_no_sentencepiece, LavishError, r"tokenizer belongs to another model.*tokenizer="),
        (tokenizer_of_no_bert, CheckpointError, r"vocab\.txt: .* BLIP needs the vocabulary"),
    ],
)
def test_releases_that_are_refused(
    make: Callable[[Path], None], kind: type[LavishError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=words) as error:
        make(tmp_path)
    assert isinstance(error.value, CheckpointError | ConfigError)


MISSING = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
EMPTY = [{"role": "user", "content": [{"type": "image", "image": None}, {"type": "text", "text": "What?"}]}]


@pytest.fixture(scope="module")
def loaded() -> Callable[[str], "lavish.VLM"]:
    kept: dict[str, Any] = {}
    return lambda name: kept.setdefault(name, None) or kept.__setitem__(name, load_tiny(name)) or kept[name]


@pytest.mark.parametrize("messages", [MISSING, EMPTY], ids=["absent", "none"])
@pytest.mark.parametrize("name", TINY)
def test_a_place_without_its_image(loaded: Any, name: str, messages: list) -> None:
    with pytest.raises((PromptError, MediaError), match="image"):
        loaded(name).chat(messages, max_new_tokens=2)


@pytest.mark.parametrize("name", ["glm4v_9b", "minigpt4_qwen", "clip_qwen"])
def test_slots_and_images_that_do_not_agree(loaded: Any, name: str) -> None:
    vlm = loaded(name)
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What?"}]
    with_image = vlm.processor.apply_chat_template([{"role": "user", "content": content}])
    without = vlm.processor.apply_chat_template([{"role": "user", "content": "What?"}])
    pixels = with_image["pixel_values"]
    for inputs in (
        {"input_ids": without["input_ids"], "pixel_values": pixels},  # an image without its place
        {"input_ids": with_image["input_ids"]},  # a place without its image
        {"input_ids": with_image["input_ids"], "pixel_values": torch.cat([pixels, pixels])},
    ):
        with torch.no_grad(), pytest.raises((PromptError, ConfigError), match="image"):
            vlm.model(**inputs)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "video"), (b"no video at all" * 50, "video"), ([], "holds no frames")],
)
def test_a_video_without_frames(content: Any, words: str) -> None:
    pytest.importorskip("av")
    with pytest.raises(MediaError, match=words):
        read_frames(content, 4)


@pytest.mark.parametrize("name", ["glm4v_9b", "clip_qwen"])
def test_a_video_for_a_model_that_sees_none(loaded: Any, name: str) -> None:
    content = [{"type": "video", "video": [PICTURE]}, {"type": "text", "text": "What?"}]
    with pytest.raises(PromptError, match="video"):
        loaded(name).chat([{"role": "user", "content": content}], max_new_tokens=2)


def test_features_of_another_width() -> None:
    vlm = lavish.load(FIXTURES / "gpt_dialogue/open/checkpoint", device="cpu")
    width = vlm.model.config.len_video_ft
    with pytest.raises(PromptError, match=rf"shape \(3, {width + 1}\) and this network takes \(frames, {width}\)"):
        vlm.answer(torch.zeros(3, width + 1), "what is it?")
    for wrong in (torch.zeros(0, width), torch.zeros(width), PICTURE):
        with pytest.raises(LavishError, match=r"video|feature|frame"):
            vlm.answer(wrong, "what is it?")


def test_a_feature_file_of_another_width(tmp_path: Path) -> None:
    import numpy as np

    vlm = lavish.load(FIXTURES / "gpt_dialogue/open/checkpoint", device="cpu")
    for name in ("i3d_flow", "i3d_rgb", "vggish"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "v1.npy", np.zeros((4, 2), dtype=np.float32))
    dialogue = {"image_id": "v1", "caption": "", "dialog": [], "question": "what?"}
    with pytest.raises(LavishError, match=r"shape \(4, 6\) and this network takes \(frames, 16\)"):
        vlm.samples.answer(dialogue, features=tmp_path)
