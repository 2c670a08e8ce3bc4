"""Data that people have, in whatever form: read row by row into one form, and checked before anything is trained.

A sample is `{"id": str, "messages": [...]}`, with messages as `apply_chat_template(..., return_labels=True)` of every
chat processor takes them. `opening.open_data` finds out the format, `checking.check_data` tells what is wrong in which
row, `page.write_page` shows samples as a model will see them. No torch here but in `dataset.py`.
"""
