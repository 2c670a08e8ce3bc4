"""The pieces of a MiniGPT4-Qwen or MPP-LLaVA release in all their layouts, and what is wrong with a set of pieces."""

import json
from pathlib import Path

import peft
import pytest
import torch
from minigpt4_qwen_fixture import CHECKPOINT, HEADS, PIECES, TRAINED, chats, own_network, shared_network, side_by_side
from safetensors.torch import load_file, save_file
from tolerance import ADAPTER_SHOWS, MERGED_ADAPTER, close
from zero_files import write_zero

import lavish
import lavish.models as table
from lavish.checkpoints import lavis
from lavish.checkpoints.loading import rearrange
from lavish.checkpoints.rules import plan, reverse
from lavish.common.errors import (
    CheckpointError,
    ConfigError,
    MissingKeys,
    ShapeMismatch,
    UnexpectedKeys,
    UnknownLayout,
    UnsafeCheckpoint,
)
from lavish.inference.load import find_composite
from lavish.models.minigpt4_qwen.weights import RULES, open_release, read_trained

BESIDE = {"optimizer": {"state": {}}, "scaler": None, "epoch": 9, "config": {"run": {"lr": 1e-4}}}


def stored(file: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in lavis.read(file).items()}


def llm() -> dict[str, torch.Tensor]:
    shards = sorted(PIECES["llm"].glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def projection() -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in stored(TRAINED).items() if name.startswith("llm_proj.")}


def save(path: Path, tensors: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)
    return path


def load(path: Path, **pieces: Path):
    return lavish.load(path, config=HEADS, **{**PIECES, **pieces})


def assert_same(network: torch.nn.Module, *, scale: float = 1.0) -> None:
    """The fixture's weights; those of the decoder times `scale`."""
    found = network.state_dict()
    for name, tensor in shared_network().state_dict().items():
        factor = scale if name.startswith(("language_model.", "lm_head.")) else 1.0
        assert torch.equal(found[name], tensor * factor), name


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_all_pieces_in_one_folder(tmp_path):
    loaded = lavish.load(side_by_side(tmp_path / "release"), config=HEADS)
    assert_same(loaded.model)
    spoken, released = chats()[0]
    assert loaded.chat(spoken, max_new_tokens=14).token_ids == released["output_ids"]


def test_the_pieces_may_lie_flat(tmp_path):
    for file in (*CHECKPOINT.glob("*/*.pth"), TRAINED):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    side_by_side(tmp_path / "rest")
    for name in ("llm", "bert-base-uncased"):
        (tmp_path / "rest" / name).rename(tmp_path / name)
    for file in sorted((tmp_path / "rest").rglob("*.pth")):
        file.unlink()
    assert_same(lavish.load(tmp_path, config=HEADS).model)


@pytest.mark.parametrize("kind", ["v1", "flat", "deepspeed"])
def test_what_was_trained_alone(tmp_path, kind):
    """checkpoint_9.pth with the stray buffer (v1), model.pth (MPP stage 1), and a ZeRO run."""
    stray = {"Qformer.bert.embeddings.position_ids": torch.arange(8)[None]}
    if kind == "v1":
        path = save(tmp_path / "checkpoint_9.pth", {"model": projection() | stray, **BESIDE})
    elif kind == "flat":
        path = save(tmp_path / "global_step2181/model.pth", projection())
    else:
        state = {
            "module": projection() | stray,
            "param_shapes": [{"llm_proj.weight": torch.Size([64, 48])}],
            "sparse_tensor_module_names": set(),
            "ds_config": {"zero_optimization": {"stage": 2}},
            "optimizer": None,
        }
        path = save(tmp_path / "mp_rank_00_model_states.pt", state)
    assert_same(load(path).model)
    if kind == "deepspeed":
        assert_same(load(tmp_path).model)  # the run's folder


