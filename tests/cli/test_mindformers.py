"""MindFormers' command line and YAML: what is used, what is left out and why, what contradicts; and that it answers."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mindspore_fixture import CARDS, HF, MS, write_tokenizer
from PIL import Image

import lavish
from lavish.cli import main
from lavish.cli.mindformers import is_mindformers, parse, translated
from lavish.common.errors import ConfigError
from lavish.models.cogvlm.mindformers import read_recipe

CKPT = str(MS / "cogvlm2-image_fp32.ckpt")
LLM = "model.model_config.llm_model.model_config"
VISION = "model.model_config.vision_model.model_config"

RECIPE: dict[str, Any] = {
    "seed": 0,
    "output_dir": "./output",
    "load_checkpoint": "",
    "auto_trans_ckpt": False,
    "use_parallel": False,
    "run_mode": "predict",
    "trainer": {"type": "MultiModalToTextGenerationTrainer"},
    "callbacks": [{"type": "MFLossMonitor"}],
    "parallel_config": {"data_parallel": 8, "model_parallel": 1, "pipeline_stage": 1, "vocab_emb_dp": False},
    "recompute_config": {"recompute": False},
    "model": {
        "model_config": {
            "type": "CogVLM2Config",
            "use_past": True,
            "is_dynamic": False,
            "block_size": 16,
            "num_blocks": 512,
            "vision_model": {
                "arch": {"type": "EVAModel"},
                "model_config": {
                    "type": "EVA02Config",
                    "image_size": 56,
                    "patch_size": 14,
                    "hidden_size": 24,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "intermediate_size": 40,
                    "layer_norm_eps": "1e-6",
                    "use_swiglu": False,
                    "use_post_norm": True,
                    "class_token": True,
                    "compute_dtype": "float16",
                },
            },
            "llm_model": {
                "arch": {"type": "LlamaForCausalLMForCogVLM2Image"},
                "model_config": {
                    "type": "LlamaConfig",
                    "seq_length": 4096,
                    "max_position_embedding": 8192,
                    "hidden_size": 32,
                    "num_layers": 2,
                    "num_heads": 4,
                    "n_kv_heads": 2,
                    "vocab_size": 64,
                    "intermediate_size": 48,
                    "rms_norm_eps": 1e-5,
                    "bos_token_id": 60,
                    "eos_token_id": 61,
                    "pad_token_id": 63,
                    "compute_dtype": "bfloat16",
                    "rotary_dtype": "bfloat16",
                    "scaling_factor": 1.0,
                    "theta": 500000,
                    "extend_method": "None",
                    "use_flash_attention": False,
                    "repetition_penalty": 1,
                    "max_decode_length": 60,
                    "top_k": 3,
                    "top_p": 1,
                    "do_sample": False,
                },
            },
        },
        "arch": {"type": "CogVLM2ImageForCausalLM"},
    },
    "processor": {
        "type": "BaseXModalToTextProcessor",
        "max_length": 4096,
        "model_transform_template": {"type": "CogVLM2ImageContentTransformTemplate", "signal_type": "vqa"},
        "tokenizer": {"vocab_file": "{path}/tokenizer.model", "pad_token": "<|reserved_special_token_0|>"},
    },
    "context": {"mode": 0, "device_target": "Ascend", "device_id": 0},
    "a_key_of_tomorrow": 3,
}
"""The keys of MindFormers' predict_cogvlm2_image_llama3_chat_19b.yaml, at the sizes of the fixture."""


