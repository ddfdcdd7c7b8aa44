"""BuPO as a TRL trainer: GRPOTrainer whose first batches train an internal policy.

    BuPOTrainer(model=..., args=BuPOConfig(bupo_layer=6, bupo_steps=30, ...), ...)

In TRL all log-probabilities (new, old, reference) come from one method. In phase 1 BuPOTrainer
calls it while the model is cut down to its first `bupo_layer` blocks. Sampling, rewards,
advantages, loss, optimizer, sharding and saving stay TRL's.
"""

from dataclasses import dataclass, field

import torch
import trl
from trl import GRPOConfig, GRPOTrainer

from minibupo_hf.adapter import HFModel, find_parts, truncated, watching
from minibupo import entropy, target_layer

if not (1, 16) <= tuple(int(part) for part in trl.__version__.split(".")[:2]) < (2, 0):
    raise ImportError(
        f'minibupo_hf/ needs trl>=1.16,<2, not {trl.__version__}: pip install -e ".[hf]"'
    )


class NoLayerError(ValueError):
    """The paper's rule names no layer for this model."""


@dataclass
class BuPOConfig(GRPOConfig):
    """GRPOConfig with the two settings of phase 1. Raises ValueError for what cannot work in it."""

    bupo_layer: int | None = field(
        default=None,
        metadata={
            "help": "layer l of phase 1, 1..L; without it the paper's rule picks one, on the first "
            "responses that are scored"
        },
    )
    bupo_steps: int = field(
        default=0,
        metadata={
            "help": "s_inter, how many batches of rollouts phase 1 takes, rounded up to whole "
            "optimizer steps; 0 is GRPO"
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.bupo_steps < 0:
            raise ValueError(f"bupo_steps must be 0 or more, not {self.bupo_steps}")
        if self.bupo_steps == 0:
            return
        if self.use_vllm and self.off_policy_mask_threshold is not None:
            raise ValueError(
                "off_policy_mask_threshold compares with vLLM's pi_theta, which phase 1 does not "
                "train: leave it out, or set bupo_steps to 0"
            )
        # In phase 1 the blocks above the layer have no gradient that DDP could wait for. It cannot
        # look for them where checkpoints are reentrant.
        self.ddp_find_unused_parameters = True
        if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("bupo_steps needs gradient_checkpointing_kwargs use_reentrant=False")


class BuPOTrainer(GRPOTrainer):
    """GRPOTrainer with phase 1 (Eq. 10) on the first `bupo_steps` batches of rollouts (Eq. 11).

    What it logs of phase 1 as `entropy`, `kl` and `clip_ratio` is the internal policy's. Raises
    ValueError for a layer that is not there and, but under DeepSpeed, a model that HFModel refuses.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.layer, self.phase = self.args.bupo_layer, 2
        if self.args.bupo_steps == 0:
            return
        lm = self.accelerator.unwrap_model(self.model)
        L = find_parts(lm)[0].config.num_hidden_layers
        if self.layer is not None and not 1 <= self.layer <= L:
            raise ValueError(f"bupo_layer must be in 1..{L}, not {self.layer}")
        if self.is_deepspeed_enabled and self.args.weight_decay:
            # DeepSpeed gives weights without a gradient one of 0
            raise ValueError("DeepSpeed would decay what phase 1 must not move: set weight_decay 0")
        # FSDP may load weights in one process alone; DeepSpeed may have them in pieces already
        if self.accelerator.is_local_main_process and not self.is_deepspeed_enabled:
            HFModel(lm)  # raises what it refuses

    def _generate_and_score_completions(self, inputs):
        # The phase is settled where rollouts are made, and holds for all steps on them. So old and
        # new log-probabilities are of one policy. After a resume global_step goes on, TRL's own
        # count of steps does not.
        if self.args.bupo_steps and self.model.training:
            per_batch = self.args.steps_per_generation * self.num_iterations
            micro_steps = self.state.global_step * self.args.gradient_accumulation_steps
            left = self.args.bupo_steps * per_batch - micro_steps
            self.phase = 1 if left > 0 else 2
            if -self.args.gradient_accumulation_steps < left <= 0:
                # The first optimizer step of phase 2. As in minibupo.bupo: moments that remember
                # phase 1's larger gradient make the first steps of phase 2 too small.
                self.optimizer.state.clear()
            # It would weigh pi_Layer^l against vLLM's pi_theta, and nearly every weight would be 0.
            self.vllm_importance_sampling_correction = (
                self.args.vllm_importance_sampling_correction and self.phase == 2
            )
            self._metrics["train"]["bupo/phase"].append(float(self.phase))
        return super()._generate_and_score_completions(inputs)

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        score = super()._get_per_token_logps_and_entropies
        if self.phase == 2 or not self.model.training:
            return score(model, *args, **kwargs)
        if self.layer is None:
            logged = [log["bupo/layer"] for log in self.state.log_history if "bupo/layer" in log]
            self.layer = logged[0] if logged else self._layer_by_rule(model, *args, **kwargs)
        with truncated(self.accelerator.unwrap_model(model), self.layer):
            return score(model, *args, **kwargs)

    @torch.no_grad()
    def _layer_by_rule(self, model, input_ids, attention_mask, keep, batch_size=None, **_) -> int:
        """minibupo.target_layer on these responses, of all ranks; noted in the log."""
        lm = self.accelerator.unwrap_model(model)
        decoder, blocks, _ = find_parts(lm)
        unembed, batch, changes = lm.get_output_embeddings(), batch_size or len(input_ids), []
        # About 64 positions are unembedded at a time; in as many pieces on every rank, since ZeRO-3
        # gathers the unembedding for each.
        pieces = 1 + batch * self.max_completion_length // 64

        def add(trace):  # of one layer, for the rows that run, whose response is mask
            read, wrote = (h[:, -keep - 1 : -1][mask] for h in (trace.mlp_in, trace.mlp_out))
            parts = zip(wrote.tensor_split(pieces), read.tensor_split(pieces))
            changes.append(sum((entropy(unembed(w)) - entropy(unembed(r))).sum() for w, r in parts))

        with watching(decoder._modules[blocks], add), self.accelerator.autocast():
            for rows, seen in zip(input_ids.split(batch), attention_mask.split(batch)):
                mask = seen[:, -keep:].bool()
                # the wrapped model is called, so that sharded weights are gathered
                model(input_ids=rows, attention_mask=seen, use_cache=False, logits_to_keep=1)
        changes = torch.stack(changes).view(-1, len(decoder._modules[blocks])).sum(0)
        sums = torch.cat([changes, attention_mask[:, -keep:].sum()[None]])  # and the positions
        sums = self.accelerator.reduce(sums)
        d_mlp = sums[:-1] / sums[-1]
        try:
            layer = target_layer(d_mlp)
        except ValueError as error:
            raise NoLayerError(f"{error}; choose one with bupo_layer") from None
        log = {"bupo/layer": layer, "bupo/d_mlp": d_mlp.tolist(), "step": self.state.global_step}
        self.state.log_history.append(log)
        return layer
