"""What W is, and the module that is sharpened. In reading order:

- ``linear``, ``conv1d``: layers by their weight
- ``forms``: in which form a layer of a model is sharpened, or why not
- ``opaque_layer``: a module sharpened in its place, through its own forward
- ``own_forward``, ``riding``, ``weight_rows``: a layer known by its forward, its columns, its rows
- ``opaque``: the update of such a layer
- ``adapters``: PEFT's around sharpened layers
- ``pairing``, ``attention``: a query and a key layer that select together
- ``shards``: layers split over ranks
"""
