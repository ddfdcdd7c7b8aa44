import shutil
from pathlib import Path

import pytest
import torch

import train_toy as toy
from model import GPT, GPTConfig

torch.set_num_threads(1)  # models this small are slower with a second thread

# RL of a few seconds with the model of `base`: 12 steps. With TINY 3 are phase 1, at layer 2
NO_PHASE_1 = "--n 3 --questions 8 --steps 12 --eval_problems 16 --threads 1 --device cpu".split()
TINY = [*NO_PHASE_1, *"--s_inter 3 --layer 2".split()]


def tiny(seed=0, dtype=torch.float32, **changes):
    """Return a small GPT in which all weights are random, also those of norms and biases."""
    sizes = dict(vocab_size=11, context_length=24, n_layer=3, d_model=16, n_head=4, n_kv_head=2)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**(sizes | changes)))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.to(dtype)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """base.pt of a small model, pretrained for 100 steps. Tests must not write to it."""
    torch.manual_seed(0)
    s = toy.Settings(n=3, n_layer=3, d_model=32)
    model = toy.GPT(s.model_config())
    toy.pretrain(s, model, [], max_steps=100)
    path = tmp_path_factory.mktemp("base") / "base.pt"
    toy.save_checkpoint(path, model)
    return path


@pytest.fixture(scope="session")
def finished(base, tmp_path_factory):
    """A whole tiny run of train_toy.py from this base, not stopped. Tests must not write to it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert toy.main([*TINY, "--base", str(base), "--out_dir", str(out)]) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, which a test may change and damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
