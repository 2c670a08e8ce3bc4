"""Scenes as training samples: what stands where in a packed row, and that packing changes nothing for the network."""

import pickle

import numpy as np
import pytest
import tolerance
import torch

from lavish.datasets.scenes.dataset import (
    DENSE_LABELS,
    IGNORED,
    SceneDataset,
    Segment,
    encode,
    packed_attention_mask,
)
from lavish.datasets.scenes.phrases import NO_PICTURE
from lavish.datasets.scenes.questions import Question, ask
from lavish.datasets.scenes.tokenizer import build_tokenizer, save_tokenizer
from lavish.datasets.scenes.world import sample_scene
from lavish.models.cogvlm.config import CogVLMConfig
from lavish.models.cogvlm.model import CogVLMForCausalLM, ExpertRouting
from lavish.models.cogvlm.processor import CogVLMProcessor
from lavish.processors.tokenizers import load_tokenizer

BOS, EOS, PAD = 0, 1, 2
NUM_IMAGE_TOKENS = 6  # boi, 2 x 2 merged patches, eoi
PREFIX = 1 + NUM_IMAGE_TOKENS


def dataset(**changes) -> SceneDataset:
    settings = {
        "num_samples": 8,
        "seed": 4,
        "image_size": 16,
        "grid": 4,
        "num_image_tokens": NUM_IMAGE_TOKENS,
        "num_conversations": 6,
        "max_text_tokens": 160,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    return SceneDataset(**{**settings, **changes})


def network() -> CogVLMForCausalLM:
    """A tiny CogVLM2 whose matrices are large enough that a wrong mask or position shows."""
    vision = {
        "image_size": 16,
        "patch_size": 4,
        "num_positions": 17,
        "hidden_size": 32,
        "num_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
    }
    config = CogVLMConfig(
        vocab_size=build_tokenizer().get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_multi_query_heads=2,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        vision_config=vision,
    )
    model = CogVLMForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.copy_(spread * 0.3 + ("bias" not in name))
            else:
                parameter.copy_(spread * (1.0 if "embed" in name else parameter[0].numel() ** -0.5))
    return model.eval()


@torch.no_grad()
def packed_logits(model: CogVLMForCausalLM, packed: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    hidden_states = model.model(
        inputs_embeds=model.model.embed(packed["input_ids"], packed["token_type_ids"], features),
        position_ids=packed["position_ids"],
        attention_mask=packed_attention_mask(packed["segment_ids"], packed["sees_image"]),
        routing=ExpertRouting.from_token_type_ids(packed["token_type_ids"]),
    )
    return model.lm_head(hidden_states)


@torch.no_grad()
def alone_logits(model: CogVLMForCausalLM, segment: Segment, pixel_values: torch.Tensor) -> torch.Tensor:
    """The public forward of one conversation, from its own ids."""
    num_slots = NUM_IMAGE_TOKENS if segment.sees_image else 0
    input_ids = torch.tensor([[BOS, *[PAD] * num_slots, *segment.input_ids]])
    types = torch.tensor([[0, *[1] * num_slots, *[0] * len(segment.input_ids)]])
    images = pixel_values if segment.sees_image else None
    logits = model(input_ids=input_ids, token_type_ids=types, pixel_values=images).logits[0]
    return logits[-len(segment.input_ids) :]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_conversations_get_the_logits_of_single_ones(implementation: str) -> None:
    """The property that packing rests on, with follow-up turns, conversations without the picture, and padding."""
    model = network()
    model.config._attn_implementation = implementation
    data = dataset(follow_up_share=0.4, no_picture_share=0.4)
    rows = [data[index]["segments"] for index in range(3)]
    assert {segment.sees_image for row in rows for segment in row} == {True, False}
    packed = data.pack(rows)
    pixel_values = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        features = model.get_image_features(pixel_values)
    logits = packed_logits(model, packed, features)
    assert (packed["segment_ids"] == -1).any(), "no row is padded: the test needs one that is"
    for row, segments in enumerate(rows):
        for number, segment in enumerate(segments, 1):
            here = logits[row][packed["segment_ids"][row] == number]
            expected = alone_logits(model, segment, pixel_values[row : row + 1])
            tolerance.close(here, expected)
    assert logits.isfinite().all()


def test_a_conversation_sees_neither_its_neighbours_nor_a_picture_that_it_has_not() -> None:
    model = network()
    first, blind = Segment([300, 301, 302], [IGNORED] * 3, True), Segment([303, 304], [IGNORED] * 2, False)
    other = Segment([400, 401, 402], [IGNORED] * 3, True)
    features = torch.randn(2, NUM_IMAGE_TOKENS, 32)
    logits = [
        packed_logits(model, dataset().pack([[start, first, blind]]), image)[0]
        for start in (first, other)
        for image in features[:, None]
    ]
    at = slice(PREFIX + 3, PREFIX + 6)
    torch.testing.assert_close(logits[0][at], logits[2][at])  # whoever stands before it
    assert not torch.allclose(logits[0][at], logits[1][at])  # another picture
    for row in logits[1:]:
        torch.testing.assert_close(row[PREFIX + 6 :], logits[0][PREFIX + 6 :])


def test_the_mask_by_hand() -> None:
    segment_ids = torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1]])
    sees_image = torch.tensor([[True, True, True, True, True, False, True, True]])
    expected = [
        "x.......",
        "xx......",
        "xxx.....",
        "xxxx....",
        "xxxxx...",
        "x....x..",
        "xxx...x.",
        "xxx...xx",
    ]
    mask = packed_attention_mask(segment_ids, sees_image)
    assert mask.shape == (1, 1, 8, 8)
    assert ["".join(".x"[int(cell)] for cell in row) for row in mask[0, 0]] == expected


