"""The indexer for every architecture, by mma.sync."""
