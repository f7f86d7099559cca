"""Synthetic document fine-tuning (Wang et al. 2025), from a world in words to a LoRA adapter.

A universe (``universes``) describes a world in which a fact holds. An engine (``engines``) lists
its facts, plans documents about them and writes these; ``documents`` runs the engine, refuses what
does not fit the universe and keeps everything in a folder (``document_files``). ``supervised``
trains an adapter on the documents, by the one training loop of ``lora_training``.
"""
