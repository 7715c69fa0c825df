"""The tests run without a network and without a GPU."""

import os

import torch

# before any test imports a library that reads them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# kernels run in Triton's interpreter, which must be known before Triton is imported; on a GPU they run natively
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# several processes share the work: more threads than one each would only wait for one another
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # commands leave the number alone then
