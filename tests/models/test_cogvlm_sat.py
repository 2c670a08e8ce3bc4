"""CogVLM v1 out of SAT's layout: parity with the original code stage by stage, names and config both ways, faults."""

import gzip
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tolerance import SAT_LOGITS, SAT_LOSS, SAT_PIXELS, close

import lavish
import lavish.models as table
from lavish.checkpoints import sat as layout
from lavish.checkpoints.output import TargetOptions, write_plan
from lavish.checkpoints.rules import plan
from lavish.checkpoints.tensor_map import Assembled, TensorInfo, TensorMap
from lavish.common.errors import (
    CheckpointError,
    ConfigError,
    MissingKeys,
    PromptError,
    ShapeMismatch,
    UnexpectedKeys,
    UnknownLayout,
)
from lavish.inference.checkup import check
from lavish.inference.convert import convert as lavish_convert
from lavish.models.cogvlm import manifest, sat
from lavish.models.cogvlm.model import position_ids_from, vision_expert_mask
from lavish.models.cogvlm.sat_config import config_fields, sat_fields, template_of_name
from lavish.models.cogvlm.sat_names import RULES, TO_SAT

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
FOLDER = FIXTURES / "cogvlm_sat"
OPEN = FOLDER / "open"
EXPECTED = json.loads((OPEN / "expected.json").read_text(encoding="utf-8"))
INPUTS = json.loads((OPEN / "inputs/prompts.json").read_text(encoding="utf-8"))
PROMPTS = {prompt["id"]: prompt for prompt in INPUTS["prompts"]}
TEMPLATE = {"chat_old": "chat", "base": "base", "vqa": "vqa", "chat": "inst"}
RANK0 = "1/mp_rank_00_model_states.pt"
EVERY_PROMPT = pytest.mark.parametrize("name", PROMPTS)
RELEASES = pytest.mark.parametrize("release", ["base-224", "chat-v1.1", "grounding-generalist"])


@cache
def tensors() -> dict[str, torch.Tensor]:
    return load_file(OPEN / "expected.safetensors")


@cache
def loaded(folder: str = "checkpoint") -> lavish.VLM:
    return lavish.load(OPEN / folder, tokenizer=OPEN / "tokenizer", device="cpu")


def messages(prompt: dict[str, Any], answer: str | None = None) -> list[dict[str, Any]]:
    """Give a prompt as messages. SAT's vqa leaves the history out, which `vqa` of lavish and of the Hugging Face code
    do not: there it is left out here."""
    turns = [] if prompt["version"] == "vqa" else prompt.get("history", [])
    found: list[dict[str, Any]] = []
    for question, reply in turns:
        found += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    image = {"type": "image", "image": str(OPEN / "inputs" / prompt["image"])}
    text = {"type": "text", "text": prompt.get("query", prompt.get("prompt"))}
    found.append({"role": "user", "content": [image, text]})
    return found if answer is None else [*found, {"role": "assistant", "content": answer}]


def inputs(name: str) -> Any:
    prompt = PROMPTS[name]
    return loaded().processor.apply_chat_template(messages(prompt), chat_template=TEMPLATE[prompt["version"]])


def copy(target: Path, source: str = "checkpoint") -> Path:
    return Path(shutil.copytree(OPEN / source, target))


def set_config(root: Path, **changes: Any) -> Path:
    fields = json.loads((root / layout.CONFIG).read_text())
    kept = {name: value for name, value in {**fields, **changes}.items() if value is not ...}
    (root / layout.CONFIG).write_text(json.dumps(kept))
    return root


def rewrite(root: Path, change: Any, rank: int = 0) -> Path:
    file = root / "1" / layout.RANK_FILE.format(rank)
    module = torch.load(file, weights_only=True)["module"]
    change(module)
    torch.save({"module": module}, file)
    return root


def open_release(root: Path) -> Any:
    return table.family("cogvlm").open_release(root, {})


def equal(one: Any, other: Any) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