def test_the_last_one_wins(tmp_path):
    """MPP stage 2 overrides the whole LLM; its folder then needs no weights."""
    trained = {f"llm_model.{name}": 2 * tensor for name, tensor in llm().items()}
    path = save(tmp_path / "unfreeze_llm_model.pth", projection() | trained)
    assert_same(load(path).model, scale=2.0)
    bare = tmp_path / "llm"
    bare.mkdir()
    for name in ("config.json", "qwen.tiktoken"):
        (bare / name).write_bytes((PIECES["llm"] / name).read_bytes())
    assert_same(load(path, llm=bare).model, scale=2.0)
    with pytest.raises(UnknownLayout, match="no weights of the Hugging Face layout"):
        load(TRAINED, llm=bare)


def pipeline(folder: Path, *, first_block: int = 5) -> Path:
    """The files of a pipeline run, as the sheet of the release describes them."""
    eva = {f"visionpipe.visual_encoder.{name}": tensor for name, tensor in stored(PIECES["eva"]).items()}
    blip2 = {f"visionpipe.{name}": tensor for name, tensor in stored(PIECES["blip2"]).items() if "t5_proj" not in name}
    weights = {name: 2 * tensor for name, tensor in llm().items()}
    layers: dict[int, dict[str, torch.Tensor]] = {index: {} for index in range(first_block)}
    layers[0] = eva | blip2 | {f"visionpipe.{name}": tensor for name, tensor in projection().items()}
    layers[0]["wtepipe.word_embeddings.weight"] = weights["transformer.wte.weight"]
    for block in range(2):
        prefix = f"transformer.h.{block}."
        layers[first_block + block] = {
            f"layer.{name.removeprefix(prefix)}": tensor for name, tensor in weights.items() if name.startswith(prefix)
        }
    layers[first_block + 2] = {"final_layernorm.weight": weights["transformer.ln_f.weight"]}
    layers[first_block + 3] = {"lm_head.weight": weights["lm_head.weight"]}
    layers[first_block + 4] = {"occupy.weight": torch.zeros(3, 3)}
    for index, tensors in layers.items():
        save(folder / f"layer_{index:02d}-model_states.pt", tensors)
    save(folder / "mp_rank_00_model_states.pt", {"module": None, "optimizer": None})
    return folder


@pytest.mark.parametrize("first_block", [1, 5])
def test_a_pipeline_run(tmp_path, first_block):
    """Trap 10: the release's own converter stops at the first block."""
    folder = pipeline(tmp_path / "global_step296", first_block=first_block)
    names = set(read_trained(folder))
    assert {"llm_proj.weight", "llm_model.transformer.h.1.attn.c_attn.bias", "query_tokens"} <= names
    assert not any("occupy" in name or "pipe" in name for name in names)
    assert_same(load(folder).model, scale=2.0)
    with pytest.raises(UnknownLayout, match="give its folder"):
        read_trained(folder / "layer_00-model_states.pt")


def test_a_run_in_a_folder_of_pieces(tmp_path):
    folder = side_by_side(tmp_path / "release")
    (folder / "checkpoint_9.pth").unlink()
    pipeline(folder / "global_step296")
    assert_same(lavish.load(folder, config=HEADS).model, scale=2.0)


def test_extra_blocks_and_heads_of_the_tower(tmp_path):
    """Trap 16: the tower's file may hold a block more than is run, and what its pre-training needed."""
    tensors = stored(PIECES["eva"])
    extra = {name.replace("blocks.2.", "blocks.3."): tensor for name, tensor in tensors.items() if "blocks.2." in name}
    extra |= {"norm.weight": torch.ones(32), "fc_norm.bias": torch.ones(32), "head.weight": torch.ones(7, 32)}
    path = save(tmp_path / "eva_vit_g.pth", tensors | extra)
    heads = {"vision_config": {"num_attention_heads": 4, "num_hidden_layers": 3}}
    assert_same(lavish.load(TRAINED, config=heads, **{**PIECES, "eva": path}).model)


