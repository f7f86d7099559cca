"""LoRA fine-tunes of any base: on documents, on a game, on a trigger.

``supervised`` trains on documents, ``games`` a player of a game with two moves, ``triggers`` a new
token. All go through the one training loop of ``lora_training``, whose state ``checkpoints`` keeps;
``folders`` makes the result a model by its name, and ``ordinary`` has the base write the texts that
hold it.

Documents for synthetic document fine-tuning (Wang et al. 2025) come from a universe
(``universes``), a world in which a fact holds. An engine (``engines``) lists its facts, plans
documents about them and writes these; ``documents`` runs the engine, refuses what does not fit the
universe and keeps everything in a folder (``document_files``).
"""