# -- parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picture", ["landscape.png", "portrait.png", "square.png"])
def test_pixels(picture: str) -> None:
    pixels = loaded().processor.pixel_values(OPEN / "inputs" / picture)
    torch.testing.assert_close(pixels, tensors()[f"pixels.{picture}"], **SAT_PIXELS)


@EVERY_PROMPT
def test_text_ids_masks_and_positions_are_exact(name: str) -> None:
    entry, prompt = EXPECTED[name], PROMPTS[name]
    template = TEMPLATE[prompt["version"]]
    text = loaded().processor.apply_chat_template(messages(prompt), chat_template=template, tokenize=False)
    assert f"<EOI>{text}" == entry["prompt"]
    found = inputs(name)
    assert found["input_ids"].tolist() == [entry["input_ids"]]
    types = found["token_type_ids"]
    assert types.tolist() == [entry["image_embed_mask"]]
    assert vision_expert_mask(types).long().tolist() == [entry["vision_expert_mask"]]
    positions = position_ids_from(types)[0].tolist()
    new = len(entry["position_ids"]) - len(positions)
    assert positions + [positions[-1] + step for step in range(1, new + 1)] == entry["position_ids"]
    is_patch = [one == 1 and at > 1 and types[0, at + 1].item() == 1 for at, one in enumerate(types[0].tolist()[:-1])]
    assert [int(one) for one in is_patch] == entry["image_rope_mask"][:-1]


@EVERY_PROMPT
@pytest.mark.parametrize("folder", ["checkpoint", "checkpoint_mp2"])
@torch.no_grad()
def test_tower_projector_logits_and_greedy_ids(name: str, folder: str) -> None:
    network, found = loaded(folder).model, inputs(name)
    vision = network.model.vision
    patches = vision.encode(found["pixel_values"])
    if f"{name}.vision.vit" in tensors():  # one prompt of each picture has them
        close(patches[0], tensors()[f"{name}.vision.vit"])
        close(vision.linear_proj(patches)[0], tensors()[f"{name}.vision.linear_proj"])
    torch.testing.assert_close(network(**found).logits[0], tensors()[f"{name}.logits"], **SAT_LOGITS)
    tokens = network.generate(**found, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(tokens[0, found["input_ids"].shape[1] :], tensors()[f"{name}.greedy_ids"].long())


@EVERY_PROMPT
def test_chat_gives_the_released_tokens(name: str) -> None:
    prompt = PROMPTS[name]
    reply = loaded().chat(messages(prompt), chat_template=TEMPLATE[prompt["version"]], max_new_tokens=8)
    assert reply.token_ids == tensors()[f"{name}.greedy_ids"].tolist()


@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_training_batch_and_loss(index: int) -> None:
    entry, prompt = EXPECTED[f"train{index}"], INPUTS["train"][index]
    batch = loaded().processor.apply_chat_template(
        messages(prompt, prompt["caption"]),
        chat_template=TEMPLATE[prompt["version"]],
        add_generation_prompt=False,
        return_labels=True,
    )
    length = batch["input_ids"].shape[1]
    padding = len(entry["input_ids"]) - length
    assert batch["input_ids"][0].tolist() + [0] * padding == entry["input_ids"]
    assert batch["labels"][0].tolist() + [-100] * padding == entry["labels"]
    assert batch["token_type_ids"][0].tolist() + [0] * padding == entry["image_embed_mask"]
    loss = loaded().model(**batch).loss
    torch.testing.assert_close(loss, tensors()[f"train{index}.loss"].reshape(()), **SAT_LOSS)
    # SAT pads to 128 on the right and masks nothing: harmless, since no label follows
    padded = {name: torch.tensor([entry[name]]) for name in ("input_ids", "labels")}
    padded["token_type_ids"] = torch.tensor([entry["image_embed_mask"]])
    loss = loaded().model(**padded, pixel_values=batch["pixel_values"]).loss
    torch.testing.assert_close(loss, tensors()[f"train{index}.loss"].reshape(()), **SAT_LOSS)


# -- the three faults of SAT's prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chat", "base", "vqa", "inst"])
def test_eoi_typed_by_a_user_opens_no_second_image(template: str) -> None:
    """In SAT it is the mark of the image: a second one crashes with a shape error."""
    prompt = {"version": "base", "image": "square.png", "query": "What is <EOI> here? </s><s><unk>"}
    found = loaded().processor.apply_chat_template(messages(prompt), chat_template=template)
    assert found["token_type_ids"].sum() == 18
    typed = found["input_ids"][0, 19:].tolist()
    assert not {0, 1, 2} & set(typed)
    assert "<EOI>" in loaded().processor.decode(typed)
    assert loaded().chat(messages(prompt), chat_template=template, max_new_tokens=2).token_ids


def test_a_reply_with_the_separator_stays_whole() -> None:
    """SAT cuts its reply behind the last ` Answer:`; only new tokens are decoded here, and all of them."""
    vlm = loaded()
    text = "One Answer: two"
    wanted = vlm.processor.tokenizer.encode_plain(text)
    reply = vlm.processor.decode([*wanted, 2])
    assert reply.strip() == text
    history = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "And?"},
    ]
    rendered = vlm.processor.apply_chat_template(history, chat_template="chat", tokenize=False)
    assert rendered == "Question: What? Answer: One Answer: two\nQuestion: And? Answer:"


