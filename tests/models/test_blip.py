"""BLIP against LAVIS's own output, stage by stage; real sizes by their manifests; saving, loading, batches, sizes."""

import gzip
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from blip_fixture import (
    CONFIG,
    FIXTURES,
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
from tolerance import BLIP_IMAGES, BLIP_LOGITS
from transformers import BertTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

import lavish
from lavish.checkpoints.rules import plan, reverse
from lavish.common.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MediaError,
    PromptError,
    UnexpectedKeys,
    UnknownLayout,
)
from lavish.models import load_model, load_model_and_preprocess, load_preprocess
from lavish.models.base_model import model_section
from lavish.models.blip.beam_search import Decoder
from lavish.models.blip.config import ARCHITECTURES, SpecialIds, lavis_config
from lavish.models.blip.model import NETWORKS, StochasticDepthLayer
from lavish.models.blip.samples import MODELS, open_model
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
    architecture = ARCHITECTURES[name]
    section = model_section(MODELS[architecture].default_config_path(model_type))
    fields = {key: section[key] for key in ("vision_config", "text_config", "image_text_hidden_size") if key in section}
    fields["vision_config"]["image_size"] = section["image_size"]
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


# Loading


def lavis_file(source: Any, folder: Path, change=lambda tensors: tensors) -> Path:
    """Write a model as LAVIS does: its names, under "model", with the buffers that it stores."""
    rules = reverse(rules_for(source.network.config.architectures[0], source.network.state_dict()))
    state = source.network.state_dict()
    tensors = {name: state[target].clone() for name, target in plan(state, rules).sources.items()}
    text = "text_decoder.bert" if hasattr(source.network, "text_decoder") else "text_encoder"
    positions = source.network.config.text_config.max_position_embeddings
    tensors[f"{text}.embeddings.position_ids"] = torch.arange(positions)[None]
    folder.mkdir(exist_ok=True)
    torch.save({"model": change(tensors), "epoch": 4}, folder / "checkpoint_best.pth")
    return folder / "checkpoint_best.pth"


def answers_of(given: Any, name: str) -> Any:
    if name == "blip_caption":
        return given.generate(samples(name), num_beams=3, max_length=16)
    if name == "blip_vqa":
        return given.predict_answers(samples(name), answer_list=prompts(name)["answer_list"])
    return given.similarity(samples(name)).tolist()


@pytest.mark.parametrize("name", TYPES)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model(name).save_pretrained(tmp_path / "saved")
    loaded = open_model(tmp_path / "saved")
    assert type(loaded) is type(model(name))
    wanted, found = model(name).network.state_dict(), loaded.network.state_dict()
    assert list(wanted) == list(found)
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())
    assert answers_of(loaded, name) == answers_of(model(name), name)
    assert (loaded.processor.prompt, loaded.processor.max_txt_len) == ("a picture of ", MAX_TXT_LEN[name])
    assert torch.equal(loaded.processor.pixels(pictures(name)), samples(name)["image"])


@pytest.mark.parametrize("name", TYPES)
def test_written_as_lavis_and_read_again(name: str, tmp_path: Path) -> None:
    file = lavis_file(model(name), tmp_path / "run")
    config = model(name).network.config
    heads = {section: {"num_attention_heads": 4} for section in ("vision_config", "text_config")}
    loaded = load_model(name, TYPES[name], True, checkpoint=file, config=heads, tokenizer=tokenizer(name))
    assert loaded.network.config.vision_config.to_dict() == config.vision_config.to_dict()
    found = loaded.network.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in model(name).network.state_dict().items())


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    """The layout of Salesforce/blip-image-captioning-base, as transformers itself writes it."""
    ours = model("blip_caption")
    theirs = BlipForConditionalGeneration(ours.network.config)
    theirs.load_state_dict(ours.network.state_dict())
    theirs.save_pretrained(tmp_path)
    vocab = BertTokenizer(vocab=str(tokenizer("blip_caption") / "vocab.txt"))
    BlipProcessor(BlipImageProcessorPil(size={"height": 64, "width": 64}), vocab).save_pretrained(tmp_path)
    loaded = load_model("blip_caption", "base_coco", is_eval=True, checkpoint=tmp_path)
    assert answers_of(loaded, "blip_caption") == answers_of(ours, "blip_caption")
    assert torch.equal(loaded.processor.pixels(pictures("blip_caption")), samples("blip_caption")["image"])
    with pytest.raises(CheckpointError, match="is a BlipForConditionalGeneration, and 'blip_vqa' was asked"):
        load_model("blip_vqa", "vqav2", checkpoint=tmp_path)


