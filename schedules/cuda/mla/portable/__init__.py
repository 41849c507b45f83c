"""The attention for every architecture, by mma.sync or FFMA."""