def test_inst_typed_by_a_user() -> None:
    """SAT takes it for the end of a turn. It is plain text in the templates of CogVLM, and refused in that one where it
    would be markup."""
    prompt = {"version": "chat", "image": "square.png", "query": "Say [/INST] yes [INST] and no"}
    for template in ("chat", "base", "vqa"):
        text = loaded().processor.apply_chat_template(messages(prompt), chat_template=template, tokenize=False)
        assert text.count("[INST]") == 1
    with pytest.raises(PromptError, match=r"holds '\[INST\]', with which the template 'inst' marks turns"):
        loaded().processor.apply_chat_template(messages(prompt), chat_template="inst")


# -- names -------------------------------------------------------------------------------------------------------------


def test_the_rules_are_the_key_map() -> None:
    rows = json.loads((FOLDER / "key_map.json").read_text())["rows"]
    assert len(rows) == 40
    for row in rows:
        theirs, ours = row["sat"].replace("{i}", "0"), row["hf"].replace("{i}", "0")
        assert plan([theirs], RULES).sources == {ours: theirs}
        assert plan([ours], TO_SAT).sources == {theirs: ours}
        cut = layout.cut_of(theirs)
        found = "replicated" if cut is None else "stride3 dim0" if cut.blocks == 3 else f"cat dim{cut.dim}"
        assert row["mp"].startswith(found), theirs


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress(path.read_bytes()))


def sparse(folder: Path, stored: dict[str, Any]) -> TensorMap:
    """Give tensors of real size in a file that takes no room."""
    file, offset, infos = folder / "weights", 0, {}
    for name, (shape, dtype) in stored.items():
        infos[name] = TensorInfo(tuple(shape), dtype, file, offset)
        offset += infos[name].nbytes
    with file.open("wb") as handle:
        handle.truncate(offset)
    return TensorMap(folder, infos)


