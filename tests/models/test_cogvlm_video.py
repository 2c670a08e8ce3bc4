"""CogVLM2-Video: no fixture of the release exists, so it is held against its key list, its sizes, its written rules,
and the image model where the two must agree.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cogvlm_fixture import FIXTURES, golden
from PIL import Image
from safetensors.torch import load_file
from tolerance import PIXELS, SAME_MATH, close
from transformers import DynamicCache
from warm import run_together

import lavish
from lavish.checkpoints.writer import save_sharded
from lavish.common.errors import ConfigError, MediaError, MissingKeys, PromptError, UnexpectedKeys
from lavish.common.video import sample_frames
from lavish.inference.build import build
from lavish.models.cogvlm.config import read_config
from lavish.models.cogvlm.manifest import read_sizes, tensors
from lavish.models.cogvlm.model import CogVLMForCausalLM, position_ids_from
from lavish.models.cogvlm.processor import CogVLMProcessor
from lavish.models.cogvlm.video import base_frames, chat_frames, frame_pixels, read_clip
from lavish.processors.pixels import normalize

IMAGE_EXPERTS = ("vision_expert", "vision_mlp")
SLOTS = 11  # of a frame of the fixture: boi, 3 x 3, eoi
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def fields(**changes) -> dict:
    released = json.loads((golden("cogvlm2").folder / "checkpoint/config.json").read_text())
    return {**released, "architectures": ["CogVLMVideoForCausalLM"], "template_version": "chat", **changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A released folder of a small CogVLM2-Video: the fixture's, without its image experts."""
    path = tmp_path_factory.mktemp("video")
    (path / "config.json").write_text(json.dumps(fields()))
    weights = golden("cogvlm2").weights()
    save_sharded({name: w for name, w in weights.items() if not any(part in name for part in IMAGE_EXPERTS)}, path)
    source = golden("cogvlm2").folder / "checkpoint"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((source / name).read_bytes())
    return path


@pytest.fixture(scope="module")
def vlm(folder):
    return lavish.load(folder, device="cpu")


def frames(count: int, seed: int = 0) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (60, 90, 3), dtype=np.uint8)) for _ in range(count)]


def messages(clip, text: str = "What happens?") -> list[dict]:
    return [{"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": text}]}]


# -- layout ------------------------------------------------------------------------------------------------------------


def test_the_key_list_and_the_size_of_the_release():
    """1029 tensors: CogVLM2's without six a layer. 25,015,065,088 bytes; the six released shards have 133,920 more."""
    network = build("cogvlm2-llama3-caption")
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert len(shapes) == 1029
    assert sum(tensor.numel() for tensor in network.state_dict().values()) * 2 == 25_015_065_088
    packed = (FIXTURES / "cogvlm2/manifest_cogvlm2-llama3-chat-19B.json.gz").read_bytes()
    image_model = json.loads(gzip.decompress(packed))
    left = {name: tuple(row[0]) for name, row in image_model.items() if not any(e in name for e in IMAGE_EXPERTS)}
    left["model.vision.patch_embedding.position_embedding.weight"] = (257, 1792)
    assert shapes == left
    assert network.config.num_image_tokens == 66
    assert network.config.max_frames == 24


def test_the_manifest_is_the_network():
    network = CogVLMForCausalLM(read_config(fields(), "config.json"))
    counted = {tensor.name: tensor.shape for tensor in tensors(read_sizes(fields(), "config.json"))}
    assert counted == {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("template", ["chat", "base"])
def test_config_read_from_the_release_and_from_what_lavish_saved(template, tmp_path):
    config = read_config(fields(template_version=template), "config.json")
    assert (config.is_video, config.max_frames, config.version) == (True, 24, 2)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["CogVLMForCausalLM"]}
    again = read_config(saved, "config.json")
    assert (again.max_frames, again.template_version) == (24, template)
    assert not read_config(fields(architectures=["CogVLMForCausalLM"]), "config.json").is_video
    assert read_config(fields(), "config.json", max_frames=8).max_frames == 8
    with pytest.raises(ConfigError, match="max_frames is 0"):
        read_config(fields(), "config.json", max_frames=0)
    with pytest.raises(ConfigError, match="max_frames makes it a CogVLM2-Video"):
        read_config({**fields(), "num_multi_query_heads": None}, "config.json")


