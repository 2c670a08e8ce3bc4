"""Telling layouts apart by what a folder holds."""

import subprocess
import sys
from pathlib import Path

import pytest

from lavish.checkpoints import layouts
from lavish.common.errors import UnknownLayout


@pytest.mark.parametrize(
    "names",
    [
        ["config.json"],
        ["model.safetensors"],
        ["model.safetensors.index.json"],
        ["pytorch_model.bin"],
        ["config.json", "x.py"],
    ],
)
def test_the_hugging_face_layout(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert layouts.detect(tmp_path) == "hf"


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("sat", ["model_config.json", "latest", "1/mp_rank_00_model_states.pt"]),
        ("lavis", ["blip_coco_caption_base.pth", "med_config.json"]),
        ("lavis", ["checkpoint_best.pth", "config.json", "bert-base-uncased/vocab.txt"]),
        ("lavis", ["eva/eva_vit_g.pth", "blip2/blip2_pretrained_flant5xxl.pth", "llm/config.json"]),
        ("mindspore", ["cogvlm2-image.ckpt", "config.json"]),
        ("mindspore", ["rank_0/checkpoint_0.ckpt", "strategy/ckpt_strategy_rank_0.ckpt"]),
        ("vlm_learning", ["other_params.bin", "adapter_config.json", "adapter_model.bin", "training_args.bin"]),
        ("vlm_learning", ["checkpoint-27000/other_params.bin", "Qwen-7B-Chat/config.json"]),
        ("peft", ["adapter_config.json", "adapter_model.safetensors"]),
        ("deepspeed", ["latest", "global_step2/mp_rank_00_model_states.pt", "config.json"]),
        ("deepspeed", ["zero_pp_rank_0_mp_rank_00_model_states.pt"]),
        ("deepspeed", ["layer_00-model_states.pt", "layer_05-model_states.pt"]),
        ("hf", ["config.json", "model.safetensors", "latest", "global_step2/mp_rank_00_model_states.pt"]),
        ("hf", ["config.json", "model-00001-of-00002.safetensors", "adapter_config.json"]),
    ],
)
def test_the_other_layouts(tmp_path: Path, layout: str, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert layouts.detect(tmp_path) == layout
    assert layout in layouts.LAYOUTS


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("peft", "adapter_model.safetensors"),
        ("peft", "adapter_model.bin"),
        ("vlm_learning", "other_params.bin"),
        ("lavis", "checkpoint_9.pth"),
        ("lavis", "weights.pt"),
        ("mindspore", "cogvlm2.ckpt"),
        ("deepspeed", "mp_rank_00_model_states.pt"),
    ],
)
def test_a_file_of_each_layout(tmp_path: Path, layout: str, name: str) -> None:
    (tmp_path / name).touch()
    assert layouts.detect(tmp_path / name) == layout


def test_a_rank_of_sat_is_no_deepspeed(tmp_path: Path) -> None:
    (tmp_path / "model_config.json").touch()
    (tmp_path / "1").mkdir()
    file = tmp_path / "1" / "mp_rank_00_model_states.pt"
    file.touch()
    assert [layouts.detect(path) for path in (tmp_path, file.parent, file)] == ["sat"] * 3


def test_a_training_run_s_objects_are_no_layout(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").touch()
    with pytest.raises(UnknownLayout, match="a file of no layout"):
        layouts.detect(tmp_path / "training_args.bin")


def test_a_weight_file_alone(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    assert layouts.detect(tmp_path / "x.safetensors") == "hf"


def test_what_is_no_layout_is_described(tmp_path: Path) -> None:
    with pytest.raises(UnknownLayout, match=r"found nothing\. It reads a folder with config\.json"):
        layouts.detect(tmp_path)
    for number in range(12):
        (tmp_path / f"part{number:02}.dat").touch()
    with pytest.raises(UnknownLayout, match=r"found part00\.dat, .* and 4 more"):
        layouts.detect(tmp_path)
    with pytest.raises(UnknownLayout, match="a file of no layout"):
        layouts.detect(tmp_path / "part00.dat")
    with pytest.raises(UnknownLayout, match="no such file or folder"):
        layouts.detect(tmp_path / "absent")


def test_the_folder_above_names_the_one_that_is_meant(tmp_path: Path) -> None:
    for name in ("b-model", "a-model", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "b-model" / "config.json").touch()
    with pytest.raises(UnknownLayout, match=r"its subfolder 'b-model' has a config\.json\. Give that: .*/b-model$"):
        layouts.detect(tmp_path)
    (tmp_path / "a-model" / "config.json").touch()
    with pytest.raises(UnknownLayout, match=r"'a-model' has a config\.json \(so have 1 others\)"):
        layouts.read_config_json(tmp_path)


def test_torch_is_not_needed_to_look(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    script = (
        "import sys; from lavish.checkpoints import hub, layouts;"
        f"print(layouts.detect(hub.resolve({str(tmp_path)!r})), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["hf", "False"]