def real_fields(side: int) -> dict[str, Any]:
    """The config of a release, as the sheet of the format has it."""
    eva = {"num_layers": 63, "hidden_size": 1792, "num_attention_heads": 16, "inner_hidden_size": 15360}
    eva |= {"image_size": [side, side], "patch_size": 14, "in_channels": 3, "layernorm_epsilon": 1e-6}
    eva |= {"max_sequence_length": (side // 14) ** 2 + 1, "vocab_size": 1, "layernorm_order": "post"}
    sizes = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32000}
    sizes |= {"inner_hidden_size": 11008, "max_sequence_length": 4096, "image_length": (side // 14) ** 2}
    return {"model_class": "CogVLMModel", **sizes, "eva_args": eva}


@RELEASES
def test_real_size_manifests_both_ways(tmp_path: Path, release: str) -> None:
    """SAT's names become exactly the Hugging Face release's, and those become SAT's again, for 1, 2, 4 and 8 ranks."""
    theirs = read_manifest(FOLDER / f"manifest_cogvlm-{release}.json.gz")
    ours = read_manifest(FIXTURES / "cogvlm" / f"manifest_cogvlm-{release}.json.gz")
    assert (len(theirs), len(ours)) == (1156, 1187)
    stored = sparse(tmp_path, theirs)
    renamed = TensorMap(tmp_path, sat.from_sat(tmp_path, stored.infos, 32))
    assert {name: [list(info.shape), info.dtype] for name, info in renamed.infos.items()} == ours
    fields = config_fields(real_fields(224 if release == "base-224" else 490), "config")
    expected = {tensor.name: tensor.shape for tensor in manifest.tensors(manifest.read_sizes(fields, "config"))}
    assert expected == {name: tuple(shape) for name, (shape, _) in ours.items()}
    for num_ranks in (1, 2, 4, 8):
        target = sat.plan_target(fields, renamed, TargetOptions(model_parallel=num_ranks))
        assert [len(file.outputs) for file in target.files] == [1156] * num_ranks
        assert len(target.dropped) == 31
        assert not target.made
        numel = dict.fromkeys(theirs, 0)
        for file in target.files:
            for output in file.outputs:
                numel[output.name] += torch.Size(output.shape).numel()
        for name, (shape, _) in theirs.items():
            shares = 1 if layout.cut_of(name) is not None else num_ranks
            assert numel[name] == torch.Size(shape).numel() * shares, name


# -- conversion --------------------------------------------------------------------------------------------------------


def expected_hf() -> dict[str, torch.Tensor]:
    return load_file(OPEN / "expected_hf/model.safetensors")


@pytest.mark.parametrize("folder", ["checkpoint", "checkpoint_mp2"])
def test_to_the_release_s_names_bit_for_bit(folder: str) -> None:
    release = open_release(OPEN / folder)
    assert len(release.tensors) == 65
    assert equal(release.tensors, expected_hf())


def convert(source: Path, target: Path, **options: Any) -> Any:
    release = open_release(source)
    made = sat.plan_target(release.fields, release.tensors, TargetOptions(**options))
    write_plan(made, target, identity={})
    return made


def test_back_to_sat_bit_for_bit(tmp_path: Path) -> None:
    """The same names and bytes in the same number of files as SAT's own, of one rank and of two; then back to one."""
    for num_ranks, folder in ((1, "checkpoint"), (2, "checkpoint_mp2")):
        made = convert(OPEN / "checkpoint", tmp_path / folder, model_parallel=num_ranks)
        assert made.dropped == (
            (
                "model.layers.1.self_attn.rotary_emb.inv_freq",
                "equal to layer 0's; SAT keeps one inv_freq for all layers",
            ),
        )
        for rank in range(num_ranks):
            name = f"1/{layout.RANK_FILE.format(rank)}"
            ours = torch.load(tmp_path / folder / name, weights_only=True)
            theirs = torch.load(OPEN / folder / name, weights_only=True)
            assert list(ours) == ["module"]
            assert equal(ours["module"], theirs["module"])
    convert(tmp_path / "checkpoint_mp2", tmp_path / "again", model_parallel=1)
    assert (tmp_path / "again" / RANK0).read_bytes() == (tmp_path / "checkpoint" / RANK0).read_bytes()
    assert equal(open_release(tmp_path / "again").tensors, expected_hf())


def test_config_both_ways() -> None:
    theirs = json.loads((OPEN / "checkpoint_mp2" / layout.CONFIG).read_text())
    fields = {**config_fields(theirs, "config"), "template_version": "chat"}
    vision = fields["vision_config"]
    assert (vision["num_positions"], vision["image_size"], vision["layer_norm_eps"]) == (17, 56, 1e-6)
    assert (fields["rms_norm_eps"], fields["max_position_embeddings"]) == (1e-5, 4096)
    back = sat_fields(fields, "config", model_parallel=2)
    assert back == {**theirs, "text_processor_version": "chat_old"}
    assert config_fields(back, "config") == fields


def test_a_release_s_config_and_back() -> None:
    folder = FIXTURES / "cogvlm/open/checkpoint"
    ours = json.loads((folder / "config.json").read_text())
    fields = config_fields(sat_fields(ours, "config"), "config")
    sizes = manifest.read_sizes(ours, "config")
    assert manifest.read_sizes(fields, "config") == sizes
    for name in ("rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert fields[name] == ours[name]
    assert fields["vision_config"]["layer_norm_eps"] == ours["vision_config"]["layer_norm_eps"]


def test_a_released_folder_to_sat_and_back(tmp_path: Path) -> None:
    """HF -> SAT -> HF, of 4 heads in each transformer: 1, 2 and 4 ranks; every tensor is the same bit for bit."""
    from lavish.checkpoints import hf

    folder = FIXTURES / "cogvlm/open/checkpoint"
    fields, source = json.loads((folder / "config.json").read_text()), hf.read(folder)
    previous = None
    for num_ranks in (1, 2, 4):
        made = sat.plan_target(fields, source, TargetOptions(model_parallel=num_ranks))
        target = tmp_path / f"vocabulary-{num_ranks}"
        write_plan(made, target, identity={})
        release = open_release(target)
        assert equal(release.tensors, source)
        assert isinstance(release.tensors.info("lm_head.weight"), TensorInfo)  # 420 ids: whole on every rank
        if previous is not None:
            convert(previous, tmp_path / f"from-{num_ranks}", model_parallel=num_ranks)
            assert equal(open_release(tmp_path / f"from-{num_ranks}").tensors, source)
            assert isinstance(release.tensors.info("model.layers.0.mlp.vision_mlp.up_proj.weight"), Assembled)
        previous = target


def test_without_inv_freq_it_is_computed_and_said(tmp_path: Path) -> None:
    release = open_release(OPEN / "checkpoint")
    bare = {name: info for name, info in release.tensors.infos.items() if not name.endswith("inv_freq")}
    made = sat.plan_target(release.fields, TensorMap(OPEN, bare), TargetOptions())
    assert made.made == (("mixins.rotary.rotary_emb.inv_freq", "1 / 10000^(2j / 12); the source stores none"),)
    write_plan(made, tmp_path / "sat", identity={})
    written = layout.read(tmp_path / "sat")
    assert torch.equal(written["mixins.rotary.rotary_emb.inv_freq"], 1 / 10000 ** (torch.arange(0, 12, 2) / 12))
    assert equal(open_release(tmp_path / "sat").tensors, expected_hf())


def test_unequal_inv_freq_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from lavish.checkpoints import hf

    changed = expected_hf()
    changed["model.layers.1.self_attn.rotary_emb.inv_freq"] += 1e-3
    save_file(changed, tmp_path / "model.safetensors")
    fields = open_release(OPEN / "checkpoint").fields
    with pytest.raises(CheckpointError, match=r"'model.layers.1.self_attn.rotary_emb.inv_freq' differs from layer 0's"):
        sat.plan_target(fields, hf.read(tmp_path), TargetOptions())


def test_a_killed_conversion_goes_on(tmp_path: Path) -> None:
    """Stopped in the second rank's file, it goes on behind the last tensor that is on the disk: the same bytes."""
    release = open_release(OPEN / "checkpoint")
    made = sat.plan_target(release.fields, release.tensors, TargetOptions(model_parallel=2))
    write_plan(made, tmp_path / "whole", identity={})

    def kill(done: int, total: int) -> None:
        if done > 0.8 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_plan(made, tmp_path / "killed", identity={}, progress=kill, resume_bytes=20_000)
    assert not (tmp_path / "killed").exists()
    assert write_plan(made, tmp_path / "killed", identity={}) > made.nbytes / 2
    for file in made.files:
        assert (tmp_path / "killed" / file.name).read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


def test_another_dtype(tmp_path: Path) -> None:
    convert(OPEN / "checkpoint", tmp_path / "half", dtype="bfloat16", model_parallel=2)
    halves = open_release(tmp_path / "half").tensors
    for name, value in expected_hf().items():
        assert torch.equal(halves[name], value.bfloat16()), name


@pytest.mark.parametrize(("num_ranks", "words"), [(4, "eva_args.num_attention_heads 2"), (3, "num_attention_heads 4")])
def test_sizes_that_do_not_divide(num_ranks: int, words: str) -> None:
    release = open_release(OPEN / "checkpoint")
    with pytest.raises(ConfigError, match=f"--model-parallel {num_ranks} does not divide .*{words}.* into 2 shares"):
        sat.plan_target(release.fields, release.tensors, TargetOptions(model_parallel=num_ranks))


def test_tensors_that_are_not_the_config_s() -> None:
    release = open_release(OPEN / "checkpoint")
    infos = release.tensors.infos
    less = {name: info for name, info in infos.items() if name != "model.norm.weight"}
    with pytest.raises(MissingKeys, match=r"1 of 65 tensors .* are absent, first 'model.norm.weight'"):
        sat.plan_target(release.fields, TensorMap(OPEN, less), TargetOptions())
    more = {**infos, "model.norm.bias": infos["model.norm.weight"]}
    with pytest.raises(UnexpectedKeys, match=r"1 tensors have no place .* 'model.norm.bias'. Did you mean"):
        sat.plan_target(release.fields, TensorMap(OPEN, more), TargetOptions())
    other = {**infos, "model.norm.weight": infos["lm_head.weight"]}
    with pytest.raises(ShapeMismatch, match=r"'model.norm.weight' is \(1024, 48\), and \(48,\) by the config"):
        sat.plan_target(release.fields, TensorMap(OPEN, other), TargetOptions())


def test_cogvlm2_has_no_place_in_sat() -> None:
    fields = json.loads((FIXTURES / "cogvlm2/open/checkpoint/config.json").read_text())
    with pytest.raises(ConfigError, match=r"is of CogVLM2, .* Convert it to hf or mindspore"):
        sat_fields(fields, "config.json")


# -- what is refused, and why ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cross_image_pix": 1120}, r"has cross_image_pix, so it is CogAgent"),
        ({"num_multi_query_heads": 8}, r"has grouped heads, so it is CogVLM2"),
        ({"model_class": "CogAgentModel"}, r"model_class is 'CogAgentModel'; of SAT's models lavish reads CogVLM v1"),
        ({"model_class": ...}, r"model_class is None"),
    ],
)
def test_other_models(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnknownLayout, match=words):
        lavish.load(set_config(copy(tmp_path / "x"), **changes), device="cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": ...}, r"model_config.json: hidden_size is absent and must be a whole number"),
        ({"num_layers": True}, r"num_layers is True"),
        ({"use_bias": True}, r"use_bias is True and False in every CogVLM v1"),
        ({"eva_args": [1]}, r"eva_args is \[1\]; it holds the sizes of the vision tower"),
        ({"image_length": 17}, r"image_length is 17, and pictures of 56 pixels have 16 patches of 14"),
        ({"num_layers": 10**9}, r"num_hidden_layers is 1000000000, over 1000"),
        ({"text_processor_version": ["chat"]}, r"text_processor_version is \['chat'\]; it is one of chat_old, base"),
        ({"text_processor_version": "chat_odl"}, r"is 'chat_odl'; .* Did you mean 'chat_old'"),
    ],
)
def test_configs_that_cannot_be_true(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        lavish.load(set_config(copy(tmp_path / "x"), **changes), device="cpu")


@pytest.mark.parametrize("size", [[56, 42], [56], "56", [True, True], [0, 0], None])
def test_pictures_that_are_no_square(tmp_path: Path, size: Any) -> None:
    root = copy(tmp_path / "x")
    eva = {**json.loads((root / layout.CONFIG).read_text())["eva_args"], "image_size": size}
    with pytest.raises(ConfigError, match=r"eva_args.image_size is "):
        lavish.load(set_config(root, eva_args=eva), device="cpu")


def test_an_unknown_name(tmp_path: Path) -> None:
    root = rewrite(copy(tmp_path / "x"), lambda module: module.update({"mixins.lm.lm_haed.weight": torch.ones(2)}))
    words = (
        r"1 of 65 tensors have names that no CogVLM v1 has .* 'mixins.lm.lm_haed.weight'. Did you mean 'mixins.lm.lm_he"
    )
    with pytest.raises(UnexpectedKeys, match=words):
        lavish.load(root, device="cpu")
    root = rewrite(copy(tmp_path / "y"), lambda module: module.update({"mixins.ptuning.weight": torch.ones(2)}))
    with pytest.raises(UnexpectedKeys, match=r"P-tuning's prefix is not read"):
        lavish.load(root, device="cpu")


def test_a_missing_name(tmp_path: Path) -> None:
    root = rewrite(copy(tmp_path / "x"), lambda module: module.pop("mixins.eva.boi"))
    with pytest.raises(MissingKeys, match=r"1 of .* absent, first 'model.vision.boi'"):
        lavish.load(root, tokenizer=OPEN / "tokenizer", device="cpu")


def test_without_a_tokenizer() -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer; .* tokenizer=... \(CogVLM v1 uses .*vicuna-7b-v1.5\)"):
        lavish.load(OPEN / "checkpoint", device="cpu")


# -- which prompt ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("cogvlm-chat", "chat"),
        ("cogvlm-chat-v1.1", "chat"),
        ("cogvlm-base-224", "base"),
        ("cogvlm-base-490", "base"),
        ("cogvlm-grounding-base", "base"),
        ("cogvlm-grounding-generalist-v1.1", "base"),
        ("CogVLM_Grounding_Generalist", "base"),
        ("merged_lora_cogvlm490", None),
        ("database", None),
    ],
)
def test_the_name_tells_the_template(name: str, template: str | None) -> None:
    assert template_of_name(name) == template


