"""hf/train.py: the command line, in one process and in two, and what it says about bad input.

Models are those of test_hf.py.
"""

# ruff: noqa: E402 - imports come after the check that the extra is there

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason='trl is not installed: pip install -e ".[hf]"')

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hf.train
from hf.adapter import load, truncated
from hf.bupo_trainer import BuPOTrainer
from tests.test_hf import OPTIONS, TIED, TOKENS, build, differ, even, logged, save, weights

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), build(**TIED))


def arguments(directory, out, **options):
    """The words of a command line; an option that is None is left out."""
    options = dict(bupo_layer=2, bupo_steps=1, max_steps=4, steps_per_generation=1) | options
    options = OPTIONS | dict(model_name_or_path=directory, output_dir=out) | options
    given = {f"--{name}": str(value) for name, value in options.items() if value is not None}
    return [word for option in given.items() for word in option]


def test_command_line(directory, tmp_path):
    options = dict(eval_strategy="steps", eval_steps=2, eval_problems=8, beta=0.1)
    assert hf.train.main(arguments(directory, tmp_path, **options)) == 0
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["bupo/phase"] for entry in log if "bupo/phase" in entry] == [1, 2, 2, 2]
    assert [entry["step"] for entry in log if "eval_reward" in entry] == [2, 4]
    kl = [entry["kl"] for entry in log if "kl" in entry]
    assert kl[0] == 0 and kl[1] > 0  # between internal policies, then between whole ones
    assert load(tmp_path)[0].n_layer == 3


def test_command_line_with_a_data_set_and_adapters(directory, tmp_path):
    """LoRA moves only adapters up to the layer."""
    (tmp_path / "train.json").write_text('{"prompt": "1+1=", "solution": "$2$"}\n' * 8)
    options = dict(dataset_name=tmp_path, dtype="bfloat16", use_peft=True, bupo_steps=4)
    trainer, _ = hf.train.make_trainer(arguments(directory, tmp_path, **options))
    assert trainer.reward_func_names == ["accuracy_reward"]
    assert trainer.model.get_input_embeddings().weight.dtype == torch.bfloat16
    trainer.reward_funcs = [even]  # a random model earns nothing else
    before = weights(trainer)
    trainer.train()
    moved = differ(before, weights(trainer))
    assert moved and all("lora" in name for name in moved)
    assert {name.split("layers.")[1][0] for name in moved} == {"0", "1"}


