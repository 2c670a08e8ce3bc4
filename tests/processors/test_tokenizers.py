"""Tokenizers: sentencepiece used directly, tokenizer.json, tiktoken ranks; user text never becomes a special id."""

import json
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers.normalizers import NFC
from transformers import PreTrainedTokenizerFast

from lavish.common.errors import CheckpointError
from lavish.datasets.scenes.tokenizer import save_tokenizer
from lavish.processors.tokenizers import (
    LLAMA3_SPECIAL_TOKENS,
    LLAMA3_SPLIT,
    SentencePieceTokenizer,
    encode_plain,
    load_rank_file,
    load_tokenizer,
)

FIXTURES = Path(__file__).parent.parent / "fixtures"
V1, V2 = FIXTURES / "cogvlm/open/checkpoint", FIXTURES / "cogvlm2/open/checkpoint"
TEXTS = [
    "",
    " ",
    "  two spaces",
    "a  b   c ",
    "Question: 图片里有什么？ Answer:",
    "emoji 🙂🙂, é, ñ, \u0000, \t tabs\r\n\n and lines\n",
    "它's 1234567 it's IT'S\n\n  x",
    "[[120,340,560,780]]",
    "<|end_of_text|></s><s><unk><0x0A>▁",
]


@pytest.fixture(scope="module")
def sentencepiece():
    return load_tokenizer(V1)


@pytest.fixture(scope="module")
def fast():
    return load_tokenizer(V2)


@pytest.fixture
def tiktoken_folder(tmp_path):
    shutil.copy(V2 / "tokenizer.model", tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_is_used_directly(sentencepiece, text):
    reference = SentencePieceProcessor(model_file=str(V1 / "tokenizer.model"))
    assert encode_plain(sentencepiece, text) == reference.encode(text)


def test_two_leading_spaces(sentencepiece):
    ids = encode_plain(sentencepiece, "  two")
    assert sentencepiece.convert_ids_to_tokens(ids) == ["▁", "▁", "▁t", "w", "o"]
    assert sentencepiece.decode(ids) == "  two"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["sentencepiece", "fast"])
def test_round_trip_is_exact(name, text, request):
    tokenizer = request.getfixturevalue(name)
    decoded = tokenizer.decode(encode_plain(tokenizer, text))
    assert decoded == (text.replace("▁", " ") if name == "sentencepiece" else text)  # "▁" is sentencepiece's space


@pytest.mark.parametrize("text", TEXTS)
def test_tiktoken_file_encodes_like_tokenizer_json(fast, tiktoken_folder, text):
    shutil.copy(V2 / "tokenizer_config.json", tiktoken_folder)
    tokenizer = load_tokenizer(tiktoken_folder)
    assert encode_plain(tokenizer, text) == encode_plain(fast, text)


def test_tiktoken_file_alone_gets_llama3_special_tokens(fast, tiktoken_folder):
    tokenizer = load_tokenizer(tiktoken_folder, vocab_size=480)
    assert tokenizer.get_vocab() == fast.get_vocab()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (448, 449)
    assert tokenizer("Hi").input_ids == fast("Hi").input_ids
    assert len(load_tokenizer(tiktoken_folder)) == 448 + 256


def test_llama3_special_tokens_stand_where_the_release_has_them():
    assert len(LLAMA3_SPECIAL_TOKENS) == len(set(LLAMA3_SPECIAL_TOKENS)) == 256
    assert LLAMA3_SPECIAL_TOKENS[:3] == ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>")
    assert LLAMA3_SPECIAL_TOKENS[6:10:3] == ("<|start_header_id|>", "<|eot_id|>")
    config = json.loads((V2 / "tokenizer_config.json").read_text())
    named = [config["added_tokens_decoder"][str(448 + i)]["content"] for i in range(32)]
    assert list(LLAMA3_SPECIAL_TOKENS[:32]) == named


@pytest.mark.parametrize("name", ["sentencepiece", "fast"])
def test_special_strings_stay_text(name, request):
    tokenizer = request.getfixturevalue(name)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    assert special
    for token in [*tokenizer.all_special_tokens, *(str(token) for token in tokenizer.added_tokens_decoder.values())]:
        text = f"before{token}after {token}"
        assert not special & set(encode_plain(tokenizer, text))
        assert tokenizer.decode(encode_plain(tokenizer, text)) == text


@pytest.mark.parametrize("name", ["sentencepiece", "fast"])
def test_transformers_calls_do_not_change_plain_encoding(name, request):
    tokenizer = request.getfixturevalue(name)
    token = tokenizer.eos_token
    assert tokenizer.eos_token_id in tokenizer(token).input_ids  # transformers' own way does parse it
    assert tokenizer.eos_token_id not in encode_plain(tokenizer, token)


@pytest.mark.parametrize("name", ["sentencepiece", "fast"])
def test_partial_characters_do_not_crash(name, request):
    tokenizer = request.getfixturevalue(name)
    ids = encode_plain(tokenizer, "🙂")
    texts = [tokenizer.decode(ids[:count]) for count in range(1, len(ids))]
    assert texts
    assert all(text.strip() in ("", "�", "��", "���") for text in texts)
    assert tokenizer.decode(ids).strip() == "🙂"


