"""Speed up a frozen bf16 model on a CPU."""