def changed(**changes: Any) -> dict[str, Any]:
    """The recipe with dotted keys replaced; `__` stands for a dot."""
    recipe = copy.deepcopy(RECIPE)
    for key, value in changes.items():
        *outer, last = (
            key.replace("LLM", LLM.replace(".", "__")).replace("VISION", VISION.replace(".", "__")).split("__")
        )
        place = recipe
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    return recipe


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer") / "tokenizer.model"


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Path) -> Path:
    content = changed(processor__tokenizer__vocab_file=str(tokenizer))
    (tmp_path / "predict.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "predict.yaml"


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def asking(recipe: Path, picture: str, *more: str, checkpoint: str = CKPT) -> list[str]:
    data = ["--predict-data", picture, "what is it?", "--modal-type", "image", "text"]
    return ["predict", "--config", str(recipe), *data, "--load-checkpoint", checkpoint, *more]


def told(*arguments: str) -> dict[str, str]:
    """The options of `lavish predict` that MindFormers' arguments become, with the config's fields."""
    with translated(arguments) as understood:
        assert understood[0] == "predict"
        options = dict(zip(understood[2::2], understood[3::2], strict=True))
        fields = json.loads(Path(options.pop("--config")).read_text())
        return {"MODEL": understood[1], **options, "fields": fields}


# -- the YAML ----------------------------------------------------------------------------------------------------------


def test_each_key_is_used_or_left_out_with_a_reason() -> None:
    recipe = read_recipe(RECIPE, "x.yaml")
    vision = {"image_size": 56, "patch_size": 14, "hidden_size": 24, "num_hidden_layers": 2, "num_heads": 4}
    assert recipe.fields == {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_multi_query_heads": 2,
        "vocab_size": 64,
        "intermediate_size": 48,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "bos_token_id": 60,
        "eos_token_id": 61,
        "pad_token_id": 63,
        "template_version": "vqa",
        "vision_config": {**vision, "intermediate_size": 40, "layer_norm_eps": 1e-6},
    }
    assert recipe.generation == {
        "do_sample": False,
        "top_k": 3,
        "top_p": 1,
        "repetition_penalty": 1,
        "max_length": 60,
        "seed": 0,
    }
    assert (recipe.tokenizer, recipe.checkpoint, recipe.model_parallel) == ("{path}/tokenizer.model", None, 1)
    left_out = dict(recipe.left_out)
    assert "position 257 would be position 256" in left_out[f"{LLM}.rotary_dtype"]
    assert "no prompt is cut" in left_out[f"{LLM}.seq_length"]
    assert left_out["a_key_of_tomorrow"] == "lavish does not know this key"
    assert {"callbacks", "context.device_target", "output_dir", "parallel_config.data_parallel"} <= left_out.keys()
    assert f"{VISION}.use_swiglu" not in left_out  # looked at: another value is an error


def test_the_video_recipe() -> None:
    content = changed(
        model__arch__type="CogVLM2ForCausalLM",
        model__model_config__num_queries=6,
        model__model_config__llm_model__arch__type="CogVLM2VideoLM",
    )
    del content["model"]["model_config"]["llm_model"]["model_config"]["max_position_embedding"]
    recipe = read_recipe(content, "x.yaml")
    assert recipe.is_video
    assert (recipe.fields["max_frames"], recipe.fields["max_position_embeddings"]) == (24, 2048)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"run_mode": "finetune"}, "run_mode is 'finetune', and a CogVLM2 here has 'predict'"),
        ({"model__arch__type": "LlamaForCausalLM"}, "model.arch.type is 'LlamaForCausalLM'"),
        ({"LLM__extend_method": "NTK"}, "extend_method is 'NTK'"),
        ({"LLM__scaling_factor": 2.0}, "scaling_factor is 2.0"),
        ({"VISION__use_swiglu": True}, "use_swiglu is True"),
        ({"VISION__use_post_norm": False}, "use_post_norm is False"),
        ({"parallel_config__pipeline_stage": 2}, "pipeline_stage is 2"),
        ({"LLM__num_heads": "four"}, "num_heads is 'four' and must be a whole number"),
        ({"LLM__vocab_size": -1}, "vocab_size is -1"),
        ({"LLM__theta": "often"}, "theta is 'often' and must be a number"),
        ({"model__model_config__num_queries": 66}, "num_queries is 66, and a picture of 56 pixels .* takes 6 slots"),
        ({"model__tokenizer__vocab_file": "/other/tokenizer.model"}, "two tokenizers: model.tokenizer.vocab_file="),
        ({"use_parallel": True, "parallel_config__model_parallel": "two"}, "model_parallel is 'two'"),
    ],
)
def test_what_contradicts_is_an_error(changes: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        read_recipe(changed(**changes), "x.yaml")


def test_the_tokenizer_may_stand_under_model() -> None:
    content = changed(model__tokenizer__vocab_file="/a/tokenizer.model")
    del content["processor"]["tokenizer"]
    recipe = read_recipe(content, "x.yaml")
    assert recipe.tokenizer == "/a/tokenizer.model"
    assert "MindFormers reads the tokenizer under processor" in recipe.warnings[0]
    content = changed(model__model_config__tokenizer__vocab_file="{path}/tokenizer.model")
    assert read_recipe(content, "x.yaml").warnings == []  # the same one in both places


def test_model_parallel_of_the_yaml_counts_where_it_is_used() -> None:
    content = changed(parallel_config__model_parallel=2)
    recipe = read_recipe(content, "x.yaml")
    assert recipe.model_parallel == 1
    assert "use_parallel is False" in dict(recipe.left_out)["parallel_config.model_parallel"]
    assert read_recipe({**content, "use_parallel": True}, "x.yaml").model_parallel == 2


# -- the command line --------------------------------------------------------------------------------------------------


def test_which_command_line_it_is() -> None:
    assert is_mindformers(["predict", "--load-checkpoint", "x.ckpt"])
    assert is_mindformers(["predict", "--predict_data=a.png"])
    assert not is_mindformers(["predict", "--config", "x.json", "-i", "a.png"])
    assert not is_mindformers(["chat", "--load-checkpoint", "x.ckpt"])
    with translated(["predict", "-i", "a.png"]) as understood:
        assert understood == ["predict", "-i", "a.png"]


def test_what_lavish_predict_is_told(recipe: Path, picture: str, tokenizer: Path) -> None:
    options = told(*asking(recipe, picture))
    assert options.pop("fields") == {**read_recipe(RECIPE, "x").fields}
    assert options == {
        "MODEL": CKPT,
        "--image": picture,
        "--question": "what is it?",
        "--max-length": "60",
        "--tokenizer": str(tokenizer.parent),
    }


def test_options_by_their_names_with_underscores(recipe: Path, picture: str) -> None:
    arguments = [
        argument.replace("-", "_") if argument[:2] == "--" else argument for argument in asking(recipe, picture)
    ]
    arguments = [f"--{argument[2:]}" if argument.startswith("__") else argument for argument in arguments]
    assert "--predict_data" in arguments
    assert told(*arguments) == told(*asking(recipe, picture))


def test_drawn_answers(recipe: Path, picture: str) -> None:
    options = told(*asking(recipe, picture, "--do_sample", "--seed", "7", f"--{LLM}.temperature", "0.5"))
    sampling = {"--temperature": "0.5", "--top-k": "3", "--top-p": "1", "--seed": "7"}
    assert sampling.items() <= options.items()
    assert told(*asking(recipe, picture, "--do_sample", "True"))["--temperature"] == "1.0"
    assert "--seed" not in told(*asking(recipe, picture, "--do_sample", "False", "--seed", "7"))


def test_lavishs_own_options_come_first(recipe: Path, picture: str, tokenizer: Path) -> None:
    more = ("--max-new-tokens", "5", "--dtype", "float32", "--tokenizer", "elsewhere")
    options = told(*asking(recipe, picture, *more))
    assert (options["--max-new-tokens"], options["--dtype"], options["--tokenizer"]) == ("5", "float32", "elsewhere")
    assert "--max-length" not in options


@pytest.mark.parametrize(
    "more",
    [
        (f"--{LLM}.num_layers", "7"),
        (f"--{LLM}.num_layers=7",),
        ("--options", f"{LLM}.num_layers=7", "seed=3"),
    ],
)
def test_keys_of_the_yaml_are_replaced(recipe: Path, picture: str, more: tuple[str, ...]) -> None:
    assert told(*asking(recipe, picture, *more))["fields"]["num_hidden_layers"] == 7


def test_16_a_value_may_hold_an_equals_sign() -> None:
    given = parse(["--a.b=x=y", "--a.c", "u=v=w", "--options", "a.d=1=2", "e=3"])
    assert given.overrides == {"a.b": "x=y", "a.c": "u=v=w", "a.d": "1=2", "e": "3"}
    assert parse(["--load-checkpoint=a=b.ckpt"]).overrides == {"load_checkpoint": "a=b.ckpt"}


def test_the_checkpoint_and_the_ranks_of_the_yaml(tmp_path: Path, tokenizer: Path, picture: str) -> None:
    content = changed(
        processor__tokenizer__vocab_file=str(tokenizer),
        load_checkpoint="x.ckpt",
        use_parallel=True,
        parallel_config__model_parallel=2,
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    arguments = ["predict", "--config", str(tmp_path / "r.yaml"), "--predict-data", "hi", "--modal-type", "text"]
    options = told(*arguments)
    assert (options["MODEL"], options["--tensor-parallel"], options["--question"]) == ("x.ckpt", "2", "hi")
    assert "--image" not in options
    assert "--tensor-parallel" not in told(*arguments, "--model-parallel", "1")
    assert told(*arguments, "--model-parallel", "4")["--tensor-parallel"] == "4"


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--loud",), "--loud is no option of MindFormers' command line"),
        (("--load_chekpoint", "x"), r"Did you mean 'load-checkpoint'\?"),
        ((f"--{LLM}.top_kk=3",), r"neither .* nor lavish has such a key\. Did you mean '.*top_k'\?"),
        ((f"--{LLM}.top_k",), "needs a value"),
        (("--seed",), "--seed needs a value"),
        (("stray",), "'stray' stands alone"),
        (("--options", "seed"), "write KEY=VALUE"),
        (("--seed.x=3",), r"neither .* nor lavish has such a key"),
        (("--model-parallel", "0"), "whole number from 1"),
        (("--run_mode", "train"), "run_mode is 'train'"),
        (("--load-checkpoint", "b.ckpt", "--dtype", "a", "--dtype", "b"), "--dtype was given twice"),
        ((f"--{LLM}.repetition_penalty=1.2",), "repetition_penalty is 1.2, which lavish predict has no option for"),
    ],
)
def test_wrong_options(recipe: Path, picture: str, more: tuple[str, ...], match: str) -> None:
    arguments = asking(recipe, picture)
    if more == ("stray",):
        arguments.insert(1, "stray")
        more = ()
    with pytest.raises(ConfigError, match=match):
        told(*arguments, *more)


