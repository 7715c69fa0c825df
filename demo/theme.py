"""How the page looks: the accent colour of the documents on warm greys, local fonts, light and dark."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from gradio.themes.utils import colors, sizes

STYLE = Path(__file__).parent / "style.css"
ACCENT = colors.teal  # as docs/stylesheets/site.css has it
FONT = ("Inter", "Segoe UI", "Helvetica Neue", "Liberation Sans", "Arial", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Consolas", "Liberation Mono", "monospace")


def theme() -> gr.themes.Base:
    """Strings as fonts are local ones: the page asks no other site for anything."""
    made = gr.themes.Base(
        primary_hue=ACCENT, secondary_hue=ACCENT, neutral_hue=colors.stone, font=FONT, font_mono=MONO,
        radius_size=sizes.radius_lg, spacing_size=sizes.spacing_md, text_size=sizes.text_md,
    )  # fmt: skip
    return made.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="#151311",
        background_fill_secondary="*neutral_50",
        background_fill_secondary_dark="#1b1816",
        background_fill_primary="white",
        background_fill_primary_dark="#1f1c1a",
        block_background_fill="white",
        block_background_fill_dark="#211e1b",
        block_border_width="1px",
        block_radius="14px",
        container_radius="14px",
        button_large_radius="12px",
        block_border_color="*neutral_200",
        block_border_color_dark="#35302c",
        border_color_primary="*neutral_200",
        border_color_primary_dark="#35302c",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_600",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        color_accent="*primary_700",
        block_title_text_weight="600",
        block_title_text_size="*text_sm",
        block_shadow="none",
        input_background_fill="white",
        input_background_fill_dark="#191614",
        input_border_color="*neutral_200",
        input_border_color_dark="#3b3531",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        button_large_text_weight="650",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
    )
