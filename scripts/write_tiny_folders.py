"""Write projects/*/tiny: config.json and tokenizer of networks small enough to learn drawn scenes on a CPU, no weights.

`model: {arch: chat, path: projects/glm4v_9b/tiny, init: random}` starts one. The tokenizers are in the form of the
releases, ranks of byte pairs, here of the single bytes and of the words of the scenes. A test checks that the files are
current.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.trainers import BpeTrainer

from lavish.datasets.scenes import dialogues
from lavish.datasets.scenes.world import COLOURS, PATTERNS, SHAPES
from lavish.models.glm4v_9b import tokenizer as glm
from lavish.processors import qwen_tokenizer as qwen

PROJECTS = Path(__file__).resolve().parent.parent / "projects"
TEXTS = (
    *(f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES),
    *("what color is the shape?", "what colour is it?", "what shape is it?", "describe the picture.", "yes", "no"),
    "Answer the question using a single word or phrase.",
    *("system\nYou are a helpful assistant.", "user\n", "assistant\n", "<Img>", "</Img>", "你是一位图像理解助手。"),
    *(*COLOURS, *SHAPES),
)
"""What the byte pairs are learnt from: each word of them is one token in the end."""
INITIALIZER_RANGE = 0.06
"""The releases' 0.02 is of layers that are forty times wider."""

Word = tuple[bytes, ...]


def learn_pairs(texts: Iterable[str], pattern: str) -> list[bytes]:
    """Give the tokens by rank: the 256 bytes, then pairs in the order of their counts, until each word is one token."""
    split = Split(Regex(pattern), behavior="isolated")
    words: Counter[Word] = Counter()
    for text in texts:
        for piece, _ in split.pre_tokenize_str(text):
            words[tuple(bytes([one]) for one in piece.encode())] += 1
    ranks = [bytes([one]) for one in range(256)]
    while pairs := _count(words):
        first, second = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks.append(first + second)
        words = Counter({_joined(word, first, second): count for word, count in words.items()})
    return ranks


def _count(words: Counter[Word]) -> Counter[tuple[bytes, bytes]]:
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            pairs[pair] += count
    return pairs


def _joined(word: Word, first: bytes, second: bytes) -> Word:
    parts: list[bytes] = []
    for part in word:
        if parts and parts[-1] == first and part == second:
            parts[-1] = first + second
        else:
            parts.append(part)
    return tuple(parts)


def rank_file(tokens: Iterable[bytes]) -> bytes:
    """Give the lines "base64 rank"."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def as_json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, indent=2, ensure_ascii=False).encode() + b"\n"


def qwen_ids(num_ranks: int) -> dict[str, int]:
    return {token: num_ranks + index for index, token in enumerate(qwen.SPECIAL_TOKENS)}


def qwen_decoder(num_ranks: int) -> dict[str, Any]:
    """Give the decoder that both families of Qwen's first generation have here."""
    return {
        "vocab_size": num_ranks + len(qwen.SPECIAL_TOKENS),
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "seq_length": 256,
        "max_position_embeddings": 256,
    }


def glm4v_9b() -> dict[str, bytes]:
    """Give the files of projects/glm4v_9b/tiny."""
    ranks = learn_pairs(TEXTS, glm.SPLIT)
    ids = {token: len(ranks) + index for index, token in enumerate(glm.SPECIAL_TOKENS)}
    ends = [ids["<|endoftext|>"], ids["<|user|>"], ids["<|observation|>"]]
    config = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "torch_dtype": "float32",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "original_rope": True,
        "post_layer_norm": True,
        "rmsnorm": True,
        "num_layers": 2,
        "hidden_size": 96,
        "ffn_hidden_size": 192,
        "kv_channels": 24,
        "num_attention_heads": 4,
        "layernorm_epsilon": 1e-5,
        "seq_length": 256,
        "padded_vocab_size": len(ranks) + len(ids),
        "tie_word_embeddings": False,
        "initializer_range": INITIALIZER_RANGE,
        "eos_token_id": ends,
        "pad_token_id": ids["<|endoftext|>"],
        "boi_token_id": ids["<|begin_of_image|>"],
        "eoi_token_id": ids["<|end_of_image|>"],
        "vision_config": {
            "image_size": 64,
            "patch_size": 8,
            "in_channels": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_heads": 4,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "dropout_prob": 0.0,
            "scaling_factor": 1,
        },
    }
    return {
        "config.json": as_json(config),
        "tokenizer.model": rank_file(ranks),
        "tokenizer_config.json": as_json(
            {
                "added_tokens_decoder": {
                    str(index): {"content": token, "special": True} for token, index in ids.items()
                },
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "image_size": 64,
                "padding_side": "left",
                "tokenizer_class": "ChatGLM4Tokenizer",
            }
        ),
    }


