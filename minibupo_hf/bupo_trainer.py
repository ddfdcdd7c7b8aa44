"""BuPO as a TRL trainer: GRPOTrainer whose first batches train an internal policy.

    BuPOTrainer(model=..., args=BuPOConfig(bupo_layer=6, bupo_steps=30, ...), ...)

In TRL all log-probabilities (new, old, reference) come from one method. In phase 1 BuPOTrainer
calls it while the model is cut down to its first `bupo_layer` blocks. Sampling, rewards,
advantages, loss, optimizer, sharding and saving stay TRL's.
"""

import math
import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field

import peft
import torch
import trl
from transformers import TrainerCallback, TrainerState
from trl import GRPOConfig, GRPOTrainer

from minibupo import entropy, target_layer
from minibupo_hf.adapter import (
    HFModel,
    check_for_trl,
    find_parts,
    one_line,
    prepare_to_save,
    remove_dropout,
    truncated,
    watching,
)

if not (1, 16) <= tuple(int(part) for part in trl.__version__.split(".")[:2]) < (2, 0):
    raise ImportError(
        f'minibupo_hf needs trl>=1.16,<2, not {trl.__version__}: pip install -e ".[hf]"'
    )


TITLE = (
    "Bottom-up Policy Optimization: Your Language Model Policy Secretly Contains Internal Policies"
)
CITATION = f"""@article{{tan2025bupo,
  title   = {{{TITLE}}},
  author  = {{Tan, Yuqiao and Wang, Minzheng and He, Shizhu and Liao, Huanxuan and
             Zhao, Chengfeng and Lu, Qiunan and Liang, Tian and Zhao, Jun and Liu, Kang}},
  journal = {{arXiv preprint arXiv:2512.19673}},
  year    = {{2025}},
}}"""


AT_LEAST_1 = ["per_device_train_batch_size", "gradient_accumulation_steps", "num_iterations"]
AT_LEAST_1 += ["steps_per_generation", "num_generations", "max_completion_length"]
AT_LEAST_1 += ["generation_batch_size"]

