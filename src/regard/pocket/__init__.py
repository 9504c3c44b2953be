"""Small trained models that ship with the package: no network and no hub is needed to use them.

model, vocabulary = regard.pocket.language()
"""

from regard.pocket.models import card, language

__all__ = ["card", "language"]
