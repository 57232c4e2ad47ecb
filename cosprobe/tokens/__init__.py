"""Maps of single tokens over the picture: energy, principal components, change in time and along steps."""

from cosprobe.tokens.measures import MASSIVE, TokenRun, measure_layer
from cosprobe.tokens.run import token_runs, tokens

__all__ = ["MASSIVE", "TokenRun", "measure_layer", "token_runs", "tokens"]
