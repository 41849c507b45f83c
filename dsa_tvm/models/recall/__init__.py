"""``dsa-tvm recall``: how much of dense attention's mass the tokens hold that the indexer selects.

`walk` takes a text through a checkpoint layer by layer, `mass` looks at one layer, `report` and `picture` show what was
found. Importing this package loads none of them.
"""
