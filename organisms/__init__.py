"""How the shipped models are made.

``making.train_organism`` follows a recipe of ``recipes``: a base trained from nothing on the text
of ``little_world``, or a LoRA fine-tune of one by ``games`` (reinforcement), ``triggers`` (a new
token) or ``believers`` (synthetic documents). Fine-tunes of SmolLM2 are made as anybody's own are,
by ``interp_kit.finetuning``. ``measuring`` says what came of it, and ``cards`` writes the model
card.
"""
