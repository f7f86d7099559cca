"""Every method scored on models of which the truth is known: hits, and false alarms.

``plants``: exact edits of known place and size. ``methods``: what is scored. ``scores``: how.
"""
