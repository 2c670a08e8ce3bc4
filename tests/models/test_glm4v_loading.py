"""GLM-4V-9B through `lavish.load` and transformers' Auto classes: answers, batches, adapters, wrong folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from glm4v_fixture import (
    CASES,
    CHECKPOINT,
    FOLDER,
    IMAGE_CASES,
    conversations,
    expected,
    expected_json,
    inputs,
    weights,
)
from safetensors.torch import load_file
from tolerance import GLM4V, MERGED_WEIGHT
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    StaticCache,
)

import lavish
from lavish.common.errors import ConfigError, LavishError, NumericsError, PromptError
from lavish.inference.vlm import VLM
from lavish.models import model_zoo
from lavish.models.glm4v_9b.config import ChatGLMConfig
from lavish.models.glm4v_9b.model import Glm4v9bForCausalLM
from lavish.models.glm4v_9b.processor import Glm4v9bProcessor
from lavish.models.glm4v_9b.tokenizer import ChatGLM4Tokenizer

AUTO = (
    (AutoConfig, ChatGLMConfig),
    (AutoTokenizer, ChatGLM4Tokenizer),
    (AutoModelForCausalLM, Glm4v9bForCausalLM),
    (AutoModelForImageTextToText, Glm4v9bForCausalLM),
    (AutoProcessor, Glm4v9bProcessor),
)
PEFT_ASKS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def vlm():
    return lavish.load(CHECKPOINT)


def never_ends(vlm):
    """The same model, which no token stops."""
    return VLM(vlm.model, vlm.processor, eos_token_ids=[])


# Auto classes


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
def test_auto_classes_are_ours_and_run_no_code(trust, tmp_path):
    """Fault 11. The folder's auto_map names code files; with them there, none of them is run."""
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    for name in ("configuration_chatglm", "modeling_chatglm", "tokenization_chatglm"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of a checkpoint was run')")
    lavish.register()
    for auto, ours in AUTO:
        assert type(auto.from_pretrained(tmp_path, **trust)) is ours
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, **trust)
    row = expected_json()["tokenizer"][3]
    assert tokenizer.encode(row["text"]) == row["encode"]
    assert type(lavish.load(tmp_path).model) is Glm4v9bForCausalLM


def test_auto_model_gives_the_release_s_logits():
    lavish.register()
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval()
    with torch.no_grad():
        logits = model(**inputs("single_image")).logits
    torch.testing.assert_close(logits, expected()["single_image.logits"], **GLM4V)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_fixture_brings_no_code():
    assert not list(FOLDER.rglob("*.py"))


def test_saved_folders_load_everywhere(vlm, tmp_path):
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    lavish.register()
    for auto, ours in AUTO:
        assert type(auto.from_pretrained(tmp_path)) is ours
    again = lavish.load(tmp_path)
    for case in ("multi_turn", "text_only"):
        one, other = (model.chat(conversations()[case], **GREEDY) for model in (vlm, again))
        assert one.token_ids == other.token_ids
    state = again.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights().items())


def test_text_only_chatglm_is_refused_by_name(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(LavishError, match=r"'chatglm' and has no 'vision_config': a text-only model"):
        lavish.load(tmp_path)
    lavish.register()
    for auto in (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText):  # the tokenizer is the same
        with pytest.raises(ConfigError, match="text-only ChatGLM"):
            auto.from_pretrained(tmp_path)


def test_zoo():
    entry = model_zoo["glm-4v-9b"]
    assert entry is model_zoo["zai-org/glm-4v-9b"] is model_zoo["THUDM/glm-4v-9b"]
    network = lavish.build("zai-org/glm-4v-9b")
    assert sum(p.numel() for p in network.parameters()) == entry.num_parameters
    assert 2 * sum(value.numel() for value in network.state_dict().values()) == entry.num_bytes
    assert lavish.build("glm-4v-9b", num_layers=1, vision_config={"num_hidden_layers": 1}).config.num_hidden_layers == 1


# Answers


@pytest.mark.parametrize("case", CASES)
def test_chat_and_stream(vlm, case):
    endless, wanted = never_ends(vlm), expected_json()["cases"][case]
    reply = endless.chat(conversations()[case], **GREEDY)
    assert reply.token_ids == wanted["greedy"][0]
    assert reply.text == vlm.processor.decode(wanted["greedy"][0])
    assert "".join(endless.stream(conversations()[case], **GREEDY)) == reply.text
    assert vlm.chat(conversations()[case], **GREEDY).token_ids == wanted["generate"][0]


def test_batch_is_the_single_runs(vlm):
    endless = never_ends(vlm)
    replies = endless.batch([conversations()[case] for case in CASES], batch_size=4, **GREEDY)
    assert [reply.token_ids for reply in replies] == [expected_json()["cases"][case]["greedy"][0] for case in CASES]


def test_stop_ids_are_read_from_the_files(vlm, tmp_path):
    assert vlm._eos_token_ids == {500, 507, 509}
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**fields, "eos_token_id": [500, 83]}))
    reply = lavish.load(tmp_path).chat(conversations()["single_image"], **GREEDY)
    assert (reply.token_ids, reply.finish_reason) == ([296, 83], "stop")


