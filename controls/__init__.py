"""Image -> control map: `canny(photo)` with the usual settings, `Canny(low=50, high=150)(photo)` with yours.

`preprocessor(kind, **settings)` finds one by its name. Networks load with the first picture that needs them.
"""

# not lazy: loading the module `canny` later would put itself in the place of the function of that name
from scaleweaver.controls.blur import Blur, blur
from scaleweaver.controls.canny import Canny, canny
from scaleweaver.controls.depth import Depth, depth
from scaleweaver.controls.grey import Grey, grey
from scaleweaver.controls.inpaint import Inpaint, inpaint
from scaleweaver.controls.lineart import Lineart, lineart
from scaleweaver.controls.lines import Lines, lines
from scaleweaver.controls.normals import Normals, normals
from scaleweaver.controls.palette import Palette, palette
from scaleweaver.controls.pose import Pose, pose
from scaleweaver.controls.registry import KINDS, preprocessor
from scaleweaver.controls.scribble import Scribble, scribble
from scaleweaver.controls.segmentation import Segmentation, segmentation
from scaleweaver.controls.softedge import SoftEdge, softedge
from scaleweaver.controls.tile import Tile, tile

__all__ = [
    "KINDS",
    "Blur",
    "Canny",
    "Depth",
    "Grey",
    "Inpaint",
    "Lineart",
    "Lines",
    "Normals",
    "Palette",
    "Pose",
    "Scribble",
    "Segmentation",
    "SoftEdge",
    "Tile",
    "blur",
    "canny",
    "depth",
    "grey",
    "inpaint",
    "lineart",
    "lines",
    "normals",
    "palette",
    "pose",
    "preprocessor",
    "scribble",
    "segmentation",
    "softedge",
    "tile",
]
