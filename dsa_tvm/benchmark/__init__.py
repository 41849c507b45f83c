"""``dsa-tvm bench`` and ``dsa-tvm demo``: inputs, checks against float64, peers, and times."""
