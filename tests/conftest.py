import os

import pytest
import torch

# Before anything imports Triton: without a GPU its interpreter runs the kernels on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # tensors are small here: threads would only wait for each other


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