def test_weights_of_the_image_model_do_not_load_as_video_nor_the_other_way(folder, tmp_path):
    released = golden("cogvlm2").folder / "checkpoint"
    with pytest.raises((MissingKeys, UnexpectedKeys), match=r"vision_expert|vision_mlp"):
        lavish.load(folder, config={"architectures": ["CogVLMForCausalLM"], "max_frames": None}, device="cpu")
    with pytest.raises((MissingKeys, UnexpectedKeys), match=r"vision_expert|vision_mlp"):
        lavish.load(released, config={"max_frames": 24}, device="cpu")


# -- which frames, and their pixels ------------------------------------------------------------------------------------


def release_chat_rule(times: list[float], most: int) -> list[int]:
    """The demo's loop, by its description: for each second the frame that is nearest, the first of equals."""
    return [times.index(min(times, key=lambda t: abs(t - second))) for second in range(round(max(times)) + 1)][:most]


@pytest.mark.parametrize(("rate", "count"), [(30.0, 1), (30.0, 100), (25.0, 900), (0.5, 7), (29.97, 333), (3.0, 20)])
def test_a_chat_model_sees_one_frame_a_second(rate, count):
    times = [index / rate for index in range(count)]
    assert chat_frames(times, 24) == release_chat_rule(times, 24)
    assert len(chat_frames(times, 24)) == min(round(times[-1]) + 1, 24)


@pytest.mark.parametrize(("rate", "count", "last"), [(30.0, 3000, 1799), (25.0, 500, 499), (10.0, 5, 4), (1.0, 1, 0)])
def test_a_base_model_sees_frames_of_the_first_minute(rate, count, last):
    chosen = base_frames([index / rate for index in range(count)], 24)
    assert len(chosen) == 24
    assert (chosen[0], chosen[-1]) == (0, last)
    assert chosen == sorted(chosen)


def test_frames_of_a_file(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(35):
            picture = Image.new("RGB", (64, 48), (index * 7, 0, 0))
            for packet in stream.encode(av.VideoFrame.from_image(picture)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    seen = read_clip(path, 24, is_base=False)
    assert len(seen) == 4  # at 0, 1, 2 and 3 seconds
    reds = [np.asarray(frame)[..., 0].mean() for frame in seen]
    assert all(abs(red - 70 * second) < 15 for second, red in enumerate(reds))
    assert len(read_clip(path, 24, is_base=True)) == 24
    assert len(sample_frames(path, lambda times: range(len(times)))) == 35
    with pytest.raises(MediaError, match="paths are not opened here"):
        read_clip(path, 24, is_base=False, allow_paths=False)
    path.write_bytes(b"no video")
    with pytest.raises(MediaError, match="not a video"):
        read_clip(path, 24, is_base=False)


def test_lists_of_frames_are_taken_as_they_are():
    assert len(read_clip(frames(5), 24, is_base=True)) == 5
    with pytest.raises(MediaError, match="25 frames were given and this model takes 24"):
        read_clip(frames(25), 24, is_base=True)
    with pytest.raises(MediaError, match="no frame"):
        read_clip([], 24, is_base=True)


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (84, 84), (300, 85), (10, 12)])
def test_pixels_short_side_and_middle(size):
    """Normalised first, then resized without antialiasing, and cropped."""
    generator = np.random.default_rng(1)
    picture = Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    pixels = frame_pixels(picture, 84)
    assert pixels.shape == (3, 84, 84)
    if size == (84, 84):
        assert np.array_equal(pixels, normalize(picture))
    flat = frame_pixels(Image.new("RGBA", size, (200, 10, 30, 99)), 84)
    assert np.allclose(flat, normalize(Image.new("RGB", (84, 84), (200, 10, 30))), **PIXELS)
    ramp = Image.fromarray(np.repeat(np.arange(size[0])[None, :, None] % 256, size[1], 0).repeat(3, 2).astype(np.uint8))
    middle = frame_pixels(ramp, 84)[0, 42, 41:43].mean() if size[0] < 256 else None
    if middle is not None:
        assert middle == pytest.approx(normalize(ramp)[0, 0].mean(), abs=0.03)


# -- ids and positions -------------------------------------------------------------------------------------------------


