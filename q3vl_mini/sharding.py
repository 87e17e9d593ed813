"""Frozen weights split among the processes of a training: each keeps a part of every layer, and gathers a layer's whole
weights only while it computes with them.

What training an adapter needs most memory for is the backbone that it never changes. Adapters, their gradients and
their moments are small and stay whole in every process, so losses, averaging, clipping and checkpoints are those of
`train.fit` with or without it. The splitting is FSDP2's (torch.distributed.fsdp.fully_shard).

A gather is a message that all processes wait for, so all must call the layers equally often, in the same order:
`PromptModel.one_call` makes a forward one call, and `train.gradient_cache(..., in_step=True)` evens out their number.
"""

import os
from collections.abc import Callable, MutableMapping

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from .backbone import inner

ASKED = "Q3VL_MINI_SHARD"  # remembers the launch for whoever asks again in this process


def asked_by_launch(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Was accelerate launched with FSDP? Then the weights are to be split, and accelerate is told to leave that to us.

    Accelerate would wrap the model for one forward a backward, of which a gradient cache has several. To be called
    before an Accelerator is made.
    """
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        environment |= {"ACCELERATE_USE_FSDP": "false", ASKED: "true"}
    return environment.get(ASKED) == "true"


def shard_frozen(model: nn.Module) -> Callable[[], None]:
    """Split the frozen weights of the language model's layers among all processes; what is returned makes them whole.

    The vision tower and the token embeddings stay whole: they are used outside of the layers.

    Args:
        model: an Embedder or Reranker with an adapter, alike in all processes of the default group.

    Raises:
        ValueError: no weight is frozen.
    """
    text = inner(model.model).model.language_model
    if all(p.requires_grad for p in text.layers.parameters()):
        raise ValueError("shard splits frozen weights, and all are trained here; train an adapter, or set shard=false")
    mesh = init_device_mesh(next(text.parameters()).device.type, (dist.get_world_size(),))
    whole = {p for p in text.parameters() if p.requires_grad} | set(text.embed_tokens.parameters())
    for layer in text.layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(text, mesh=mesh, ignored_params=whole)  # the final norm; and it lets a layer's gather begin early

    def make_whole() -> None:
        for module in text.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False, recurse=False)
                module.set_reshard_after_backward(False, recurse=False)
                module.unshard()

    return make_whole
