"""Patching: write activations of one run into another, and see what it does to the decision.

``patches``: where to write. ``positions``: at which tokens, and which tokens of the source
correspond to them. ``recording``: what is kept of a run. ``scores``: from logits to nats.
``experiments``: one prompt, one target run and one source, ready for any patch set. ``table``: what
tables of patched runs share. The engine below them: ``sweep``, with ``plan`` (which passes),
``packing`` (how rows stand beside each other), ``writes`` (the hooks) and ``memory``.
"""
