"""The operators: public functions, backend choice, reference.

Every operator is a function of tensors with one name in every place (``ops/X.py``, ``kernels/X.py``, ``csrc/*/X.*``,
``tests/ops/test_X.py``, ``docs/ops/X.md``).  All but ``photometric`` (of 8-bit images) and ``merge_tiles`` (for
testing and prediction) are differentiable at least twice.
"""

from pmm_fast.ops.backends import available_backends, explain, record_backends, use_backend
from pmm_fast.ops.masked_average_pool import masked_average_pool, update_memory
from pmm_fast.ops.memory_pass import memory_pass
from pmm_fast.ops.memory_read import gumbel_noise, memory_read
from pmm_fast.ops.merge_tiles import merge_tiles, segment_tiles
from pmm_fast.ops.photometric import photometric
from pmm_fast.ops.reference import assignment, compute_dtype, normalize, seeded_gumbel_noise
from pmm_fast.ops.upsample_cross_entropy import upsample_cross_entropy

__all__ = [
    "assignment",
    "available_backends",
    "compute_dtype",
    "explain",
    "gumbel_noise",
    "masked_average_pool",
    "memory_pass",
    "memory_read",
    "merge_tiles",
    "normalize",
    "photometric",
    "record_backends",
    "seeded_gumbel_noise",
    "segment_tiles",
    "update_memory",
    "upsample_cross_entropy",
    "use_backend",
]
