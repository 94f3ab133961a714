"""The conformance suite of a backend: `pytest --pyargs batch_invariant.conformance --bi-backend=X`.

One test for each operator, dtype and check of `batch_invariant.proof.checks`, generated from the
operators' contracts. A gap that the backend declares is a strict xfail.
"""
