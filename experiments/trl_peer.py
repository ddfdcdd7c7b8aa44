"""The same training by TRL's GRPOTrainer, for bench.py. Needs the extra `bench` (trl, datasets).

How TRL is set up: its model is transformers' Qwen3 with exactly our weights, in float32. Prompts,
group size, mini-batches, response limit, temperature, reward, clip, group advantages, loss (TRL's
"bnpo" is our average over the tokens of a mini-batch) and optimizer are ours. There is no reference
model (beta = 0). What would only slow it down is off: gradient checkpointing, bfloat16, logging,
saving, evaluation, progress bars. It samples by transformers' `generate` with its default cache,
because vLLM needs a GPU. It scores rollouts in a separate pass before the update, as we do.

Other settings of TRL 1.16 were tried at commit 07e9ae1 on one thread. None was faster than a step
of 1.5 s: a static cache took 1.7 s, eager attention 1.6 s, torch_compile 1.6 s after 75 s of
compiling, transformers' continuous batching 9 s, bfloat16 10 s.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

import train_toy as toy
from model import GPT

MINIBATCHES = 4  # as in minibupo.update


def same_weights(model: GPT, qwen3):
    """Yield pairs (our weight, theirs). If one of ours is several of theirs, ours are views."""
    c = model.cfg
    theirs = dict(qwen3.named_parameters())
    yield model.embed.weight, theirs["model.embed_tokens.weight"]
    yield model.final_norm.weight, theirs["model.norm.weight"]
    for i, block in enumerate(model.blocks):
        attn = block.attn
        mlp = block.mlp
        q, k, v = attn.qkv.weight.split([heads * c.head_dim for heads in attn.heads])
        gate, up = mlp.gate_up.weight.chunk(2)
        ours = {
            "input_layernorm": block.attn_norm.weight,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.q_norm": attn.q_norm.weight,
            "self_attn.k_norm": attn.k_norm.weight,
            "self_attn.o_proj": attn.out.weight,
            "post_attention_layernorm": block.mlp_norm.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": mlp.down.weight,
        }
        for name, weight in ours.items():
            yield weight, theirs[f"model.layers.{i}.{name}.weight"]


@torch.no_grad()
def to_qwen3(model: GPT) -> Qwen3ForCausalLM:
    """Return a model as transformers' Qwen3. It must have QK-norm, no biases, tied embeddings."""
    c = model.cfg
    config = Qwen3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_mlp,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        head_dim=c.head_dim,
        max_position_embeddings=c.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=toy.EOS,
        pad_token_id=toy.PAD,
        attn_implementation="sdpa",
        dtype=torch.float32,
    )
    qwen3 = Qwen3ForCausalLM(config)
    for ours, theirs in same_weights(model, qwen3):
        theirs.copy_(ours)
    return qwen3


@torch.no_grad()
def from_qwen3(model: GPT, qwen3):
    """Copy the weights of a Qwen3 back into our model."""
    for ours, theirs in same_weights(model, qwen3):
        ours.copy_(theirs)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the toy's characters for transformers, which pads on the left."""
    ids = {c: i for i, c in enumerate(toy.CHARACTERS)} | {"<eos>": toy.EOS, "<pad>": toy.PAD}
    characters = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokens = dict(eos_token="<eos>", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=characters, padding_side="left", **tokens)


def reward(prompts, completions, completion_ids, **_) -> list[float]:
    """Return train_toy's reward for problems with their `=` and lists of response tokens."""
    texts = [toy.ENCODING.decode(ids) for ids in completion_ids]
    return [float(toy.is_correct(p.removesuffix("="), text)) for p, text in zip(prompts, texts)]


def train(s: toy.Settings, qwen3, steps: int, lr: float, reward_func, after_step):
    """Steps 1..steps of RL, on the questions that train_toy draws for them.

    After each step, between two optimizer steps of TRL's loop, after_step(step) is called. Training
    ends early if it returns False.
    """

    class AfterStep(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            step, rest = divmod(state.global_step, MINIBATCHES)
            if rest == 0 and after_step(step) is False:
                control.should_training_stop = True

    problems = []
    for step in range(1, steps + 1):
        rng = toy.rng_for(s.seed, "questions", step)
        problems += toy.draw_questions(rng, s.questions, s.n)
    optimizer = torch.optim.AdamW(qwen3.parameters(), lr=lr, fused=True)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with tempfile.TemporaryDirectory() as out:
        trainer = GRPOTrainer(
            model=qwen3,
            reward_funcs=reward_func,
            train_dataset=Dataset.from_dict({"prompt": [p + "=" for p in problems]}),
            processing_class=tokenizer(),
            callbacks=[AfterStep()],
            optimizers=(optimizer, constant),
            args=trl_options(s, out, steps),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def trl_options(s: toy.Settings, out: str, steps: int) -> GRPOConfig:
    """Return TRL's options for train_toy's hyper-parameters."""
    return GRPOConfig(
        # the same training
        max_steps=steps * MINIBATCHES,
        per_device_train_batch_size=s.questions * s.group // MINIBATCHES,
        steps_per_generation=MINIBATCHES,
        gradient_accumulation_steps=1,
        num_iterations=1,
        num_generations=s.group,
        max_completion_length=s.response_limit,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        loss_type="bnpo",
        scale_rewards="group",
        max_grad_norm=1.0,
        shuffle_dataset=False,
        seed=s.seed,
        # what only costs time is off
        output_dir=out,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
