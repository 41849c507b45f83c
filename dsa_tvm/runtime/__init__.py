"""The compiled library as Python sees it: loading it, calling it, and the tensors on the way in and out."""
