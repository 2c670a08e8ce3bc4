"""From the words of the command line to what `lavish.load` takes."""

from pathlib import Path

import pytest

from lavish.cli.loading import choose_dtype, choose_quantization, resolve_model
from lavish.common.errors import ConfigError


def test_names_of_the_zoo_are_hub_ids() -> None:
    path, entry = resolve_model("cogvlm-chat-v1.1")
    assert path == "THUDM/cogvlm-chat-hf"
    assert entry is not None
    assert entry.tokenizer == "lmsys/vicuna-7b-v1.5"


def test_a_hub_id_of_the_zoo_brings_its_row_and_keeps_its_revision() -> None:
    path, entry = resolve_model("THUDM/cogvlm-chat-hf@main")
    assert path == "THUDM/cogvlm-chat-hf@main"
    assert entry is not None


def test_a_path_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cogvlm-chat-v1.1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("cogvlm-chat-v1.1") == ("cogvlm-chat-v1.1", None)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model")[0] == str(tmp_path / "model")


@pytest.mark.parametrize("name", [None, "pocket"])
def test_the_bundled_model(name: str | None) -> None:
    assert resolve_model(name)[0] is None


def test_other_hub_ids_pass() -> None:
    assert resolve_model("org/cogvlm2-llama3-chat-19B") == ("org/cogvlm2-llama3-chat-19B", None)


@pytest.mark.parametrize("owner", ["THUDM", "zai-org"])
def test_both_names_of_the_owner_are_in_the_zoo(owner: str) -> None:
    name, entry = resolve_model(f"{owner}/cogvlm-chat-hf@main")
    assert name == f"{owner}/cogvlm-chat-hf@main"
    assert entry is not None
    assert entry.tokenizer == "lmsys/vicuna-7b-v1.5"


def test_a_wrong_name_suggests() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'cogvlm-chat-v1\.1'\?"):
        resolve_model("cogvlm-chat-v1")


def test_cogagent_is_refused_with_words() -> None:
    with pytest.raises(ConfigError, match="CogAgent"):
        resolve_model("cogagent-chat")


@pytest.mark.parametrize(
    ("dtype", "fp16", "bf16", "expected"),
    [("auto", False, False, "auto"), ("auto", True, False, "float16"), ("bf16", False, True, "bfloat16")],
)
def test_dtype(dtype: str, fp16: bool, bf16: bool, expected: str) -> None:
    assert choose_dtype(dtype, fp16=fp16, bf16=bf16) == expected


@pytest.mark.parametrize(("dtype", "fp16", "bf16"), [("auto", True, True), ("float32", True, False)])
def test_contradicting_dtypes(dtype: str, fp16: bool, bf16: bool) -> None:
    with pytest.raises(ConfigError, match="contradict"):
        choose_dtype(dtype, fp16=fp16, bf16=bf16)


def test_quantization_by_bits() -> None:
    assert choose_quantization(None, None) is None
    assert choose_quantization(None, 8) == "int8"
    assert choose_quantization("nf4", 4) == "nf4"
    with pytest.raises(ConfigError, match="--quant 3"):
        choose_quantization(None, 3)
    with pytest.raises(ConfigError, match="contradict"):
        choose_quantization("int8", 4)
