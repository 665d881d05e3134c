"""Training of the Qwen3 family: data, optimisers, checkpoints and the recipes that use them."""
