"""Changes runs while they are sampled, and measures what follows: evidence that a state is used, not only decodable."""

from cosprobe.causal.edits import Edit, load_edits, save_edits
from cosprobe.causal.interventions import intervene
from cosprobe.causal.patching import LATENT, At, patch
from cosprobe.causal.prefix import Prefix, recorded, replayed
from cosprobe.causal.states import record_states

__all__ = [
    "LATENT",
    "At",
    "Edit",
    "Prefix",
    "intervene",
    "load_edits",
    "patch",
    "record_states",
    "recorded",
    "replayed",
    "save_edits",
]
