"""Imported before PyTorch, which looks for the hooks of a CUDA build once: loads the fake ones."""

import ctypes
import os

ctypes.CDLL(os.environ["FAKE_TORCH"], mode=ctypes.RTLD_GLOBAL)
