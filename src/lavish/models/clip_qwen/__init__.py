"""CLIP + Qwen v1 (MMultiModal of VLM-learning): config, network, processor and the rules for their weights."""
