import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import GPT, GPTConfig  # noqa: E402


def tiny(seed=0, dtype=torch.float32, **changes):
    """A small GPT with random weights, every one of them: norms and biases too."""
    sizes = dict(vocab_size=11, context_length=24, n_layer=3, d_model=16, n_head=4, n_kv_head=2)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**(sizes | changes)))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.to(dtype)


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small only lose by a second thread."""
    torch.set_num_threads(1)
