"""The indexer for sm_90a, by wgmma and TMA."""
