"""The LoRA of SAT's fine-tuning: beside the weights when it is loaded, added to them, and as a PEFT adapter.

No trained one was released; the files here are laid as SAT's lora2.py lays them.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tolerance import MERGED_ADAPTER

import lavish
import lavish.models as table
from lavish.checkpoints import sat as layout
from lavish.common.errors import CheckpointError, ConfigError, MissingKeys, ShapeMismatch
from lavish.inference.convert import convert

# peft 0.21 asks transformers 5.23 under the attribute's old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
OPEN = Path(__file__).resolve().parents[1] / "fixtures/cogvlm_sat/open"
RANK = 3
LANGUAGE, TOWER = "transformer.layers.{}.attention", "mixins.eva.vit_model.transformer.layers.{}.attention"
HF = {
    LANGUAGE: "model.layers.{}.self_attn.language_expert_",
    TOWER: "model.vision.transformer.layers.{}.attention.",
}
MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "image", "image": str(OPEN / "inputs/square.png")}, {"type": "text", "text": "CAPTCHA:"}],
    }
]


def modules() -> Iterator[tuple[str, str, int]]:
    """Give SAT's name of each module with a LoRA, the release's, and in how many parts it is."""
    for place, ours in HF.items():
        for layer in (0, 1):
            for leaf, parts in (("query_key_value", 3), ("dense", 1)):
                yield f"{place.format(layer)}.{leaf}", ours.format(layer) + leaf, parts


def with_lora(module: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Lay a LoRA of rank 3 on the attention of all language and tower layers, as lora2.py does."""
    generator = torch.Generator().manual_seed(7)
    made = {name: value.to(dtype) for name, value in module.items()}
    for name, _, parts in modules():
        for leaf in ("weight", "bias"):
            if f"{name}.{leaf}" in made:
                made[f"{name}.original.{leaf}"] = made.pop(f"{name}.{leaf}")
        rows, columns = made[f"{name}.original.weight"].shape
        for part in range(parts):
            made[f"{name}.matrix_A.{part}"] = torch.randn(RANK, columns, generator=generator).to(dtype)
            made[f"{name}.matrix_B.{part}"] = torch.randn(rows // parts, RANK, generator=generator).to(dtype)
    return made


def merged(module: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add the LoRA by the sheet's words: the product in float32, the scaling 1 / rank, cast to the weight's dtype."""
    made = {}
    for name, _, parts in modules():
        products = [
            module[f"{name}.matrix_B.{part}"].float() @ module[f"{name}.matrix_A.{part}"].float()
            for part in range(parts)
        ]
        weight = module[f"{name}.original.weight"]
        made[f"{name}.weight"] = weight + (torch.cat(products) * (1 / RANK)).to(weight.dtype)
    plain = {name.replace(".original.", "."): value for name, value in module.items() if ".matrix_" not in name}
    return {**plain, **made}


def write(root: Path, module: dict[str, torch.Tensor], **fields: Any) -> Path:
    (root / "1").mkdir(parents=True)
    config = json.loads((OPEN / "checkpoint" / layout.CONFIG).read_text())
    (root / layout.CONFIG).write_text(json.dumps({**config, **fields}))
    (root / "latest").write_text("1")
    torch.save({"module": module}, root / "1" / layout.RANK_FILE.format(0))
    return root


def weights() -> dict[str, torch.Tensor]:
    return torch.load(OPEN / "checkpoint/1" / layout.RANK_FILE.format(0), weights_only=True)["module"]


TRAINED = {"model_class": "FineTuneTrainCogVLMModel", "use_lora": True, "lora_rank": RANK, "use_qlora": False}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return write(tmp_path / "finetune-cogvlm-base-490", with_lora(weights()), **TRAINED)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The same, merged by the sheet's words, as SAT's merge script saves it."""
    fields = {**TRAINED, "model_class": "FineTuneTestCogVLMModel", "use_lora": False}
    return write(tmp_path / "merged_lora_490", merged(with_lora(weights())), **fields)


def load(path: Path, **options: Any) -> lavish.VLM:
    return lavish.load(path, tokenizer=OPEN / "tokenizer", device="cpu", **options)


@torch.no_grad()
def logits(vlm: lavish.VLM) -> torch.Tensor:
    return vlm.model(**vlm.processor.apply_chat_template(MESSAGES, chat_template="base")).logits


def test_it_lies_beside_the_weights_when_loaded(trained: Path, plain: Path) -> None:
    """The weights are the originals, PEFT adds three times the rank in one pair, and the logits are the merged ones."""
    vlm, wanted = load(trained), load(plain)
    assert not torch.allclose(logits(load(OPEN / "checkpoint")), logits(wanted), **MERGED_ADAPTER)
    torch.testing.assert_close(logits(vlm), logits(wanted), **MERGED_ADAPTER)
    answer = {"chat_template": "base", "max_new_tokens": 4}
    assert vlm.chat(MESSAGES, **answer).token_ids == wanted.chat(MESSAGES, **answer).token_ids
    layer = vlm.model.get_base_model().model.layers[1].self_attn.language_expert_query_key_value
    assert layer.lora_A["default"].weight.shape == (3 * RANK, 48)
    assert layer.scaling["default"] == pytest.approx(1 / RANK)
    assert torch.equal(layer.base_layer.weight, weights()["transformer.layers.1.attention.query_key_value.weight"])
    dense = vlm.model.get_base_model().model.vision.transformer.layers[0].attention.dense
    assert dense.lora_A["default"].weight.shape == (RANK, 32)
    assert dense.scaling["default"] == pytest.approx(1 / RANK)
    untouched = vlm.model.get_base_model().model.layers[0].self_attn.vision_expert_dense
    assert isinstance(untouched, torch.nn.Linear)
    assert not hasattr(untouched, "lora_A")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_as_sat_merges_it(tmp_path: Path, dtype: torch.dtype) -> None:
    module = with_lora(weights(), dtype)
    root = write(tmp_path / "cogvlm-base", module, **TRAINED)
    report = convert(root, tmp_path / "hf", merge_lora=True, tokenizer=OPEN / "tokenizer")
    assert report.layout == "sat"
    expected = table.family("cogvlm").open_release(write(tmp_path / "plain", merged(module)), {}).tensors
    found = load_file(tmp_path / "hf/model.safetensors")
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert lavish.load(tmp_path / "hf", device="cpu").processor.template_version == "base"


def test_as_a_peft_adapter(trained: Path, plain: Path, tmp_path: Path) -> None:
    """The LoRA alone, and the originals it lies on, give the merged logits; the adapter loads with PEFT's own rules."""
    convert(trained, tmp_path / "adapter", to="peft")
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (3 * RANK, 3)
    assert fields["rank_pattern"] == {"dense": RANK, "language_expert_dense": RANK}
    assert fields["target_modules"] == [
        "dense",
        "language_expert_dense",
        "language_expert_query_key_value",
        "query_key_value",
    ]
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(stored) == 16
    for theirs, ours, parts in modules():
        module = with_lora(weights())
        down = torch.cat([module[f"{theirs}.matrix_A.{part}"] for part in range(parts)])
        up = torch.block_diag(*(module[f"{theirs}.matrix_B.{part}"] for part in range(parts)))
        assert torch.equal(stored[f"base_model.model.{ours}.lora_A.weight"], down)
        assert torch.equal(stored[f"base_model.model.{ours}.lora_B.weight"], up)
    vlm = load(OPEN / "checkpoint", adapter=tmp_path / "adapter")
    torch.testing.assert_close(logits(vlm), logits(load(plain)), **MERGED_ADAPTER)
    vlm = load(tmp_path / "adapter", base=OPEN / "checkpoint")
    torch.testing.assert_close(logits(vlm), logits(load(plain)), **MERGED_ADAPTER)


def test_nobody_said_what_becomes_of_it(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a LoRA that belongs to the model. .*--merge-lora.*--to peft"):
        convert(trained, tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"Convert to hf with --merge-lora first"):
        convert(trained, tmp_path / "sat", to="sat")
    assert not (tmp_path / "hf").exists()


def test_another_adapter_does_not_take_its_place(trained: Path, tmp_path: Path) -> None:
    convert(trained, tmp_path / "adapter", to="peft")
    with pytest.raises(ConfigError, match=r"holds a LoRA of its own. Merge that first"):
        load(trained, adapter=tmp_path / "adapter")
    vlm = load(trained)
    vlm.load_adapter(tmp_path / "adapter", "other")
    torch.testing.assert_close(logits(vlm), logits(load(trained)), **MERGED_ADAPTER)


def test_some_layers_only(tmp_path: Path, plain: Path) -> None:
    """Names of modules, not of kinds, where the LoRA is not on all of them."""
    module = with_lora(weights())
    for name, _, parts in list(modules())[2:]:
        for leaf in ("weight", "bias"):
            if f"{name}.original.{leaf}" in module:
                module[f"{name}.{leaf}"] = module.pop(f"{name}.original.{leaf}")
        for part in range(parts):
            del module[f"{name}.matrix_A.{part}"], module[f"{name}.matrix_B.{part}"]
    vlm = load(write(tmp_path / "some", module, **TRAINED))
    layers = [name for name, _ in vlm.model.named_modules() if name.endswith("lora_A.default")]
    assert len(layers) == 2
    assert all(".layers.0.self_attn.language_expert_" in name for name in layers)


def split(root: Path, module: dict[str, torch.Tensor]) -> Path:
    """Save two ranks: A of dense by columns, B of QKV by rows; both others whole on each."""
    write(root, {}, **TRAINED, model_parallel_size=2)
    for rank in (0, 1):
        shares = {}
        for name, value in module.items():
            cut = layout.cut_of(name)
            if cut is None:
                shares[name] = value
                continue
            blocks = value.chunk(cut.blocks, cut.dim)
            shares[name] = torch.cat([block.chunk(2, cut.dim)[rank] for block in blocks], cut.dim)
        torch.save({"module": shares}, root / "1" / layout.RANK_FILE.format(rank))
    return root


def test_of_two_ranks_it_is_laid_together_before_it_is_added(trained: Path, tmp_path: Path) -> None:
    module = with_lora(weights())
    root = split(tmp_path / "double", module)
    stored = torch.load(root / "1" / layout.RANK_FILE.format(1), weights_only=True)["module"]
    assert stored["transformer.layers.0.attention.query_key_value.matrix_B.1"].shape == (24, RANK)
    assert stored["transformer.layers.0.attention.dense.matrix_A.0"].shape == (RANK, 24)
    torch.testing.assert_close(logits(load(root)), logits(load(trained)), rtol=0, atol=0)
    # what SAT trained on each rank by itself is no one LoRA
    file = root / "1" / layout.RANK_FILE.format(1)
    stored["transformer.layers.0.attention.dense.matrix_B.0"] += 1
    torch.save({"module": stored}, file)
    with pytest.raises(CheckpointError, match=r"matrix_B.0' of rank 1 differs from rank 0's"):
        load(root)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda m: m.pop(f"{LANGUAGE.format(0)}.dense.matrix_A.0"), MissingKeys, r"has no matrix_A.0; the file is not"),
        (lambda m: m.pop(f"{LANGUAGE.format(0)}.query_key_value.matrix_B.1"), MissingKeys, r"has no matrix_B.1"),
        (lambda m: m.pop(f"{LANGUAGE.format(0)}.dense.original.weight"), MissingKeys, r"and no such weight"),
        (
            lambda m: m.update({f"{LANGUAGE.format(0)}.dense.matrix_A.0": torch.ones(RANK, 7)}),
            ShapeMismatch,
            r"has matrices of \(3, 7\) and \(48, 3\) for each of 1 parts; they do not fit",
        ),
        (
            lambda m: m.update(
                {f"transformer.final_layernorm.matrix_{kind}.0": torch.tensor(1.0) for kind in "AB"},
            ),
            ShapeMismatch,
            r"'model.norm.weight', which is \(48,\), has matrices of \(\) and \(\)",
        ),
        (
            lambda m: m.update({f"{LANGUAGE.format(0)}.dense.matrix_A.0": torch.tensor(1.0)}),
            ShapeMismatch,
            r"has matrices of \(\) and \(48, 3\)",
        ),
        (
            lambda m: m.update({f"{LANGUAGE.format(0)}.dense.weight": torch.ones(2)}),
            CheckpointError,
            r"dense.original.weight' beside the weight that it is the original of",
        ),
    ],
)
def test_files_that_are_not_whole(tmp_path: Path, change: Any, error: type[Exception], words: str) -> None:
    module = with_lora(weights())
    change(module)
    with pytest.raises(error, match=words):
        load(write(tmp_path / "x", module, **TRAINED))