def test_positions_types_and_targets_of_a_row() -> None:
    seeing, blind = Segment([30, 31, 32], [IGNORED, 32, EOS], True), Segment([40, 41], [41, EOS], False)
    packed = dataset(length_penalty=0.5).pack([[seeing, blind], [seeing]])
    assert packed["input_ids"].tolist() == [
        [BOS, *[PAD] * 6, 30, 31, 32, 40, 41],
        [BOS, *[PAD] * 6, 30, 31, 32, PAD, PAD],
    ]
    assert packed["position_ids"][0].tolist() == [0, 1, 2, 2, 2, 2, 3, 4, 5, 6, 1, 2]
    assert packed["token_type_ids"][1].tolist() == [0, *[1] * 6, *[0] * 5]
    assert packed["segment_ids"].tolist() == [[*[0] * 7, 1, 1, 1, 2, 2], [*[0] * 7, 1, 1, 1, -1, -1]]
    assert packed["targets"][0].tolist() == [*[IGNORED] * 8, 32, EOS, 41, EOS]
    assert packed["targets"][1].tolist() == [*[IGNORED] * 8, 32, EOS, IGNORED, IGNORED]
    assert packed["sees_image"][0].tolist() == [*[True] * 10, False, False]
    weights = packed["target_weights"][packed["targets"] != IGNORED]
    torch.testing.assert_close(weights, torch.full((6,), 2**-0.5))


def test_targets_are_the_next_tokens_of_the_last_answer() -> None:
    data, tokenizer = dataset(follow_up_share=0.5, num_conversations=12), build_tokenizer()
    for index in range(4):
        for segment in data[index]["segments"]:
            assert len(segment.input_ids) == len(segment.targets)
            learnt = [place for place, target in enumerate(segment.targets) if target != IGNORED]
            assert learnt == list(range(learnt[0], len(segment.targets)))
            assert segment.targets[-1] == EOS
            assert segment.targets[learnt[0] : -1] == segment.input_ids[learnt[0] + 1 :]
            prompt = tokenizer.decode(segment.input_ids[: learnt[0] + 1], skip_special_tokens=False)
            assert "Question: " in prompt or "nswer:" not in prompt
            if not segment.sees_image:
                answer = tokenizer.decode(segment.targets[learnt[0] : -1], skip_special_tokens=False)
                assert answer in NO_PICTURE.values()


