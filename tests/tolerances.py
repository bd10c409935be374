"""Every tolerance of the tests, each with its reason."""

from typing import NamedTuple


class Tolerance(NamedTuple):
    """Largest difference allowed: ``atol + rtol * |expected|``."""

    rtol: float
    atol: float


FIGURE_RMS = 2.0
"""Grey levels of 255. The same figure drawn twice on one machine gives 0, an altered curve or cell gives 5 and more;
between machines, text is set a fraction of a pixel off."""

FORWARD = {
    "float64": Tolerance(1e-12, 1e-13),
    "float32": Tolerance(1e-5, 1e-6),
    "bfloat16": Tolerance(2**-8 + 1e-5, 1e-5),
    "float16": Tolerance(2**-11 + 1e-5, 1e-5),
}
"""Against the same attention in float64. float64: sums in another order. float32: its own rounding, 6e-8 an operation,
over the dozen operations of a small case. Half types: inside it is float32, so the one rounding at the end remains,
half a unit in the last place."""

BACKWARD = {
    "float64": Tolerance(1e-11, 1e-12),
    "float32": Tolerance(1e-4, 1e-5),
    "bfloat16": Tolerance(2**-7, 2**-5),
    "float16": Tolerance(2**-10, 2**-8),
}
"""As FORWARD, with twice as many operations. Half types: the gradient of a shared key is a sum over its query heads,
each rounded before and after; the terms of a small case are below 8, where one unit in the last place is 2**-5 (2**-8).
"""

MODULE = Tolerance(1e-11, 1e-12)
"""float64 modules against PyTorch's: sums in another order, through two projections."""

CONVERTED = Tolerance(1e-6, 1e-6)
"""float64 modules against transformers and timm, whose eager attention may take its softmax in float32."""

HAND_WRITTEN = Tolerance(1e-12, 1e-13)
"""float64 against a formula written out in Python floats, which are float64 too: sums in another order."""

ROUNDED_ONCE = {
    "float64": Tolerance(2**-51, 0),
    "float32": Tolerance(2**-22, 0),
    "bfloat16": Tolerance(2**-8 + 2**-22, 0),
    "float16": Tolerance(2**-11 + 2**-22, 0),
}
"""A product that is computed in float32 at least, three roundings of half a unit in the last place, and then rounded to
half a unit of its own type, 2**-8 for bfloat16 and 2**-11 for float16."""

DROPOUT_STANDARD_ERRORS = 6.0
"""A mean over independent draws is further from its expectation once in 5e8 times; the draws are seeded besides."""

HALF_STEP = Tolerance(2**-6, 2**-6)
"""bfloat16 modules: each of the four steps (two projections, attention, the input) rounds to half a unit in the last
place, 2**-9; sums of a dozen such terms stay below."""

AUTOCAST = Tolerance(1e-4, 1e-3)
"""float32 against float64 with large scores; bfloat16 products inside would be off by 0.1 and more."""

ONNX = {
    "float64": Tolerance(1e-11, 1e-12),
    "float32": Tolerance(1e-5, 1e-6),
    "float16": Tolerance(2**-10, 2**-10),
    "bfloat16": Tolerance(2**-7, 2**-7),
}
"""Against numpy, which rounds each step to the type of the inputs. float32: a dozen roundings of 6e-8. Half types: the
scaled inputs, the scores, the bias, the weights and the output are rounded there, each to half a unit in the last
place of numbers below 1, 2**-12 and 2**-9; here only the output is, or the weights too."""

ROTATED = Tolerance(1e-5, 1e-5)
"""float32, where the angle itself is the rounded product of a position up to 50 and a frequency."""

EXACT = Tolerance(1e-9, 1e-9)
"""float64 backends against reference_attention: sums in another order, over a thousand keys 1e-13. An error in a
formula is 1e-3 and more."""

STEP = 1e-5
DIRECTION = Tolerance(1e-6, 1e-7)
"""A central difference in float64 with this step: its square times a third derivative, and rounding, 1e-15 / 1e-5."""

ROUNDED_INSIDE = {"bfloat16": Tolerance(2**-6, 2**-6), "float16": Tolerance(2**-9, 2**-9)}
"""PyTorch's kernel rounds the weights to the half type before it averages values below 4: half a unit in the last
place, 2**-9 (2**-12), of each, and rounds the output besides."""

TRITON = {
    "float64": Tolerance(1e-9, 1e-9),
    "float32": Tolerance(1e-5, 1e-5),
    "bfloat16": Tolerance(2**-7, 2**-6),
    "float16": Tolerance(2**-10, 2**-9),
}
"""Against the reference in float64, outputs and gradients. float64: the library's bound for a backend; 4e-15 is seen.
float32: its own rounding over a hundred terms; 1e-6 is seen. Half types: the weights are rounded to half a unit in the
last place before they multiply the values, as in every flash kernel, the output once more; the terms are below 4."""

ANOTHER_OUTPUT = 1e-3
"""Standard deviations by which a mistake must change an output to be told from no mistake, as the doctor has it; in
float64, rounding changes it by 1e-12."""

SECONDS = 5.0
"""Of one core, for an examination of width 768: what the doctor promises."""
