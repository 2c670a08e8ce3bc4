"""The package of examples/avsd, which stands outside lavish, trained as its README says, on features that it draws."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "avsd"
TOKENIZER = ROOT / "tests" / "fixtures" / "gpt_dialogue" / "open" / "checkpoint" / "gpt2"


def run(*command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=200)


def test_the_package_names_lavish_where_it_named_lavis() -> None:
    for path in (EXAMPLE / "avsd").glob("*.py"):
        for line in re.findall(r"^(?:from|import) (\w+)", path.read_text(), flags=re.MULTILINE):
            assert line in {"lavish", "avsd", "torch", "transformers", "numpy", "json", "os", "pathlib"}


def test_avsd_is_learnt_by_a_package_of_its_own(tmp_path: Path) -> None:
    assert run(str(EXAMPLE / "make_features.py"), str(tmp_path / "data"), folder=tmp_path).returncode == 0
    data, section = tmp_path / "data", "datasets.my_avsd_dialogue"
    options = {
        f"{section}.build_info.features.storage": data / "features",
        f"{section}.build_info.annotations.train.storage": data / "annotations" / "train.json",
        f"{section}.build_info.annotations.val.storage": data / "annotations" / "val.json",
        **{f"{section}.text_processor.{split}.tokenizer": TOKENIZER for split in ("train", "eval")},
        "model.len_video_ft": 20,
        "model.n_layer": 2,
        "model.n_embd": 64,
        "model.n_head": 2,
        "run.init_lr": 5e-3,
        "run.max_epoch": 8,
        "run.batch_size_train": 4,
        "run.device": "cpu",
        "run.output_dir": tmp_path / "out",
        "run.log_freq": 1,
    }
    recipe = ["--cfg-path", "dialogue_avsd_ft.yaml", "--options", *(f"{key}={value}" for key, value in options.items())]
    done = run("-m", "lavish", "train", "--plugin", "avsd", *recipe, folder=EXAMPLE)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss_text"] < 0.3 * lines[0]["loss_text"]
    scores = [
        json.loads(line)["agg_metrics"] for line in (tmp_path / "out" / "validations.jsonl").read_text().splitlines()
    ]
    assert scores[-1] < 0.5 * scores[0]
    without = run("-m", "lavish", "train", *recipe, folder=EXAMPLE)
    assert without.returncode == 2
    assert "my_gpt_dialogue" in without.stderr


def test_a_plugin_that_is_not_there(tmp_path: Path) -> None:
    for name, message in (("no_such_module", "there is no module 'no_such_module'"), ("no.py", "no such file")):
        done = run("-m", "lavish", "train", "recipe.yaml", "--plugin", name, folder=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr


def test_a_plugin_file_and_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lavish.common.plugins import load_plugins
    from lavish.common.registry import registry

    file = tmp_path / "my_plugin_of_a_test.py"
    file.write_text(
        "from lavish.common.registry import registry\n"
        "@registry.register_lr_scheduler('of_a_plugin')\n"
        "class Mine:\n    pass\n"
    )
    assert load_plugins([str(file)])[-1] == str(file)
    assert load_plugins([str(file)])
    assert "of_a_plugin" in registry.list_lr_schedulers()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_plugin_of_a_test.py").write_text("import no_such_package_of_a_test\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_of_a_test"):
        load_plugins(["broken_plugin_of_a_test"])
    assert os.getcwd() == str(tmp_path)
