"""How prompts enter the encoder: the names, for everything that must not load torch to say them.

``prefix``: keys and values of a layer (deep). ``inline``: rows of the sequence; of deep prompts additions to
the hidden states of placeholder rows before every layer, of shallow ones word embeddings. ``added``: shallow
prompts as additions to placeholder rows *after* the embedding LayerNorm, as BBT's and the MP2 authors' code
have them.
"""

from __future__ import annotations

from typing import Literal

Injection = Literal["prefix", "inline", "added"]
INJECTIONS: dict[str, tuple[Injection, ...]] = {
    "deep": ("prefix", "inline"),
    "shallow": ("inline", "added"),
}
"""Those of each kind of prompts; the first is the default."""