# The options of a generation_config that TRL samples with although it has no setting for them, and
# the value of each that changes nothing; None changes nothing either.
NO_LIMIT = ["max_time", "stop_strings", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"]
NO_LIMIT += ["forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"]
NO_LIMIT += ["sequence_bias", "watermarking_config", "top_h", "dola_layers", "constraints"]
NO_LIMIT += ["force_words_ids"]
ZERO = ["min_length", "min_new_tokens", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size"]
ZERO += ["encoder_no_repeat_ngram_size", "penalty_alpha", "remove_invalid_values", "token_healing"]
ONE = ["num_beams", "num_return_sequences", "typical_p", "guidance_scale"]
ONE += ["encoder_repetition_penalty"]
NEUTRAL = dict.fromkeys(NO_LIMIT) | dict.fromkeys(ZERO, 0) | dict.fromkeys(ONE, 1)


# The settings that say what phase 1 trains, and for how many optimizer steps. A resumed run must
# have the same.
OF_PHASE_1 = ["bupo_steps", "bupo_layer", "steps_per_generation"]
OF_PHASE_1 += ["gradient_accumulation_steps", "num_iterations"]


class NoLayerError(ValueError):
    """The paper's rule names no layer for this model."""


class ResumeError(ValueError):
    """A run cannot be resumed from this checkpoint, or not with these settings."""


@contextmanager
def reading(checkpoint):
    """Inside the `with`, all errors are about the files of this checkpoint, and say so."""
    try:
        yield
    except Exception as error:  # each reader has a class of its own for each kind of damage
        raise ResumeError(f"cannot resume from {checkpoint}: {one_line(error)}") from error


@dataclass
class BuPOConfig(GRPOConfig):
    """GRPOConfig with the two settings of phase 1. Raises ValueError for options that do not go
    together, or out of their range."""

    bupo_layer: int | None = field(
        default=None,
        metadata={
            "help": "layer l of phase 1, 1..L; if it is not given, the paper's rule picks one, on "
            "the first responses that are scored"
        },
    )
    bupo_steps: int = field(
        default=0,
        metadata={
            "help": "s_inter, how many batches of rollouts phase 1 takes, which must be whole "
            "optimizer steps; 0 is GRPO"
        },
    )

    def __post_init__(self):
        for name in AT_LEAST_1:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for name, value in vars(self).items():
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{name} must be a number, not nan")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        super().__post_init__()
        for name, value in vars(self).items():
            if name.endswith("_kwargs") and not isinstance(value, dict | None):
                raise ValueError(f'{name} must be a dict like {{"name": 1}}, not {value!r}')
        for name, types in (("bupo_layer", int | None), ("bupo_steps", int)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, types):
                raise ValueError(f"{name} must be a whole number, not {value!r}")
        if self.bupo_steps < 0:
            raise ValueError(f"bupo_steps must be 0 or more, not {self.bupo_steps}")
        if self.neftune_noise_alpha:
            raise ValueError(
                "neftune_noise_alpha is not for BuPOTrainer: its noise is in the ratio"
            )
        if self.bupo_steps == 0:
            if self.bupo_layer is not None:
                warnings.warn("bupo_steps is 0: this run is GRPO, without bupo_layer", stacklevel=3)
            return
        if self.use_vllm and self.off_policy_mask_threshold is not None:
            raise ValueError(
                "off_policy_mask_threshold compares with vLLM's pi_theta, which phase 1 does not "
                "train: leave it out, or set bupo_steps to 0"
            )
        if self.ignore_data_skip:
            raise ValueError("bupo_steps cannot be counted after a resume with ignore_data_skip")
        # In phase 1 the blocks above the layer have no gradient that DDP could wait for. DDP cannot
        # look for them if checkpoints are reentrant.
        self.ddp_find_unused_parameters = True
        if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("bupo_steps needs gradient_checkpointing_kwargs use_reentrant=False")


def check_sampling(generation_config, overridden):
    """Raise ValueError if a model's generation_config would change the samples.

    The loss knows nothing of it, so they would not be samples of the policy that is trained.
    """
    for name, neutral in NEUTRAL.items():
        value = getattr(generation_config, name, None)
        if name not in overridden and value not in (None, [], neutral):
            raise ValueError(
                f"the model's generation_config has {name} = {value!r}, with which responses are "
                "not sampled from the policy: remove it"
            )


def refuse_keys(missing, unexpected):
    """Raise ValueError for weights that a checkpoint lacks, or that the model has no place for."""
    if missing:
        raise ValueError(f"it has no weights for {min(missing)}, which the model has")
    if unexpected:
        raise ValueError(f"it has weights {min(unexpected)}, for which the model has no place")


class AtTheStart(TrainerCallback):
    """Tells a trainer how many optimizer steps were done when its run starts or resumes."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **_):
        self.trainer._begin_run(state.global_step)


class BuPOTrainer(GRPOTrainer):
    """GRPOTrainer with phase 1 (Eq. 10) on the first `bupo_steps` batches of rollouts (Eq. 11).

    What it logs in phase 1 as `entropy`, `kl` and `clip_ratio` is the internal policy's. Raises
    ValueError for an invalid layer and, except under DeepSpeed, for a model that HFModel refuses.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, BuPOConfig):
            raise ValueError(f"args must be a BuPOConfig, not {type(self.args).__name__}")
        self.add_callback(AtTheStart(self))
        self.layer = self.args.bupo_layer
        self.phase = 2
        self._old_logps = None
        self._count_minibatches()
        lm = self.accelerator.unwrap_model(self.model)
        prepare_to_save(lm.generation_config)
        if not self.use_vllm:
            check_sampling(lm.generation_config, self.generation_kwargs)
        remove_dropout(lm)
        # FSDP may load weights in one process only; DeepSpeed may have them in pieces already
        whole = self.accelerator.is_local_main_process and not self.is_deepspeed_enabled
        if whole:
            check_for_trl(lm)
        if self.args.bupo_steps == 0:
            return
        # TRL writes these into the card of the model. A run without phase 1 keeps GRPO's.
        self._name = "BuPO"
        self._tag_names = [*self._tag_names, "bupo"]
        self._paper = {"title": TITLE, "id": "2512.19673", "citation": CITATION}
        lm.add_model_tags("bupo")
        L = find_parts(lm)[0].config.num_hidden_layers
        if self.layer is not None and not 1 <= self.layer <= L:
            raise ValueError(f"bupo_layer must be in 1..{L}, not {self.layer}")
        if self.layer is not None:
            self._check_trainable(self.layer)
        if self.is_deepspeed_enabled and self.args.weight_decay:
            # DeepSpeed gives weights without a gradient one of 0
            raise ValueError("DeepSpeed would decay what phase 1 must not move: set weight_decay 0")
        if whole:
            HFModel(lm)  # raises what it refuses

    def _check_trainable(self, layer: int):
        """Raise NoLayerError if phase 1 of this layer has nothing to train."""
        lm = self.accelerator.unwrap_model(self.model)
        with truncated(lm, layer):
            if not any(p.requires_grad for p in lm.parameters()):
                raise NoLayerError(
                    f"phase 1 of layer {layer} has nothing to train, because all that is trained "
                    "lies above it: choose a higher bupo_layer"
                )

    def _count_minibatches(self):
        """Count the mini-batches of phase 1 and of an epoch. A mini-batch is what TRL calls a step:
        each optimizer step takes gradient_accumulation_steps of them, or what an epoch has left.

        Raises ValueError for too few prompts, and unless phase 1 ends with an optimizer step.
        """
        if not hasattr(self.train_dataset, "__len__"):
            if self.args.bupo_steps:
                raise ValueError("bupo_steps needs a training set with a length, not a stream")
            return
        prompts = len(self.train_dataset)
        needed = self.args.generation_batch_size // self.num_generations
        if prompts < needed:
            raise ValueError(f"a batch of rollouts needs {needed} prompts, there are {prompts}")
        if self.args.bupo_steps and self.args.n_gpu > 1:
            raise ValueError("start one process for each GPU, by torchrun or accelerate launch")
        uses = self.args.steps_per_generation * self.num_iterations  # of a batch of rollouts
        self.phase_1 = self.args.bupo_steps * uses
        self.epoch = prompts // needed * uses
        steps = self.args.gradient_accumulation_steps
        if self.phase_1 % self.epoch % steps:
            raise ValueError(
                f"bupo_steps = {self.args.bupo_steps} are {self.phase_1} mini-batches "
                "(x steps_per_generation x num_iterations), which are not whole optimizer steps of "
                f"gradient_accumulation_steps = {steps}"
            )

    def _minibatches(self, optimizer_steps: int) -> int:
        """How many mini-batches these optimizer steps take. The last step of an epoch may have
        fewer than the others."""
        steps = self.args.gradient_accumulation_steps
        epochs, rest = divmod(optimizer_steps, math.ceil(self.epoch / steps))
        return epochs * self.epoch + rest * steps

    def _begin_run(self, optimizer_steps: int):
        """Count on from the optimizer steps that a resumed run has done; 0 for a new run.

        TRL itself counts mini-batches from 0 after a resume. So a run that was stopped inside a
        batch of rollouts would use the next one too long. Now it samples this batch anew, and uses
        it for the mini-batches that remain.
        """
        if optimizer_steps >= self.state.max_steps:
            raise ResumeError(
                f"the checkpoint has {optimizer_steps} steps, and the run ends after "
                f"{self.state.max_steps}: no step remains"
            )
        self._check_settings(optimizer_steps)
        if self.args.bupo_steps == 0:
            return
        if self.phase_1 >= self._minibatches(self.state.max_steps):
            warnings.warn(
                f"phase 1 takes all {self.state.max_steps} optimizer steps of this run, because "
                f"bupo_steps = {self.args.bupo_steps}: there is no phase 2",
                stacklevel=2,
            )
        self._step = self._minibatches(optimizer_steps)
        self._buffered_inputs = None
        self.layer = self.args.bupo_layer

    def _check_settings(self, optimizer_steps: int):
        """Note in the log the settings of phase 1.

        Raises ResumeError if a resumed run has noted others, because its phases would be wrong.
        """
        ours = {"bupo_steps": 0}
        if self.args.bupo_steps:
            ours = {name: getattr(self.args, name) for name in OF_PHASE_1}
            ours["mini-batches of an epoch"] = self.epoch
        history = self.state.log_history
        if optimizer_steps == 0:
            history.append({"bupo/settings": ours, "step": 0})
        logged = [log["bupo/settings"] for log in history if "bupo/settings" in log]
        noted = logged[0] if logged else {"bupo_steps": 0}
        for name, value in ours.items():
            if noted.get(name) != value:
                raise ResumeError(
                    f"the checkpoint is of a run with {name} = {noted.get(name)}, which cannot be "
                    f"resumed with {value}, because phase 1 would be another"
                )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            TrainerState.load_from_json(os.path.join(resume_from_checkpoint, "trainer_state.json"))
            lm = self.model if model is None else model
            if isinstance(lm, peft.PeftModel) and not self.is_fsdp_enabled:
                saved = peft.load_peft_weights(resume_from_checkpoint, device="cpu").keys()
                ours = peft.get_peft_model_state_dict(lm).keys()
                refuse_keys(ours - saved, saved - ours)

    def _issue_warnings_after_load(self, load_result):
        tied = self.accelerator.unwrap_model(self.model).all_tied_weights_keys
        missing = set(load_result.missing_keys) - tied.keys()
        refuse_keys(missing, load_result.unexpected_keys)
        super()._issue_warnings_after_load(load_result)

    def _load_optimizer_and_scheduler(self, checkpoint):
        options = self.optimizer.param_groups[0].keys()
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if self.optimizer.param_groups[0].keys() != options:
                raise ValueError("its optimizer is of another kind than this run's optim")

    def _load_rng_state(self, checkpoint):
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _generate_and_score_completions(self, inputs):
        # The phase is fixed when the rollouts are generated, and holds for all steps on them. So
        # old and new log-probabilities are the same policy's.
        if self.args.bupo_steps and self.model.training:
            self._begin_batch()
        return super()._generate_and_score_completions(inputs)

    def _begin_batch(self):
        """Set the phase of the batch of rollouts that comes next."""
        done = self._step  # mini-batches, of this run and of those that it resumes
        first_of_phase_2 = done == self.phase_1
        self.phase = 1 if done < self.phase_1 else 2
        if first_of_phase_2:
            # As in minibupo.phases: moments that remember phase 1's larger gradient make the first
            # steps of phase 2 too small.
            self.optimizer.state.clear()
        # It would weigh pi_Layer^l against vLLM's pi_theta, and nearly every weight would be 0.
        self.vllm_importance_sampling_correction = (
            self.args.vllm_importance_sampling_correction and self.phase == 2
        )
        self._metrics["train"]["bupo/phase"].append(float(self.phase))

    def _compute_loss(self, model, inputs):
        self._old_logps = inputs.get("old_per_token_logps")
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._old_logps = None

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        score = super()._get_per_token_logps_and_entropies
        if self.phase == 2 or not self.model.training:
            return score(model, *args, **kwargs)
        if self.layer is None:
            self.layer = self._logged_layer() or self._layer_by_rule(model, *args, **kwargs)
        with truncated(self.accelerator.unwrap_model(model), self.layer):
            logps, *others = score(model, *args, **kwargs)
        if self._old_logps is not None:
            # The log-ratio stays within +-20, as in minibupo.surrogate. One update can move the
            # log-probability of a token by 60 if the internal policy is confident and wrong; at 89
            # exp overflows, and the weights would become NaN.
            logps = logps.clamp(self._old_logps - 20, self._old_logps + 20)
        return logps, *others

    def _logged_layer(self) -> int | None:
        """The layer that the rule has picked before a resume."""
        logged = [log["bupo/layer"] for log in self.state.log_history if "bupo/layer" in log]
        return logged[0] if logged else None

    def _layer_by_rule(self, model, *args, **kwargs) -> int:
        """The layer that minibupo.target_layer picks on these responses; noted in the log."""
        dH_mlp = self._measure_dH_mlp(model, *args, **kwargs)
        try:
            layer = target_layer(dH_mlp)
        except ValueError as error:
            raise NoLayerError(f"{error}; choose one with bupo_layer") from None
        self._check_trainable(layer)
        log = {"bupo/layer": layer, "bupo/dH_mlp": dH_mlp.tolist(), "step": self.state.global_step}
        self.state.log_history.append(log)
        return layer

    @torch.no_grad()
    def _measure_dH_mlp(self, model, input_ids, attention_mask, keep, batch_size=None, **_):
        """look_inside's dH_mlp (L,), the mean over the response positions of all ranks."""
        lm = self.accelerator.unwrap_model(model)
        decoder, blocks_name, _ = find_parts(lm)
        blocks = getattr(decoder, blocks_name)
        unembed = lm.get_output_embeddings()
        batch = batch_size or len(input_ids)
        # About 64 positions are unembedded at a time. Every rank takes as many pieces, because
        # ZeRO-3 gathers the unembedding for each.
        longest = self.accelerator.gather(torch.tensor([keep], device=input_ids.device)).max()
        pieces = 1 + batch * (self.max_completion_length or int(longest)) // 64
        changes = []  # a sum over positions for each layer of each batch

        def add(trace):  # of one layer, for the rows that run, whose response is mask
            change = 0.0
            read = trace.mlp_in[:, -keep - 1 : -1][mask].tensor_split(pieces)
            wrote = trace.mlp_out[:, -keep - 1 : -1][mask].tensor_split(pieces)
            for r, w in zip(read, wrote):
                change += (entropy(unembed(w)) - entropy(unembed(r))).sum()
            changes.append(change)

        with watching(blocks, add), self.accelerator.autocast():
            for rows, seen in zip(input_ids.split(batch), attention_mask.split(batch)):
                mask = seen[:, -keep:].bool()
                # the wrapped model is called, so that sharded weights are gathered
                model(input_ids=rows, attention_mask=seen, use_cache=False, logits_to_keep=1)
        changes = torch.stack(changes).view(-1, len(blocks)).sum(0)
        positions = attention_mask[:, -keep:].sum()
        sums = self.accelerator.reduce(torch.cat([changes, positions[None]]))
        if sums[-1] == 0:  # mask_truncated_completions leaves out what has not finished
            raise NoLayerError("no response has finished: set bupo_layer, or let them be longer")
        return sums[:-1] / sums[-1]
