"""Evaluates a model on texts that it was not trained on, in any layout.

``windows`` cuts texts, ``scoring`` computes how likely a model finds them, ``sets`` reads named sets of texts,
``results`` keeps what was found, and ``evaluate`` does all of this for ``tedlab eval``. ``harness`` lends a model to
the lm-eval harness.
"""
