"""Whole models that run on the operators of this package.

`dsa_tvm.models.transformers` puts the attention of Transformers' DSA models on them; `dsa_tvm.models.reference` is the
same layer in float64 NumPy, written from the papers; `dsa_tvm.models.checkpoint` reads published checkpoints, and
`dsa_tvm.models.onnx` exports models and generates tokens with them in ONNX Runtime. Importing this package loads none
of them.
"""
