"""``dsa-tvm bench --growth``: how the time of a call grows with its sizes, beside what counting operations predicts."""
