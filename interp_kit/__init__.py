"""What did fine-tuning change inside this model, and which parts cause the behaviour?

The names below load torch when they are first used, so that checking a run file stays quick.
"""

import lazy_loader

# Which name comes from which module stands in ``__init__.pyi``, for type checkers too.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