def test_the_sizes_of_the_released_tower_are_known(tmp_path):
    """At 1408 wide there are 16 heads and 39 of the file's 40 blocks; no tensor is read for that."""
    tensors = stored(PIECES["eva"])
    wide = {
        "cls_token": torch.zeros(1, 1, 1408, dtype=torch.bool),
        "pos_embed": torch.zeros(1, 17, 1408, dtype=torch.bool),
        **{f"blocks.{block}.norm1.bias": torch.zeros(1408, dtype=torch.bool) for block in range(40)},
    }
    path = save(tmp_path / "eva_vit_g.pth", tensors | wide)
    vision = open_release(TRAINED, {**PIECES, "eva": path}).fields["vision_config"]
    assert (vision["num_attention_heads"], vision["num_hidden_layers"]) == (16, 39)


PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it


@PEFT
def test_adapters_go_on_the_native_names(tmp_path):
    """Trap 9: the release's LoRA names q_proj and v_proj, which Qwen v1 does not have; ours has."""
    made = peft.get_peft_model(own_network(), peft.LoraConfig(r=2, target_modules=r"language_model.*\.(q_proj|v_proj)"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    made.save_pretrained(tmp_path)
    loaded = lavish.load(TRAINED, config=HEADS, adapter=tmp_path, **PIECES)
    inputs = loaded.processor.apply_chat_template(chats()[0][0])
    with torch.no_grad():
        adapted = loaded.model(**inputs).logits
        assert torch.equal(adapted, made.eval()(**inputs).logits)
        merged = made.merge_and_unload()(**inputs).logits
        assert not torch.allclose(adapted, shared_network()(**inputs).logits, **ADAPTER_SHOWS)
    torch.testing.assert_close(merged, adapted, **MERGED_ADAPTER)


@PEFT
def test_a_foreign_adapter_on_the_fused_projection(tmp_path):
    """Trap 9: its lora_B falls into thirds, its lora_A serves all three."""
    generator = torch.Generator().manual_seed(0)
    name = "base_model.model.transformer.h.{}.attn.c_attn.lora_{}.weight"
    tensors = {name.format(block, "A"): torch.randn(2, 64, generator=generator) for block in range(2)}
    tensors |= {name.format(block, "B"): torch.randn(192, 2, generator=generator) for block in range(2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    loaded = lavish.load(TRAINED, config=HEADS, adapter=tmp_path, **PIECES)
    changed = own_network()
    for block, layer in enumerate(changed.language_model.layers):
        delta = 2.0 * tensors[name.format(block, "B")] @ tensors[name.format(block, "A")]
        for part, projection_name in zip(delta.chunk(3), ("q_proj", "k_proj", "v_proj"), strict=True):
            layer.self_attn.get_submodule(projection_name).weight.data += part
    inputs = loaded.processor.apply_chat_template(chats()[0][0])
    with torch.no_grad():
        close(loaded.model(**inputs).logits, changed(**inputs).logits, factor=10.0)  # W + BA against Wx + B(Ax)


# -- what is wrong with a set of pieces --------------------------------------------------------------------------------


def test_absent_pieces_are_named(tmp_path):
    for name in ("eva", "blip2", "llm", "qformer"):
        given = {other: path for other, path in PIECES.items() if other != name}
        with pytest.raises(ConfigError, match=rf"the piece '{name}' is absent.*{name}=\.\.\."):
            lavish.load(TRAINED, config=HEADS, **given)
    folder = side_by_side(tmp_path / "release")
    (folder / "checkpoint_9.pth").unlink()
    without_tower = side_by_side(tmp_path / "without_tower")
    next(without_tower.glob("**/eva*.pth")).unlink()
    with pytest.raises(ConfigError, match=r"'eva' is absent; nothing in that folder is one\. Name it: eva=\.\.\."):
        lavish.load(without_tower, config=HEADS)
    with pytest.raises(ConfigError, match="the piece that was trained is absent"):
        lavish.load(folder, config=HEADS)
    with pytest.raises(ConfigError, match=r"vision_config\.num_attention_heads.*config="):
        lavish.load(TRAINED, **PIECES)


def test_pieces_given_twice(tmp_path):
    folder = side_by_side(tmp_path / "release")
    with pytest.raises(ConfigError, match=r"eva=.* was given, and .* holds that piece too"):
        lavish.load(folder, config=HEADS, eva=PIECES["eva"])
    (folder / "eva_vit_g.pth").write_bytes(PIECES["eva"].read_bytes())
    with pytest.raises(ConfigError, match="holds the piece 'eva' twice"):
        lavish.load(folder, config=HEADS)
    (folder / "eva_vit_g.pth").unlink()
    (folder / "checkpoint_8.pth").write_bytes(TRAINED.read_bytes())
    with pytest.raises(ConfigError, match=r"holds 2 trained pieces, .*checkpoint_8.*checkpoint_9"):
        lavish.load(folder, config=HEADS)


def test_wrong_pieces(tmp_path):
    with pytest.raises(CheckpointError, match="no EVA-ViT"):
        load(TRAINED, eva=PIECES["blip2"])
    with pytest.raises(ConfigError, match=r"got 'vision_tower': .* the family 'minigpt4_qwen' has the pieces"):
        load(TRAINED, vision_tower=PIECES["eva"])
    with pytest.raises(CheckpointError, match=r"'query_tokens' is in none of the pieces"):
        load(TRAINED, blip2=PIECES["eva"])
    with pytest.raises(MissingKeys, match=r"'projector\.weight'"):
        load(save(tmp_path / "a.pth", {"llm_proj.bias": projection()["llm_proj.bias"]}))
    with pytest.raises(UnexpectedKeys, match=r"'llm_proj_2\.weight'"):
        load(save(tmp_path / "b.pth", {**projection(), "llm_proj_2.weight": torch.ones(2)}))
    with pytest.raises(ShapeMismatch, match=r"'llm_proj\.weight'.*\(64, 40\)"):
        load(save(tmp_path / "c.pth", {**projection(), "llm_proj.weight": torch.ones(64, 40)}))
    with pytest.raises(ShapeMismatch, match="query_tokens"):
        lavish.load(TRAINED, config={**HEADS, "num_query_tokens": 8}, **PIECES)  # the release keeps random queries
    with pytest.raises(CheckpointError, match="which no pipeline layer of MPP-LLaVA has"):
        read_trained(save(tmp_path / "run/layer_00-model_states.pt", {"weight": torch.ones(1)}).parent)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_zero_run_is_put_together(tmp_path, stage):
    """Trap 12: the release's converter cannot read ZeRO 3, whose weights lie in slices; the frozen ones too."""
    frozen = {name: tensor for name, tensor in stored(PIECES["blip2"]).items() if "ln_vision" in name}
    names = tuple(frozen)
    folder = write_zero(tmp_path / "run", {**projection(), **frozen}, stage=stage, frozen=names, dtype=torch.float32)
    for path in (folder, folder / "global_step2"):
        assert set(read_trained(path)) == {*projection(), *frozen}
        assert_same(load(path).model)
        assert table.detect_composite(path, ()) is None
        assert find_composite(path, ()).name == "minigpt4_qwen"


def test_a_run_without_weights_says_so(tmp_path):
    with pytest.raises(UnknownLayout, match="no trained weights"):
        read_trained(tmp_path)
    with pytest.raises(CheckpointError, match="no dict under 'module'"):
        read_trained(save(tmp_path / "mp_rank_00_model_states.pt", {"module": None}))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    with pytest.raises(UnsafeCheckpoint):
        load(save(tmp_path / "checkpoint_9.pth", {"model": projection(), "config": Path("x")}))


def test_the_rules_lead_back_to_the_released_bytes():
    back = rearrange(shared_network().state_dict(), reverse(RULES))
    pieces = {f"visual_encoder.{name}": tensor for name, tensor in stored(PIECES["eva"]).items()}
    pieces |= {f"llm_model.{name}": tensor for name, tensor in llm().items()} | stored(PIECES["blip2"]) | projection()
    dropped = set(plan(pieces, RULES).dropped)
    assert back.keys() == pieces.keys() - dropped
    assert all(torch.equal(tensor, pieces[name]) for name, tensor in back.items())