@pytest.mark.parametrize("name", TYPES)
def test_what_a_file_is(name: str) -> None:
    opened = open_model(checkpoint(name), config=CONFIG)
    assert type(opened) is type(model(name))
    assert not opened.training


def test_a_pretraining_file_serves_all_three(tmp_path: Path) -> None:
    """Its queues, momentum copies and other halves are left; what is unknown is not."""
    vqa, extractor = model("blip_vqa"), load("blip_feature_extractor")
    lavis_file(vqa, tmp_path / "vqa")
    lavis_file(extractor, tmp_path / "features")
    both = {**torch.load(tmp_path / "vqa" / "checkpoint_best.pth", weights_only=True)["model"]}
    both |= torch.load(tmp_path / "features" / "checkpoint_best.pth", weights_only=True)["model"]
    both |= {f"visual_encoder_m.{name}": value for name, value in {"norm.weight": torch.ones(32)}.items()}
    both |= {"text_queue": torch.ones(2, 2), "temp": torch.tensor(0.07), "queue_ptr": torch.zeros(1)}
    torch.save({"model": both}, tmp_path / "model_base.pth")
    for name in TYPES:
        options = {"config": {**CONFIG, "text_config": {"num_attention_heads": 4}}, "tokenizer": tokenizer(name)}
        load_model(name, TYPES[name], checkpoint=tmp_path / "model_base.pth", **options)
    torch.save({"model": both | {"visual_encoder.new": torch.ones(2)}}, tmp_path / "model_base.pth")
    with pytest.raises(UnexpectedKeys, match=r"visual_encoder\.new"):
        load_model(name, TYPES[name], checkpoint=tmp_path / "model_base.pth", **options)


def test_another_checkpoint_of_the_same_model(tmp_path: Path) -> None:
    changed = load("blip_caption")
    with torch.no_grad():
        changed.network.vision_model.post_layernorm.bias += 1
    file = lavis_file(changed, tmp_path)
    loaded = load("blip_caption")
    loaded.load_checkpoint(file)
    assert torch.equal(loaded.image_states(samples("blip_caption")), changed.image_states(samples("blip_caption")))
    assert loaded.network.config.text_config.num_attention_heads == 4


def test_what_a_run_of_lavish_saves(tmp_path: Path) -> None:
    """The state of the whole registered model, `network.` before every name, with the optimizer beside it."""
    source = model("blip_vqa")
    torch.save({"model": source.state_dict(), "optimizer": {"state": {}}, "epoch": 2}, tmp_path / "checkpoint_2.pth")
    loaded = load("blip_vqa")
    with torch.no_grad():
        loaded.network.text_encoder.embeddings.word_embeddings.weight.zero_()
    loaded.load_checkpoint(tmp_path / "checkpoint_2.pth")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in source.state_dict().items())


@pytest.mark.parametrize("name", TYPES)
def test_in_bfloat16(name: str) -> None:
    half = open_model(checkpoint(name), config=CONFIG, dtype=torch.bfloat16)
    states = half.image_states(samples(name))
    assert states.dtype == torch.bfloat16
    assert (states.float() - model(name).image_states(samples(name))).abs().max() < 0.2
    assert len(answers_of(half, name)) == 2


