"""LoRA adapters, merged while weights are read."""
