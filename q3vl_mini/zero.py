"""What training needs besides each trained weight, split among the processes: ZeRO, stages 1 and 2, by DeepSpeed.

Adam keeps two moments a weight, and each process its own copy of them and of the averaged gradient. With ZeRO each
process keeps a part (stage 1: of the moments; stage 2: of the averaged gradients too, once a step's backward passes are
over), updates that part of the weights, and all hand each other what is new. For an adapter that is little; it is
for full fine-tuning (`lora_rank = 0`, a stage at a time). Frozen weights are split by `sharding.py`.

DeepSpeed's engine gets the trained weights, not the model: forward and backward stay those of `train.fit`, of which a
gradient cache has several a step, and the engine is told to wait for the last. So losses, numbers and checkpoints are
those without it; a checkpoint of one serves the other.

Source: Rajbhandari et al. 2020 (arXiv 1910.02054).
"""

import json
import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ASKED = "Q3VL_MINI_ZERO"  # remembers the launch for whoever asks again in this process
MOMENTS = ("exp_avg", "exp_avg_sq")
FROM_PRESET = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
)


def asked_by_launch(environment: MutableMapping[str, str] = os.environ) -> dict[str, Any] | None:
    """DeepSpeed's settings, if accelerate was launched with DeepSpeed, which it is then told to leave to us; else None.

    They are those of the launch's `deepspeed_config_file`, or its `zero_stage`. Accelerate would let the engine take a
    step at every backward pass. To be called before an Accelerator is made.

    Raises:
        ValueError: settings that are the preset's to make, a stage other than 1 and 2, or offloading.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        settings = {"zero_optimization": {"stage": int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))}}
        if file.lower() != "none":
            with open(file, encoding="utf-8") as text:
                settings = json.load(text)
        settings = checked(settings)
        environment |= {"ACCELERATE_USE_DEEPSPEED": "false", ASKED: json.dumps(settings)}
    return json.loads(environment.get(ASKED, "null"))


def checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings without those that are "auto". ValueError names what we cannot take, and the remedy."""
    settings = _without_auto(settings)
    if taken := [name for name in FROM_PRESET if name in settings]:
        raise ValueError(
            f"DeepSpeed's configuration has {', '.join(taken)}, which the preset says (batch_size, accumulate, clip, "
            'lr, dtype); leave it out, or set it to "auto"'
        )
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2):
        raise ValueError(
            f"DeepSpeed's zero_optimization has stage {zero.get('stage')}; 1 and 2 split what training needs besides "
            "the weights; to split frozen weights, launch with configs/accelerate/fsdp.yaml, or set shard=true"
        )
    if away := [name for name in ("offload_optimizer", "offload_param") if name in zero]:
        raise ValueError(f"DeepSpeed's zero_optimization has {', '.join(away)}, which is not supported; leave it out")
    return settings


def _without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in settings.items() if value != "auto"}
    return {name: _without_auto(x) if isinstance(x, Mapping) else x for name, x in settings.items()}


class ZeroOptimizer:
    """An AdamW whose moments are split among all processes: for `train.fit`, in place of the one that it is made of.

    Every method but `step` is a message: all processes call it.

    Args:
        optimizer: AdamW over weights that are alike in all processes; its moments, if a run goes on, are taken over.
        settings: what `checked` gave.
        clip: largest norm of the whole gradient, as torch.nn.utils.clip_grad_norm_ has it.

    Raises:
        ImportError: DeepSpeed is not installed.
    """

    def __init__(self, optimizer: torch.optim.AdamW, settings: Mapping[str, Any], clip: float):
        try:
            import deepspeed
        except ImportError as error:
            raise ImportError("a launch with DeepSpeed needs it: pip install 'q3vl-mini[deepspeed]'") from error
        moments = optimizer.state_dict()["state"]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in self.parameters:
            p.ds_optim_param = True  # the engine need not send it to the others: it cannot, if it is a scalar
        own = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": clip, "steps_per_print": 2**31}
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=nn.ParameterList(self.parameters), optimizer=optimizer, config={**settings, **own}
        )
        self._begin_with(moments)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """All backward passes of one step happen inside; at its end gradients are averaged over the processes."""
        from deepspeed.utils import safe_set_full_fp32_param

        with self.engine.coalesce_grad_reduction():
            try:
                yield
            except BaseException:
                for p in self.parameters:  # nothing is sent: the other processes may not come to this point
                    p.grad = None
                raise
            for p in self.parameters:  # a part of the model that this process did not need
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                if p.dim() == 0:  # a quantiser sets its step by the first batch, which the engine's copy has to learn
                    safe_set_full_fp32_param(p, p.data)

    def norm(self) -> float:
        """The averaged gradient's norm before clipping; after `accumulating`, before `step`."""
        return float(self.optimizer.scaled_global_norm())

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self) -> None:
        """Nothing: `step` did it."""

    def state_dict(self) -> dict[str, Any]:
        """What AdamW's would be, in the first process; the others get it without moments."""
        from deepspeed.utils import safe_get_full_optimizer_state

        is_main, state = dist.get_rank() == 0, {}
        step = next(iter(self.optimizer.optimizer.state.values()))["step"]
        for i, p in enumerate(self.parameters):
            whole = {key: safe_get_full_optimizer_state(p, key) for key in MOMENTS}
            if is_main:
                state[i] = {"step": step.clone(), **{key: value.cpu() for key, value in whole.items()}}
        return {"state": state, "param_groups": self.param_groups}

    def _begin_with(self, moments: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Moments of a run that goes on, or zeros: DeepSpeed makes those at the first step, and not for each group."""
        from deepspeed.utils import safe_set_full_optimizer_state

        step = moments[0]["step"] if moments else torch.zeros(())
        for group in self.param_groups:
            [part] = group["params"]  # this process's part of all weights of the group, flat
            zeros = {key: torch.zeros_like(part) for key in MOMENTS}
            self.optimizer.optimizer.state[part] = {"step": step.clone(), **zeros}
        self.optimizer._lazy_init_hp_params_optimizer_state()  # which part of them is whose
        for i, values in moments.items():
            for key in MOMENTS:
                p = self.parameters[i]
                safe_set_full_optimizer_state(p, values[key].to(p.device), key)
