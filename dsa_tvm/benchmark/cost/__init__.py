"""``dsa-tvm cost``: what a token of one attention layer costs at each position, ours beside others that do it.

`contenders` has the layers, `dense` is multi-head latent attention without selection; both run in `processes`, one for
each contender, so that each has a peak of memory of its own. `measure` decides what runs and for how long, `report` and
`picture` show it. Only the processes import torch.
"""
