"""The networks that the benchmarks run: CogVLM2-shaped, random weights, and a Llama of the same text size."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lavish.models.cogvlm.config import CogVLMConfig
from lavish.models.cogvlm.model import CogVLMForCausalLM, RotaryEmbedding, reference_inv_freq

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


def cogvlm2(size: str, dtype: torch.dtype) -> CogVLMForCausalLM:
    """Make a network of `SIZES`, on the CPU."""
    return fill(CogVLMForCausalLM, CogVLMConfig(**SIZES[size], bos_token_id=1, eos_token_id=2, pad_token_id=0), dtype)


def fill(network_class, config, dtype: torch.dtype, device: str | torch.device = "cpu"):
    """Make a network with random weights, in a second: all of it is laid out from one pool of normal numbers.

    Matrices have std 1/sqrt(fan in), embeddings and learned rows .02, biases .3 (with zeros, an expert's bias would not
    show), norms 1.
    """
    with torch.device("meta"):
        network = network_class(config)
    network = network.to(dtype).to_empty(device=device)
    pool = torch.randn(2**22 + 1, generator=torch.Generator().manual_seed(0)).to(device)
    offset = 0
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            leaf = name.rpartition(".")[2]
            if leaf == "weight" and parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            is_row = leaf in ("boi", "eoi", "cls_embedding") or "embed" in name.rpartition(".")[0].rpartition(".")[2]
            std = 0.3 if leaf == "bias" else 0.02 if is_row else parameter[0].numel() ** -0.5
            offset = lay(pool, offset, parameter.view(-1), std)
        for module in network.modules():
            if isinstance(module, RotaryEmbedding):
                module.inv_freq.copy_(reference_inv_freq(module.head_dim, module.base, dtype))
    return network.eval()


def lay(pool: torch.Tensor, offset: int, flat: torch.Tensor, std: float) -> int:
    """Fill a flat tensor from the pool, going on where the last one ended; gives where this one ends."""
    done = 0
    while done < flat.numel():
        count = min(flat.numel() - done, pool.numel() - offset)
        flat[done : done + count] = pool[offset : offset + count] * std
        done, offset = done + count, (offset + count) % pool.numel()
    return offset


def llama(size: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """Make transformers' Llama with the text sizes of `cogvlm2(size)`."""
    fields = {key: value for key, value in SIZES[size].items() if key not in ("vision_config", "num_multi_query_heads")}
    config = LlamaConfig(
        **fields,
        num_key_value_heads=SIZES[size]["num_multi_query_heads"],
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    network = fill(LlamaForCausalLM, config, dtype)
    network.model.rotary_emb = LlamaRotaryEmbedding(config)  # its table is computed, and stays float32
    return network


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
    head for the last token. Of the last layer only the keys and values of all tokens are needed. The tower is not in
    it."""
    config = network.config
    layers = config.num_hidden_layers
    whole_layer = sum(
        parameter.numel()
        for name, parameter in network.model.layers[0].named_parameters()
        if parameter.ndim == 2 and "vision_" not in name
    )
    key_value = 2 * config.hidden_size * config.head_dim * config.num_key_value_heads
    linear = 2.0 * num_tokens * ((layers - 1) * whole_layer + key_value)
    attention = 2.0 * num_tokens**2 * config.hidden_size * (layers - 1)  # q k^T and a v, half of each
    return linear + attention + 2.0 * network.lm_head.weight.numel()
