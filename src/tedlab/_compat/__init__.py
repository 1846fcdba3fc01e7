"""Every use of what other libraries keep to themselves, one module per library.

Each name here stands for something whose name begins with an underscore in its library. Its docstring says what it is
for and why nothing public does it. ``tests/test_compat.py`` has a test of each, which fails when a new release has
changed it, and a check that the rest of tedlab uses nothing private. The modules are imported one by one: a command
line that needs Hydra's must not wait for torch.
"""
