"""CLIP + Qwen against its golden fixture, stage by stage; caches, batches, saving, training."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tolerance
import torch
from clip_qwen_fixture import (
    END_OF_TEXT,
    EXPECTED,
    FIXTURE,
    IMAGES,
    LLM,
    PROMPTS,
    RELEASE,
    TOWER,
    TRAINED,
    expanded,
    load,
    messages,
    network,
    processor,
    shared,
    tensors,
    training_messages,
    with_one_slot,
)
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText

import lavish
from lavish.checkpoints import hf
from lavish.checkpoints.qwen import LORA_TARGETS
from lavish.checkpoints.rules import plan
from lavish.common.errors import ConfigError
from lavish.inference.parallel import load_share
from lavish.inference.vlm import VLM
from lavish.models import family_of
from lavish.models.clip_qwen.config import ClipQwenConfig, read_config
from lavish.models.clip_qwen.model import ClipQwenForConditionalGeneration, freeze
from lavish.models.clip_qwen.weights import RULES, native_adapter, save_trained, tie_shared_lora
from lavish.nn.qwen import read_qwen_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

KINDS = ("base", "lora")


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=atol)


# -- stage by stage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
def test_training_pixels(index: int) -> None:
    with Image.open(IMAGES / f"img{index}.png") as picture:
        found = torch.from_numpy(processor().pixels(picture))
    torch.testing.assert_close(found, tensors()["pixel_values"][index], **tolerance.PIXELS)


@pytest.mark.parametrize("index", range(4))
def test_pixels_of_the_web_ui(index: int) -> None:
    with Image.open(IMAGES / f"img{index}.png") as picture:
        found = torch.from_numpy(processor().pixels(picture, "webui"))
    torch.testing.assert_close(found, tensors()["webui_pixel_values_noantialias"][index], **tolerance.RESIZED_PIXELS)
    assert (found - tensors()["pixel_values"][index]).abs().max() > 0.3


@torch.no_grad()
def test_tower_and_projector() -> None:
    tower = network().vision_tower
    with_class = tower(tensors()["pixel_values"]).last_hidden_state
    close(with_class, tensors()["vision_last_hidden_with_cls"], tolerance.QWEN_FEATURES)
    close(with_class[:, 1:], tensors()["image_feature"], tolerance.QWEN_FEATURES)
    features = network().get_image_features(tensors()["pixel_values"])
    close(features, tensors()["projected_feature"], tolerance.QWEN_FEATURES)


@pytest.mark.parametrize("name", PROMPTS)
def test_ids_and_slots(name: str) -> None:
    inputs = processor().apply_chat_template(messages(name))
    ids = inputs["input_ids"][0].tolist()
    assert with_one_slot(ids) == PROMPTS[name]["input_ids"]
    assert len(ids) == EXPECTED["seq_len"][name]
    assert inputs["token_type_ids"].sum() == (16 if PROMPTS[name]["image"] else 0)
    assert ("pixel_values" in inputs) == (PROMPTS[name]["image"] is not None)
    assert processor().apply_chat_template(messages(name), tokenize=False) == PROMPTS[name]["raw_text"]


@torch.no_grad()
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind: str, name: str) -> None:
    logits = network(kind)(**processor().apply_chat_template(messages(name))).logits[0]
    tolerance.qwen_logits(logits, tensors()[f"{kind}_logits_{name}"])


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kind", [*KINDS, "merged"])
def test_greedy_tokens_by_generate_and_by_chat(kind: str, name: str) -> None:
    """`two_turns` crosses `seq_length` while decoding, `long_ntk` starts beyond it."""
    wanted = EXPECTED["generate"][kind][name]["tokens"]
    inputs = processor().apply_chat_template(messages(name))
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    out = network(kind).generate(**inputs, **options)
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == wanted
    stop = {END_OF_TEXT, END_OF_TEXT + 1, END_OF_TEXT + 2}
    cut = next((index for index, token in enumerate(wanted) if token in stop), 24)
    found = shared("lora").chat(messages(name), max_new_tokens=24).token_ids if kind == "lora" else wanted
    assert found[:cut] == wanted[:cut]


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "merged"])
def test_loss_and_logits_of_the_training_batch(kind: str) -> None:
    batch = processor().apply_chat_template(
        training_messages(), padding_side="right", return_labels=True, add_generation_prompt=False
    )
    assert batch["input_ids"].tolist() == [expanded(row) for row in tensors()["collate_input_ids"].tolist()]
    assert torch.equal(batch["labels"], tensors()["collate_labels"])
    for pixels, name in ((tensors()["collate_images_fp16"], "loss_batch"), (None, "loss_batch_fp32pixels")):
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels", "pixel_values")}
        out = network(kind)(**(inputs if pixels is None else {**inputs, "pixel_values": pixels}))
        close(out.loss, tensors()[f"{kind}_{name}"], tolerance.QWEN_LOSS)
        if pixels is not None:
            # The release passes no mask; what differs are the padded queries, which have no label.
            plain = network(kind)(batch["input_ids"], pixel_values=pixels).logits
            tolerance.qwen_logits(plain[:, -1], tensors()[f"{kind}_logits_batch_last"])
            assert torch.equal(plain.argmax(-1), tensors()[f"{kind}_logits_batch_argmax"])


@torch.no_grad()
def test_merging_changes_nothing_visible() -> None:
    inputs = processor().apply_chat_template(messages("long_ntk"))
    merged, beside = network("merged")(**inputs).logits, network("lora")(**inputs).logits
    torch.testing.assert_close(merged, beside, **tolerance.MERGED_ADAPTER)


# -- training ----------------------------------------------------------------------------------------------------------


def training_network() -> Any:
    """The fixture's start: a LoRA on the released projections, tied as on the fused one, and the projector."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    start = {
        name.removeprefix("train_init."): value for name, value in tensors().items() if name.startswith("train_init.")
    }
    lora = {name: value for name, value in start.items() if "lora_" in name}
    prefix = "base_model.model.transformer"
    lora = {f"{prefix}{name.partition('transformer')[2]}".replace(".default", ""): v for name, v in lora.items()}
    fields = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.0, "bias": "none", "target_modules": ["c_attn", "w1", "w2"]}
    fields, native = native_adapter(fields, lora)
    base = load("base").model
    model = get_peft_model(base, LoraConfig(**fields))
    set_peft_model_state_dict(model, native)
    assert tie_shared_lora(model) == 4
    projector = {name.partition("feature_proj.")[2]: value for name, value in start.items() if "feature_proj" in name}
    base.projector.load_state_dict(projector)
    freeze(model)
    return model