def clip_qwen() -> dict[str, bytes]:
    """Give the files of projects/clip_qwen/tiny."""
    ranks = learn_pairs(TEXTS, qwen.QWEN_SPLIT)
    ids = qwen_ids(len(ranks))
    config = {
        "model_type": "clip_qwen",
        "architectures": ["ClipQwenForConditionalGeneration"],
        "torch_dtype": "float32",
        "image_token_id": ids[qwen.IMAGE],
        "pad_token_id": ids[qwen.END_OF_TEXT],
        "num_token_ids": len(ranks) + len(ids),
        "initializer_range": INITIALIZER_RANGE,
        "text_config": qwen_decoder(len(ranks)),
        "vision_config": {
            "image_size": 48,
            "patch_size": 8,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        },
    }
    return {"config.json": as_json(config), qwen.RANK_FILE: rank_file(ranks)}


def minigpt4_qwen() -> dict[str, bytes]:
    """Give the files of projects/minigpt4_qwen/tiny."""
    ranks = learn_pairs(TEXTS, qwen.QWEN_SPLIT)
    ids = qwen_ids(len(ranks))
    config = {
        "model_type": "minigpt4_qwen",
        "architectures": ["MiniGPT4QwenForConditionalGeneration"],
        "torch_dtype": "float32",
        "image_token_id": ids[qwen.IMAGE],
        "pad_token_id": ids[qwen.END_OF_TEXT],
        "num_query_tokens": 8,
        "initializer_range": INITIALIZER_RANGE,
        "text_config": qwen_decoder(len(ranks)),
        "vision_config": {
            "image_size": 48,
            "patch_size": 8,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "initializer_range": INITIALIZER_RANGE,  # the default of transformers' class is as good as none
        },
        "qformer_config": {
            "initializer_range": INITIALIZER_RANGE,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "encoder_hidden_size": 96,
            "cross_attention_frequency": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    }
    return {"config.json": as_json(config), qwen.RANK_FILE: rank_file(ranks)}


def gpt_dialogue() -> dict[str, bytes]:
    """Give the files of projects/gpt_dialogue/tiny: byte pairs of the texts of `scenes_dialogue`, in GPT-2's form."""
    texts = [f"{dialogues.CAPTION.format(pattern)} {dialogues.SUMMARY}" for pattern in PATTERNS]
    for label, values in dialogues.VideoSettings().values().items():
        question, answer = dialogues.TURNS[label]
        texts += [*[question] * 5, *(answer.format(value) for value in values)]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    with TemporaryDirectory() as folder:
        return {path.name: path.read_bytes() for path in map(Path, tokenizer.model.save(folder))}


def folders() -> dict[Path, bytes]:
    """Give the content of every file by its path."""
    chat = {"glm4v_9b": glm4v_9b(), "clip_qwen": clip_qwen(), "minigpt4_qwen": minigpt4_qwen()}
    made = {**chat, "gpt_dialogue": gpt_dialogue()}
    return {
        PROJECTS / family / "tiny" / name: content for family, files in made.items() for name, content in files.items()
    }


if __name__ == "__main__":
    for path, content in folders().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