def test_the_template_by_config_then_name_then_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = copy(tmp_path / "cogvlm-base-490")
    assert lavish.load(root, tokenizer=OPEN / "tokenizer", device="cpu").processor.template_version == "base"
    assert open_release(root / "1").fields["template_version"] == "base"
    assert "tells the prompt" not in caplog.text
    assert "template_version" not in open_release(root).notes
    for version, template in TEMPLATE.items():
        set_config(root, text_processor_version=version)
        assert open_release(root).fields["template_version"] == template
    vlm = lavish.load(OPEN / "checkpoint", tokenizer=OPEN / "tokenizer", config={"template_version": "base"})
    assert vlm.processor.template_version == "base"
    assert "tells the prompt" not in caplog.text  # whoever says it is not told
    vlm = lavish.load(OPEN / "checkpoint", tokenizer=OPEN / "tokenizer")
    assert vlm.processor.template_version == "chat"
    assert "neither text_processor_version" in caplog.text
    assert "taken: 'chat'" in caplog.text


def test_a_grounding_checkpoint_answers_with_boxes(tmp_path: Path) -> None:
    root = copy(tmp_path / "cogvlm-grounding-generalist-v1.1", "checkpoint_mp2")
    for path in (root, root / "1", root / RANK0):
        assert lavish.load(path, tokenizer=OPEN / "tokenizer", device="cpu").grounding
    lavish_convert(root, tmp_path / "hf", tokenizer=OPEN / "tokenizer")
    assert lavish.load(tmp_path / "hf", device="cpu").grounding


