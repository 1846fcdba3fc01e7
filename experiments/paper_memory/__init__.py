"""The largest base model by GPUs and tensor degree on V100s with 16 GB, and the memory of the optimizer step."""
