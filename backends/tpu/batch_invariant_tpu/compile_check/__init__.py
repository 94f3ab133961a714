"""What the real TPU compiler makes of the kernels, for machines without a TPU.

    python -m batch_invariant_tpu.compile_check               # v5e, v6e, TPU7x
    python -m batch_invariant_tpu.compile_check --full        # v4 and v5p too

libtpu compiles every kernel ahead of time, for several generations and sizes of the batch. Per
kernel, generation and dtype there must be one program text and one set of addition trees, whatever
the size of the batch, with no arithmetic beside the kernel. Plain jnp.dot, jnp.mean and psum go
through the same comparison, and must be found to vary: else it is blind.
"""
