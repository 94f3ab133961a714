"""The TPU backend of batch-invariant: `jax` has the kernels, `backend` what torch users select.

Importing this package imports neither torch nor jax.
"""
