"""One folder per operation: `reference.py` is the contract in plain torch; `__init__.py` exports.

Nothing here imports the rest of kvtool.
"""