def test_a_rank_that_is_not_the_config_s(tmp_path: Path) -> None:
    """The scaling comes from it: 10 instead of 3 would be less than a third of what was trained."""
    with pytest.raises(CheckpointError, match=r"its LoRA has rank 3 and model_config.json says lora_rank 10"):
        load(write(tmp_path / "x", with_lora(weights()), **{**TRAINED, "lora_rank": 10}))


def test_qlora_is_refused_with_a_hint(tmp_path: Path) -> None:
    module = with_lora(weights())
    name = f"{LANGUAGE.format(0)}.query_key_value.original.weight"
    module[name] = torch.zeros(48 * 144 // 2, 1, dtype=torch.uint8)
    module[f"{name}.absmax"] = torch.ones(9)
    with pytest.raises(CheckpointError, match=r"packed in 4 bits \(use_qlora is True\), .* merge them there with SAT"):
        load(write(tmp_path / "x", module, **{**TRAINED, "use_qlora": True}))


def test_a_quantised_base_keeps_it_in_float(trained: Path, plain: Path) -> None:
    vlm = load(trained, quantization="int8")
    reference = load(OPEN / "checkpoint", quantization="int8")
    far, near = logits(reference) - logits(load(plain)), logits(vlm) - logits(load(plain))
    assert near.abs().max() < far.abs().max() / 4
    shutil.rmtree(trained)  # nothing is read after loading
    assert logits(vlm).isfinite().all()