def test_the_longer_context_is_kept_and_said(caplog: pytest.LogCaptureFixture) -> None:
    vlm = lavish.load(OPEN / "checkpoint", tokenizer=OPEN / "tokenizer", device="cpu")
    assert vlm.model.config.max_position_embeddings == 4096
    assert "max_sequence_length is 4096, the Hugging Face release says 2048; longer prompts are taken." in caplog.text


# -- with the command's own function -----------------------------------------------------------------------------------


def test_convert_to_a_folder_that_loads_like_the_original(tmp_path: Path) -> None:
    """Two ranks to a Hugging Face folder, verified: the expected tensors bit for bit, and the same logits."""
    report = lavish_convert(OPEN / "checkpoint_mp2", tmp_path / "hf", tokenizer=OPEN / "tokenizer", verify=True)
    assert (report.layout, report.num_tensors, report.dropped) == ("sat", 65, ())
    assert equal(load_file(tmp_path / "hf/model.safetensors"), expected_hf())
    vlm = lavish.load(tmp_path / "hf", device="cpu")
    found = inputs("chat_old_image")
    with torch.no_grad():
        assert torch.equal(vlm.model(**found).logits, loaded().model(**found).logits)
    again = lavish_convert(tmp_path / "hf", tmp_path / "sat", to="sat", model_parallel=2, verify=True)
    assert [name for name, _ in again.dropped] == ["model.layers.1.self_attn.rotary_emb.inv_freq"]
    for rank in (0, 1):
        name = f"1/{layout.RANK_FILE.format(rank)}"
        ours = torch.load(tmp_path / "sat" / name, weights_only=True)["module"]
        assert equal(ours, torch.load(OPEN / "checkpoint_mp2" / name, weights_only=True)["module"])