@pytest.mark.parametrize("name", TYPES)
def test_unusual_sizes(name: str, tmp_path: Path) -> None:
    """Odd head counts, three layers, another width of text and picture: drawn, written as LAVIS, read again."""
    width = 36 if name == "blip_vqa" else 24
    config = {
        "vision_config": {
            "image_size": 60,
            "patch_size": 12,
            "hidden_size": 36,
            "num_attention_heads": 9,
            "num_hidden_layers": 3,
            "intermediate_size": 50,
        },
        "text_config": {
            "vocab_size": 170,
            "hidden_size": width,
            "num_attention_heads": 3,
            "num_hidden_layers": 1,
            "intermediate_size": 40,
            "max_position_embeddings": 50,
        },
    }
    drawn = load_model(
        name, TYPES[name], True, config=config, tokenizer=tokenizer(name), load_finetuned=False, load_pretrained=False
    )
    loaded = load_model(
        name, TYPES[name], True, checkpoint=lavis_file(drawn, tmp_path), config=config, tokenizer=tokenizer(name)
    )
    given = {"image": torch.randn(2, 3, 60, 60), "text_input": ["a cat", "a dog on a table"]}
    if name == "blip_caption":
        assert len(loaded.generate(given, num_beams=4)) == 2
        assert loaded.generate(given) == drawn.generate(given)
    elif name == "blip_vqa":
        assert loaded.predict_answers(given, inference_method="generate") == drawn.predict_answers(
            given, inference_method="generate"
        )
    else:
        assert torch.equal(loaded.similarity(given), drawn.similarity(given))


def test_the_release_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a checkpoint the URL of the YAML counts: finetuned, else pretrained; the cache comes first."""
    monkeypatch.setenv("LAVISH_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"BLIP/blip_coco_caption_base\.pth: HF_HUB_OFFLINE is set"):
        load_model("blip_caption", "base_coco")
    with pytest.raises(CheckpointError, match=r"BLIP/models/model_base_capfilt_large\.pth: HF_HUB_OFFLINE is set"):
        load_model("blip_caption", "base_coco", load_finetuned=False)
    with pytest.raises(CheckpointError, match=r"BLIP/models/model_base_capfilt_large\.pth: HF_HUB_OFFLINE is set"):
        load_model("blip_feature_extractor", "base")
    url = model_section(MODELS["BlipForConditionalGeneration"].default_config_path("base_coco"))["finetuned"]
    place = tmp_path / hashlib.sha256(url.encode()).hexdigest()[:16] / "blip_coco_caption_base.pth"
    place.parent.mkdir()
    shutil.copy(checkpoint("blip_caption"), place)
    config = {**CONFIG, "text_config": {"num_attention_heads": 4}}
    loaded = load_model("blip_caption", "base_coco", True, config=config, tokenizer=tokenizer("blip_caption"))
    assert answers_of(loaded, "blip_caption") == answers_of(model("blip_caption"), "blip_caption")


def test_by_a_recipe_section() -> None:
    """`from_config` takes what a recipe's `model` section says over the YAML."""
    kind = MODELS["BlipForConditionalGeneration"]
    section = model_section(kind.default_config_path("base_coco"), {"tokenizer": str(tokenizer("blip_caption"))})
    section["load_finetuned"], section["finetuned"] = True, str(checkpoint("blip_caption"))
    section["image_size"] = 64
    section["vision_config"] |= CONFIG["vision_config"]
    built = kind.from_config(section).eval()
    assert answers_of(built, "blip_caption") == answers_of(model("blip_caption"), "blip_caption")


# Using


def test_captions_one_by_one_and_together() -> None:
    given = samples("blip_caption")
    for options in ({"num_beams": 1}, {"num_beams": 5, "max_length": 16}, {"num_beams": 2, "repetition_penalty": 1.3}):
        together = model("blip_caption").generate(given, **options)
        alone = [model("blip_caption").generate({"image": image[None]}, **options)[0] for image in given["image"]]
        assert together == alone


def test_steps_with_a_cache_are_those_without() -> None:
    caption, stage = model("blip_caption"), expected("blip_caption")
    states, ids = caption.image_states(samples("blip_caption")), stage["decoder_input_ids"]
    whole = caption.network.text_decoder(input_ids=ids, encoder_hidden_states=states, use_cache=False).logits
    decoder = Decoder(caption.network.text_decoder, states, None)
    with torch.no_grad():
        for length in range(1, ids.shape[1] + 1):
            near(decoder.step(ids[:, :length]), whole[:, length - 1].detach())


