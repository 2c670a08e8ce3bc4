"""What LAVIS or transformers get wrong with BLIP, and ours does not: one test a trap of the family's sheet.

Head counts, epsilons and smoothing (trap 3) are held in test_blip.py, as are the beam rules (trap 2).
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blip_fixture import (
    CONFIG,
    MAX_TXT_LEN,
    TYPES,
    checkpoint,
    expected,
    facts,
    load,
    model,
    pictures,
    prompts,
    tokenizer,
)
from tolerance import BLIP_PADDED
from transformers import BlipForQuestionAnswering

from lavish.common.errors import CheckpointError, MissingKeys, ShapeMismatch
from lavish.models import load_model
from lavish.models.blip.beam_search import generate
from lavish.models.blip.model import answer_losses
from lavish.processors.blip_processors import BlipImageEvalProcessor


def vqa_samples() -> dict[str, Any]:
    given = prompts("blip_vqa")
    texts = facts("blip_vqa")["questions_processed"]
    images = model("blip_vqa").processor.pixels(pictures("blip_vqa"))
    return (
        {"image": images, "text_input": texts}
        | {key: given[key] for key in ("n_answers", "weight")}
        | {"answer": given["answers"]}
    )


def caption_samples() -> dict[str, Any]:
    return {"image": model("blip_caption").processor.pixels(pictures("blip_caption"))}


def answer_logits(network: Any, padding: int) -> torch.Tensor:
    """Give the logits of the fixture's answers, the questions padded by some ids."""
    stage = expected("blip_vqa")
    counts = torch.tensor(prompts("blip_vqa")["n_answers"])
    input_ids = F.pad(stage["question_input_ids"], (0, padding), value=network.config.text_config.pad_token_id)
    mask = F.pad(stage["question_attention_mask"], (0, padding))
    answers, answers_mask = model("blip_vqa").processor.answers(prompts("blip_vqa")["answers"])
    with torch.no_grad():
        images = network.vision_model(expected("blip_vqa")["pixel_values"]).last_hidden_state
        states = network.text_encoder(input_ids, attention_mask=mask, encoder_hidden_states=images).last_hidden_state
        repeated = states.repeat_interleave(counts, 0), mask.repeat_interleave(counts, 0)
        return answer_losses(network.text_decoder, answers, answers_mask, *repeated)[1]


def test_1_a_padded_question_gives_the_same_answers() -> None:
    network = model("blip_vqa").network
    torch.testing.assert_close(
        answer_logits(network, 4), expected("blip_vqa")["answer_logits"], rtol=0, atol=BLIP_PADDED
    )


def test_1_without_our_layer_it_does_not() -> None:
    """When this fails, transformers hands the mask on itself, and `CrossAttention` can go."""
    native = BlipForQuestionAnswering(model("blip_vqa").network.config).eval()
    native.load_state_dict(model("blip_vqa").network.state_dict())
    assert (answer_logits(native, 4) - expected("blip_vqa")["answer_logits"]).abs().max() > 1.0


@pytest.mark.parametrize(
    "options", [{"inference_method": "generate"}, {"answer_list": prompts("blip_vqa")["answer_list"]}]
)
def test_1_a_batch_of_unequal_questions_equals_single_runs(options: dict[str, Any]) -> None:
    vqa, images = model("blip_vqa"), vqa_samples()["image"]
    questions = ["cat?", "how many red birds are sitting on the old table?"]
    together = vqa.predict_answers({"image": images, "text_input": questions}, **options)
    alone = [
        vqa.predict_answers({"image": image[None], "text_input": question}, **options)[0]
        for image, question in zip(images, questions, strict=True)
    ]
    assert together == alone


def test_1_the_release_attends_padding_when_it_writes() -> None:
    vqa = model("blip_vqa")
    given = {**vqa_samples(), "text_input": ["cat?", "how many red birds are sitting on the old table?"]}
    _, states, mask = vqa._read(given)
    assert not bool(mask.all())
    rules = vqa._rules(max_length=10, min_length=1, num_beams=3)
    start = torch.full((2, 1), vqa.processor.special_ids.bos_token_id)
    wanted = vqa.processor.decode(generate(vqa.network.text_decoder, start, states, torch.ones_like(mask), rules))
    assert vqa.predict_answers(given, inference_method="generate", compat="lavis") == wanted
    shifted = vqa.first_token_logits(states, torch.ones_like(mask)) - vqa.first_token_logits(states, mask)
    assert shifted[0].abs().max() > 0.01
    assert shifted[1].abs().max() < BLIP_PADDED


def test_1_generate_of_transformers_too() -> None:
    network, stage = model("blip_vqa").network, expected("blip_vqa")
    pixels = stage["pixel_values"]
    ids, mask = stage["question_input_ids"], stage["question_attention_mask"]
    options = {"num_beams": 1, "do_sample": False, "max_length": 10}
    plain = network.generate(ids, pixels, attention_mask=mask, **options)
    padded = network.generate(F.pad(ids, (0, 4)), pixels, attention_mask=F.pad(mask, (0, 4)), **options)
    assert torch.equal(plain, padded)
    assert torch.equal(plain, stage["generate_beam1_ids"])


def test_4_the_callers_ids_stay() -> None:
    network = model("blip_caption").network
    pixels = expected("blip_caption")["pixel_values"]
    input_ids, _ = model("blip_caption").processor.encode(["a picture of"] * 2)  # [CLS] first
    before = input_ids.clone()
    options = {"num_beams": 1, "do_sample": False, "max_length": 12}
    first = network.generate(pixels, input_ids=input_ids, **options)
    assert torch.equal(input_ids, before)
    assert torch.equal(first, network.generate(pixels, input_ids=input_ids, **options))


