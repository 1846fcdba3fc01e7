"""Attention and experts in two pools: predicted beside what MegaScale-Infer's authors report, and the path of rows."""
