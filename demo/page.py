"""The page as a whole: its head, its tabs, its endpoints, and the server that shows it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from scaleweaver.demo.endpoints import add_endpoints
from scaleweaver.demo.studio import Studio
from scaleweaver.demo.tabs import find_tabs
from scaleweaver.demo.theme import STYLE, theme

# coarse to fine, as the pictures
MARK = "".join(f'<i style="opacity:{shade}"></i>' for shade in (0.25, 0.5, 1, 0.5, 1, 0.75, 1, 0.75, 0.35))
HEADER = f"""
<header class="sw-head">
  <span class="sw-mark" aria-hidden="true">{MARK}</span>
  <div>
    <h1>scaleweaver</h1>
    <p>Pictures drawn scale by scale, under control: words say what, a map says where.</p>
  </div>
  <button type="button">Light / dark</button>
</header>
"""
# in the head of the page, for tabs are measured before its style sheet is there
TABS = "<style>.sw-source .tab-container button { padding: 0 9px !important; font-size: .85rem; }</style>"
TOGGLE = """
element.addEventListener("click", (event) => {
  if (!event.target.closest("button")) return;
  document.body.classList.toggle("dark");
  document.body.style.background = "var(--body-background-fill)";
});
"""
FRESH, OLD = 600, 3600  # seconds: how often files of visitors are looked through, and when they are removed


def build(studio: Studio) -> gr.Blocks:
    """The page; nothing in it is shared between visitors but the model."""
    with gr.Blocks(title="scaleweaver", analytics_enabled=False, delete_cache=(FRESH, OLD)) as page:
        gr.HTML(HEADER, js_on_load=TOGGLE, apply_default_css=False)
        for tab in find_tabs():
            with gr.Tab(tab.title, id=tab.name):
                tab.build(studio)
        add_endpoints(studio)
    # every call waits its turn: none goes around the queue
    page.queue(max_size=studio.limits.waiting, default_concurrency_limit=4, api_open=False)
    return page


def launch(studio: Studio, **options: Any) -> gr.Blocks:
    """Show the page; `options` are those of gradio's `Blocks.launch`."""
    ours = {
        "theme": theme(),
        "css_paths": STYLE,
        "head": TABS,
        "max_file_size": studio.limits.upload,
        "show_error": True,
        "ssr_mode": False,
        "footer_links": ["api"],
        "state_session_capacity": 500,
    }
    page = build(studio)
    page.launch(**{**ours, **options})
    return page
