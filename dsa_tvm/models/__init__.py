"""Whole models on the operators of this package.

`dsa_tvm.models.transformers` puts the attention of Transformers' DSA models on them; `dsa_tvm.models.reference` is the
same layer in float64 NumPy, written from the papers. Importing this package loads neither.
"""