class OnDeepSpeed(BuPOTrainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_deepspeed_enabled = True


def test_errors_are_one_sentence(directory, tmp_path, capsys, monkeypatch):
    """It says what is wrong, and the remedy where that is not the same."""
    (tmp_path / "train.json").write_text('[{"prompt": "1+1="}]')
    (tmp_path / "base.pt").write_bytes(b"PK")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")
    narrow, part = build(**TIED), build(**TIED)
    for layer in narrow.model.layers:
        layer.mlp.down_proj.weight.data *= 100  # loud writes: every FFN narrows
    del part.model.layers[1].mlp.up_proj
    for name, lm in dict(narrow=narrow, part=part, parallel=build("GPTNeoX")).items():
        save(tmp_path / name, lm)

    def said(**options):
        capsys.readouterr()
        assert hf.train.main(arguments(directory, tmp_path, **options)) == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("hf.train: ")

    for options, says in [
        (dict(bupo_steps=-1), "bupo_steps must be 0 or more, not -1"),
        (dict(bupo_layer=4), "bupo_layer must be in 1..3, not 4"),
        (dict(bupo_layer=0), "bupo_layer must be in 1..3, not 0"),
        (dict(use_vllm=True, off_policy_mask_threshold=0.1), "off_policy_mask_threshold"),
        (dict(gradient_checkpointing_kwargs='{"use_reentrant": true}'), "use_reentrant=False"),
        (dict(model_name_or_path=None), "--model_name_or_path is missing"),
        (dict(model_name_or_path=tmp_path / "nothing"), "transformers cannot read"),
        (dict(model_name_or_path=tmp_path / "base.pt"), "only a .gguf"),
        (dict(model_name_or_path=tmp_path / "cut.gguf"), "transformers cannot read"),
        (dict(model_name_or_path=tmp_path / "part"), "no weights for model.layers.1.mlp.up_proj"),
        (dict(model_name_or_path=tmp_path / "parallel"), "GPTNeoXForCausalLM cannot be laid open"),
        (dict(model_name_or_path=tmp_path / "narrow", bupo_layer=None), "choose one with bupo_l"),
        (dict(operations="/"), "operations must be some of + - *"),
        (dict(dataset_name=tmp_path / "no-data"), "there is no data set"),
        (dict(dataset_name=tmp_path, dataset_train_split="x"), "has no split x, only train"),
        (dict(dataset_name=tmp_path), "has no column 'solution', only prompt"),
    ]:
        assert says in said(**options)
    monkeypatch.setattr(hf.train, "BuPOTrainer", OnDeepSpeed)
    assert "set weight_decay 0" in said()
    hf.train.make_trainer(arguments(directory, tmp_path, weight_decay=0.0))  # is not refused
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert 'pip install -e ".[hf]"' in said()
    code = "import trl; trl.__version__ = '1.15.3'; import hf.train"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stderr.startswith('hf.train needs pip install -e ".[hf]"') and "1.15.3" in run.stderr


def test_arithmetic_holds_problems_out():
    train, held_out = hf.train.arithmetic(1, "+*")
    assert len(train) + len(held_out) == 198 and len(held_out) == 39  # less two worked examples
    assert not set(train["prompt"]) & set(held_out["prompt"])
    for row in [*train, *held_out]:
        question = row["prompt"].split("\n")[-1]
        assert row["prompt"] == f"3+4=7\n2*4=8\n{question}"
        assert row["answer"] == str(eval(question[:-1]))
    assert hf.train.right_answer(["7\n3", " 7", "77", ""], ["7"] * 4) == [1, 1, 0, 0]
    assert all(len(p) == 15 for p in hf.train.arithmetic(2, "-")[1]["prompt"][:99])


def one_of_two(argv):
    """What each process of the next test does: DDP by hf.train, then FSDP2 beside one process."""
    torch.set_num_threads(1)
    trainer, _ = hf.train.make_trainer(argv)
    trainer.reward_funcs = [even]
    before = weights(trainer)
    trainer.train()
    both = [None, None]
    ours = (trainer.layer, logged(trainer, "bupo/d_mlp"), weights(trainer))
    torch.distributed.all_gather_object(both, ours)
    (layer, d_mlp, after), other = both
    assert trainer.accelerator.num_processes == 2
    assert 1 <= layer < 3 and other[:2] == (layer, d_mlp)
    assert not differ(after, other[2]) and differ(before, after) == before.keys()

    alone, sharded = build(**TIED), build(**TIED)
    mesh = init_device_mesh("cpu", (2,))  # by itself it may choose a GPU that is not to be seen
    for module in (*sharded.model.layers, sharded):
        fully_shard(module, mesh=mesh)
    for lm, rows in (alone, TOKENS), (sharded, TOKENS.chunk(2)[torch.distributed.get_rank()]):
        optimizer = torch.optim.SGD(lm.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for layer in (2, 3, 2):  # phase 1, phase 2, phase 1
            with truncated(lm, layer) if layer < 3 else torch.enable_grad():
                loss = lm(input_ids=rows, labels=rows).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for (name, p), whole in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), whole, rtol=1e-5, atol=1e-6, msg=name)
    torch.distributed.barrier()  # neither leaves while the other may still need it
    torch.distributed.destroy_process_group()


def test_two_processes(directory, tmp_path):
    """DDP over gloo: layer by the rule, accumulation, weight decay, checkpointing, both phases.
    FSDP2 on two processes does what one process does, also where layers have no gradient."""
    options = dict(steps_per_generation=2, gradient_accumulation_steps=2, max_steps=3)
    # with this seed the two do not sample equally many tokens
    options |= dict(gradient_checkpointing=True, bupo_layer=None, use_cpu=None, seed=5)
    words = "-m torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d".split()
    words += "--rdzv_endpoint 127.0.0.1:0 --local_addr 127.0.0.1 -m tests.test_hf_train".split()
    words += arguments(directory, tmp_path, **options)
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    given = dict(env=env, cwd=ROOT, capture_output=True, text=True)
    run = subprocess.run([sys.executable, *words], **given)
    assert run.returncode == 0, run.stderr[-3000:]


if __name__ == "__main__":
    one_of_two(sys.argv[1:])
