"""Imports torch_npu before pytest loads anything else, as torch's autoload does on a real machine."""

import torch  # noqa: F401
import torch_npu  # noqa: F401