def final_lora(model: Any, name: str) -> torch.Tensor:
    """One released LoRA tensor, put together from ours."""
    found = dict(model.named_parameters(remove_duplicate=False))
    _, _, rest = name.partition("transformer.h.")
    layer, module = rest.split(".", 1)
    released, leaf = module.split(".lora_")
    letter = leaf[0]
    parts = [
        found[f"base_model.model.language_model.layers.{layer}.{ours}.lora_{letter}.default.weight"]
        for ours in LORA_TARGETS[released]
    ]
    return torch.cat(parts) if letter == "B" else parts[0]


def test_four_steps_of_training() -> None:
    """The release's optimiser on its batches gives its losses, gradient norms and weights; every weight moves."""
    model = training_network()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    projector = {f"base_model.model.projector.{index}.{leaf}" for index in (0, 2) for leaf in ("weight", "bias")}
    assert {name for name in names if "lora_" not in name} == projector
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name in names}
    recipe = EXPECTED["train"]["args"]
    lora = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    weights = [p for name, p in model.named_parameters() if name in projector and name.endswith("weight")]
    biases = [p for name, p in model.named_parameters() if name in projector and name.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [
            {"params": lora, "lr": recipe["lr"], "weight_decay": recipe["wd"]},
            {"params": weights, "lr": recipe["proj_lr"], "weight_decay": recipe["wd"]},
            {"params": biases, "lr": recipe["proj_lr"], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / recipe["steps"])
    losses, norms = [], []
    model.train()
    for step in range(recipe["steps"]):
        ids, labels, pixels = (tensors()[f"train_step{step}.{key}"] for key in ("input_ids", "labels", "images_fp16"))
        ids = torch.tensor([expanded(row) for row in ids.tolist()])
        loss = model(input_ids=ids, labels=labels, pixel_values=pixels).loss
        loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norms.append(float(nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(EXPECTED["train"]["losses"], abs=tolerance.QWEN_TRAIN_LOSS)
    assert norms == pytest.approx(EXPECTED["train"]["grad_norms_before_clip"], rel=1e-3)
    for name, wanted in tensors().items():
        if name.startswith("train_final."):
            found = (
                final_lora(model, name)
                if "lora_" in name
                else model.get_base_model().projector.get_parameter(name.partition("feature_proj.")[2])
            )
            close(found.detach(), wanted, tolerance.QWEN_TRAINED_WEIGHTS)
    after = dict(model.named_parameters())
    assert all((after[name] != value).any() for name, value in before.items())


def test_what_is_trainable_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        names = freeze(load("base").model)
    assert names == ["projector.0.weight", "projector.0.bias", "projector.2.weight", "projector.2.bias"]
    assert "trainable: 4 parameters in projector.0.weight" in caplog.text
    resumed = load().model
    assert tie_shared_lora(resumed) == 4
    names = freeze(resumed)
    modules = {name.partition(".lora_")[0].rpartition(".")[2] for name in names if "lora_" in name}
    assert modules == {"q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"}
    assert len(names) == 4 + 2 * (2 * 5 - 2)


def test_a_half_precision_network_trains_in_float32() -> None:
    """Trap: bfloat16 weights stay where they are under steps of 3e-5."""
    vlm = load(dtype="bfloat16")
    model = vlm.model.train()
    names = freeze(model)
    parameters = dict(model.named_parameters())
    assert {parameters[name].dtype for name in names} == {torch.float32}
    assert parameters["base_model.model.lm_head.weight"].dtype == torch.bfloat16
    before = {name: parameters[name].detach().clone() for name in names}
    batch = vlm.processor.apply_chat_template(
        training_messages(), padding_side="right", return_labels=True, add_generation_prompt=False
    )
    model(**batch).loss.backward()
    torch.optim.AdamW([parameters[name] for name in names], lr=3e-5, weight_decay=0.0).step()
    moved = [float((parameters[name] != value).float().mean()) for name, value in before.items()]
    assert min(moved) > 0.9


def test_gradients_stay_out_of_the_tower() -> None:
    model = load("base").model
    freeze(model)
    model.train()
    assert not model.vision_tower.training
    batch = processor().apply_chat_template(
        training_messages(), padding_side="right", return_labels=True, add_generation_prompt=False
    )
    model.activation_checkpointing_enable()
    model(**batch).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        name for name, _ in model.named_parameters() if name.startswith("projector.")
    }


# -- caches, batches, saving -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["cap_zh", "two_turns", "long_ntk"])
def test_without_a_cache(name: str) -> None:
    inputs = processor().apply_chat_template(messages(name))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = network().generate(**inputs, **options)
    if name != "two_turns":
        assert torch.equal(network().generate(**inputs, **options, use_cache=False), cached)
    inputs.pop("attention_mask")
    assert torch.equal(network().generate(**inputs, **options), cached)


@torch.no_grad()
def test_a_left_padded_batch_with_and_without_images() -> None:
    batch = processor().apply_chat_template([messages(name) for name in PROMPTS])
    out = network()(**batch)
    for index, name in enumerate(PROMPTS):
        wanted = tensors()[f"base_logits_{name}"]
        tolerance.qwen_logits(out.logits[index, -len(wanted) :], wanted)
    tokens = network().generate(**batch, max_new_tokens=24, do_sample=False, eos_token_id=None)
    for index, name in enumerate(PROMPTS):
        assert tokens[index, -24:].tolist() == EXPECTED["generate"]["base"][name]["tokens"]


def test_a_batch_equals_single_chats_and_streams() -> None:
    vlm = shared()
    conversations = [messages(name) for name in PROMPTS]
    singles = [vlm.chat(conversation, max_new_tokens=12) for conversation in conversations]
    batch = vlm.batch(conversations, max_new_tokens=12)
    assert [reply.token_ids for reply in batch] == [reply.token_ids for reply in singles]
    assert "".join(vlm.stream(conversations[0], max_new_tokens=12)) == singles[0].text


def test_two_interleaved_requests() -> None:
    """One beyond `seq_length`, one that crosses it: each keeps the alpha of its own prefill."""
    vlm = shared()
    names = ("two_turns", "long_ntk")
    alone = [vlm.chat(messages(name), max_new_tokens=20).text for name in names]
    streams = [vlm.stream(messages(name), max_new_tokens=20) for name in names]
    pieces: list[list[str]] = [[], []]
    going = [0, 1]
    while going:
        for index in list(going):
            piece = next(streams[index], None)
            if piece is None:
                going.remove(index)
            else:
                pieces[index].append(piece)
    assert ["".join(parts) for parts in pieces] == alone


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    merged = load("merged")
    merged.model.save_pretrained(tmp_path)
    merged.processor.save_pretrained(tmp_path)
    again = lavish.load(tmp_path)
    config = again.model.config
    assert (config.vision_tower, config.language_model) == ("clip-vit-large-patch14", "Qwen-7B-Chat")
    assert (config.image_token_id, config.system_prompt) == (559, "你是一位图像理解助手。")
    wanted = merged.model.state_dict()
    assert again.model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in again.model.state_dict().items())
    reply = again.chat(messages("cap_zh"), max_new_tokens=24)
    assert reply.token_ids == EXPECTED["generate"]["merged"]["cap_zh"]["tokens"]
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert isinstance(auto, ClipQwenForConditionalGeneration)
    inputs = again.processor.apply_chat_template(messages("cap_zh"))
    with torch.no_grad():
        tolerance.qwen_logits(auto(**inputs).logits, merged.model(**inputs).logits)


def test_what_was_trained_is_saved_as_the_release_saves_it(tmp_path: Path) -> None:
    save_trained(shared().model, tmp_path / "checkpoint-1")
    for name in ("adapter_model.bin", "other_params.bin"):
        found = torch.load(tmp_path / "checkpoint-1" / name, weights_only=True)
        wanted = torch.load(TRAINED / name, weights_only=True)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[key]) for key, value in found.items())
    fields = json.loads((tmp_path / "checkpoint-1/adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["target_modules"]) == (4, 32, ["c_attn", "w1", "w2"])
    again = lavish.load(tmp_path / "checkpoint-1", llm=LLM, vision_tower=TOWER)
    inputs = processor().apply_chat_template(messages("cap_zh"))
    with torch.no_grad():
        tolerance.qwen_logits(again.model(**inputs).logits[0], tensors()["lora_logits_cap_zh"])
    save_trained(network(), tmp_path / "checkpoint-2")
    assert [path.name for path in (tmp_path / "checkpoint-2").iterdir()] == ["other_params.bin"]


def test_a_lora_that_the_release_cannot_say(tmp_path: Path) -> None:
    vlm = load()
    with torch.no_grad():
        vlm.model.get_base_model().language_model.layers[1].self_attn.k_proj.lora_A["default"].weight += 1
    with pytest.raises(ConfigError, match=r"layer 1: self_attn\.q_proj, .* have not one lora_A"):
        save_trained(vlm.model, tmp_path / "checkpoint-1")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_lavish_saved(tmp_path: Path) -> None:
    merged = load("base")
    merged.model.save_pretrained(tmp_path / "base")
    merged.processor.save_pretrained(tmp_path / "base")
    shared().model.save_pretrained(tmp_path / "adapter")
    again = lavish.load(tmp_path / "base", adapter=tmp_path / "adapter")
    inputs = processor().apply_chat_template(messages("cap_zh"))
    with torch.no_grad():
        tolerance.qwen_logits(again.model(**inputs).logits[0], tensors()["lora_logits_cap_zh"])
    released = lavish.load(tmp_path / "base", adapter=RELEASE / "checkpoint-27000")
    with torch.no_grad():
        tolerance.qwen_logits(released.model(**inputs).logits[0], tensors()["lora_logits_cap_zh"])


def test_a_network_with_its_lora_is_saved_and_loaded_again(tmp_path: Path) -> None:
    vlm = load()
    with torch.no_grad():
        vlm.model.get_base_model().projector[2].bias += 0.5  # as after a training
    inputs = processor().apply_chat_template(messages("cap_zh"))
    for folder in (tmp_path / "first", tmp_path / "second"):
        vlm.model.save_pretrained(folder)
        vlm.processor.save_pretrained(folder)
        again = lavish.load(folder)
        assert again.adapters == ("default",)
        with torch.no_grad():
            tolerance.qwen_logits(again.model(**inputs).logits, vlm.model(**inputs).logits)
        vlm = again
    elsewhere = lavish.load(tmp_path / "second", llm=LLM, vision_tower=TOWER)
    with torch.no_grad():
        tolerance.qwen_logits(elsewhere.model(**inputs).logits, vlm.model(**inputs).logits)


# -- real and odd sizes ------------------------------------------------------------------------------------------------


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    with gzip.open(FIXTURE / f"manifest_{name}.json.gz", "rt") as file:
        return {key: tuple(shape) for key, (shape, _) in json.load(file).items()}


def test_the_real_sizes_are_consumed() -> None:
    llm = read_qwen_config(
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 22016,
            "seq_length": 8192,
        },
        "",
    )
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    config = ClipQwenConfig(vision_config=vision, text_config=llm.to_dict())
    assert config.num_image_tokens == 256
    assert config.eos_token_id == [151643, 151644, 151645]
    with torch.device("meta"):
        network = ClipQwenForConditionalGeneration(config)
    stored = manifest("Qwen-7B-Chat")
    stored |= {f"vision_tower.{name}": shape for name, shape in manifest("clip-vit-large-patch14").items()}
    stored |= {f"projector.{name}": shape for name, shape in manifest("other_params_Qwen-7B-Chat").items()}
    places = plan(stored, RULES)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert places.sources.keys() == shapes.keys()
    for name, source in places.sources.items():
        shape = list(stored[source])
        if name in places.parts:
            start, stop = places.parts[name].span(shape) or (0, 0)
            shape[0] = stop - start
        assert tuple(shape) == shapes[name], name
    dropped = set(places.dropped)
    assert not {name for name in dropped if not name.startswith("vision_tower.")}
    used = sum(value.numel() for name, value in network.state_dict().items() if name.startswith("vision_tower."))
    assert used == 303_177_728
    assert sum(value.numel() for value in network.language_model.parameters()) + network.lm_head.weight.numel() == (
        7_721_324_544
    )
    assert sum(value.numel() for value in network.projector.parameters()) == 20_979_712


def test_the_real_adapter_is_consumed() -> None:
    stored = manifest("adapter_Qwen-7B-Chat_r128_c_attn_w1_w2")
    tensors = {name: torch.empty(shape, device="meta") for name, shape in stored.items()}
    fields, native = native_adapter({"target_modules": ["c_attn", "w1", "w2"]}, tensors)
    assert len(native) == 32 * 5 * 2
    assert "q_proj" in fields["target_modules"]
    prefix = "base_model.model.language_model.layers.31."
    assert native[f"{prefix}self_attn.k_proj.lora_B.weight"].shape == (4096, 128)
    assert native[f"{prefix}mlp.gate_proj.lora_B.weight"].shape == (11008, 128)


@pytest.mark.parametrize(
    "change",
    [
        {"vision_config": {"image_size": 70}},
        {"vision_config": {"num_hidden_layers": 1, "num_attention_heads": 3}},
        {"text_config": {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}},
    ],
    ids=["larger pictures", "three heads", "two heads"],
)
@torch.no_grad()
def test_odd_sizes(change: dict[str, Any]) -> None:
    config = read_config(network().config.to_dict(), "config.json", **change, shortest_edge=None)
    odd = ClipQwenForConditionalGeneration(config).eval()
    made = type(processor()).from_config(config, processor().tokenizer)
    inputs = made.apply_chat_template(messages("cap_zh"))
    assert inputs["input_ids"].shape[1] == 32 + config.num_image_tokens
    assert odd(**inputs).logits.isfinite().all()


def test_a_conversation_that_grows_beyond_seq_length() -> None:
    """The cache of the first turn (alpha 1) is of no use to the second (alpha 3)."""
    conversation = messages("cap_zh")
    vlm, fresh = shared(), VLM(network("lora"), processor(), eos_token_ids=[END_OF_TEXT])
    vlm.conversations.clear()
    for _ in range(3):
        reply = vlm.chat(conversation, max_new_tokens=12)
        fresh.conversations.clear()
        assert reply.token_ids == fresh.chat(conversation, max_new_tokens=12).token_ids
        conversation = [
            *conversation,
            {"role": "assistant", "content": "图中有一个红色的圆形和蓝色的方块。"},
            {"role": "user", "content": "How many people are there?"},
        ]
    assert processor().apply_chat_template(conversation)["input_ids"].shape[1] > 80


def test_requests_in_threads() -> None:
    vlm = shared()
    alone = {name: vlm.chat(messages(name), max_new_tokens=12).token_ids for name in PROMPTS}
    with ThreadPoolExecutor(4) as pool:
        replies = {name: pool.submit(vlm.chat, messages(name), max_new_tokens=12) for name in PROMPTS}
    assert {name: reply.result().token_ids for name, reply in replies.items()} == alone


# -- surroundings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 8])
def test_processes_that_would_cut_through_heads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int) -> None:
    """8 divides the 64 features of q, and not its 4 heads."""
    for name, value in {"WORLD_SIZE": size, "RANK": 0, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match=rf"with {size} processes: the 4 heads of .* do not divide\. Use 2 or 4"):
        load_share(
            family_of(network()), network().config, hf.read(LLM), dtype=torch.float32, device=torch.device("cpu")
        )


@torch.no_grad()
def test_in_eight_bits(tmp_path: Path) -> None:
    merged = load("merged")
    merged.model.save_pretrained(tmp_path)
    merged.processor.save_pretrained(tmp_path)
    small = lavish.load(tmp_path, quantization="int8")
    inputs = processor().apply_chat_template(messages("cap_zh"))
    wanted = tensors()["lora_logits_cap_zh"]
    difference = (small.model(**inputs).logits[0] - wanted).abs()
    assert 0 < difference.mean() < 0.1 * wanted.std()
    beneath = lavish.load(RELEASE, quantization="int8")  # the adapter stays in float32 on top
    difference = (beneath.model(**inputs).logits[0] - wanted).abs()
    assert 0 < difference.mean() < 0.1 * wanted.std()


def test_merging_by_the_surface(tmp_path: Path) -> None:
    vlm = load()
    assert len(vlm.adapters) == 1
    vlm.merge_adapter()
    assert isinstance(vlm.model, ClipQwenForConditionalGeneration)
    found = vlm.chat(messages("cap_zh"), max_new_tokens=24).token_ids
    assert found == EXPECTED["generate"]["merged"]["cap_zh"]["tokens"]
