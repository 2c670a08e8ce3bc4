"""CogVLM v1 and CogVLM2: config, network, processor and the rules for their weights."""
