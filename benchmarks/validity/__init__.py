"""Every method scored on models of which the truth is known: hits, and false alarms.

``programs``: transformers compiled from programs. ``plants``: exact edits of known place and size.
``methods``: what is scored. ``scores``: how.
"""
