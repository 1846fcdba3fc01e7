"""X-MoE's models on Frontier and Megatron's parallel folding on DGX H100: predicted beside reported."""