@pytest.mark.parametrize("num_beams", [1, 2, 3, 4, 7])
def test_5_any_number_of_beams_on_two_images(num_beams: int) -> None:
    assert len(model("blip_caption").generate(caption_samples(), num_beams=num_beams)) == 2
    answers = model("blip_vqa").predict_answers(vqa_samples(), num_beams=num_beams, inference_method="generate")
    assert len(answers) == 2


def test_6_what_a_captioning_evaluation_passes() -> None:
    """LAVIS's task gives `length_penalty` and `temperature`, which its own model does not take."""
    caption, given = model("blip_caption"), caption_samples()
    options = {"num_beams": 3, "max_length": 20, "min_length": 1, "repetition_penalty": 1.0}
    neutral = caption.generate(given, **options, length_penalty=1.0, temperature=1.0, top_p=0.9)
    assert neutral == caption.generate(given, **options)
    long = caption.generate(given, **options, length_penalty=3.0)
    assert len(long[1]) > len(neutral[1])


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_7_weights_of_answers_as_a_collater_gives_them(kind: Any) -> None:
    given = vqa_samples()
    given |= {"weight": kind(given["weight"]), "n_answers": kind(given["n_answers"])}
    loss = load("blip_vqa")(given).loss
    loss.backward()
    assert torch.equal(loss.detach(), model("blip_vqa")(given).loss.detach())


def broken(name: str, tmp_path: Any, change: Any) -> dict[str, Any]:
    content = torch.load(checkpoint(name), weights_only=True)
    change(content["model"])
    torch.save(content, tmp_path / "broken.pth")
    text = {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    config = {**CONFIG, "text_config": text}
    return {"checkpoint": tmp_path / "broken.pth", "config": config, "tokenizer": tokenizer(name)}


@pytest.mark.parametrize("name", TYPES)
def test_8_one_wrong_shape_is_told(name: str, tmp_path: Any) -> None:
    key = "visual_encoder.blocks.1.mlp.fc2.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key][:, :-1].clone()

    with pytest.raises(ShapeMismatch, match=rf"'{key}': \(32, 127\) in broken.pth, \(32, 128\)"):
        load_model(name, TYPES[name], **broken(name, tmp_path, change))


def test_8_one_absent_tensor_is_told(tmp_path: Any) -> None:
    key = "text_encoder.encoder.layer.0.output.dense.weight"
    options = broken("blip_vqa", tmp_path, lambda tensors: tensors.pop(key))
    with pytest.raises(MissingKeys, match=rf"1 of 149 tensors .* absent, first '{key}'"):
        load_model("blip_vqa", "vqav2", **options)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("image_size", [32, 96])
def test_9_another_picture_size(name: str, image_size: int) -> None:
    """Positions are resized, bicubic, class row kept; the release does so for pretrained files only."""
    loaded = load(name, config={"vision_config": {**CONFIG["vision_config"], "image_size": image_size}})
    table = model(name).network.vision_model.embeddings.position_embedding.detach()
    grid, side = table[0, 1:].view(4, 4, 32), image_size // 16
    wanted = F.interpolate(grid.permute(2, 0, 1)[None], (side, side), mode="bicubic", align_corners=False)
    found = loaded.network.vision_model.embeddings.position_embedding.detach()
    assert torch.equal(found[:, 0], table[:, 0])
    torch.testing.assert_close(found[0, 1:].T.view(1, 32, side, side), wanted)
    assert loaded.image_size == loaded.network.config.vision_config.image_size == image_size
    images = torch.stack([BlipImageEvalProcessor(image_size)(picture) for picture in pictures(name)])
    assert loaded.image_states({"image": images}).shape == (2, side**2 + 1, 32)


@pytest.mark.parametrize("mode", ["text", "multimodal"])
def test_10_a_text_longer_than_the_positions(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    extractor = model("blip_feature_extractor")
    pixels = extractor.processor.pixels(pictures("blip_feature_extractor"))
    features = extractor.extract_features({"image": pixels, "text_input": ["cat " * 600, "a dog"]}, mode=mode)
    assert features[f"{mode}_embeds"].shape == (2, 64, 32)
    assert "fills all 64 positions" in caplog.text


def test_11_the_callers_repetition_penalty_counts_in_sampling() -> None:
    def drawn(**options: Any) -> list[str]:
        generator = torch.Generator().manual_seed(3)
        return model("blip_caption").generate(
            caption_samples(), use_nucleus_sampling=True, generator=generator, max_length=30, **options
        )

    assert drawn(repetition_penalty=1.0) != drawn(repetition_penalty=8.0)
    assert drawn() == drawn(repetition_penalty=1.1), "LAVIS's number where the caller says nothing"


def test_captions_to_learn_are_cut_and_questions_too() -> None:
    processor = model("blip_caption").processor
    input_ids, _ = processor.captions(["cat " * 50])
    assert input_ids.shape == (1, MAX_TXT_LEN["blip_caption"])
    assert int(input_ids[0, -1]) == processor.tokenizer.sep_token_id
    assert processor.answers(["cat " * 50])[0].shape == (1, 52), "answers are never cut"


def test_a_damaged_tokenizer(tmp_path: Any) -> None:
    (tmp_path / "vocab.txt").write_text("cat\ndog\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"2 entries without \[PAD\], \[UNK\], \[CLS\], \[SEP\], \[MASK\]"):
        load("blip_caption", tokenizer=tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer; looked for tokenizer\.json and vocab\.txt"):
        load("blip_caption", tokenizer=checkpoint("blip_caption").parent)
