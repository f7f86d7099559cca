"""Every method scored where the truth is known: hits, and false alarms.

``cases`` lists all cases; each is a function that yields ``rows``. What they are made of:
``programs``, transformers compiled from programs; ``plants``, exact edits of known place and size;
``adapters``, random ones; ``methods``, what is scored between two models or within one; ``scores``,
how.
"""
