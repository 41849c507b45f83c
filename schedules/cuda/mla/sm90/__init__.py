"""The attention for sm_90a, by wgmma."""
