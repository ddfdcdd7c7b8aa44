"""The same training by TRL's GRPOTrainer, for bench.py to compare with. Needs the extra `bench` (trl, datasets).

How TRL is set up. Its model is transformers' Qwen3 with our very weights, in float32, attention by
scaled_dot_product_attention. Prompts, group size, mini-batches, response limit, temperature, reward, clip, group
advantages, loss (TRL's "bnpo" is our average over the tokens of a mini-batch) and optimizer (the same fused AdamW) are
ours. There is no reference model (beta = 0), and what would only slow it down is off: gradient checkpointing and bfloat16
(both on by default), logging, saving, evaluation, progress bars. It samples by transformers' `generate` with its default
cache, since vLLM needs a GPU. Old log-probabilities it computes in a pass of its own, as it must where one batch of
rollouts serves several optimizer steps. Rewards are told from token ids, so that no text need be parsed.

Tried on the default toy model with TRL 1.16, one thread, and no faster (a step took 1.5 s): a static cache 1.7 s, eager
attention 1.6 s, torch_compile 1.6 s after 75 s of compiling, transformers' continuous batching 9 s, bfloat16 10 s.
"""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is to be fetched

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen3Config, Qwen3ForCausalLM, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

import train_toy as toy  # noqa: E402
from model import GPT  # noqa: E402


def same_weights(model: GPT, qwen3):
    """Pairs (our weight, theirs) of equal shape. Where our projections are one matrix and theirs are several, ours are views."""
    c, theirs = model.cfg, dict(qwen3.named_parameters())
    yield model.embed.weight, theirs["model.embed_tokens.weight"]
    yield model.final_norm.weight, theirs["model.norm.weight"]
    if not c.tied:
        yield model.lm_head.weight, theirs["lm_head.weight"]
    for i, block in enumerate(model.blocks):
        attn, mlp = block.attn, block.mlp
        q, k, v = attn.qkv.weight.split([heads * c.head_dim for heads in (c.n_head, c.n_kv_head, c.n_kv_head)])
        gate, up = mlp.gate_up.weight.chunk(2)
        ours = {"input_layernorm": block.attn_norm.weight, "post_attention_layernorm": block.mlp_norm.weight,
                "self_attn.q_norm": attn.q_norm.weight, "self_attn.k_norm": attn.k_norm.weight,
                "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": attn.out.weight,
                "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": mlp.down.weight}  # fmt: skip
        for name, weight in ours.items():
            yield weight, theirs[f"model.layers.{i}.{name}.weight"]


@torch.no_grad()
def to_qwen3(model: GPT) -> Qwen3ForCausalLM:
    """A model, which must have QK-norm and no biases, as transformers' Qwen3."""
    c = model.cfg
    qwen3 = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_mlp, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, max_position_embeddings=c.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
        bos_token_id=None, eos_token_id=toy.EOS, pad_token_id=toy.PAD, attn_implementation="sdpa", dtype=torch.float32,
    ))  # fmt: skip
    for ours, theirs in same_weights(model, qwen3):
        theirs.copy_(ours)
    return qwen3


@torch.no_grad()
def from_qwen3(model: GPT, qwen3):
    """Copy the weights back."""
    for ours, theirs in same_weights(model, qwen3):
        ours.copy_(theirs)


def tokenizer() -> PreTrainedTokenizerFast:
    """The toy's characters for transformers; prompts are padded on the left."""
    ids = {c: i for i, c in enumerate(toy.CHARACTERS)} | {"<eos>": toy.EOS, "<pad>": toy.PAD}
    characters = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def reward(completion_ids, answer, **_) -> list[float]:
    """train_toy.reward as TRL calls it: lists of response tokens, a list of answers."""
    return [float([toy.EQUALS, *ids][-3:] == [toy.EQUALS, a, toy.EOS]) for ids, a in zip(completion_ids, answer)]


def train(s: toy.Settings, qwen3: Qwen3ForCausalLM, steps: int, lr: float, reward_func, after_step):
    """`steps` steps of RL on the questions that train_toy.rl_step draws for steps 1, 2, ... Behind each one, that is between
    two optimizer steps of TRL's loop, after_step(step) is called; training ends early where it returns False."""

    class AfterStep(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % s.minibatches == 0 and after_step(state.global_step // s.minibatches) is False:
                control.should_training_stop = True

    questions = [row for step in range(1, steps + 1) for row in zip(*toy.training_problems(s, step))]
    columns = {"prompt": [toy.decode(tokens[:length]) for tokens, length, _ in questions], "answer": [int(row[2]) for row in questions]}
    optimizer = toy.adamw(qwen3, lr, s.weight_decay)
    with tempfile.TemporaryDirectory() as out:
        trainer = GRPOTrainer(
            model=qwen3, reward_funcs=reward_func, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer(),
            callbacks=[AfterStep()], optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
            args=GRPOConfig(
                output_dir=out, use_cpu=True, bf16=False, gradient_checkpointing=False, seed=s.seed, shuffle_dataset=False,
                max_steps=steps * s.minibatches, per_device_train_batch_size=s.questions * s.group // s.minibatches,
                steps_per_generation=s.minibatches, gradient_accumulation_steps=1, num_iterations=1, num_generations=s.group,
                max_completion_length=s.response_limit, temperature=s.temperature, top_p=1.0, top_k=0, beta=0.0, epsilon=s.clip,
                loss_type="bnpo", scale_rewards="group", max_grad_norm=1.0, logging_strategy="no", save_strategy="no",
                eval_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
            ),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