def test_frames_carry_their_index_with_the_chat_template(vlm):
    inputs = vlm.processor.apply_chat_template(messages(frames(12)), chat_template="chat")
    ids, types = inputs["input_ids"][0], inputs["token_type_ids"][0]
    numbers = [vlm.processor.tokenizer.encode(str(i), add_special_tokens=False) for i in range(12)]
    expected = [0] + [kind for number in numbers for kind in [1] * SLOTS + [0] * len(number)]
    assert types[: len(expected)].tolist() == expected
    assert not types[len(expected) :].any()
    digits = [int(i) for i, kind in zip(ids[1 : len(expected)], types[1 : len(expected)]) if kind == 0]
    assert digits == [i for number in numbers for i in number]
    assert vlm.processor.decode(ids[len(expected) :]) == "Question: What happens? Answer:"
    assert inputs["pixel_values"].shape == (12, 3, 84, 84)
    positions = position_ids_from(types[None])[0].tolist()
    at, place = 1, 1
    for number in numbers:  # c, then c + 1 for all patches, c + 2, then the digits
        wanted = [place, *[place + 1] * (SLOTS - 2), place + 2, *range(place + 3, place + 3 + len(number))]
        assert positions[at : at + len(wanted)] == wanted
        at, place = at + len(wanted), place + 3 + len(number)


@pytest.mark.parametrize("template", ["base", "vqa"])
def test_other_templates_put_frames_side_by_side(vlm, template):
    """One run of slots: its first 1, its last 3, and everything between 2, as the release counts."""
    inputs = vlm.processor.apply_chat_template(messages(frames(3)), chat_template=template)
    types = inputs["token_type_ids"]
    assert types[0, : 2 + 3 * SLOTS].tolist() == [0] + [1] * 3 * SLOTS + [0]
    assert position_ids_from(types)[0, : 2 + 3 * SLOTS].tolist() == [0, 1, *[2] * (3 * SLOTS - 2), 3, 4]


# -- the network where it coincides with the image model ---------------------------------------------------------------


@torch.no_grad()
def test_text_alone_is_the_image_models(vlm):
    ids = torch.tensor([golden("cogvlm2").expected["text_only_chat"]["input_ids"]])
    expected = golden("cogvlm2").tensors["text_only_chat.logits"]
    close(vlm.model(input_ids=ids).logits[0], expected)


@torch.no_grad()
def test_one_frame_is_an_image_whose_experts_are_the_texts(vlm):
    """An image model whose image experts are copies of its language experts."""
    twin = golden("cogvlm2").network()
    for layer in twin.model.layers:
        attention = layer.self_attn
        attention.vision_expert_query_key_value.weight.copy_(attention.language_expert_query_key_value.weight)
        attention.vision_expert_query_key_value.bias.zero_()
        attention.vision_expert_dense.load_state_dict(attention.language_expert_dense.state_dict())
        layer.mlp.vision_mlp.load_state_dict(layer.mlp.language_mlp.state_dict())
    inputs = vlm.processor.apply_chat_template(messages(frames(1)), chat_template="base")
    close(vlm.model(**inputs).logits, twin(**inputs).logits, SAME_MATH)
    image = [
        {
            "role": "user",
            "content": [{"type": "image", "image": frames(1)[0]}, {"type": "text", "text": "What happens?"}],
        }
    ]
    assert torch.equal(vlm.processor.apply_chat_template(image, chat_template="base")["input_ids"], inputs["input_ids"])


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chat", "base"])
@torch.no_grad()
def test_chat_stream_batch_and_generate_agree(vlm, template):
    chats = [messages(frames(3)), messages(frames(1, seed=4), "Who?"), [{"role": "user", "content": "Hello"}]]
    options = {"max_new_tokens": 8, "temperature": 0.0, "chat_template": template}
    singles = [vlm.chat(chat, **options).token_ids for chat in chats]
    assert [reply.token_ids for reply in vlm.batch(chats, **options)] == singles
    for chat, single in zip(chats, singles, strict=True):
        inputs = vlm.processor.apply_chat_template(chat, chat_template=template)
        for use_cache in (True, False):
            ids = vlm.model.generate(**inputs, **GREEDY, use_cache=use_cache)[0, inputs["input_ids"].shape[1] :]
            assert ids.tolist() == single


