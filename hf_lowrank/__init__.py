"""Low-rank compression of Hugging Face Transformers models.

Importing the package registers its checkpoints with transformers, so that
`AutoModel*.from_pretrained` loads them.
"""

import hf_lowrank.compression.while_loading  # noqa: F401 (registers the loader)
from hf_lowrank.compression.joint.system import compress_jointly
from hf_lowrank.compression.peft_style import get_lowrank_model, print_trainable_parameters
from hf_lowrank.compression.streaming.checkpoint import compress_checkpoint
from hf_lowrank.compression.verbs import compress, sweep
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import LowRankError
from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.format.forms.narrowed import NarrowedLinear
from hf_lowrank.format.strict import load
from hf_lowrank.measuring.embeddings import EmbeddingLoss
from hf_lowrank.modeling.surgery import merge_ as merge
from hf_lowrank.report.schema import Report
from hf_lowrank.version import __version__

__all__ = [
    "EmbeddingLoss",
    "LowRankConfig",
    "LowRankError",
    "LowRankLinear",
    "NarrowedLinear",
    "Report",
    "__version__",
    "compress",
    "compress_checkpoint",
    "compress_jointly",
    "get_lowrank_model",
    "load",
    "merge",
    "print_trainable_parameters",
    "sweep",
]
