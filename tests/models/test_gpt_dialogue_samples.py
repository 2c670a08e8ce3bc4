"""`gpt_dialogue` behind LAVIS's interface: loading by name, the loss of samples, answers."""

import shutil

import pytest
import torch
from gpt_dialogue_fixture import (
    BATCHES,
    FEATURES,
    FILE,
    GPT2,
    batch,
    dialogues,
    expected,
    facts,
    network,
    processor,
    samples,
    turns,
)
from safetensors.torch import save_file
from tolerance import GPT_DIALOGUE_LOSS

from lavish.common.errors import CheckpointError, ConfigError, DataError, MissingKeys, PromptError, ShapeMismatch
from lavish.common.registry import registry
from lavish.models.gpt_dialogue.samples import GPTDialogue
from lavish.models.loading import load_model, load_model_and_preprocess

LENGTH = {"max_length": 12}


@pytest.fixture(scope="module")
def model() -> GPTDialogue:
    return load_model("gpt_dialogue", "base", is_eval=True, checkpoint=FILE)


def shipped(split: str) -> dict[str, torch.Tensor]:
    """The batch of LAVIS's own collater, under its names."""
    names = ("input_ids", "token_type_ids", "labels", "video_fts", "attn_mask")
    return {name: expected()[f"{split}_batch.{name}"] for name in names}


def test_loaded_by_name_with_its_processors():
    made, visual, text = load_model_and_preprocess("gpt_dialogue", "base", is_eval=True, checkpoint=FILE)
    assert not made.training
    assert registry.get_model_class("gpt_dialogue") is GPTDialogue
    video = visual["eval"](FEATURES, "VID_A")
    assert torch.equal(video["video_fts"], samples("eval")[0]["video_fts"])
    assert torch.equal(text["eval"](turns(dialogues()[0])[-1])["labels"], samples("eval")[0]["labels"])
    assert set(visual) == set(text) == {"train", "eval"}


@pytest.mark.parametrize("split", BATCHES)
@torch.no_grad()
def test_the_releases_batches_and_losses(split):
    made = load_model("gpt_dialogue", "base", is_eval=True, checkpoint=FILE, compat="lavis")
    output = made(shipped(split))
    for name in ("lm_loss", "video_loss", "loss"):
        torch.testing.assert_close(output[name], expected()[f"{split}_batch.{name}"][0], **GPT_DIALOGUE_LOSS)


@torch.no_grad()
def test_the_corrected_loss_is_the_default(model):
    assert torch.equal(model(batch("train")).loss, network()(**batch("train")).loss)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_of_a_batch_are_those_of_single_dialogues(model, num_beams):
    every = model.generate(batch("eval"), num_beams=num_beams, **LENGTH)
    singles = [
        model.answer(turns(dialogue)[-1], features=FEATURES, num_beams=num_beams, **LENGTH) for dialogue in dialogues()
    ]
    assert every == singles
    if num_beams == 1:
        assert every == [entry["text"].strip() for entry in facts()["greedy_from_eval_items"]]


def test_answers_do_not_look_at_the_answer(model):
    """A batch with the true answers, and one of questions alone."""
    questions = processor().collate([processor().prompt(sample) for sample in samples("eval")])
    assert model.generate(questions, **LENGTH) == model.generate(batch("eval"), **LENGTH)
    without = {name: tensor for name, tensor in questions.items() if name != "labels"}
    assert model.generate(without, **LENGTH) == model.generate(batch("eval"), **LENGTH)


def test_drawn_answers_follow_the_seed(model):
    answers = []
    for _ in range(2):
        torch.manual_seed(3)
        answers.append(model.generate(batch("eval"), use_nucleus_sampling=True, temperature=2.0, **LENGTH))
    assert answers[0] == answers[1]


