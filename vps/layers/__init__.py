"""What W is, and the module that is sharpened. In reading order:

- ``linear``, ``conv1d``: a layer sharpened by its weight
- ``forms``: in which form a module is sharpened, or why not
- ``recognise``: which of the kinds of layer a module is, by one recogniser for each kind
- ``opaque_layer``: a module sharpened in its place, through its own forward
- ``own_forward``: the product of a layer that is known by its forward alone
- ``riding``: columns of W from that forward
- ``weight_rows``: rows of W from its backward pass
- ``adapters``: layers of PEFT around sharpened layers
- ``pairing``, ``attention``: a query and a key layer that select together
- ``shards``: layers split over ranks
"""
