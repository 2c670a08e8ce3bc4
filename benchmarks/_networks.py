"""The networks that the benchmarks run: CogVLM2-shaped, random weights, and a Llama of the same text size."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lavish.models.cogvlm.config import CogVLMConfig
from lavish.models.cogvlm.model import CogVLMForCausalLM

SIZES = {
    # 0.3 billion parameters; 896 px are 64 x 64 patches, merged to 1,024 image tokens.
    "mid": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_multi_query_heads": 2,
        "max_position_embeddings": 4096,
        "vision_config": {
            "image_size": 896,
            "patch_size": 14,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_heads": 4,
        },
    },
    # For the tests of the benchmarks: the same shape, too small to say anything about speed.
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_multi_query_heads": 2,
        "max_position_embeddings": 256,
        "vision_config": {
            "image_size": 56,
            "patch_size": 14,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 2,
        },
    },
}


def cogvlm2(size: str, dtype: torch.dtype, seed: int = 0) -> CogVLMForCausalLM:
    """Make a network of `SIZES`, on the CPU."""
    torch.manual_seed(seed)
    network = CogVLMForCausalLM(CogVLMConfig(**SIZES[size], bos_token_id=1, eos_token_id=2, pad_token_id=0))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.rpartition(".")[2] in ("boi", "eoi", "cls_embedding"):
                parameter.normal_(std=0.02)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)  # with a zero bias the experts' difference would not show in full
    return network.to(dtype).eval()


def llama(size: str, dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    """Make transformers' Llama with the text sizes of `cogvlm2(size)`."""
    torch.manual_seed(seed)
    fields = {key: value for key, value in SIZES[size].items() if key not in ("vision_config", "num_multi_query_heads")}
    config = LlamaConfig(
        **fields,
        num_key_value_heads=SIZES[size]["num_multi_query_heads"],
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def bytes_per_token(network: CogVLMForCausalLM) -> int:
    """Bytes of the weights that one generated token reads: language experts, norms and head, one embedding row."""
    read = 0
    for name, parameter in network.named_parameters():
        is_text = name.startswith("model.layers.") and "vision_" not in name
        if is_text or name in ("lm_head.weight", "model.norm.weight"):
            read += parameter.nbytes
    return read


def prefill_flops(network: CogVLMForCausalLM, num_tokens: int) -> float:
    """Operations that a prefill of one row cannot do without: each token through one expert, causal attention, and the
    head for the last token. The tower is not in it."""
    config = network.config
    per_token = sum(
        parameter.numel()
        for name, parameter in network.model.layers.named_parameters()
        if parameter.ndim == 2 and "vision_" not in name
    )
    attention = 2.0 * num_tokens**2 * config.hidden_size * config.num_hidden_layers  # q k^T and a v, half of each
    return 2.0 * per_token * num_tokens + attention + 2.0 * network.lm_head.weight.numel()