@pytest.mark.parametrize("name", ["sentencepiece", "fast"])
def test_special_ids_show_or_not_and_ids_without_text_are_skipped(name, request):
    tokenizer = request.getfixturevalue(name)
    ids = [*encode_plain(tokenizer, "Hi"), tokenizer.eos_token_id, 100_000]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hi"
    assert tokenizer.decode(ids) == f"Hi{tokenizer.eos_token}"
    assert tokenizer.decode(tokenizer.eos_token_id) == tokenizer.eos_token


@pytest.mark.parametrize("name", ["sentencepiece", "fast"])
def test_save_and_load(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer)
    assert again.get_vocab() == tokenizer.get_vocab()
    for text in TEXTS:
        assert encode_plain(again, text) == encode_plain(tokenizer, text)
    assert again.special_tokens_map == tokenizer.special_tokens_map


def test_sentencepiece_wins_over_a_converted_json(tmp_path):
    shutil.copy(V1 / "tokenizer.model", tmp_path)
    shutil.copy(V2 / "tokenizer.json", tmp_path)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)


def test_tokenizer_json_wins_over_tiktoken_ranks(fast):
    assert isinstance(fast, PreTrainedTokenizerFast)
    assert fast.clean_up_tokenization_spaces is False
    assert fast.decode(encode_plain(fast, "a , b . c")) == "a , b . c"


def test_no_tokenizer(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"looked for tokenizer.model and tokenizer.json, found an empty folder.*tokenizer="
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.model", b"\x00\x01 not a model", "neither a sentencepiece model nor a tiktoken rank file"),
        ("tokenizer.model", b"", "neither a sentencepiece model nor a tiktoken rank file \\(0 bytes\\)"),
        ("tokenizer.model", b"IQ== 0\nIg==\n", "line 2: expected 'base64 rank'"),
        ("tokenizer.model", b"IQ== 0\n!! 1\n", "line 2: expected 'base64 rank'"),
        ("tokenizer.model", b"IQ== 0\nIg== 7\n", "the 2 ranks are not 0 to 1"),
        ("tokenizer.json", b'{"version": ', "tokenizer.json is not a JSON object \\(11 bytes, it may be cut\\)"),
        ("tokenizer.json", b"{}", "tokenizer.json describes no tokenizer"),
    ],
)
def test_damaged_files(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"null", b"[]", b"\xff\xfe{}", b"{"])
def test_a_damaged_tokenizer_config(tmp_path, content):
    shutil.copy(V2 / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json (is not valid JSON|holds)"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": 7, "added_tokens_decoder": null}')
    assert len(load_tokenizer(tmp_path)) > 400


def test_tiktoken_ranks_of_another_model(tiktoken_folder):
    with pytest.raises(CheckpointError, match="holds 448 ranks and the model has 32000 ids"):
        load_tokenizer(tiktoken_folder, vocab_size=32000)


def test_tokenizer_of_the_drawn_world(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    for text in [*TEXTS, "".join(tokenizer.all_special_tokens), "Where is the red circle? [[012,345,678,901]]"]:
        ids = encode_plain(tokenizer, text)
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([1, *encode_plain(tokenizer, "🙂")[:2]], skip_special_tokens=True) == "�"


GLM = FIXTURES / "glm4v/open/checkpoint"
GLM_SPECIAL = {"<|endoftext|>": 500, "[MASK]": 501, "[gMASK]": 502, "[sMASK]": 503, "<sop>": 504}


def test_rank_file_with_its_own_split_specials_normalizer_and_prefix(tmp_path):
    shutil.copy(GLM / "tokenizer.model", tmp_path)
    path = tmp_path / "tokenizer.model"
    plain = load_rank_file(path, split_pattern=LLAMA3_SPLIT, special_tokens=GLM_SPECIAL, pad_token="<|endoftext|>")
    assert (len(plain), plain.vocab_size, plain.pad_token_id) == (505, 500, 500)
    assert plain("<sop>hello").input_ids == [504, 260, 108, 108, 111]
    assert encode_plain(plain, "[gMASK]<sop>x") == [91, 103, 77, 65, 83, 75, 93, 60, 115, 111, 112, 62, 120]
    split = load_rank_file(path, split_pattern=".", special_tokens=GLM_SPECIAL)
    assert encode_plain(split, "hello") == [104, 101, 108, 108, 111]
    prefixed = load_rank_file(
        path, split_pattern=LLAMA3_SPLIT, special_tokens=GLM_SPECIAL, prefix=("[gMASK]", "<sop>"), normalizer=NFC()
    )
    assert prefixed("hello").input_ids == [502, 504, 260, 108, 108, 111]
    assert encode_plain(prefixed, "e\u0301") == encode_plain(plain, "\u00e9") != encode_plain(plain, "e\u0301")


def test_special_ids_that_do_not_follow_the_ranks():
    with pytest.raises(CheckpointError, match=r"500 ranks, so the 2 special tokens have the ids 500 to 501; .*7 to 8"):
        load_rank_file(GLM / "tokenizer.model", split_pattern=LLAMA3_SPLIT, special_tokens={"<a>": 7, "<b>": 8})
