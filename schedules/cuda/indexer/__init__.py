"""The CUDA lightning indexer."""