def test_a_follow_up_reuses_the_cache_and_frames_side_by_side_are_counted_anew(vlm, folder):
    """With three frames the second one's last slot is inside the run: its key is of another position."""
    clip, options = frames(3), {"max_new_tokens": 4, "temperature": 0.0}
    first = vlm.chat(messages(clip), **options)
    history = [*messages(clip), {"role": "assistant", "content": first.text}, {"role": "user", "content": "And then?"}]
    again = vlm.chat(history, **options)
    assert again.usage.cached_tokens > 3 * SLOTS
    assert again.token_ids == lavish.load(folder, device="cpu").chat(history, **options).token_ids
    for count in (2, 3, 2):
        base = {**options, "chat_template": "base"}
        fresh = lavish.load(folder, device="cpu").chat(messages(clip[:count], "Go"), **base)
        assert vlm.chat(messages(clip[:count], "Go"), **base).token_ids == fresh.token_ids


@torch.no_grad()
def test_forward_in_two_parts(vlm):
    inputs = vlm.processor.apply_chat_template(messages(frames(2)))
    whole, cut = vlm.model(**inputs).logits, inputs["input_ids"].shape[1] - 4
    cache = DynamicCache()
    head = {name: inputs[name][:, :cut] for name in ("input_ids", "token_type_ids", "attention_mask")}
    vlm.model(**head, pixel_values=inputs["pixel_values"], past_key_values=cache, use_cache=True)
    tail = vlm.model(
        input_ids=inputs["input_ids"][:, cut:], attention_mask=inputs["attention_mask"], past_key_values=cache
    )
    close(tail.logits, whole[:, cut:], SAME_MATH)


@torch.no_grad()
def test_saved_and_loaded_again(vlm, tmp_path):
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    again = lavish.load(tmp_path, device="cpu")
    inputs = again.processor.apply_chat_template(messages(frames(2)))
    assert torch.equal(again.model(**inputs).logits, vlm.model(**inputs).logits)
    assert CogVLMProcessor.from_pretrained(tmp_path).max_frames == 24


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input(vlm):
    inputs = vlm.processor.apply_chat_template(messages(frames(2)))
    with pytest.raises(PromptError, match=r"1 image\(s\) were given and 2"):
        vlm.model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
    torn = {name: inputs[name][:, :-1] for name in ("input_ids", "token_type_ids", "attention_mask")}
    torn["token_type_ids"] = torn["token_type_ids"].clone()
    torn["token_type_ids"][0, 3] = 0
    with pytest.raises(
        PromptError, match=f"row 0 has {2 * SLOTS - 1} image slots .* a frame of this model takes {SLOTS}"
    ):
        vlm.model(**torn, pixel_values=inputs["pixel_values"])
    many = torch.ones(1, 25 * SLOTS, dtype=torch.long)
    with pytest.raises(PromptError, match="row 0 has 25 frames; a video has 24 at most"):
        vlm.model(input_ids=many, token_type_ids=many, pixel_values=torch.zeros(25, 3, 84, 84))
    two = [{"role": "user", "content": [*messages(frames(1))[0]["content"], {"type": "image", "image": frames(1)[0]}]}]
    with pytest.raises(PromptError, match="holds 2 videos and images"):
        vlm.chat(two)
    with pytest.raises(PromptError, match="without an image"):
        vlm.chat(messages(frames(1)), chat_template="vicuna")
    with pytest.raises(PromptError, match="sees no videos"):
        golden_vlm().chat(messages(frames(1)))


def golden_vlm():
    return lavish.load(golden("cogvlm2").folder / "checkpoint", device="cpu")


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_two_processes_give_what_one_gives(folder, vlm, tmp_path):
    """Its layers have no image experts: the plan of the image model finds what there is to cut."""
    program = Path(__file__).with_name("cogvlm_video_program.py")
    done = run_together(2, program, folder, tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        logits = vlm.model(**vlm.processor.apply_chat_template(messages(frames(3)))).logits
    alone = vlm.batch([messages(frames(3)), messages(frames(2), "And now?")], **GREEDY)
    whole = {name: value.nbytes for name, value in vlm.model.named_parameters()}
    cut = [name for name in whole if "language_expert" in name or "language_mlp" in name or name == "lm_head.weight"]
    assert len(cut) == 5 * vlm.model.config.num_hidden_layers + 1
    shares = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for found in shares:
        close(found["logits"], logits, SAME_MATH)
        assert torch.equal(found["logits"], shares[0]["logits"])
        assert [found[f"tokens.{index}"].tolist() for index in range(2)] == [reply.token_ids for reply in alone]
        assert all(int(found[name]) * 2 == whole[name] for name in cut)
