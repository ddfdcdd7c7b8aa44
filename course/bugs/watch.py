"""train_toy.py, which also keeps the weights of every tenth step, in steps.pt where it was started.

run.py starts it inside a copy of the repository that has a bug. So every line of it is the copy's.
"""

import sys

import torch

sys.path.insert(0, ".")

import minibupo  # noqa: E402
import train_toy  # noqa: E402

bupo, kept = minibupo.bupo, {}


def watched(model, *args, **options):
    """minibupo.bupo, with a look over its shoulder."""
    for step, *rest in bupo(model, *args, **options):
        if step % 10 == 0:
            kept[step] = {name: value.clone() for name, value in model.state_dict().items()}
            torch.save(kept, "steps.pt")
        yield step, *rest


minibupo.bupo = watched
sys.exit(train_toy.main())
