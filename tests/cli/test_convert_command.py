"""`lavish convert`: what it prints, its exit status, progress, and `--check`."""

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lavish
from lavish.checkpoints import hf
from lavish.cli import main
from lavish.cli.convert import ByteProgress, read_size
from lavish.common.errors import ConfigError

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
V2 = FIXTURES / "cogvlm2" / "open" / "checkpoint"


def run(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def test_the_destination_is_the_result_and_the_rest_is_said_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(V2, tmp_path / "new", "--dtype", "bf16", "--shard-size", "300kB", "--verify") == 0
    told = capsys.readouterr()
    assert told.out == f"{tmp_path / 'new'}\n"
    assert "cogvlm, hf to hf: 83 tensors, 820 kB in 3 files" in told.err
    assert "read back, equal bit by bit" in told.err
    assert lavish.load(tmp_path / "new", device="cpu").model.dtype == torch.bfloat16


def test_the_report_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(V2, tmp_path / "new", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["family"] == "cogvlm"
    assert report["layout"] == report["to"] == "hf"
    assert report["files"] == ["model.safetensors"]
    assert report["num_bytes"] == hf.read(V2).nbytes
    assert report["is_verified"] is False


def test_what_was_dropped_is_said_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, fields = FIXTURES / "minigpt4qwen" / "open" / "checkpoint", tmp_path / "fields.json"
    fields.write_text(json.dumps({"vision_config": {"num_attention_heads": 4}}))
    llm = f"llm={FIXTURES / 'qwen' / 'llm'}"
    assert run(source, tmp_path / "new", "--piece", llm, "--config", fields) == 0
    told = capsys.readouterr().err
    assert "Not written: Qformer.bert.embeddings.position_ids: a constant" in told
    assert "t5_proj.weight" in told


def test_values_that_are_clamped_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    shutil.copytree(V2, source, ignore=shutil.ignore_patterns("model*"))
    weights = {name: value.clone() for name, value in hf.read(V2).items()}
    weights["lm_head.weight"][0, 0] = 1e6
    save_file(weights, source / "model.safetensors")
    assert run(source, tmp_path / "new", "--dtype", "fp16") == 2
    assert "1 of 30720 values do not fit float16" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert run(source, tmp_path / "new", "--dtype", "fp16", "--clamp") == 0
    assert "Clamped: 1 values of lm_head.weight" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*step: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ByteProgress, "advance", interrupt)
        assert run(V2, tmp_path / "new") == 130
    assert "The same command goes on from here." in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert run(V2, tmp_path / "new") == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Missing argument"),
        ((V2,), "Where to? Give a destination"),
        ((V2, "{new}", "--to", "hg"), "No layout 'hg'"),
        ((V2, "{new}", "--dtype", "int9"), "No dtype 'int9'"),
        ((V2, "{new}", "--shard-size", "5 G"), "write a number and a unit"),
        ((V2, "{new}", "--model-parallel", "2"), "files of 'hf' are whole"),
        ((V2, "{new}", "--to", "lavis"), "'lavis' cannot hold"),
        ((V2, "{new}", "--merge-lora"), "has no LoRA"),
        ((V2, V2), "nothing is overwritten"),
        ((V2, f"{V2}/new"), "lies in the source"),
        (("{new}/nothing", "{new}"), "no such file or folder"),
        ((V2, "{new}", "--check"), "writes nothing; leave out"),
    ],
)
def test_what_is_refused(
    arguments: tuple[object, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*(str(argument).format(new=tmp_path / "new") for argument in arguments)) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1.5gb", 15 * 10**8), ("2GiB", 2**31), ("300kB", 300_000), ("7", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5GBs", "0", "0.1B", "5,5GB", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--shard-size"):
        read_size(text)


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lavish.cli import convert

    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(convert.time, "monotonic", lambda: float(next(clock)))
    with ByteProgress() as progress:
        for done in range(0, 500, 100):
            progress.advance("convert", done * 10**6, 4 * 10**8)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "convert: 100 MB of 400 MB, 16.7 MB/s, 18.0 s left"
    assert len(lines) == 2


def test_progress_on_a_terminal_is_a_bar_with_speed_and_time_left(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom lavish.cli.convert import ByteProgress\n"
        "with ByteProgress() as progress:\n"
        "    for done in range(0, 110, 10):\n"
        "        progress.advance('convert', done * 10**6, 10**8)\n        time.sleep(0.05)\n"
    )
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=follower, env=environment)
    os.close(follower)
    seen = b""
    while True:
        try:
            chunk = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    assert process.wait(timeout=60) == 0
    assert b"convert" in seen
    assert b"100.0/100.0 MB" in seen
    assert b"MB/s" in seen
    assert b"0:00" in seen


# -- --check -----------------------------------------------------------------------------------------------------------


def test_a_sound_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--check", V2) == 0
    told = capsys.readouterr()
    assert "model-00001-of-00002.safetensors" in told.out
    assert "model.vision" in told.out
    assert "Nothing is wrong." in told.err


def test_a_check_takes_no_options_of_writing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--check", V2, "--to", "sat", "--verify", "--dtype", "bf16") == 2
    assert "it takes no --to, --dtype, --verify" in capsys.readouterr().err


def test_what_is_no_number_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(V2, tmp_path / "bad", ignore=shutil.ignore_patterns("model*"))
    weights = {name: value.clone() for name, value in hf.read(V2).items()}
    weights["lm_head.weight"][3, :2] = torch.tensor([float("nan"), float("inf")])
    save_file(weights, tmp_path / "bad" / "model.safetensors")
    assert run("--check", tmp_path / "bad") == 1
    assert "'lm_head.weight' in model.safetensors holds 1 NaN and 1 infinities" in capsys.readouterr().err
    assert run("--check", tmp_path / "bad", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert {part["name"]: (part["nan"], part["inf"]) for part in found["parts"]}["lm_head"] == (1, 1)


def test_a_cut_off_file_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(V2, tmp_path / "bad")
    file = tmp_path / "bad" / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert run("--check", tmp_path / "bad") == 1
    told = capsys.readouterr()
    assert "truncated" in told.err
    assert file.name in told.out  # its checksum is told all the same


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom lavish.cli import main\nmain(['convert', '--help'])\n"
        "sys.exit(any(name.partition('.')[0] in ('torch', 'transformers') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--model-parallel" in done.stdout
