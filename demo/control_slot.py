"""One control of the page: where its map comes from, the map itself, how strongly, when and where it acts."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from scaleweaver.contracts import Control
from scaleweaver.demo.encoded import MAX_POSE, data_url
from scaleweaver.demo.errors import told
from scaleweaver.demo.kept import in_files, kept
from scaleweaver.demo.scenes import COUNT, Scene, find_scene, render_scene
from scaleweaver.demo.studio import Studio
from scaleweaver.demo.widgets.skeleton import skeleton, skeleton_properties
from scaleweaver.demo.widgets.sketch import mode_of, pad_properties, read_sketch, sketch_pad
from scaleweaver.images import fit

EXAMPLES = Path(__file__).parent / "examples"
MAPS: dict[str, Any] = {"concurrency_limit": 2, "concurrency_id": "maps", "api_visibility": "private"}


@dataclass(frozen=True)
class Example:
    """A prompt, and a picture from which a control of `kind` is taken."""

    title: str
    kind: str
    prompt: str
    file: str

    @property
    def path(self) -> str:
        return str(EXAMPLES / self.file)


def examples(studio: Studio) -> list[Example]:
    """Those whose control the model has."""
    listed = json.loads((EXAMPLES / "examples.json").read_text(encoding="utf-8"))
    return [Example(**entry) for entry in listed if entry["kind"] in studio.kinds]


class ControlSlot:
    """The components of one control, wired so that `map` always shows what the model will read.

    Every source (photo, sketch, skeleton, ready map, scene) makes that map; the source that was used last counts.
    `size` chooses the size of the picture, which all maps have; without it they have the model's own.
    """

    def __init__(
        self,
        studio: Studio,
        number: int,
        *,
        prompt: gr.Textbox | None = None,
        size: gr.Dropdown | None = None,
        example: Example | None = None,
    ) -> None:
        self.studio, self.number = studio, number
        self.size = gr.State(studio.own_size_name) if size is None else size
        kind = example.kind if example else ""
        height, width = studio.own_size
        start = studio.map_of(kind, studio.upload(example.path)) if example else None
        self._pose = next((name for name in studio.kinds if studio.map_kind(name) == "pose"), None)
        with gr.Accordion(self._title(kind), open=bool(kind), elem_classes="sw-slot") as self.frame:
            with gr.Row():
                kinds = [("Off", ""), *((studio.label(name), name) for name in studio.kinds)]
                self.kind = gr.Dropdown(kinds, value=kind, label="Kind", min_width=130)
                self.scale = gr.Slider(0, 2, value=1, step=0.05, label="Strength", min_width=160)
            with gr.Column(visible=bool(kind)) as self.body:
                with gr.Row(equal_height=False, elem_classes="sw-source"):
                    with gr.Column(min_width=250), gr.Tabs(selected="photo") as self.tabs:
                        with gr.Tab("Photo", id="photo") as photo_tab:
                            self.photo = gr.Image(
                                value=example.path if example else None, type="filepath", image_mode=None,
                                show_label=False, sources=["upload", "webcam", "clipboard"], height=250, label="Photo",
                            )  # fmt: skip
                        with gr.Tab("Sketch", id="sketch") as sketch_tab:
                            self.sketch = sketch_pad(height, width, self._mode(kind))
                        with gr.Tab("Skeleton", id="skeleton", visible=self._pose is not None) as skeleton_tab:
                            self.skeleton = skeleton(height, width)
                            with gr.Row():
                                load = gr.UploadButton("Load JSON", file_types=[".json"], size="sm", min_width=90)
                                find = gr.Button("Find in the photo", size="sm", min_width=90)
                        with gr.Tab("Scene", id="scene") as scene_tab:
                            self.scene_picture = gr.Image(
                                show_label=False, interactive=False, height=210, buttons=[], elem_classes="sw-map"
                            )
                            another = gr.Button("Surprise me", size="sm")
                        with gr.Tab("Map", id="ready") as ready_tab:
                            self.ready = gr.Image(
                                type="filepath", image_mode=None, show_label=False, sources=["upload", "clipboard"],
                                height=250,
                            )  # fmt: skip
                    with gr.Column(min_width=180, elem_classes="sw-read"):
                        self.map = gr.Image(
                            value=kept(start), type="filepath", image_mode=None, format="png", interactive=False,
                            label="What the model reads", elem_classes="sw-map", height=300,
                            buttons=["download", "fullscreen"],
                        )  # fmt: skip
                with gr.Accordion("When and where it acts", open=False, elem_classes="sw-fold"):
                    with gr.Row():
                        self.start = gr.Slider(0, 1, value=0, step=0.05, label="From", min_width=120)
                        self.end = gr.Slider(0, 1, value=1, step=0.05, label="Until", min_width=120)
                    gr.HTML(
                        '<p class="sw-hint">0 to 1 is all scales. Paint where it acts; nothing painted: everywhere.</p>'
                    )
                    backdrop = data_url(start) if start else ""
                    self.mask = sketch_pad(height, width, "mask", backdrop=backdrop)
        self.source = gr.State("photo")
        self.scene = gr.State(None)
        tabs = {
            "photo": photo_tab, "sketch": sketch_tab, "skeleton": skeleton_tab, "scene": scene_tab, "ready": ready_tab
        }  # fmt: skip
        self._wire(tabs, load, find)
        surprised = self.scene_outputs(prompt)
        another.click(
            in_files(told(self.surprise)), [self.kind, self.size], surprised, show_progress_on=self.map, **MAPS
        )

    @property
    def inputs(self) -> list[Any]:
        """What a drawing reads, in the order of `read_controls`."""
        return [self.kind, self.map, self.scale, self.start, self.end, self.mask]

    @property
    def outputs(self) -> list[Any]:
        """What a new map or kind changes, in the order of `_shown`."""
        return [self.map, self.mask, self.kind, self.source, self.frame, self.body, self.sketch]

    def scene_outputs(self, prompt: gr.Textbox | None) -> list[Any]:
        """What `surprise` changes."""
        return [*self.outputs, self.tabs, self.scene, self.scene_picture, *([prompt] if prompt else [])]

    def surprise(self, kind: str, size: str) -> tuple[Any, ...]:
        """Another scene of the built-in world: its exact map, its picture, its words."""
        kind = kind or self.studio.kinds[0]
        number = find_scene(secrets.randbelow(COUNT), self.studio.map_kind(kind))
        scene = self._render(number)
        shown = self._shown(kind, "scene", size, self._map_of_scene(kind, scene, self.studio.size(size)))
        return (*shown, gr.Tabs(selected="scene"), number, scene.picture, scene.prompt)

    def load_example(self, example: Example, size: str) -> tuple[Any, ...]:
        """Values for `outputs`, the tabs and the photo."""
        made = self.studio.map_of(example.kind, self.studio.upload(example.path), self.studio.size(size))
        return (*self._shown(example.kind, "photo", size, made), gr.Tabs(selected="photo"), example.path)

    def _wire(self, tabs: dict[str, Any], load: Any, find: Any) -> None:
        given = [self.size, self.photo, self.sketch, self.skeleton, self.ready, self.scene]
        for source, tab in tabs.items():
            tab.select(in_files(self._from(source)), [self.kind, *given], self.outputs, show_progress="hidden", **MAPS)
        # an error covers what shows the progress: the map, not the way to another one; what comes while a map is being
        # made, as a photo just after another was taken away, is not dropped
        shown = {"show_progress_on": self.map, "trigger_mode": "always_last", **MAPS}
        uploads = {"photo": self.photo, "ready": self.ready}
        for source, picture in uploads.items():
            picture.input(in_files(self._from(source)), [self.kind, *given], self.outputs, **shown)
        quiet = {"show_progress": "hidden", "trigger_mode": "always_last", **MAPS}
        widgets = {"sketch": self.sketch, "skeleton": self.skeleton}
        for source, widget in widgets.items():
            widget.input(in_files(self._from(source)), [self.kind, *given], self.outputs, **quiet)
        self.kind.input(
            in_files(told(self._changed_kind)), [self.kind, self.source, *given], [*self.outputs, self.tabs], **shown
        )
        skeletons = [*self.outputs, self.skeleton]
        find.click(in_files(told(self._find)), [self.kind, self.size, self.photo], skeletons, **shown)
        load.upload(in_files(told(self._load)), [self.kind, self.size, load], skeletons, **shown)
        if len(self.studio.sizes) > 1 and isinstance(self.size, gr.Dropdown):
            self.size.input(in_files(told(self._changed_size)), [self.kind, self.source, *given], skeletons, **shown)

    def _from(self, source: str) -> Any:
        """The handler for a source that was just used."""

        def remake(kind: str, size: str, *given: Any) -> tuple[Any, ...]:
            # the skeleton makes poses and the pad makes none, whatever was chosen before
            chosen = kind
            if source == "skeleton" and self._pose:
                chosen = self._pose
            elif source == "sketch" and kind == self._pose:
                chosen = next((name for name in self.studio.kinds if name != self._pose), "")
            return self._shown(chosen, source, size, self._make(chosen, source, size, *given))

        return told(remake)

    def _changed_kind(self, kind: str, source: str, size: str, *given: Any) -> tuple[Any, ...]:
        poses = bool(kind) and self.studio.map_kind(kind) == "pose"
        if source == ("sketch" if poses else "skeleton"):
            source = "skeleton" if poses else "photo"
        # lines are no depth and no colours: a sketch begins again
        made = None if source == "sketch" else self._make(kind, source, size, *given)
        return (*self._shown(kind, source, size, made, fresh=source == "sketch"), gr.Tabs(selected=source))

    def _changed_size(self, kind: str, source: str, size: str, *given: Any) -> tuple[Any, ...]:
        # sheets of another shape begin again
        made = None if source == "sketch" else self._make(kind, source, size, *given)
        shown = self._shown(kind, source, size, made, resized=True)
        return (*shown, gr.update(**skeleton_properties(*self.studio.size(size))))

    def _find(self, kind: str, size: str, photo: str | None) -> tuple[Any, ...]:
        chosen = self._pose or kind
        record = self.studio.find_pose(chosen, self.studio.upload(photo, "photo"), self.studio.size(size))
        return self._posed(chosen, size, record)

    def _load(self, kind: str, size: str, file: str) -> tuple[Any, ...]:
        with Path(file).open(encoding="utf-8-sig", errors="replace") as opened:
            record = opened.read(MAX_POSE + 1)  # what is longer is refused
        return self._posed(self._pose or kind, size, record)

    def _posed(self, kind: str, size: str, record: str) -> tuple[Any, ...]:
        made = self.studio.skeletons(kind, record, self.studio.size(size))
        return (*self._shown(kind, "skeleton", size, made), record)

    def _make(
        self, kind: str, source: str, size: str, photo: Any, sketch: Any, record: Any, ready: Any, scene: Any
    ) -> Any:
        """The map that a source gives, None where it has nothing yet."""
        if not kind:
            return None
        area = self.studio.size(size)
        if source == "photo":
            return self.studio.map_of(kind, self.studio.upload(photo, "photo"), area) if photo else None
        if source == "ready":
            return self.studio.fitted(self.studio.upload(ready, "map"), area) if ready else None
        if source == "skeleton":
            return self.studio.skeletons(kind, record, area) if record else None
        if source == "scene":
            return self._map_of_scene(kind, self._render(scene), area) if scene is not None else None
        drawn = read_sketch(sketch)
        return None if drawn is None else self._map_of_sketch(kind, drawn, area)

    def _map_of_sketch(self, kind: str, drawn: Image.Image, area: tuple[int, int]) -> Image.Image:
        mode = self._mode(kind)
        if mode == "colours":
            return self.studio.map_of(kind, drawn, area)
        if mode == "depth":
            return self.studio.fitted(drawn, area)
        white_on_black = drawn.convert("L").point([255 * (value < 128) for value in range(256)])
        return fit(white_on_black, *area, two_level=True).convert("RGB")

    def _map_of_scene(self, kind: str, scene: Scene, area: tuple[int, int]) -> Image.Image:
        exact = scene.maps.get(self.studio.map_kind(kind))
        return self.studio.map_of(kind, scene.picture, area) if exact is None else self.studio.fitted(exact, area)

    def _render(self, number: int) -> Scene:
        return render_scene(number, min(*self.studio.own_size, 512))

    def _shown(
        self,
        kind: str,
        source: str,
        size: str,
        made: Image.Image | None,
        *,
        fresh: bool = False,
        resized: bool = False,
    ) -> tuple[Any, ...]:
        """Values for `outputs`. A new map lies under the mask, whose strokes stay; a `fresh` sketch pad has none.

        After a change of size both pads are fresh, and the part stays folded where there is no control.
        """
        area = self.studio.size(size)
        empty: dict[str, Any] = {"value": ""}
        mask = pad_properties(*area, "mask", data_url(made) if made else "") | (empty if resized else {})
        pad = pad_properties(*area, self._mode(kind)) | (empty if fresh or resized else {})
        return (
            made,
            gr.update(**mask),
            kind,
            source,
            gr.update(label=self._title(kind), open=bool(kind) or not resized),
            gr.update(visible=bool(kind)),
            gr.update(**pad),
        )

    def _mode(self, kind: str) -> str:
        return mode_of(self.studio.map_kind(kind)) if kind else "lines"

    def _title(self, kind: str) -> str:
        if kind:
            return f"Control {self.number}: {self.studio.label(kind)}"
        return f"Control {self.number}: off" if self.number == 1 else f"Add control {self.number}"


def read_controls(studio: Studio, values: Sequence[Any]) -> tuple[Control, ...]:
    """The controls that are on, from the values of all slots' `inputs`, one after the other."""
    slots = [values[i : i + 6] for i in range(0, len(values), 6)]
    made = []
    for number, (kind, picture, scale, start, end, mask) in enumerate(slots, 1):
        if not kind:
            continue
        if not picture:
            raise ValueError(
                f"control {number} ({studio.label(kind)}) has no map yet; give it a photo, a sketch or a scene,"
                " or switch it off"
            )
        shown = studio.upload(picture, f"map of control {number}")
        made.append(Control(kind, shown, scale=scale, start=start, end=end, mask=read_sketch(mask, "mask")))
    return tuple(made)
