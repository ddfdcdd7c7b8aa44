"""minibupo_hf/train.py: the command line, in one process and in two, and its error messages.

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

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import minibupo_hf.bupo_trainer
import minibupo_hf.train
from minibupo_hf.adapter import load, truncated
from minibupo_hf.bupo_trainer import BuPOTrainer
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
    """A run that is stopped and resumed has one log."""
    options = dict(eval_strategy="steps", eval_steps=2, eval_problems=8, beta=0.1)
    options |= dict(save_strategy="steps", save_steps=2)
    saved = dict(resume_from_checkpoint=tmp_path / "checkpoint-2")
    logs = []
    for more in dict(max_steps=2), saved:
        assert minibupo_hf.train.main(arguments(directory, tmp_path, **options, **more)) == 0
        logs.append(json.loads((tmp_path / "trainer_state.json").read_text())["log_history"])
    log = logs[1]
    assert log[0] == logs[0][0]  # also its time, so it is the same entry
    assert [entry["bupo/phase"] for entry in log if "bupo/phase" in entry] == [1, 2, 2, 2]
    assert [entry["step"] for entry in log if "eval_reward" in entry] == [2, 4]
    kl = [entry["kl"] for entry in log if "kl" in entry]
    assert kl[0] == 0 and kl[1] > 0  # between internal policies, then between whole ones
    assert load(tmp_path)[0].n_layer == 3


def test_command_line_with_a_data_set_and_adapters(directory, tmp_path):
    """LoRA moves only adapters up to the layer."""
    for split, prompt in ("train", "1+1="), ("test", "2+0="):
        row = {"prompt": prompt, "solution": "$2$"}
        (tmp_path / f"{split}.json").write_text((json.dumps(row) + "\n") * 8)
    options = dict(dataset_name=tmp_path, dtype="bfloat16", use_peft=True, bupo_steps=4)
    options |= dict(eval_strategy="steps", eval_steps=9)
    trainer, _ = minibupo_hf.train.make_trainer(arguments(directory, tmp_path, **options))
    assert trainer.eval_dataset["prompt"][0] == "2+0="
    assert trainer.reward_func_names == ["right_mathematics"]
    texts = [r"\boxed{2}", r"\boxed{3}"]
    for completions in texts, [[{"role": "assistant", "content": text}] for text in texts]:
        assert minibupo_hf.train.right_mathematics(completions, solution=["$2$"] * 2) == [1, 0]
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
    """The sentence says what is wrong, and the remedy if that does not follow from it."""
    data = {"a/train": "prompt", "b/train": "problem", "c/train": "prompt", "c/test": "problem"}
    for file, column in data.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.json").write_text(json.dumps({column: "1+1="}))
    (tmp_path / "base.pt").write_bytes(b"PK")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")
    narrow = build(**TIED)
    part = build(**TIED)
    for layer in narrow.model.layers:
        layer.mlp.down_proj.weight.data *= 100  # large writes: every FFN lowers entropy
    del part.model.layers[1].mlp.up_proj
    for name, lm in dict(narrow=narrow, part=part, parallel=build("GPTNeoX")).items():
        save(tmp_path / name, lm)
    save(tmp_path / "cut", narrow).joinpath("model.safetensors").write_bytes(b"")

    def said(**options):
        capsys.readouterr()
        assert minibupo_hf.train.main(arguments(directory, tmp_path, **options)) == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("minibupo_hf.train: ")

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
        (dict(model_name_or_path=tmp_path / "cut.gguf", beta=0.1), "beta needs a reference model"),
        (dict(model_name_or_path=tmp_path / "cut"), "transformers cannot read"),
        (dict(attn_implementation="none"), "transformers cannot read"),
        (dict(load_in_4bit=True), "load_in_4bit is not for"),
        (dict(model_name_or_path=tmp_path / "part"), "no weights for model.layers.1.mlp.up_proj"),
        (dict(model_name_or_path=tmp_path / "parallel"), "GPTNeoXForCausalLM cannot be opened"),
        (dict(model_name_or_path=tmp_path / "narrow", bupo_layer=None), "choose one with bupo_l"),
        (dict(operations="/"), "operations must be some of + - *"),
        (dict(operations=""), "operations must be some of + - *"),
        (dict(operations="++"), "operations must be some of + - *"),
        (dict(digits=0), "digits 1, 2 or 3, not '+*' and 0"),
        (dict(dataset_name=tmp_path / "no-data"), "cannot read data set"),
        (dict(dataset_name=tmp_path / "c"), "cannot read data set"),
        (dict(dataset_name=tmp_path / "a", dataset_config="x"), "cannot read data set"),
        (dict(dataset_name=tmp_path / "a", dataset_train_split="x"), "has no split x, only train"),
        (dict(dataset_name=tmp_path / "a"), "has no column 'solution', only prompt"),
        (dict(dataset_name=tmp_path / "b"), "has no column 'prompt', only problem"),
    ]:
        assert says in said(**options)
    monkeypatch.setattr(minibupo_hf.bupo_trainer, "BuPOTrainer", OnDeepSpeed)
    assert "set weight_decay 0" in said()
    # the model itself is not checked there
    words = arguments(tmp_path / "parallel", tmp_path, weight_decay=0.0)
    minibupo_hf.train.make_trainer(words)


def test_missing_packages_are_one_sentence(tmp_path, capsys, monkeypatch):
    trainer = "minibupo_hf.bupo_trainer"
    for change, says in [
        (lambda: monkeypatch.setitem(sys.modules, "gguf", None), "gguf"),
        (lambda: monkeypatch.setattr("trl.__version__", "1.15.3"), "needs trl>=1.16,<2, not 1.15"),
        (lambda: monkeypatch.setitem(sys.modules, "trl", None), "trl"),
    ]:
        change()
        if "gguf" not in says:  # imported again, as when the program starts
            monkeypatch.delitem(sys.modules, trainer, raising=False)
        assert minibupo_hf.train.main(arguments(tmp_path / "cut.gguf", tmp_path)) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("minibupo_hf.train: ") and 'pip install -e ".[hf]"' in said
        assert says in said


def test_what_is_set_by_default(directory, tmp_path, monkeypatch):
    tokenizer = load(directory)[1]
    monkeypatch.setattr(minibupo_hf.adapter, "load_lm", lambda *_, **__: (build(**TIED), tokenizer))
    options = dict(eval_strategy="steps", eval_steps=2, eval_problems=8)
    options |= dict.fromkeys(("bf16", "gradient_checkpointing", "use_cpu"))
    trainer, config = minibupo_hf.train.make_trainer(arguments("a.gguf", tmp_path, **options))
    assert len(trainer.eval_dataset) == 8 and trainer.processing_class is tokenizer
    gpu = torch.accelerator.is_available()
    assert (config.bf16, config.gradient_checkpointing, config.use_cpu) == (gpu, gpu, not gpu)


def test_arithmetic_holds_problems_out():
    train, held_out = minibupo_hf.train.arithmetic(1, "+-*")
    assert list(held_out) == list(minibupo_hf.train.arithmetic(1, "+-*")[1])  # also in another run
    assert sum(map(len, minibupo_hf.train.arithmetic(3, "+"))) <= 20_000
    assert len(train) + len(held_out) == 297 and len(held_out) == 59  # less the worked examples
    assert not set(train["prompt"]) & set(held_out["prompt"])
    for row in [*train, *held_out]:
        question = row["prompt"].split("\n")[-1]
        assert row["prompt"] == f"3+4=7\n7-4=3\n2*4=8\n{question}"
        assert row["answer"] == str(eval(question[:-1]))
    assert minibupo_hf.train.right_answer(["7\n3", " 7", "77", ""], ["7"] * 4) == [1, 1, 0, 0]
    assert all(len(p) == 15 for p in minibupo_hf.train.arithmetic(2, "-")[1]["prompt"][:99])


FSDP2 = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")
FSDP2 |= dict(FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")  # as accelerate's launcher says it


def shard_on_a_cpu():
    """accelerate shards on GPUs only, and trains by DDP without. From here on it shards."""
    make = AcceleratorState.__init__

    def made(self, *args, fsdp_plugin=None, **kwargs):
        make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.fsdp_plugin = fsdp_plugin or self.fsdp_plugin
        self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = made


def one_of_two(argv):
    """What each process of the next test does."""
    torch.set_num_threads(1)
    sharded = "ACCELERATE_USE_FSDP" in os.environ
    if sharded:
        shard_on_a_cpu()
    else:
        truncated_and_sharded_is_truncated()
    trainer, _ = minibupo_hf.train.make_trainer(argv)
    trainer.reward_funcs = [even]
    before = weights(trainer)
    trainer.train()
    assert {isinstance(p, DTensor) for p in trainer.model.parameters()} == {sharded}
    both = [None, None]
    ours = (trainer.layer, logged(trainer, "bupo/dH_mlp"), weights(trainer))
    torch.distributed.all_gather_object(both, ours)
    (layer, dH_mlp, after), other = both
    assert trainer.accelerator.num_processes == 2
    assert 1 <= layer < 3 and other[:2] == (layer, dH_mlp)
    assert not differ(after, other[2]) and differ(before, after) == before.keys()
    trainer.save_model()
    torch.distributed.barrier()  # neither leaves while the other may still need it
    torch.distributed.destroy_process_group()


def truncated_and_sharded_is_truncated():
    """FSDP2 (`fully_shard`) does what one process does, also where layers have no gradient."""
    torch.distributed.init_process_group("gloo")
    alone = build(**TIED)
    sharded = build(**TIED)
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


def test_two_processes(directory, tmp_path):
    """DDP and FSDP2 over gloo, with layer by the rule, accumulation, weight decay, checkpointing
    and both phases, give the same model."""
    options = dict(steps_per_generation=2, gradient_accumulation_steps=2, max_steps=3)
    # with this seed the two do not sample equally many tokens; epsilon: no step by rounding alone
    options |= dict(gradient_checkpointing=True, bupo_layer=None, use_cpu=None, seed=5)
    options |= dict(adam_epsilon=1e-2)
    words = "-m torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d".split()
    words += "--rdzv_endpoint 127.0.0.1:0 --local_addr 127.0.0.1 -m tests.test_hf_train".split()
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name, more in ("ddp", {}), ("fsdp2", FSDP2):
        command = [sys.executable, *words, *arguments(directory, tmp_path / name, **options)]
        run = subprocess.run(command, env=env | more, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
    one, other = (load(tmp_path / name)[0].state_dict() for name in ("ddp", "fsdp2"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    one_of_two(sys.argv[1:])
    os._exit(0)  # torch's threads now and then abort a process that ends by itself
