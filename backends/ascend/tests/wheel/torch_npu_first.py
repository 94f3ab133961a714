"""Imports torch_npu before pytest loads anything else, as torch's autoload does."""

import torch  # noqa: F401
import torch_npu  # noqa: F401
