"""A model's weights, gradients and optimiser state in shards, one for each process of the learner: FSDP2 of torch.

Each decoder layer is put together for its forward and its backward pass only. Embeddings and the output layer, often one tensor, which
the loss looks at as well, stay whole in every process. All passes are taken together: every process has as many micro-batches as any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from ondol.models import forward


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Keep this process's share, in place. Gradients are summed over the processes, in float32 or wider, as they come up."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    base = forward.causal_lm(model)
    decoder = base.get_decoder()
    ends = [base.get_input_embeddings().weight, forward.head(model)]
    half = ends[0].dtype in (torch.bfloat16, torch.float16)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32) if half else MixedPrecisionPolicy()
    for part in (*decoder.layers, decoder):
        # also the last ones: a pass without a backward pass would leave them whole, and old after the next step
        made: Any = fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=set(ends))
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)  # gloo cannot scale as it sums
    return model


def is_sharded(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(m, FSDPModule) for m in model.modules())


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that is in shards, or the whole of any other."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, without gradient. Of a tensor in shards every process has to ask; it comes on the CPU."""
    return cast(DTensor, tensor.detach()).full_tensor().cpu() if isinstance(tensor, DTensor) else tensor.detach()


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, in every process the same, in shards where `like` is."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def squared_norm(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Sum of the squares of all, over all processes where they are in shards."""
    total: Any = torch.zeros((), dtype=dtype)
    for t in tensors:
        total = total.to(t.device) + torch.linalg.vector_norm(local(t), dtype=dtype).square()
    if tensors and isinstance(tensors[0], DTensor):
        torch.distributed.all_reduce(total, group=tensors[0].device_mesh.get_group())
    return total
