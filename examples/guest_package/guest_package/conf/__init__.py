"""Configuration files: ``hydra.searchpath=[pkg://guest_package.conf]``."""
