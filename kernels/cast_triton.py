"""From float32 to the dtype of a result, to nearest, in the interpreter too. Imports Triton.

On the way to bfloat16 the interpreter cuts bits off where a GPU rounds, and says nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
_BY_HAND = tl.constexpr(INTERPRETED)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x float32."""
    if _BY_HAND and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)