@pytest.mark.parametrize(
    ("data", "kinds", "match"),
    [
        (["a.png", "x"], ["image"], "has 2 values and --modal-type 1"),
        (["a.png"], ["image"], "holds no text"),
        (["a", "b"], ["text", "text"], "two of the kind 'text'"),
        (["a.png", "x"], ["picture", "text"], "--modal-type 'picture'; it is image, video, text"),
        (["a.mp4", "x"], ["video", "text"], "is of the image model"),
        (["a.mp4", "x"], ["image", "text"], "is a video; its --modal-type is 'video'"),
        (["a.png", "a.mp4", "x"], ["image", "video", "text"], "an image and a video"),
    ],
)
def test_wrong_questions(recipe: Path, data: list[str], kinds: list[str], match: str) -> None:
    arguments = ["predict", "--config", str(recipe), "--load-checkpoint", CKPT]
    with pytest.raises(ConfigError, match=match):
        told(*arguments, "--predict-data", *data, "--modal-type", *kinds)


def test_wrong_files(tmp_path: Path, picture: str, recipe: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        told(*asking(tmp_path / "absent.yaml", picture))
    (tmp_path / "x.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="no YAML of MindFormers"):
        told(*asking(tmp_path / "x.yaml", picture))
    with pytest.raises(ConfigError, match="needs --config"):
        told("predict", "--load-checkpoint", CKPT)
    content = changed(processor__tokenizer__vocab_file="{path}/tokenizer.model")
    (tmp_path / "y.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"vocab_file is \{path\}/tokenizer\.model, and no such file"):
        told(*asking(tmp_path / "y.yaml", picture))
    with pytest.raises(ConfigError, match="has no load_checkpoint"):
        told("predict", "--config", str(recipe), "--predict-data", "hi", "--modal-type", "text")


def test_the_tokenizer_beside_the_checkpoint_is_taken(tmp_path: Path, tokenizer: Path, picture: str) -> None:
    (tmp_path / "y.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "tokenizer" / "x.ckpt").touch()
    options = told(*asking(tmp_path / "y.yaml", picture, checkpoint=str(tmp_path / "tokenizer" / "x.ckpt")))
    assert "--tokenizer" not in options


# -- answers -----------------------------------------------------------------------------------------------------------


def test_it_answers_as_python_does(recipe: Path, picture: str, tokenizer: Path, capsys) -> None:
    assert main([*asking(recipe, picture), "--device", "cpu"]) == 0
    seen = capsys.readouterr()
    vlm = lavish.load(CKPT, tokenizer=tokenizer.parent, config=str(recipe), device="cpu")
    image = {"type": "image", "image": Image.open(picture)}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "what is it?"}]}]
    assert seen.out.rstrip("\n") == vlm.chat(messages, max_length=60).text.rstrip("\n")
    assert vlm.processor.template_version == "vqa"
    assert "settings are used; without a meaning here:" in seen.err
    assert "a_key_of_tomorrow: lavish does not know this key" in seen.err


