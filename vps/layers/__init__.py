"""What W is, and the module that is sharpened. In reading order:

- ``linear``, ``conv1d``: layers by their weight
- ``forms``, ``recognise``: in which form a module is sharpened, or why not; a recogniser a kind
- ``opaque_layer``: a module sharpened in its place, through its own forward
- ``own_forward``, ``riding``, ``weight_rows``: W known by a layer's forward, its columns, its rows
- ``adapters``: PEFT's around sharpened layers
- ``pairing``, ``attention``: a query and a key layer that select together
- ``shards``: layers split over ranks
"""
