"""BLIP against LAVIS's own output, stage by stage; real sizes by their manifests; saving, loading, batches, sizes."""

import gzip
import json
from typing import Any

import pytest
import torch
from blip_fixture import FIXTURES, TYPES, expected, facts, model, pictures, prompts
from tolerance import BLIP_IMAGES, BLIP_LOGITS

from lavish.checkpoints.rules import plan
from lavish.models.base_model import model_section
from lavish.models.blip.config import ARCHITECTURES, SpecialIds, lavis_config
from lavish.models.blip.model import NETWORKS
from lavish.models.blip.samples import BlipCaption, BlipVQA
from lavish.models.blip.weights import architecture_of, rules_for

MANIFESTS = {
    "base_coco": ("blip_caption", 223_971_644),
    "large_coco": ("blip_caption", 446_290_492),
    "vqav2": ("blip_vqa", 361_478_972),
    "base": ("blip_feature_extractor", 223_450_880),  # without `temp`, which only pretraining reads
}
MODES = ("image", "text", "multimodal")


def near(actual: torch.Tensor, wanted: torch.Tensor, atol: float = BLIP_LOGITS) -> None:
    torch.testing.assert_close(actual.detach(), wanted, rtol=0, atol=atol)


def samples(name: str) -> dict[str, Any]:
    """Give the fixture's pictures and processed texts."""
    texts = facts(name)["questions_processed" if name == "blip_vqa" else "captions_processed"]
    return {"image": model(name).processor.pixels(pictures(name)), "text_input": texts}


def answered() -> dict[str, Any]:
    given = prompts("blip_vqa")
    return samples("blip_vqa") | {
        "answer": given["answers"],
        "n_answers": given["n_answers"],
        "weight": given["weight"],
    }


# Parity


@pytest.mark.parametrize("name", ["blip_caption", "blip_vqa"])
def test_pixels_and_image_states(name: str) -> None:
    given = samples(name)
    assert torch.equal(given["image"], expected(name)["pixel_values"])
    near(model(name).image_states(given), expected(name)["image_embeds"], BLIP_IMAGES)


def test_caption_ids_logits_and_loss() -> None:
    stage = expected("blip_caption")
    input_ids, attention_mask = model("blip_caption").processor.captions(samples("blip_caption")["text_input"])
    assert torch.equal(input_ids, stage["decoder_input_ids"])
    assert torch.equal(attention_mask, stage["decoder_attention_mask"])
    output = model("blip_caption")(samples("blip_caption"))
    assert torch.equal(output.intermediate_output.decoder_labels, stage["decoder_labels"])
    near(output.intermediate_output.decoder_output.logits, stage["logits"])
    near(output.loss.reshape(1), stage["loss"])
    assert output.loss is output["loss"]