def test_errors_are_told_in_one_line(recipe: Path, picture: str, capsys) -> None:
    assert main([*asking(recipe, picture), "--run-mode", "train"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main([*asking(recipe, picture, checkpoint=str(MS / "encrypted.ckpt"))]) == 2
    assert "encrypted by MindSpore" in capsys.readouterr().err
    assert main([*asking(recipe, picture), f"--{LLM}.num_layers=3"]) == 2
    assert "absent" in capsys.readouterr().err


@pytest.mark.parametrize("checkpoint", [CKPT, str(CARDS)])
def test_model_parallel_2_is_one_answer_of_two_processes(
    checkpoint: str, recipe: Path, picture: str, tokenizer: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    options = ("--model-parallel", "2", "--device", "cpu", "--dtype", "float32")
    command = [sys.executable, "-m", "lavish", *asking(recipe, picture, *options, checkpoint=checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    vlm = lavish.load(checkpoint, tokenizer=tokenizer.parent, config=str(recipe), device="cpu", dtype="float32")
    image = {"type": "image", "image": Image.open(picture)}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "what is it?"}]}]
    assert done.stdout.rstrip("\n") == vlm.chat(messages, max_length=60).text.rstrip("\n")
    assert done.stderr.count("settings are used") == 1


def test_the_release_itself_can_be_asked_so_too(recipe: Path, picture: str, capsys) -> None:
    """A folder of the Hugging Face layout as the checkpoint, with the YAML's sizes and tokenizer."""
    assert main([*asking(recipe, picture, checkpoint=str(HF)), "--device", "cpu", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out