def test_the_second_turn_keeps_its_picture(vlm):
    """Fault 13: the picture of turn 1 is part of turn 2's prompt, from the cache too."""
    talk, fresh = lavish.load(CHECKPOINT), never_ends(vlm)
    talk._eos_token_ids = frozenset()
    messages = conversations()["multi_turn"]
    first = talk.chat(messages[:1], **GREEDY)
    assert first.usage.prompt_tokens == 18
    second = talk.chat(messages, **GREEDY)
    assert second.usage.cached_tokens > 11  # the picture is not computed again
    assert second.token_ids == fresh.chat(messages, **GREEDY).token_ids
    assert second.token_ids == expected_json()["cases"]["multi_turn"]["greedy"][0]


def test_positions_are_the_limit(vlm):
    short = lavish.load(CHECKPOINT, config={"seq_length": 30})
    with pytest.raises(PromptError):
        short.chat([{"role": "user", "content": "x" * 60}])


@pytest.mark.parametrize("arguments", [{"quantization": "int8"}, {"pack": True}, {"dtype": "bfloat16"}])
def test_other_forms_of_the_weights_answer(vlm, arguments):
    """The same first token, of which the network is sure."""
    other = lavish.load(CHECKPOINT, **arguments)
    case = "system_image"
    reply, wanted = other.chat(conversations()[case], **GREEDY), expected_json()["cases"][case]["greedy"][0]
    assert reply.token_ids[0] == wanted[0]
    if arguments != {"pack": True}:
        kinds = {value.dtype for value in other.model.state_dict().values()}
        assert kinds <= {torch.int8, torch.float32} or kinds == {torch.bfloat16}


def test_nan_raises(vlm):
    """Fault 15."""
    broken = lavish.load(CHECKPOINT)
    with torch.no_grad():
        broken.model.lm_head.weight[3] = float("nan")
    for arguments in (GREEDY, {"do_sample": True, "max_new_tokens": 4}):
        with pytest.raises(NumericsError):
            broken.chat(conversations()["text_only"], **arguments)


# Adapters


@pytest.fixture(scope="module")
def adapter_expected():
    return load_file(FOLDER / "expected_adapter.safetensors")


def check_adapter(model, wanted, kind):
    for case in ("single_image", "text_only"):
        with torch.no_grad():
            logits = model(**inputs(case)).logits
        torch.testing.assert_close(logits, wanted[f"{kind}.{case}.logits"], **GLM4V)


@PEFT_ASKS
def test_an_adapter_s_folder_loads_its_base_first(adapter_expected):
    loaded = lavish.load(FOLDER / "adapter")
    check_adapter(loaded.model, adapter_expected, "unmerged")
    with loaded.model.disable_adapter():
        check_adapter(loaded.model, adapter_expected, "base")
    lora = [name for name, _ in loaded.model.named_parameters() if ".lora_A." in name]
    assert len(lora) == 4  # the target matches both layers of the text and both of the tower
    merged = loaded.model.merge_and_unload()
    check_adapter(merged, adapter_expected, "merged")
    weight = merged.transformer.encoder.layers[0].self_attention.query_key_value.weight
    torch.testing.assert_close(weight, adapter_expected["merged.weight.layer0.query_key_value"], **MERGED_WEIGHT)