@pytest.mark.parametrize("case", ["beam1", "beam1_rep", "beam3", "beam3_short"])
def test_captions(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = facts("blip_caption")["generate"][case]
    decoded: list[torch.Tensor] = []
    processor = model("blip_caption").processor
    decode = processor.decode
    monkeypatch.setattr(processor, "decode", lambda ids: decoded.append(ids) or decode(ids))
    assert model("blip_caption").generate(samples("blip_caption"), **wanted["args"]) == wanted["captions"]
    assert torch.equal(decoded[0], expected("blip_caption")[f"generate_{case}_ids"])


def test_question_ids_and_states() -> None:
    stage, vqa = expected("blip_vqa"), model("blip_vqa")
    input_ids, attention_mask = vqa.processor.questions(samples("blip_vqa")["text_input"])
    assert torch.equal(input_ids, stage["question_input_ids"])
    assert torch.equal(attention_mask, stage["question_attention_mask"])
    near(
        vqa.network.question_states(vqa.image_states(samples("blip_vqa")), input_ids, attention_mask),
        stage["question_states"],
    )


def test_answers_are_learnt_with_their_weights() -> None:
    stage = expected("blip_vqa")
    output = model("blip_vqa")(answered())
    assert torch.equal(output.intermediate_output.decoder_labels, stage["answer_labels"])
    near(output.intermediate_output.decoder_output, stage["answer_logits"])
    near(output.loss.reshape(1), stage["loss"])


@pytest.mark.parametrize("case", ["generate_beam1", "generate_beam3", "generate_beam1_len6", "rank", "rank_top4"])
def test_predicted_answers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, decoded = facts("blip_vqa")["predict_answers"][case], []
    processor = model("blip_vqa").processor
    decode = processor.decode
    monkeypatch.setattr(processor, "decode", lambda ids: decoded.append(ids) or decode(ids))
    assert model("blip_vqa").predict_answers(samples("blip_vqa"), **wanted["args"]) == wanted["answers"]
    if case.startswith("generate"):
        assert torch.equal(decoded[0], expected("blip_vqa")[f"{case}_ids"])


def test_ranks() -> None:
    stage, vqa = expected("blip_vqa"), model("blip_vqa")
    places, scores = vqa.rank_answers(samples("blip_vqa"), prompts("blip_vqa")["answer_list"])
    near(torch.empty_like(scores).scatter(1, places, scores), stage["rank_answer_scores"])
    _, states, mask = vqa._read(samples("blip_vqa"))
    near(vqa.first_token_logits(states, mask), stage["rank_first_token_logits"])


@pytest.mark.parametrize("mode", MODES)
def test_features(mode: str) -> None:
    name = "blip_feature_extractor"
    features = model(name).extract_features(samples(name), mode=mode)
    names = [key.partition(".")[2] for key in expected(name) if key.startswith(f"{mode}.") and "input_ids" not in key]
    assert sorted(features) == sorted(key for key in names if key != "attention_mask")
    for key, value in features.items():
        near(value, expected(name)[f"{mode}.{key}"], BLIP_IMAGES if key == "image_embeds" else BLIP_LOGITS)


def test_ids_similarity_and_match() -> None:
    extractor = model("blip_feature_extractor")
    stage, given = expected("blip_feature_extractor"), samples("blip_feature_extractor")
    near(extractor.similarity(given), stage["similarity"])
    for mode, first in (("text", None), ("multimodal", "[ENC]")):
        input_ids, attention_mask = extractor.processor.encode(given["text_input"], first)
        assert torch.equal(input_ids, stage[f"{mode}.input_ids"])
        assert torch.equal(attention_mask, stage["attention_mask"])
    match = extractor.match(given)
    assert match.shape == (2,)
    assert bool(((match > 0) & (match < 1)).all())
    near(extractor.network.vision_model.embeddings.position_embedding, stage["pos_embed_after_load"])


# Real sizes


@pytest.mark.parametrize("model_type", MANIFESTS)
def test_manifest(model_type: str) -> None:
    """Every tensor of the real file has its place, of its shape, and every parameter has its tensor."""
    name, num_parameters = MANIFESTS[model_type]
    with gzip.open(FIXTURES / name / f"manifest_{model_type}.json.gz") as file:
        manifest = {key: tuple(shape) for key, (shape, _) in json.load(file).items()}
    kind = BlipCaption if name == "blip_caption" else NETWORKS_BY_NAME[name]
    section = model_section(kind.default_config_path(model_type))
    fields = {key: section[key] for key in ("vision_config", "text_config", "image_text_hidden_size") if key in section}
    fields["vision_config"]["image_size"] = section["image_size"]
    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        network = NETWORKS[architecture](lavis_config(fields, SpecialIds(30522, 102, 0), architecture, model_type))
    if name == "blip_feature_extractor":
        network.itm_head = None
    sources = plan(manifest, rules_for(architecture, manifest)).sources
    targets = network.state_dict()
    assert {target: tuple(value.shape) for target, value in targets.items()} == {
        target: manifest[source] for target, source in sources.items()
    }
    assert sum(parameter.numel() for parameter in network.parameters()) == num_parameters
    assert architecture_of(manifest, "") == architecture


NETWORKS_BY_NAME = {"blip_vqa": BlipVQA, "blip_feature_extractor": type(model("blip_feature_extractor"))}


@pytest.mark.parametrize("name", TYPES)
def test_values_of_the_release(name: str) -> None:
    """What loads without an error and is wrong: epsilons, head counts, label smoothing (trap 3)."""
    for model_type in type(model(name)).PRETRAINED_MODEL_CONFIG_DICT:
        section = model_section(type(model(name)).default_config_path(model_type))
        vision, text = section["vision_config"], section["text_config"]
        assert (vision["layer_norm_eps"], text["layer_norm_eps"]) == (1e-6, 1e-12)
        assert (text["num_attention_heads"], text["label_smoothing"], text["hidden_dropout_prob"]) == (12, 0.1, 0.1)
        assert vision["num_attention_heads"] == (16 if model_type == "large_coco" else 12)
        assert section["image_size"] == {"blip_caption": 384, "blip_vqa": 480, "blip_feature_extractor": 224}[name]
        assert vision["drop_path_rate"] == (0.1 if name == "blip_vqa" or model_type == "large_coco" else 0.0)
    config = model(name).network.config
    assert config.vision_config.layer_norm_eps == 1e-6
    assert config.text_config.layer_norm_eps == 1e-12
    assert config.text_config.num_attention_heads == 4, "of the med_config.json beside the file"
    assert config.text_config.label_smoothing == 0.1