def test_a_conversation_is_encoded_as_the_processor_does(tmp_path) -> None:
    """One and several turns, each template; the processor's ids with the release's labels."""
    save_tokenizer(tmp_path)
    processor = CogVLMProcessor(load_tokenizer(tmp_path), 16, NUM_IMAGE_TOKENS, BOS, EOS, PAD)
    data, picture = dataset(), np.zeros((16, 16, 3), np.uint8)
    checked = set()
    for index in range(6):
        rng = np.random.default_rng(index)
        questions = ask(sample_scene(rng), rng, 8)
        for template in ("chat", "vqa", "base"):
            turns = [question for question in questions if question.template == template][
                : 1 if template == "base" else 3
            ]
            if not turns:
                continue
            checked.add((template, len(turns)))
            segment = data._segment(turns, np.random.default_rng(0))
            assert segment.sees_image
            expected = processor.apply_chat_template(
                conversation(turns, picture), chat_template=template, return_labels=True, compat="release"
            )
            assert expected["input_ids"][0].tolist() == [BOS, *[PAD] * 6, *segment.input_ids, EOS]
            labels = expected["labels"][0].tolist()
            assert labels == [*[IGNORED] * PREFIX, IGNORED, *segment.targets]
    assert {("chat", 3), ("vqa", 3), ("base", 1)} <= checked


def conversation(turns: list[Question], picture: np.ndarray) -> list[dict]:
    from PIL import Image

    messages: list[dict] = []
    for turn in turns:
        parts = [{"type": "text", "text": turn.question}]
        if not messages:
            parts.insert(0, {"type": "image", "image": Image.fromarray(picture)})  # type: ignore[dict-item]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": turn.answer}]
    return messages


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    first, again, other = dataset()[5], dataset()[5], dataset(seed=5)[5]
    assert first["segments"] == again["segments"] != other["segments"]
    assert np.array_equal(first["image"], again["image"])
    assert not np.array_equal(first["image"], other["image"])


def test_pictures_come_at_their_sizes_and_end_at_the_networks() -> None:
    data = dataset(picture_sizes=[112, 16])
    assert {data[index]["image"].shape for index in range(4)} == {(16, 16, 3)}
    assert data[0]["image"].dtype == np.uint8
    assert not np.array_equal(data[0]["image"], dataset(picture_sizes=[16])[0]["image"])
    assert np.array_equal(data[1]["image"], dataset(picture_sizes=[16])[1]["image"])


def test_rows_hold_what_fits_and_at_least_one_conversation() -> None:
    for room in (1, 40, 160):
        data = dataset(max_text_tokens=room, num_conversations=12)
        for index in range(4):
            lengths = [len(segment.input_ids) for segment in data[index]["segments"]]
            assert lengths
            assert sum(lengths) <= room or len(lengths) == 1


@pytest.mark.parametrize("max_turns", [1, 2, 5])
def test_conversations_have_as_many_turns_as_asked_and_no_more(max_turns: int) -> None:
    data = dataset(follow_up_share=0.9, max_turns=max_turns, num_conversations=30, max_text_tokens=2000)
    questions = [
        build_tokenizer().decode(segment.input_ids).count("Question: ")
        for index in range(6)
        for segment in data[index]["segments"]
    ]
    assert max(questions) == max_turns


def test_a_batch_has_the_parts_of_its_stage() -> None:
    data = dataset()
    batch = data.collater([data[0], data[1]])
    assert batch["pictures"].shape == (2, 16, 16, 3)
    for name in DENSE_LABELS:
        assert batch[name].shape == ((2, 16, 4) if "box" in name else (2, 16))
    tower, decoder = dataset(with_text=False), dataset(with_picture=False)
    assert "input_ids" not in tower.collater([tower[0]])
    assert "pictures" not in decoder.collater([decoder[0]])
    assert torch.equal(decoder.collater([decoder[0], decoder[1]])["input_ids"], batch["input_ids"])


def test_loader_processes_can_be_spawned() -> None:
    copied = pickle.loads(pickle.dumps(dataset()))
    assert copied[3]["segments"] == dataset()[3]["segments"]
    assert encode("What color is the star?") == tuple(build_tokenizer().encode("What color is the star?").ids)
