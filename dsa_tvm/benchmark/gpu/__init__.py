"""``dsa-tvm bench --suite cuda``: the same on a GPU."""