def test_saved_and_loaded_again(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = load_model("gpt_dialogue", "base", is_eval=True, checkpoint=tmp_path)
    assert again.generate(batch("eval"), **LENGTH) == model.generate(batch("eval"), **LENGTH)
    assert again.network.config.n_head == 4


def test_a_run_is_resumed_strictly(model, tmp_path):
    made = load_model("gpt_dialogue", "base", checkpoint=FILE)
    assert made.training
    with torch.no_grad():
        made.network.video_ff.bias.zero_()
    made.load_checkpoint(FILE)
    assert torch.equal(made.network.video_ff.bias, network().video_ff.bias)
    assert made.training
    state = {name: tensor.clone() for name, tensor in network().state_dict().items() if name != "video_ff.bias"}
    torch.save({"model": state}, tmp_path / "cut.pth")
    with pytest.raises(MissingKeys, match=r"video_ff\.bias"):
        made.load_checkpoint(tmp_path / "cut.pth")


def test_heads_are_asked_for_where_no_file_tells(tmp_path):
    shutil.copy(FILE, tmp_path / "checkpoint.pth")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GPT2 / name, tmp_path / name)
    with pytest.raises(ConfigError, match=r"32 wide and those of this model type 768.*config=\{'n_head'"):
        load_model("gpt_dialogue", "base", checkpoint=tmp_path / "checkpoint.pth")
    made = load_model("gpt_dialogue", "base", checkpoint=tmp_path, config={"n_head": 4}, is_eval=True)
    assert made.generate(batch("eval"), **LENGTH)[1].startswith("man")
    with pytest.raises(ShapeMismatch):
        load_model("gpt_dialogue", "base", checkpoint=tmp_path, config={"n_head": 4, "len_video_ft": 17})


def test_a_run_starts_from_plain_gpt2(tmp_path):
    """Without a checkpoint: GPT-2's weights, its tokenizer, and fresh video layers."""
    state = {name.removeprefix("transformer."): t for name, t in network().transformer.state_dict().items()}
    state["wte.weight"] = state["wte.weight"][:-7]
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GPT2 / name, tmp_path / name)
    sizes = {"vocab_size": 348, "n_positions": 160, "n_embd": 32, "n_layer": 2, "n_head": 4, "len_video_ft": 16}
    made = load_model("gpt_dialogue", "base", is_eval=True, pretrained=str(tmp_path), config=sizes)
    assert torch.equal(made.network.transformer.wpe.weight, network().transformer.wpe.weight)
    assert made(batch("eval")).loss.isfinite()
    drawn = load_model("gpt_dialogue", "base", load_pretrained=False, tokenizer=GPT2, config=sizes)
    assert not torch.equal(drawn.network.transformer.wpe.weight, network().transformer.wpe.weight)


def test_bad_input(model, tmp_path):
    rows = dict(batch("eval"))
    with pytest.raises(DataError, match="no tensor 'video_fts'; they have input_ids"):
        model.generate({name: rows[name] for name in rows if name != "video_fts"})
    with pytest.raises(DataError, match="no tensor 'labels'"):
        model({name: rows[name] for name in rows if name != "labels"})
    with pytest.raises(PromptError, match=r"takes \(frames, 16\)"):
        model.answer({"question": "who?"}, torch.ones(3, 15))
    with pytest.raises(PromptError, match="150 of the answer"):
        model.answer(turns(dialogues()[0])[-1], features=FEATURES, max_length=150)
    assert model.answer(turns(dialogues()[0])[-1], features=FEATURES, max_length=100, too_long="cut")
    with pytest.raises(ConfigError, match="Did you mean 'max_turns'"):
        load_model("gpt_dialogue", "base", checkpoint=FILE, config={"max_turn": 1})
    with pytest.raises(ConfigError, match="compat='mpp'"):
        load_model("gpt_dialogue", "base", checkpoint=FILE, compat="mpp")
    with pytest.raises(ConfigError, match="no model type 'large'"):
        load_model("gpt_dialogue", "large")
    shutil.copy(FILE, tmp_path / "checkpoint.pth")
    (tmp_path / "vocab.json").write_text("no json")
    with pytest.raises(CheckpointError, match=r"vocab\.json"):
        load_model("gpt_dialogue", "base", checkpoint=tmp_path, config={"n_head": 4})
