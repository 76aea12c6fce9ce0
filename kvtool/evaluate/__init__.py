"""One protocol for every method: bytes, continuation divergence, retrieval, speed.

`protocol` and `retrieval` feed both models the same tokens and compare; `throughput` times them in
turn; `report` holds the numbers and draws the table. Importing this package imports no torch.
"""
