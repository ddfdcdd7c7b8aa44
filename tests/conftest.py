import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_toy as toy  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

TINY = ["--n", "3", "--n_layer", "3", "--d_model", "32", "--pretrain_max_steps", "100", "--pretrain_batch", "32", "--sloppy_from", "60", "--questions", "8",
        "--minibatches", "2", "--steps", "6", "--s_inter", "3", "--lr_steps", "4", "--eval_problems", "24", "--eval_samples", "4", "--eval_every", "4",
        "--probe_every", "2", "--save_every", "2", "--threads", "1", "--layer", "2", "--device", "cpu"]  # fmt: skip


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


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A whole tiny run of train_toy.py, never stopped. Not to be written to."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert toy.main([*TINY, "--out_dir", str(out)]) == 0
    return out