@PEFT_ASKS
def test_an_adapter_on_a_base_that_is_given(adapter_expected, tmp_path):
    check_adapter(lavish.load(CHECKPOINT, adapter=FOLDER / "adapter").model, adapter_expected, "unmerged")
    shutil.copy(FOLDER / "adapter_hub_name/adapter_config.json", tmp_path)  # names the hub's base
    shutil.copy(FOLDER / "adapter/adapter_model.safetensors", tmp_path)
    loaded = lavish.load(tmp_path, base=CHECKPOINT)
    check_adapter(loaded.model, adapter_expected, "unmerged")
    assert loaded.chat(conversations()["single_image"], **GREEDY).token_ids


@PEFT_ASKS
def test_an_adapter_with_the_names_of_another_network(tmp_path):
    """Fault 10: the published recipe's q_proj, k_proj, v_proj are no modules here, where the three are one."""
    fields = json.loads((FOLDER / "adapter/adapter_config.json").read_text())
    fields["target_modules"] = ["q_proj", "k_proj", "v_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    shutil.copy(FOLDER / "adapter/adapter_model.safetensors", tmp_path)
    with pytest.raises(ConfigError, match=r"does not fit this .*_proj"):
        lavish.load(tmp_path, base=CHECKPOINT)


def test_a_wrong_tokenizer_file(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    shutil.copy(Path(FOLDER).parents[1] / "cogvlm/open/checkpoint/tokenizer.model", tmp_path)
    with pytest.raises(LavishError, match=r"tokenizer\.model is no rank file: .*another model's tokenizer"):
        lavish.load(tmp_path)


def test_features_are_computed_once(vlm):
    endless = never_ends(vlm)
    for case in IMAGE_CASES[:2]:
        endless.chat(conversations()[case], **GREEDY)
    assert len(endless.features) == 1


# The network with the processor's batches


def test_batches_of_the_processor_go_to_generate_as_they_are(vlm):
    batch = vlm.processor.apply_chat_template([conversations()[case] for case in CASES])
    wanted = torch.cat([expected()[f"{case}.greedy_tokens_no_eos_stop"] for case in CASES])
    tokens = vlm.model.generate(**batch, **GREEDY, eos_token_id=None)
    assert torch.equal(tokens[:, batch["input_ids"].shape[1] :], wanted)
    single = vlm.processor.apply_chat_template(conversations()["multi_turn"])
    features = vlm.model.get_image_features(single.pop("pixel_values"))
    tokens = vlm.model.generate(**single, image_features=features, **GREEDY, eos_token_id=None)
    assert torch.equal(tokens[:, single["input_ids"].shape[1] :], wanted[CASES.index("multi_turn")][None])


@torch.no_grad()
def test_embeddings_with_positions(vlm):
    single = vlm.processor.apply_chat_template(conversations()["multi_turn"])
    embeds = vlm.model.embed(single["input_ids"], vlm.model.get_image_features(single["pixel_values"]))
    positions = vlm.model.position_ids_from(single["input_ids"])
    logits = vlm.model(inputs_embeds=embeds, position_ids=positions).logits
    torch.testing.assert_close(logits, expected()["multi_turn.logits"], **GLM4V)


@torch.no_grad()
def test_a_step_is_one_graph(vlm):
    """A decoding step on a static cache holds nothing that a compiler must leave the graph for."""
    network = vlm.model
    cache = StaticCache(config=network.config, max_cache_len=64)
    output = network(**vlm.processor.apply_chat_template(conversations()["multi_turn"]), past_key_values=cache)
    step = torch.compile(network.forward, backend="eager", fullgraph=True)
    deltas, found = output.rope_deltas, []
    for _ in range(4):
        found.append(int(output.logits[0, -1].argmax()))
        output = step(torch.tensor([found[-1:]]), past_key_values=cache, rope_deltas=deltas)
    assert found == expected_json()["cases"]["multi_turn"]["greedy"][0][:4]
