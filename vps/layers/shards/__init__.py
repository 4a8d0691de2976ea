"""Layers that transformers' tensor parallelism splits over ranks. In reading order:

- ``tensor_parallel``: recognises such a layer and sharpens it in its place
- ``sharding``: what ranks hold and exchange
- ``column_wise``: W with its outputs split over ranks
- ``row_wise``: W with its inputs split over ranks
"""
