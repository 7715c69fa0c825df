"""The page: draw under control, compare settings, look at what every scale adds. `scaleweaver demo` opens it."""