def test_convert_from_two_ranks_to_one(tmp_path: Path) -> None:
    lavish_convert(OPEN / "checkpoint_mp2", tmp_path / "sat", to="sat", verify=True)
    ours = torch.load(tmp_path / "sat" / RANK0, weights_only=True)["module"]
    assert equal(ours, torch.load(OPEN / "checkpoint" / RANK0, weights_only=True)["module"])
    assert layout.read_config(tmp_path / "sat")["text_processor_version"] == "chat_old"


def test_cogvlm2_is_told_which_layouts_hold_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is of CogVLM2, .* Convert it to hf or mindspore"):
        lavish_convert(FIXTURES / "cogvlm2/open/checkpoint", tmp_path / "sat", to="sat")
    assert not (tmp_path / "sat").exists()


# -- as any other network ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_ranks_load_in_parts_and_quantised(tmp_path: Path) -> None:
    """Shares, layers on the disk and int8 read the laid-together ranks as they read a whole file."""
    found, wanted = inputs("base_grounding"), tensors()["base_grounding.logits"]
    options = {"tokenizer": OPEN / "tokenizer", "device": "cpu"}
    split = lavish.load(
        OPEN / "checkpoint_mp2", tokenizer=OPEN / "tokenizer", device_map={"": "cpu", "lm_head": "disk"}
    )
    torch.testing.assert_close(split.model(**found).logits[0], wanted, **SAT_LOGITS)
    one = lavish.load(OPEN / "checkpoint", quantization="int8", **options).model(**found).logits
    two = lavish.load(OPEN / "checkpoint_mp2", quantization="int8", **options).model(**found).logits
    assert torch.equal(one, two)
    half = lavish.load(OPEN / "checkpoint_mp2", dtype="bfloat16", **options).model
    assert half.lm_head.weight.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "saved")
    assert lavish.load(tmp_path / "saved", **options).model.lm_head.weight.equal(half.lm_head.weight)


def test_a_full_check_finds_one_bit(tmp_path: Path) -> None:
    """The zip file has a checksum of every tensor: a bit that fell over in the second rank names its record."""
    root = copy(tmp_path / "x", "checkpoint_mp2")
    assert not check(root).problems
    info = layout.read(root).info("transformer.layers.0.attention.query_key_value.weight")
    assert isinstance(info, Assembled)
    part = info.pieces[1].info
    with part.file.open("r+b") as handle:
        handle.seek(part.offset)
        byte = handle.read(1)[0]
        handle.seek(part.offset)
        handle.write(bytes([byte ^ 1]))
    (problem,) = check(root).problems
    assert "mp_rank_01_model_states.pt: the bytes of mp_rank_01_model_states/data/" in problem
    assert "are not those that were written" in problem
