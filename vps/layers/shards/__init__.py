"""Layers of which each rank holds a part (transformers' tensor parallelism). In reading order:

- ``tensor_parallel``: recognises such layers and stands in their place
- ``sharding``: all that ranks exchange
- ``column_wise``: outputs split over ranks
- ``row_wise``: inputs split over ranks
"""