def test_several_captions() -> None:
    given, caption = samples("blip_caption"), model("blip_caption")
    once = caption.generate(given, num_beams=2)
    assert caption.generate(given, num_beams=2, num_captions=2) == [once[0], once[0], once[1], once[1]]

    def drawn(seed: int, **options: Any) -> list[str]:
        generator = torch.Generator().manual_seed(seed)
        return caption.generate(given, use_nucleus_sampling=True, num_captions=3, generator=generator, **options)

    assert len(drawn(1)) == 6
    assert drawn(1) == drawn(1)
    assert len(set(drawn(1)[:3])) > 1
    assert drawn(1) != drawn(2)
    assert drawn(1, top_k=1) == drawn(2, top_k=1), "one token is left to draw"
    assert drawn(1, top_p=1e-5) == drawn(2, top_k=1)


def test_prompts() -> None:
    given, caption = samples("blip_caption"), model("blip_caption")
    assert caption.generate(given, prompt="a picture of ") == caption.generate(given)
    mixed = caption.generate(given, prompt=["a photo of the ", "a dog"])
    first = caption.generate({"image": given["image"][:1]}, prompt="a photo of the ")
    second = caption.generate({"image": given["image"][1:], "prompt": "a dog"})
    assert mixed == first + second
    with pytest.raises(PromptError, match="3 prompts and 2 images"):
        caption.generate(given, prompt=["a", "b", "c"])


def test_pictures_may_be_pictures() -> None:
    wanted = facts("blip_caption")["generate"]["beam3"]
    assert model("blip_caption").generate({"image": pictures("blip_caption")}, **wanted["args"]) == wanted["captions"]


def test_what_a_user_types_is_text() -> None:
    processor = model("blip_vqa").processor
    input_ids, _ = processor.questions(["a [SEP] [ENC] [DEC] cat"])
    special = processor.tokenizer.convert_tokens_to_ids(["[SEP]", "[ENC]", "[DEC]"])
    assert [int((input_ids == token_id).sum()) for token_id in special] == [1, 1, 0]


def test_processors_of_the_model() -> None:
    loaded, pixels, texts = load_model_and_preprocess(
        "blip_vqa", "vqav2", is_eval=True, checkpoint=checkpoint("blip_vqa"), config=CONFIG | {"max_txt_len": 10}
    )
    images = torch.stack([pixels["eval"](picture) for picture in pictures("blip_vqa")])
    assert torch.equal(images, expected("blip_vqa")["pixel_values"])
    questions = [texts["eval"](question) for question in prompts("blip_vqa")["questions"]]
    assert questions == facts("blip_vqa")["questions_processed"]
    given = {"image": images, "text_input": questions}
    wanted = facts("blip_vqa")["predict_answers"]["rank"]
    assert loaded.predict_answers(samples=given, **wanted["args"]) == wanted["answers"]
    assert pixels["train"](pictures("blip_vqa")[0]).shape == (3, 64, 64)
    assert load_preprocess({})[0]["eval"]("x") == "x"


