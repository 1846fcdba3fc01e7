"""Measurements behind what the documentation says about speed and memory; README.md lists them."""
