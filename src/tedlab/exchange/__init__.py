"""Weights of published models in and out: a folder of safetensors files becomes a checkpoint, and back."""
