"""Image -> control map: `canny(photo)` with the usual settings, `Canny(low=50, high=150)(photo)` with yours."""

# not lazy: loading the module `canny` later would put itself in the place of the function of that name
from scaleweaver.controls.canny import Canny, canny

__all__ = ["Canny", "canny"]
