"""NEFTune noise for token embeddings, exact and fused. The specification is docs/specification.md;
the paper arXiv 2310.05914.
"""

from .backends import available_backends
from .functional import add_noise, neftune_noise, noisy_embedding
from .integrations.apply import apply_neftune
from .integrations.handle import NEFTuneHandle
from .modules import NEFTuneEmbedding
from .version import SPEC_VERSION, __version__

__all__ = [
    "SPEC_VERSION",
    "NEFTuneEmbedding",
    "NEFTuneHandle",
    "__version__",
    "add_noise",
    "apply_neftune",
    "available_backends",
    "neftune_noise",
    "noisy_embedding",
]
