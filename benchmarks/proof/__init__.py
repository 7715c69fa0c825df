"""The proof of the built-in model: what is measured, and the tables and contact sheets that show it.

`evaluate_toybox.py` puts it together: evaluation (model, scenes, pictures) -> parts (numbers) -> targets, tables,
sheets.
"""
