"""The processors `gpt_video_ft` and `gpt_dialogue` by themselves; their golden samples are in test_gpt_dialogue.py."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lavish.common.errors import CheckpointError, ConfigError, DataError
from lavish.common.registry import registry
from lavish.processors.gpt_processors import load_dialogue_tokenizer

OPEN = Path(__file__).parents[1] / "fixtures/gpt_dialogue/open"
GPT2, FEATURES = OPEN / "checkpoint/gpt2", OPEN / "inputs/features"
TURN = {"question": "is there any sound?", "answer": "yes"}


def video(**settings):
    made = registry.get_processor_class("gpt_video_ft")
    return made.from_config({"name": "gpt_video_ft", "tokenizer": str(GPT2), **settings})


def dialogue(**settings):
    return registry.get_processor_class("gpt_dialogue").from_config({"tokenizer": str(GPT2), **settings})


def text(sample) -> str:
    return load_dialogue_tokenizer(GPT2).decode(sample["input_ids"])


def types(sample) -> list[str]:
    names = load_dialogue_tokenizer(GPT2).convert_ids_to_tokens(sample["token_type_ids"].tolist())
    return [name for at, name in enumerate(names) if at == 0 or names[at - 1] != name]


def test_features_are_joined_in_order_and_cut_to_the_shortest():
    sample = video(visual_ft=["i3d_flow", "i3d_rgb"], audio_ft=["vggish"])(FEATURES, "VID_A")
    arrays = [np.load(FEATURES / name / "VID_A.npy") for name in ("i3d_flow", "i3d_rgb", "vggish")]
    frames = min(len(array) for array in arrays)
    assert len({len(array) for array in arrays}) > 1
    assert torch.equal(sample["video_fts"], torch.from_numpy(np.concatenate([a[:frames] for a in arrays], axis=1)))
    assert sample["token_type_ids"].tolist() == [345] * frames


def test_defaults_are_the_releases():
    made = video()
    assert (made.visual_ft, made.audio_ft) == (("i3d_rgb",), ("vggish",))
    assert (dialogue().max_turns, dialogue().use_caption) == (3, True)
    assert video(audio_ft=[])(FEATURES, "VID_B")["video_fts"].shape[1] == 6


def test_segments_speakers_and_labels():
    sample = dialogue()({"caption": "a man", "summary": "he sits", "dialog": [TURN] * 2, **TURN})
    assert text(sample) == "a man he sits<eos>" + "is there any sound?<eos>yes<eos>" * 3
    assert types(sample) == ["<cap>", *["<speaker1>", "<speaker2>"] * 3]
    learned = sample["labels"] >= 0
    assert load_dialogue_tokenizer(GPT2).decode(sample["labels"][learned]) == "yes<eos>"
    assert torch.equal(sample["labels"][learned], sample["input_ids"][-int(learned.sum()) :])


@pytest.mark.parametrize(("max_turns", "kept"), [(0, 0), (1, 1), (3, 3), (9, 4)])
def test_the_latest_turns_are_kept(max_turns, kept):
    history = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(4)]
    found = text(dialogue(max_turns=max_turns)({"dialog": history, **TURN}))
    wanted = "".join(f"q{i}<eos>a{i}<eos>" for i in range(4 - kept, 4))
    assert found == f"<eos>{wanted}is there any sound?<eos>yes<eos>"


def test_no_caption_is_only_its_end():
    sample = dialogue(use_caption=False)({"caption": "a man", "summary": "he sits", **TURN})
    assert text(sample).startswith("<eos>is there")
    assert types(sample)[0] == "<cap>"


def test_padding_and_masks_go_by_length():
    """The release pads with the default where -1 is asked, and reads masks off the values."""
    rows = [torch.tensor([5, 6, 7]), torch.tensor([347])]
    assert dialogue().padding(rows).tolist() == [[5, 6, 7], [347, 347, 347]]
    assert dialogue().padding(rows, -1).tolist() == [[5, 6, 7], [347, -1, -1]]
    assert dialogue().get_attention_mask(rows).tolist() == [[1, 1, 1], [1, 0, 0]]
    frames = [torch.zeros(2, 3), torch.ones(1, 3)]
    assert video().padding(frames)[1].tolist() == [[1.0] * 3] * 2
    assert video().get_attention_mask(frames).tolist() == [[1, 1], [1, 0]]


def test_masks_of_padded_batches_as_the_tutorial_asks_for_them():
    rows, frames = [torch.tensor([5, 6, 7]), torch.tensor([4])], [torch.zeros(2, 3), torch.zeros(1, 3)]
    assert dialogue().get_attention_mask(dialogue().padding(rows)).tolist() == [[1, 1, 1], [1, 0, 0]]
    assert video().get_attention_mask(video().padding(frames)).tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 6), np.float32), "no frames"),
        (np.zeros(6, np.float32), r"\(6,\); features are floating-point"),
        (np.zeros((2, 6), np.int64), "int64"),
        (np.full((2, 6), np.nan, np.float32), "NaN"),
        (np.array([[{}]], dtype=object), "no array of numbers"),
    ],
)
def test_wrong_feature_files(array, message, tmp_path):
    (tmp_path / "i3d_rgb").mkdir()
    np.save(tmp_path / "i3d_rgb/VID.npy", array)
    with pytest.raises(DataError, match=message):
        video(audio_ft=[])(tmp_path, "VID")


def test_absent_or_outlying_features(tmp_path):
    with pytest.raises(DataError, match=r"i3d_rgb/VID_C\.npy: no such features"):
        video()(FEATURES, "VID_C")
    with pytest.raises(DataError, match="no plain file name"):
        video()(FEATURES, "../i3d_flow/VID_A")
    (tmp_path / "i3d_rgb").mkdir()
    (tmp_path / "i3d_rgb/VID.npy").write_bytes(b"\x93NUMPY cut")
    with pytest.raises(DataError, match="no array of numbers"):
        video(audio_ft=[])(tmp_path, "VID")


@pytest.mark.parametrize(
    ("ann", "message"),
    [
        ({"answer": "x"}, "question is None"),
        ({"question": "x", "dialog": [{"question": "y"}]}, "answer is None"),
        ({"question": "x", "dialog": ["y"]}, "question is None"),
        ({"question": "x", "answer": 3}, "answer is 3"),
        ({"question": "x", "caption": ["y"]}, "caption is"),
    ],
)
def test_wrong_dialogues(ann, message):
    with pytest.raises(DataError, match=message):
        dialogue()(ann)


def test_wrong_settings():
    with pytest.raises(ConfigError, match="Did you mean 'max_turns'"):
        dialogue(max_turn=2)
    with pytest.raises(ConfigError, match="max_turns is -1"):
        dialogue(max_turns=-1)
    with pytest.raises(ConfigError, match="a list of folder names"):
        video(visual_ft="i3d_rgb")
    with pytest.raises(ConfigError, match="both empty"):
        video(visual_ft=[], audio_ft=[])


def test_the_hubs_tokenizer_is_fetched_on_first_use(monkeypatch):
    """As in LAVIS's recipes, which name none; a config is checked without it."""
    asked = []

    def snapshot_download(repo_id, **options):
        asked.append(repo_id)
        raise OSError("the line is dead")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    made = registry.get_processor_class("gpt_dialogue").from_config({})
    assert asked == []
    with pytest.raises(CheckpointError, match=r"openai-community/gpt2: .*the line is dead.*Give the path"):
        made({"question": "x"})
    assert asked == ["openai-community/gpt2"]


def test_wrong_tokenizer_files(tmp_path):
    with pytest.raises(CheckpointError):
        load_dialogue_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    with pytest.raises(CheckpointError, match=r"merges\.txt: cannot be read"):
        load_dialogue_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nb b\n")
    with pytest.raises(CheckpointError, match="'b b' is no merge"):
        load_dialogue_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("a b\n")
    assert len(load_dialogue_tokenizer(tmp_path)) == 10
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 3}')
    with pytest.raises(CheckpointError, match="ids are not 0 to 2"):
        load_dialogue_tokenizer(tmp_path)