def test_what_base_model_offers(tmp_path: Path) -> None:
    caption = load("blip_caption")
    assert str(caption.device) == "cpu"
    count = sum(parameter.numel() for parameter in caption.parameters())
    assert caption.show_n_params(return_str=False) == count
    assert caption.show_n_params() == f"{count / 1e3:.1f}K"
    groups = caption.get_optimizer_params(0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert sum(parameter.numel() for group in groups for parameter in group["params"]) == count
    assert not any(parameter.ndim > 1 for parameter in groups[1]["params"])
    with pytest.raises(NotImplementedError, match="blip_feature_extractor"):
        caption.extract_features({})


def test_training_goes_down_and_is_random() -> None:
    vqa = load("blip_vqa").train()
    layers = vqa.network.vision_model.encoder.layers
    assert [layer.rate for layer in layers if isinstance(layer, StochasticDepthLayer)] == pytest.approx([0.0, 0.1])
    assert float(vqa(answered()).loss.detach()) != float(vqa(answered()).loss.detach()), "dropout"
    optimizer = torch.optim.AdamW(vqa.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = vqa(answered()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_attributes_that_lavis_users_know() -> None:
    caption = load("blip_caption")
    assert (caption.prompt, caption.prompt_length, caption.max_txt_len) == ("a picture of ", 4, 12)
    assert caption.tokenizer is caption.processor.tokenizer
    wanted = caption.generate(samples("blip_caption"), prompt="a dog")
    caption.prompt, caption.max_txt_len = "a dog", 6
    assert caption.generate(samples("blip_caption")) == wanted
    assert caption.processor.captions(["a red cat on the table and a dog"])[0].shape == (1, 6)


def test_a_med_config_as_text_config(tmp_path: Path) -> None:
    case = checkpoint("blip_vqa")
    text = json.loads((case.parent / "med_config.json").read_text(encoding="utf-8"))
    shutil.copy(case, tmp_path)
    config = {**CONFIG, "text_config": text, "max_txt_len": 10}
    options = {"config": config, "tokenizer": tokenizer("blip_vqa")}
    loaded = load_model("blip_vqa", "vqav2", True, checkpoint=tmp_path / case.name, **options)
    assert answers_of(loaded, "blip_vqa") == answers_of(model("blip_vqa"), "blip_vqa")


def test_through_lavish_load(tmp_path: Path) -> None:
    model("blip_vqa").save_pretrained(tmp_path)
    vlm = lavish.load(tmp_path, device="cpu")
    wanted, answers = facts("blip_vqa")["predict_answers"]["rank"]["answers"], prompts("blip_vqa")["answer_list"]
    for picture, question, answer in zip(pictures("blip_vqa"), samples("blip_vqa")["text_input"], wanted, strict=True):
        assert vlm.answer(picture, question, answer_list=answers) == answer


def test_a_file_without_the_matching_head(tmp_path: Path) -> None:
    name = "blip_feature_extractor"

    def headless(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value for key, value in tensors.items() if not key.startswith("itm_head")}

    file = lavis_file(model(name), tmp_path / "run", headless)
    heads = {section: {"num_attention_heads": 4} for section in ("vision_config", "text_config")}
    loaded = open_model(file, config=heads, tokenizer=tokenizer(name))
    loaded.save_pretrained(tmp_path / "saved")
    for extractor in (loaded, open_model(tmp_path / "saved")):
        near(extractor.similarity(samples(name)), expected(name)["similarity"])
        with pytest.raises(ConfigError, match="have no itm_head"):
            extractor.match(samples(name))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2.5}, "num_beams is 2.5 and must be a whole number"),
        ({"max_length": 4}, "counts the prompt, which has 4 tokens"),
        ({"max_length": 65}, "has 64 positions"),
        ({"top_p": 1.5, "use_nucleus_sampling": True}, "top_p is 1.5"),
        ({"num_captions": 0}, "num_captions is 0"),
    ],
)
def test_wrong_options_of_captions(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model("blip_caption").generate(samples("blip_caption"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give answer_list="),
        ({"answer_list": ["yes"], "num_ans_candidates": 0}, "num_ans_candidates is 0"),
        ({"inference_method": "genearte"}, "Did you mean 'generate'"),
        ({"inference_method": "generate", "compat": "blip"}, "compat='blip'"),
    ],
)
def test_wrong_options_of_answers(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model("blip_vqa").predict_answers(samples("blip_vqa"), **options)


def test_wrong_samples() -> None:
    vqa, given = model("blip_vqa"), samples("blip_vqa")
    with pytest.raises(DataError, match=r"texts \(1\) must equal the number of images \(2\)"):
        vqa.predict_answers({**given, "text_input": "one?"}, inference_method="generate")
    with pytest.raises(DataError, match="no 'image'"):
        vqa.predict_answers({"text_input": "one?"}, inference_method="generate")
    with pytest.raises(DataError, match="no 'text_input'"):
        vqa.predict_answers({"image": given["image"]}, inference_method="generate")
    with pytest.raises(DataError, match=r"a dict with 'image', not a Tensor"):
        model("blip_caption").generate(given["image"])
    with pytest.raises(MediaError, match="No picture was given"):
        vqa.predict_answers({"image": [], "text_input": []}, inference_method="generate")
    for wrong in (None, 3, ["one?", None], {"one?": 1}):
        with pytest.raises(DataError, match="text_input is a text or a list of texts"):
            vqa.predict_answers({**given, "text_input": wrong}, inference_method="generate")
    with pytest.raises(DataError, match="no 'n_answers'"):
        vqa(given)
    with pytest.raises(DataError, match=r"unsqueeze\(0\)"):
        vqa.predict_answers({"image": given["image"][0], "text_input": "one?"}, inference_method="generate")
    with pytest.raises(DataError, match="add up to the answers"):
        vqa({**answered(), "n_answers": [2, 2]})
    with pytest.raises(ConfigError, match=r"mode is 'imgae'.*Did you mean 'image'"):
        model("blip_feature_extractor").extract_features({}, mode="imgae")


def test_captions_that_hold_nothing_to_learn() -> None:
    caption, image = model("blip_caption"), samples("blip_caption")["image"]
    with pytest.raises(DataError, match=r"none of the 1 texts is longer than the prompt 'a picture of ' \(4 ids\)"):
        caption({"image": image[:1], "text_input": ["a b"]})
    loss = caption({"image": image[:2], "text_input": ["a b", "a picture of a dog"]}).loss
    assert loss.isfinite()


def test_one_question_may_be_a_string() -> None:
    given = samples("blip_vqa")
    single = {"image": given["image"][:1], "text_input": given["text_input"][0]}
    assert model("blip_vqa").predict_answers(single, inference_method="generate") == ["old"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {"vision_cnofig": {}}}, "vision_cnofig.*Did you mean 'vision_config'"),
        ({"config": {"vision_config": {"hiden_size": 3}}}, "hiden_size.*Did you mean 'hidden_size'"),
        ({"config": {"vision_config": {"image_size": 64}}}, "no file tells how many heads"),
        ({"config": {"vision_config": {"num_attention_heads": 5}}}, "does not divide into 5 heads"),
        ({"config": {"vision_config": {**CONFIG["vision_config"], "image_size": 65}}}, "no multiple of patch_size"),
        ({"config": {"text_config": {"sep_token_id": 102}, **CONFIG}}, "sep_token_id is 102 and the tokenizer's is 5"),
        ({"config": {"text_config": {"vocab_size": 100}, **CONFIG}}, "it belongs to another model"),
        ({"config": 3}, "config= must be a dict"),
        ({"max_words": 3}, "max_words is no setting"),
        ({"config": {"prompt": 3, **CONFIG}}, "prompt is 3"),
    ],
)
def test_wrong_config(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model("blip_caption", "base_coco", checkpoint=checkpoint("blip_caption"), **options)


def test_wrong_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'base_coco'"):
        load_model("blip_caption", "base_cocoo")
    with pytest.raises(ConfigError, match="Did you mean 'blip_caption'"):
        load_model("blip_captoin", "base_coco")
    with pytest.raises(ConfigError, match=r"load it with lavish\.load"):
        load_model("cogvlm", "base")
    with pytest.raises(UnknownLayout, match="no such file"):
        load_model("blip_caption", "base_coco", checkpoint=tmp_path / "absent.pth")


def test_another_model_type(tmp_path: Path) -> None:
    """Without a config the type's sizes count: another file is an error that names tensor and shapes."""
    file = lavis_file(model("blip_caption"), tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint_best\.pth: \d+ of 473 tensors that this Blip.* are absent"):
        load_model("blip_caption", "base_coco", checkpoint=file, tokenizer=tokenizer("blip_caption"))


def test_a_file_of_answers_is_none_of_captions() -> None:
    with pytest.raises(CheckpointError, match="it is a blip_vqa, whose decoder writes answers"):
        load("blip_caption", checkpoint=checkpoint("blip_vqa"))
    with pytest.raises(CheckpointError, match="it is a blip_vqa"):
        load("blip_caption").load_checkpoint(checkpoint("blip_vqa"))


def test_a_file_of_something_else(tmp_path: Path) -> None:
    torch.save({"model": {"query_tokens": torch.ones(2)}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no BLIP file: it has no visual_encoder; found query_tokens"):
        open_model(tmp_path / "x.pth")
