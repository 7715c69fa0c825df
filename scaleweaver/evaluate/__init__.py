"""How well pictures follow their prompts and controls."""
