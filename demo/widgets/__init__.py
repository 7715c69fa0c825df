"""Two inputs that gradio has no component for, as `gr.HTML` with JavaScript of our own: a skeleton and a sketch pad."""
