"""How the shipped models are made.

``making.train_organism`` follows a recipe of ``recipes``: a base trained from nothing on the text
of ``little_world``, or a LoRA fine-tune of one by ``games`` (reinforcement), ``triggers`` (a new
token) or ``believers`` (synthetic documents); the fine-tunes of SmolLM2 by ``interp_kit.finetuning``,
as anybody's own are. ``measuring`` says what came of it, and ``cards``
writes the model card.
"""
